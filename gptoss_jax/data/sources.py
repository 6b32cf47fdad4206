"""Where records come from: a file, a folder and its splits, a glob, a hub dataset, or a list of records."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path, PurePosixPath
from typing import Any

from upath import UPath

from ..config import HUB_ID
from ..errors import DataError, UserError, plain, reason
from ..files.paths import AnyPath, is_local, place
from .formats import KINDS, NAME, Records, form_of, given, parse
from .remarks import Remarks
from .splits import TRAIN, declared, splits_of

CARD = "README.md"
# Texts about the data that lie beside it.
ABOUT = re.compile(r"(readme|licen[cs]e)([-_.].*)?|(notice|copying|citation|changelog)(\..*)?", re.IGNORECASE)
# What `datasets` writes beside the data that it saves.
INFO, STATE, SAVED_SPLITS = "dataset_info.json", "state.json", "dataset_dict.json"


@dataclass(frozen=True)
class Found:
    """The files of one split, in order of name, and those that are left out, each with the reason."""

    files: list[AnyPath]
    left_out: list[tuple[str, str]]


def records(source: Any, split: str, subset: str | None, remarks: Remarks) -> Records:
    """Where each record stands, and its columns: of a file, of the files of this split in a folder, of all that a glob
    matches, of a hub dataset (streamed), or of a list of such records. In place of one that cannot be read stands why.

    What is left out is told to `remarks`. DataError where nothing can be read, or no more of it.
    """
    if not isinstance(source, str | Path | UPath):
        _choose({TRAIN: source}, split, "a list of records")
        _refuse_subset(subset, "a list of records")
        yield from ((f"record {number}", record) for number, record in enumerate(source, 1))
        return
    name = str(source)
    if not name:
        raise DataError("--data is empty: name a file, a folder or a hub id")
    path = place(source)
    shown = plain(name, NAME)
    try:
        if HUB_ID.fullmatch(name) and not form_of(name)[0] and not path.exists():
            yield from _hub_records(name, split, subset)
            return
        found = find(path, split, subset)
        for name, why in found.left_out:
            remarks.say(f"left out of the data, {why}", name, "file")
        for file in found.files:
            shown = plain(str(file), NAME)
            with file.open("rb") as opened:
                yield from parse(opened, str(file))
    except UserError:
        raise
    except Exception as error:
        # Storages have exceptions of their own.
        if is_local(path) and not isinstance(error, OSError):
            raise
        said = isinstance(error, OSError) and error.strerror
        raise DataError(f"{shown}: cannot be read: {plain(said or reason(error))}") from None


def find(path: AnyPath, split: str, subset: str | None = None) -> Found:
    """The files of a split: those of a folder, all that a glob matches, or one file; a file and a glob are `train`.

    DataError where there is no such path, no data in it, or no such split or subset.
    """
    shown = plain(str(path), NAME)
    if path.is_file():
        _refuse_subset(subset, shown)
        _choose({TRAIN: path}, split, shown)
        return Found([path], [])
    if path.is_dir():
        below, takes_hidden = _below(path), False
    elif path.exists():
        raise DataError(f"{shown}: is a pipe or a device: write what it gives to a file, and name that")
    elif has_magic(str(path)):
        below, takes_hidden = _matches(path)
    else:
        raise DataError(f"{shown}: no such file or folder, and no hub id of the form owner/name")
    verdicts = {name: _why_not(name, below, takes_hidden) for name in below}
    names = [name for name, why in verdicts.items() if why is None]
    if not names:
        raise DataError(f"{shown}: holds no data: give {KINDS}")
    _refuse_copies(names, shown)
    splits = _splits(below, names, subset, shown, path.is_dir())
    chosen = _choose(splits, split, shown)
    others = {name: f"of split {other}" for other in splits for name in splits[other]}
    rest = "of another subset or of none" if subset else "of no split"
    verdicts |= {name: others.get(name, rest) for name in {*names} - {*chosen}}
    return Found([below[name] for name in chosen], [(name, why) for name, why in verdicts.items() if why])


def _splits(
    below: Mapping[str, AnyPath], names: list[str], subset: str | None, shown: str, is_folder: bool
) -> dict[str, list[str]]:
    card = below.get(CARD) if is_folder else None
    if card and card.is_file():
        found = declared(card.read_text(encoding="utf-8", errors="replace"), names, subset, shown)
        if found is not None:
            return found
    _refuse_subset(subset, shown)
    return splits_of(names, SAVED_SPLITS in below) if is_folder else {TRAIN: names}


def _choose(splits: Mapping[str, Any], split: str, shown: str) -> Any:
    if split not in splits:
        hint = f"choose with --split one of {', '.join(plain(name) for name in list(splits)[:20])}"
        if list(splits) == [TRAIN]:
            hint = f"all of it is {TRAIN}: leave --split out"
        raise DataError(f"{shown}: there is no split {plain(repr(split))}: {hint}")
    return splits[split]


def _refuse_subset(subset: str | None, shown: str) -> None:
    if subset is not None:
        raise DataError(f"{shown}: has no subsets: leave --subset out, and name the files that you want")


def _refuse_copies(names: Iterable[str], shown: str) -> None:
    """DataError where a file stands beside its compressed form: all of its rows would count twice."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name[: len(name) - len(form_of(name)[1])], name)
        if other != name:
            raise DataError(f"{shown}: {plain(other)} and {plain(name)} are one file twice: remove one of them")


def _below(folder: AnyPath) -> dict[str, AnyPath]:
    """What a folder holds at any depth, but folders, by its names there, in their order. Links to folders are among
    them, and are not followed."""
    if isinstance(folder, UPath):
        root = folder.path.rstrip("/")
        names = (found.removeprefix(root).lstrip("/") for found in folder.fs.find(root))
        return {name: folder / name for name in sorted(names)}
    found: list[Path] = []
    folders = [folder]
    while folders:
        for path in folders.pop().iterdir():
            is_folder = path.is_dir() and not path.is_symlink()
            (folders if is_folder else found).append(path)
    return {path.relative_to(folder).as_posix(): path for path in sorted(found)}


def _matches(path: AnyPath) -> tuple[dict[str, AnyPath], bool]:
    """What a glob matches, but folders, by the names from where it begins; and whether it names hidden files."""
    first = next(i for i, part in enumerate(path.parts) if has_magic(part))
    base: Any = path.parents[len(path.parts) - first - 1]
    pattern = list(path.parts[first:])
    if pattern[-1] == "**":
        pattern.append("*")
    try:
        found = sorted(p for p in base.glob("/".join(pattern)) if not p.is_dir())
    except ValueError as error:
        raise DataError(f"{plain(str(path), NAME)}: no such file, and no pattern: {plain(reason(error))}") from None
    if not found:
        raise DataError(f"{plain(str(path), NAME)}: no such file, and as a pattern it matches none")
    return {p.relative_to(base).as_posix(): p for p in found}, any(part.startswith((".", "__")) for part in pattern)


def _why_not(name: str, below: Mapping[str, AnyPath], takes_hidden: bool) -> str | None:
    """Why a file is left out: None where it is not, and an empty text where nobody takes it for data."""
    path = PurePosixPath(name)
    form, packing = form_of(name)
    beside = path.parent
    is_hidden = path.name.startswith(".") or any(part.startswith((".", "__")) for part in beside.parts)
    if is_hidden and not takes_hidden:
        return "hidden" if form else ""
    if ABOUT.fullmatch(path.name) and form + packing in ("", ".txt"):
        return "a text about it" if form else ""
    if path.name in (INFO, "dataset_infos.json", SAVED_SPLITS):
        return ""
    if path.name == STATE and str(beside / INFO) in below:
        return ""
    if path.name == "config.json":
        return "a configuration"
    if path.name.startswith("cache-") and form == ".arrow" and str(beside / STATE) in below:
        return "a cache of `datasets`"
    if not form:
        return "" if path.name.startswith("_") else "of no kind that is read"
    file = below[name]
    return None if not is_local(file) or file.is_file() else "no file but a link, a pipe or a device"


def _hub_records(name: str, split: str, subset: str | None) -> Records:
    import datasets  # slow to import, and needed for hub ids only

    where = f"{name} {f'subset {subset} ' if subset else ''}split {split}"
    try:
        for number, record in enumerate(datasets.load_dataset(name, subset, split=split, streaming=True), 1):
            yield f"{where}, row {number}", given(record)
    # The library raises anything from ValueError to connection errors of several packages.
    except Exception as error:
        several = re.search(r"available configs: (.*)", str(error))
        if several:
            raise DataError(f"{name} has subsets: give --subset one of {plain(several[1], 500)}") from error
        why = plain(reason(error), 500)
        raise DataError(f"{name}: no local file, and the hub dataset cannot be read: {why}") from error
