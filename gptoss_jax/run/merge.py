"""Finished profiles over different rows, added into one: all statistics are sums over tokens, or maxima.

Letters: see `config`.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from ..data.groups import MAX_DOMAINS, MAX_JOINT, folds_of
from ..errors import ProfileError
from ..statistics.store import Sums
from ..statistics.sums import DECLARED, Statistic, Statistics
from . import artifacts
from .artifacts import Measured
from .options import PROFILE, Option, declared_options, flag_of
from .profile import Profile

SEVERAL = "several"  # in place of an option's value, where the merged profiles differ in it
# Numbers of profile.json that add up.
ADDED = ("rows", "truncated_rows", "empty_rows", "total_tokens", "seconds", "compile_seconds")


def merge(profiles: Sequence[Profile], command: str = "") -> Profile:
    """The profile over the rows of all, which does not depend on their order.

    ProfileError names folders and reason where they are of other models, of the same rows, or count tokens otherwise.
    """
    if len(profiles) < 2:
        raise ProfileError("merge takes two or more profiles")
    for other in profiles[1:]:
        _check_alike(profiles[0], other)
    for one, other in combinations(profiles, 2):
        _check_apart(one, other)
    domains = sorted({name for profile in profiles for name in profile.sums.domains})
    if len(domains) > MAX_DOMAINS:
        raise ProfileError(f"the profiles hold {len(domains)} domains together, at most {MAX_DOMAINS}: merge fewer")
    ordered = sorted(profiles, key=lambda profile: profile.info["prompts_hash"])
    sums = _added(ordered, domains)
    added = {name: sum(profile.info[name] for profile in ordered) for name in ADDED}
    took = Measured(
        total_tokens=added["total_tokens"],
        passes=1 + len(sums.weighted),
        seconds=added["seconds"],
        compile_seconds=added["compile_seconds"],
        peak_rss_bytes=max(profile.info["peak_rss_bytes"] for profile in ordered),
    )
    info = {**_info(ordered, added), "command": command, "versions": artifacts.versions()}
    return Profile(artifacts.completed(info, sums, took), sums)


def _added(profiles: Sequence[Profile], domains: Sequence[str]) -> Sums:
    """The sums of all, in the order given."""
    joint = len(domains) > MAX_JOINT or any(_is_joint(profile.sums) for profile in profiles)
    # Of numbers of folds that divide FOLDS.
    folds = math.gcd(folds_of(len(domains)), *(profile.sums.folds for profile in profiles))
    first, *others = (_among(profile.sums, domains, folds, joint) for profile in profiles)
    statistics, weighted = first
    for more, more_weighted in others:
        statistics = statistics.merge(more)
        weighted = {name: sums + more_weighted[name] for name, sums in weighted.items()}
    row_hashes = np.sort(np.concatenate([profile.sums.row_hashes for profile in profiles]))
    return Sums(statistics, weighted, domains, row_hashes, folds)


def _is_joint(sums: Sums) -> bool:
    """Whether co-activations are of all domains together."""
    return sums.statistics.coactivation.shape[1] != len(sums.domains)


def _among(sums: Sums, domains: Sequence[str], folds: int, joint: bool) -> tuple[Statistics, Mapping[str, np.ndarray]]:
    """Statistics [L, G, …] and weighted sums, G so many folds of the domains of all profiles: 0 in those that this one
    lacks."""
    places = [domains.index(name) for name in sums.domains]

    def spread(own: np.ndarray, among: int, reduce: np.ufunc = np.add) -> np.ndarray:
        """Of a domain's folds those whose numbers are equal, modulo `among`, are together."""
        L, rest = len(own), own.shape[2:]
        wide = np.zeros((L, len(domains), among, *rest), own.dtype)
        wide[:, places] = reduce.reduce(own.reshape(L, len(places), -1, among, *rest), axis=2)
        return wide.reshape(L, len(domains) * among, *rest)

    def one(own: np.ndarray, statistic: Statistic) -> np.ndarray:
        if not statistic.axes.startswith("J"):
            return spread(own, folds, statistic.reduce)
        return own.sum(1, keepdims=True) if joint else spread(own, 1)

    return sums.statistics.map(one), {name: spread(own, folds) for name, own in sums.weighted.items()}


def _info(profiles: Sequence[Profile], added: dict[str, Any]) -> dict[str, Any]:
    """What profile.json says of the merged profiles before their statistics."""
    first = profiles[0].info
    hashes = sorted(profile.info["prompts_hash"] for profile in profiles)
    rows, truncated, empty = (added[name] for name in ("rows", "truncated_rows", "empty_rows"))
    engines = {engine for profile in profiles for engine in profile.info["engine"].split(", ")}
    return {
        "model": first["model"],
        "model_fingerprint": first["model_fingerprint"],
        **{name: p.info[name] for p in profiles for name in ("config", "quantized") if name in p.info},
        "options": {name: _common(profiles, name) for profile in profiles for name in profile.info["options"]},
        "engine": ", ".join(sorted(engines)),
        "rows": rows,
        "truncated_rows": truncated,
        "empty_rows": empty,
        "prompts_hash": hashlib.sha256("\n".join(hashes).encode()).hexdigest(),
        "merged": [
            {"folder": _name(profile)} | {name: profile.info[name] for name in ("rows", "prompts_hash", "command")}
            for profile in profiles
        ],
        "warnings": [*artifacts.data_warnings(rows, truncated, empty), *_differences(profiles)],
    }


def _common(profiles: Sequence[Profile], name: str) -> Any:
    values = [profile.info["options"].get(name) for profile in profiles]
    return values[0] if all(value == values[0] for value in values) else SEVERAL


def _declared(merging: str) -> Iterator[tuple[str, str, Option]]:
    """Name, flag and declaration of each option of which a merge says this."""
    for kind in PROFILE:
        for name, declared in declared_options(kind).items():
            if declared.merging == merging:
                yield name, flag_of(kind, name), declared


def _differences(profiles: Sequence[Profile]) -> Iterator[str]:
    """What a reader of the sums should know of how they came about."""
    for name, flag, _ in _declared("told"):
        if _common(profiles, name) == SEVERAL:
            values = sorted({str(profile.info["options"][name]) for profile in profiles})
            yield f"{flag} is not the same in all merged profiles: {', '.join(values)}"
    for name, statistic in DECLARED.items():
        lacking = [_name(p) for p in profiles if getattr(p.sums.statistics, name) is None]
        if lacking and not statistic.asked:
            yield f"{name} is left out: {', '.join(lacking)} is of a version that did not have it"
    if len({profile.sums.folds for profile in profiles}) > 1:
        each = (f"{_name(p)} has {p.sums.folds if p.sums.folds > 1 else 'none'}" for p in profiles)
        yield f"folds are kept as far as all merged profiles have them: {', '.join(each)}"
    if profiles[0].sums.weighted:
        yield "the quantiles of --eaft are over the tokens of each merged profile, not over all together"


def _check_alike(one: Profile, other: Profile) -> None:
    """ProfileError where sums are of different things, and do not add."""
    if _model(one) != _model(other):
        raise ProfileError(
            f"{_name(other)} is a profile of another model than {_name(one)}: merge profiles of the same weights"
        )
    for name, flag, declared in _declared("equal"):
        if declared.beside and not one.info["options"][declared.beside]:
            continue
        theirs, ours = (profile.info["options"][name] for profile in (other, one))
        if theirs != ours:
            raise ProfileError(
                f"{_name(other)} has {flag} {theirs}, {_name(one)} has {ours}: such sums do not add: "
                "profile the rows of one of them again"
            )


def _model(profile: Profile) -> tuple[str, int, int, int]:
    """Fingerprint, L, E and k."""
    statistics = profile.sums.statistics
    L, _, E = statistics.count.shape
    return profile.info["model_fingerprint"], L, E, statistics.gate_rank_sum.shape[-1]


def _name(profile: Profile) -> str:
    return str(profile.folder or "a profile that is not saved")


def _check_apart(one: Profile, other: Profile) -> None:
    """ProfileError where rows would count twice."""
    resolved = [p.folder.resolve() if isinstance(p.folder, Path) else p.folder for p in (one, other)]
    if one is other or (resolved[0] is not None and resolved[0] == resolved[1]):
        raise ProfileError(f"{_name(other)} is named twice: name each profile once")
    if shared := len(np.intersect1d(one.sums.row_hashes, other.sums.row_hashes)):
        raise ProfileError(
            f"{_name(one)} and {_name(other)} share {shared:,} row{'s' * (shared > 1)}, which would count twice: "
            "merge profiles of different rows"
        )
