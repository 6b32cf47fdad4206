"""Which files of a folder are of which split, by the rules of `datasets`."""

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from ..errors import DataError, plain, reason

TRAIN = "train"
# The words that name a split in names of files and folders, and what parts them, are those of `datasets.data_files`.
WORDS = {
    TRAIN: "train|training",
    "validation": "validation|valid|dev|val",
    "test": "test|testing|eval|evaluation",
}
PARTS = "[-._ 0-9]"
IN_FOLDER = {split: re.compile(f"(.*{PARTS})?({words})({PARTS}.*)?", re.DOTALL) for split, words in WORDS.items()}
IN_FILE = {split: re.compile(f"(.*{PARTS})?({words}){PARTS}.*", re.DOTALL) for split, words in WORDS.items()}
SHARD = re.compile(r"data/([^/]+)-\d{5}-of-\d{5}[^/]*\.[^/]*", re.ASCII)
CONFIGS = re.compile(r"---[ \r]*\n(?:(?!---).*\n)*?configs:")  # in the head of a card


def splits_of(names: Sequence[str], is_saved: bool = False) -> dict[str, list[str]]:
    """The files of each split, from their names below the folder.

    Folders are splits where `save_to_disk` made them. Else the first of these decides that names any: shards as
    data/train-00000-of-00001.parquet, words in names of folders, words in names of files. Else all is `train`.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        shard = SHARD.fullmatch(name)
        if is_saved and "/" in name:
            found.setdefault(name.partition("/")[0], []).append(name)
        elif not is_saved and shard:
            found.setdefault(shard[1], []).append(name)
    if found:
        return found
    for patterns, of_folders in ((IN_FOLDER, True), (IN_FILE, False)):
        for split, pattern in patterns.items():
            for name in names:
                parts = PurePosixPath(name).parts
                if any(map(pattern.fullmatch, parts[:-1] if of_folders else parts[-1:])):
                    found.setdefault(split, []).append(name)
        if found:
            return found
    return {TRAIN: list(names)}


def declared(card: str, names: Sequence[str], subset: str | None, shown: str) -> dict[str, list[str]] | None:
    """The files of each split of a subset as a dataset's card declares them, which is its README.md; None where it
    declares no files. `subset` may be None where one is the default.

    DataError, which names the folder as `shown`, where the card cannot be understood, or there is no such subset.
    """
    if not CONFIGS.match(card):
        return None
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    try:
        configs = MetadataConfigs.from_dataset_card_data(DatasetCard(card).data)
        chosen = subset or configs.get_default_config_name()
        if not any({"data_files", "data_dir"} & config.keys() for config in configs.values()):
            return None
        if chosen in configs:
            return _files_of(configs[chosen], names)
    except Exception as error:  # of YAML, of what both libraries check, and of what they do not
        why = f"README.md declares subsets that cannot be understood ({plain(reason(error))})"
        raise DataError(f"{shown}: {why}: mend it, or name the files that you want") from None
    there = ", ".join(plain(str(name)) for name in list(configs)[:20])
    raise DataError(f"{shown}: has subsets: give --subset one of {there}")


def _files_of(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, list[str]]:
    from datasets.data_files import sanitize_patterns
    from fsspec.utils import glob_translate

    folder = PurePosixPath(config.get("data_dir") or "")
    if not config.get("data_files"):
        below = {
            str(PurePosixPath(name).relative_to(folder)): name
            for name in names
            if folder in PurePosixPath(name).parents
        }
        return {split: [below[name] for name in of_it] for split, of_it in splits_of([*below]).items()}
    found = {}
    for split, patterns in sanitize_patterns(config["data_files"]).items():
        wanted = [re.compile(glob_translate(str(folder / pattern))) for pattern in patterns]
        found[split] = [name for name in names if any(pattern.match(name) for pattern in wanted)]
    return {split: of_it for split, of_it in found.items() if of_it}
