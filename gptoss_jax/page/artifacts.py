"""What a page is made of: files and folders that the other commands wrote, each told by what it says of itself."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from typing import Any

from ..config import PRESETS
from ..errors import InputError, ProfileError, plain
from ..evaluation import stored
from ..evaluation.stored import EVAL
from ..evaluation.summary import Summary
from ..files.paths import AnyPath, is_path, place, storage_errors
from ..fingerprints.folder import INFO as DATASET
from ..fingerprints.folder import Activations
from ..routing.traces import TRACE, Trace
from ..run.artifacts import INFO
from ..run.distilling import HEAL
from ..run.profile import Profile
from ..selection.keep_sets import KeepSets
from ..selection.ranking import Ranking
from . import healings

KINDS = "a profile, an activation dataset, a trace, an evaluation, a healed checkpoint, a keep.json, or a ranking"
BARE = {"keep", "layer_0"}  # what objects have that hold lists of experts and nothing else
# What may be given open, with its name on the page, and the field of `Things` that it belongs to.
OPEN: dict[type, tuple[str, str]] = {
    Profile: ("profile", "profiles"),
    Activations: ("answers", "fingerprints"),
    KeepSets: ("keep-sets", "keep_sets"),
    Ranking: ("ranking", "rankings"),
    Summary: ("evaluation", "evaluations"),
    Trace: ("trace", "traces"),
}


@dataclass(frozen=True)
class Sizes:
    """What all things of a page have in common."""

    num_layers: int
    num_experts: int
    top_k: int

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> "Sizes":
        """As a thing's own file says them; InputError where it does not."""
        try:
            return cls(*(int(said[name]) for name in ("num_layers", "num_experts", "top_k")))
        except (KeyError, TypeError, ValueError):
            raise InputError(
                "a profile or dataset does not say how many layers and experts it is of: make it again"
            ) from None


@dataclass
class Things:
    """Everything that was given, by names that tell them apart."""

    profiles: dict[str, Profile] = field(default_factory=dict)
    fingerprints: dict[str, Activations] = field(default_factory=dict)
    keep_sets: dict[str, KeepSets] = field(default_factory=dict)
    rankings: dict[str, Ranking] = field(default_factory=dict)
    evaluations: dict[str, Summary] = field(default_factory=dict)
    healings: dict[str, dict[str, Any]] = field(default_factory=dict)
    traces: dict[str, Trace] = field(default_factory=dict)
    folders: dict[str, AnyPath] = field(default_factory=dict)
    """Of evaluations that were read, where their replies are."""

    @property
    def known(self) -> dict[str, Sizes]:
        """Of all that says the sizes of its model, profiles first."""
        of = {name: one.info for name, one in (self.profiles | self.fingerprints).items()}
        of |= {name: asdict(one.about) for name, one in self.traces.items()}
        return {name: Sizes.of(said) for name, said in of.items()}

    @property
    def sizes(self) -> Sizes:
        """Those of the first profile."""
        return next(iter(self.known.values()))


def opened(given: Sequence[Any]) -> Things:
    """What lies at these places, and what is open already. InputError where something is none of what a page shows,
    errors of each kind where it is damaged, and ProfileError where no profile is among them, or things are of models of
    different sizes."""
    things, by_layer = Things(), dict[str, dict[str, AnyPath]]({KeepSets.kind: {}, Ranking.kind: {}})
    # A healed checkpoint says where it lies.
    given = [os.fspath(one) if isinstance(one, os.PathLike) and not is_path(one) else one for one in given]
    places = [place(one) for one in given if is_path(one)]
    names = _names(places)
    taken = {*names}
    for one in given:
        if not is_path(one):
            _add(things, one, taken)
    for name, path in zip(names, places, strict=True):
        if _read(things, name, path):
            continue
        if (kind := _kind_of(path)) not in by_layer:
            raise InputError(f"{path}: is nothing that a page shows: give {KINDS}")
        by_layer[kind][name] = path
    if not (things.profiles or things.fingerprints):
        named = ", ".join(map(str, places)) or "what is given"
        raise ProfileError(f"no profile among {named}: give one, whose experts the page shows")
    _check(things)
    # Of a model's sizes its number of layers and of experts are all that keep-sets are checked against.
    config = replace(PRESETS["gpt-oss-20b"], num_layers=things.sizes.num_layers, num_experts=things.sizes.num_experts)
    for name, one in (things.keep_sets | things.rankings).items():
        one.check(config, name)
    things.keep_sets |= {name: KeepSets.read(path, config) for name, path in by_layer[KeepSets.kind].items()}
    things.rankings |= {name: Ranking.read(path, config) for name, path in by_layer[Ranking.kind].items()}
    return things


def _read(things: Things, name: str, path: AnyPath) -> bool:
    """Whether it is something that a file of its own tells, which is then among the things."""
    with storage_errors(path):
        inside = {file for file in (INFO, DATASET, HEAL, TRACE, EVAL) if (path / file).exists()}
    if INFO in inside:
        things.profiles[name] = Profile.open(path)
    elif DATASET in inside:
        things.fingerprints[name] = Activations.open(path)
    elif HEAL in inside or path.name == HEAL:
        things.healings[name] = healings.read(path)
    elif TRACE in inside:
        things.traces[name] = Trace.open(path)
    elif EVAL in inside or path.name == EVAL:
        things.evaluations[name] = stored.read(path)
        things.folders[name] = path if path.is_dir() else path.parent
    else:
        return False
    return True


def _add(things: Things, one: Any, taken: set[str]) -> None:
    """Something that is open: its name is its kind's, with a number where that is taken."""
    for kind, (label, among) in OPEN.items():
        if isinstance(one, kind):
            name = next(name for n in count(1) if (name := f"{label} {n}" if n > 1 else label) not in taken)
            taken.add(name)
            getattr(things, among)[name] = one
            return
    raise InputError(f"{type(one).__name__} is nothing that a page shows: give {KINDS}, open or its path")


def _names(places: Sequence[AnyPath]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    depth = 1
    while len({_tail(path, depth) for path in places}) < len({*map(str, places)}):
        depth += 1
    names = [_tail(path, depth) for path in places]
    if len({*names}) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{twice} is given twice: name each file or folder once")
    return names


def _tail(path: AnyPath, depth: int) -> str:
    return "/".join(path.parts[-depth:])


def _kind_of(path: AnyPath) -> str:
    """What a JSON file says that it is, empty where it says nothing; InputError where it cannot be read.

    Lists without a word of what they are, as other programs write them, are keep-sets."""
    with storage_errors(path):
        if not path.exists():
            raise InputError(f"{path}: no such file or folder: give {KINDS}")
        if path.is_dir() or path.suffix != ".json":
            return ""
    said = healings.json_of(path, f"give {KINDS}")
    if isinstance(said, list) or (isinstance(said, dict) and not BARE.isdisjoint(said)):
        return KeepSets.kind
    return str(said.get("kind", "")) if isinstance(said, dict) else ""


def _check(things: Things) -> None:
    """ProfileError where something is of a model of other sizes than the first profile, or has counted no token."""
    (first, sizes), *others = things.known.items()
    for name, other in others:
        if other != sizes:
            raise ProfileError(
                f"{name}: is of a model of {other.num_layers} layers of {other.num_experts} experts, {first} of one of "
                f"{sizes.num_layers} layers of {sizes.num_experts}: make a page of each"
            )
    for name, profile in things.profiles.items():
        if not profile.info["kept_tokens"]:
            raise ProfileError(f"{plain(name)}: has counted no token: profile rows of which some are kept")
