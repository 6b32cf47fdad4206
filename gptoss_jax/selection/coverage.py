"""How much of what experts hold is kept: of each layer, and of each domain. Letters: see `config`.

What an expert holds is its mass, a sum over tokens that is at least 0: `criteria.masses`. Domains are D here.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Shaped

from .criteria import CRITERIA, masses
from .keep_sets import KeepSets

# For what a choice costs domains, where the criterion itself has no mass, and the second where a table has no more.
OTHERWISE = ("reap_sum", "frequency")


def told_by(columns: Mapping[str, np.ndarray], criterion: str) -> str:
    """The criterion of which it is told what domains lose."""
    names = (CRITERIA[criterion].mass, *OTHERWISE)
    return next(name for name in names if name and {*CRITERIA[name].needs} <= {*columns})


def best_mass(mass_DLE: Shaped[np.ndarray, "D L E"], num_kept: int) -> Float[np.ndarray, "D L"]:
    """What the best experts of each layer hold, so many for each domain on its own."""
    return -np.sort(-mass_DLE.astype(np.float64), axis=2)[:, :, :num_kept].sum(2)


def shares(mass_DLE: Shaped[np.ndarray, "D L E"], num_kept: int) -> tuple[np.ndarray, np.ndarray]:
    """What each expert adds to the coverage of a domain [D, L, E], and what that has without any [D].

    The coverage of a domain is the mean over layers of the mass that it retains there, over the mass that its own best
    experts, as many, would retain. A layer without mass loses nothing.
    """
    best_DL = best_mass(mass_DLE, num_kept)
    held_DL = best_DL > 0
    L = best_DL.shape[1]
    return mass_DLE / np.where(held_DL, best_DL, 1)[:, :, None] / L, (~held_DL).sum(1) / L


def coverages(mass_DLE: Shaped[np.ndarray, "D L E"], kept_LE: Bool[np.ndarray, "L E"]) -> Float[np.ndarray, " D"]:
    """The coverage of each domain, of keep-sets with as many experts in each layer."""
    shares_DLE, nothing_D = shares(mass_DLE, int(kept_LE[0].sum()))
    return nothing_D + (shares_DLE * kept_LE).sum((1, 2))


def mask_of(layers: Sequence[Sequence[int]], num_experts: int) -> Bool[np.ndarray, "L E"]:
    """Which experts the keep-sets hold."""
    kept_LE = np.zeros((len(layers), num_experts), bool)
    for layer, experts in enumerate(layers):
        kept_LE[layer, experts] = True
    return kept_LE


def domain_coverages(
    by_domain: Mapping[str, Mapping[str, np.ndarray]], keep_sets: KeepSets, criterion: str
) -> dict[str, float]:
    """The coverage of each domain that has a kept token, worst first."""
    counted = {name: columns for name, columns in by_domain.items() if columns["count"].any()}
    if not counted:
        return {}
    mass_DLE = masses_of(counted, [*counted], told_by(next(iter(counted.values())), criterion))
    found = coverages(mass_DLE, mask_of(keep_sets.layers, mass_DLE.shape[2]))
    return dict(sorted(zip(counted, found.tolist(), strict=True), key=lambda item: item[1]))


def fewest_experts(order_LE: Sequence[Sequence[int]], mass_LE: Shaped[np.ndarray, "L E"], share: float | int) -> int:
    """The fewest experts, of each layer the first in order, that hold the share of every layer's mass."""
    ordered_LE = np.take_along_axis(mass_LE.astype(np.float64), np.array(order_LE), 1)
    total_L = ordered_LE.sum(1)
    held_LE = np.cumsum(ordered_LE, axis=1) >= share * total_L[:, None] * (1 - 1e-12)  # sums in another order differ
    return int(held_LE.argmax(1).max()) + 1


def masses_of(by_domain: Mapping[str, Mapping[str, np.ndarray]], names: Sequence[str], criterion: str) -> np.ndarray:
    """The masses [D, L, E] of some domains."""
    return np.stack([masses(by_domain[name], criterion) for name in names])
