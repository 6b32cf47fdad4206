"""From evidence to keep-sets: the best of a ranking, and those that several domains share. Letters: see `config`.

Domains are D here. Nested sets come from the largest on: each smaller one is looked for inside the one before it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import OptionError, ProfileError, RankingError
from . import blend, coverage
from .blend import Blend, Sets
from .criteria import CRITERIA
from .evidence import Evidence
from .keep_sets import KeepSets
from .mixes import mixed
from .origin import Origin
from .ranking import check_protected, whole_counts

Protected = Mapping[tuple[int, int], str]
"""The reasons for experts that stay whatever they score, by layer and id."""
DECIMALS = 6  # of the weights that a blend gives domains


@dataclass(frozen=True)
class Found:
    """Keep-sets, and what a user should know of them."""

    keep_sets: KeepSets
    remarks: tuple[str, ...] = ()


def check_mass(criterion: str, option: str) -> None:
    """OptionError where experts hold no shares of what the criterion scores."""
    if not CRITERIA[criterion].mass:
        known = ", ".join(name for name, declared in CRITERIA.items() if declared.mass)
        raise OptionError(
            f"{option} needs scores that add up and are not negative, which those of {criterion} are not: take one of "
            f"{known}"
        )


def outliers(evidence: Evidence, number: int) -> dict[tuple[int, int], str]:
    """The experts with the largest activations of the whole model: so many, ties to the lower layer and id."""
    if not number:
        return {}
    largest_LE = evidence.columns.get("activation_max")
    if largest_LE is None:
        lacking = "the column 'activation_max', which this profile lacks"
        raise ProfileError(f"--protect-outliers needs {lacking}: profile again")
    order = np.argsort(-largest_LE, axis=None, kind="stable")[:number]
    places = [divmod(int(at), largest_LE.shape[1]) for at in order]
    return {place: f"protected: activation {largest_LE[place]:.4g}" for place in places}


def maxmin(evidence: Evidence, criterion: str, counts: Sequence[int], protected: Protected) -> Iterator[Found]:
    """The keep-sets whose worst domain keeps the most: of the domains that are named, or of all that have a token."""
    named = evidence.origin.domains or [name for name, of in evidence.by_domain.items() if of["count"].any()]
    names = [*named]
    if len(names) < 2:
        raise OptionError("--blend maxmin needs two domains or more: profile with --domain-column, or name more")
    mass_DLE = coverage.masses_of(evidence.by_domain, names, criterion)
    allowed_LE = np.ones(mass_DLE.shape[1:], bool)
    for num_kept in counts:
        sets = _sets(num_kept, allowed_LE, protected)
        shares_DLE, nothing_D = coverage.shares(mass_DLE, num_kept)
        found = blend.maxmin(shares_DLE, nothing_D, sets)
        weights = dict(zip(names, found.weights_D.round(DECIMALS).tolist(), strict=True))
        rule = f"{num_kept} whose worst domain keeps the most"
        origin = replace(evidence.origin, domains=weights, criterion=CRITERIA[criterion].mass, rule=rule)
        mix = whole_counts(mixed(evidence.by_domain, weights))
        reasons = _reasons(found, found.weights_D[:, None, None] * shares_DLE, names, criterion, protected)
        allowed_LE = found.kept_LE
        yield Found(_keep_sets(found, origin, mix, reasons), (_compared(evidence, mass_DLE, found, sets, criterion),))


def floors(
    evidence: Evidence, criterion: str, counts: Sequence[int], protected: Protected, shares: Mapping[str, float | int]
) -> Iterator[Found]:
    """The keep-sets that hold the most of the rows that count, and of each named domain at least its share.

    RankingError says the nearest that can be had where that cannot.
    """
    mass_DLE = coverage.masses_of(evidence.by_domain, [*shares], criterion)
    pooled_1LE = coverage.masses_of({"": evidence.columns}, [""], criterion)
    allowed_LE = np.ones(mass_DLE.shape[1:], bool)
    told = ", ".join(f"{name} at least {share:g}" for name, share in shares.items())
    for num_kept in counts:
        sets = _sets(num_kept, allowed_LE, protected)
        found = _within(mass_DLE, pooled_1LE, [*shares.values()], sets)
        if found is None:
            raise RankingError(_nearest(mass_DLE, pooled_1LE, shares, sets))
        rule = f"{num_kept} that hold the most, {told}"
        origin = replace(evidence.origin, criterion=CRITERIA[criterion].mass, rule=rule)
        held_DLE = coverage.shares(mass_DLE, num_kept)[0] * found.weights_D[:, None, None]
        reasons = _reasons(found, held_DLE, [*shares], criterion, protected, pooled_1LE[0])
        allowed_LE = found.kept_LE
        yield Found(_keep_sets(found, origin, whole_counts(evidence.columns), reasons))


def _sets(num_kept: int, allowed_LE: np.ndarray, protected: Protected) -> Sets:
    check_protected(protected, num_kept)
    forced_LE = np.zeros(allowed_LE.shape, bool)
    for place in protected:
        forced_LE[place] = True
    return Sets(num_kept, allowed_LE, forced_LE)


def _within(mass_DLE: np.ndarray, pooled_1LE: np.ndarray, least: Sequence[float | int], sets: Sets) -> Blend | None:
    shares_DLE, nothing_D = coverage.shares(mass_DLE, sets.num_kept)
    (pooled_LE,), _ = coverage.shares(pooled_1LE, sets.num_kept)
    return blend.floors(pooled_LE, shares_DLE, nothing_D, np.array(least), sets)


def _nearest(mass_DLE: np.ndarray, pooled_1LE: np.ndarray, shares: Mapping[str, float | int], sets: Sets) -> str:
    """What can be had in place of floors that cannot: a part of each, or more experts."""
    least = np.array([*shares.values()])
    factor = blend.maxmin(*coverage.shares(mass_DLE, sets.num_kept), sets, least).value
    asked = ", ".join(f"{name}={share:g}" for name, share in shares.items())
    said = f"no {sets.num_kept} experts a layer hold --floor {asked}: they hold {math.floor(factor * 1000) / 1000:g} of"
    for more in range(sets.num_kept + 1, int(sets.allowed_LE.sum(1).min()) + 1):
        larger = replace(sets, num_kept=more)
        if not blend.may_hold(*coverage.shares(mass_DLE, more), least, larger):
            continue
        if _within(mass_DLE, pooled_1LE, [*least], larger) is not None:
            return f"{said} each, and {more} hold all: lower the shares, or keep so many"
    return f"{said} each: lower the shares"


def _reasons(
    found: Blend,
    held_DLE: np.ndarray,
    names: Sequence[str],
    criterion: str,
    protected: Protected,
    mass_LE: np.ndarray | None = None,
) -> list[list[str | None]]:
    """Why each kept expert stays: its place by mass, or the domain that it holds most of where others went before it.

    `held_DLE` is what it holds of each domain, as much as that decides; `mass_LE` what places go by, where that is not
    all of it.
    """
    E, num_kept = found.kept_LE.shape[1], int(found.kept_LE[0].sum())
    order_LE = np.argsort(-(held_DLE.sum(0) if mass_LE is None else mass_LE), axis=1, kind="stable")
    place_LE = np.argsort(order_LE, axis=1) + 1
    over = CRITERIA[criterion].mass + (" of the blend" if mass_LE is None else "")

    def reason(layer: int, expert: int) -> str:
        if (layer, expert) in protected:
            return protected[layer, expert]
        if place_LE[layer, expert] <= num_kept:
            return f"place {place_LE[layer, expert]} of {E} by {over}"
        return f"held for domain {names[int(held_DLE[:, layer, expert].argmax())]}"

    return [[reason(layer, int(e)) for e in np.flatnonzero(kept_E)] for layer, kept_E in enumerate(found.kept_LE)]


def _keep_sets(found: Blend, origin: Origin, counts_LE: np.ndarray, reasons: list[list[str | None]]) -> KeepSets:
    kept = [np.flatnonzero(kept_E) for kept_E in found.kept_LE]
    counts = [counts_LE[layer, experts].tolist() for layer, experts in enumerate(kept)]
    return KeepSets([experts.tolist() for experts in kept], origin, counts, reasons)


def _compared(evidence: Evidence, mass_DLE: np.ndarray, found: Blend, sets: Sets, criterion: str) -> str:
    """The worst domain of the blend beside that of the pool, and how many experts the union of all would keep."""
    E = mass_DLE.shape[2]
    pooled_LE = coverage.masses_of({"": evidence.columns}, [""], criterion)[0]
    best_LE = _best(pooled_LE[None], sets.num_kept)[0]
    pooled = coverage.coverages(mass_DLE, best_LE).min()
    union_L = _best(mass_DLE, sets.num_kept).any(0).sum(1)
    return (
        f"the worst domain keeps {found.value:.3f} of what its own best {sets.num_kept} would hold, in no sets more "
        f"than {found.bound:.3f}; in the best of all together {pooled:.3f}; the union of each domain's best would keep "
        f"{union_L.min()} to {union_L.max()} of {E} experts a layer"
    )


def _best(mass_DLE: np.ndarray, num_kept: int) -> np.ndarray:
    """The best experts of each layer and domain, as a mask."""
    order_DLE = np.argsort(-mass_DLE, axis=2, kind="stable")[:, :, :num_kept]
    best_DLE = np.zeros(mass_DLE.shape, bool)
    np.put_along_axis(best_DLE, order_DLE, True, axis=2)
    return best_DLE
