"""How much more a domain uses an expert than all answers do. Letters: see `config`.

Of a layer's choices over the answers of a domain, each answer or each token with the same say, an expert has a share;
of those over all answers, the domain's among them, it has another. Their ratio is its specificity: 2 where the domain
uses the expert twice as much as all do.

Its interval is of the log of the ratio, by the jackknife (Wolter, Introduction to Variance Estimation, chapter 4): each
category is left out once. Categories of the domain are one stratum, the others another. With m of a stratum and θ_c
what comes without category c, it adds (m − 1)/m · Σ (θ_c − mean of θ_c)² to the variance, and the interval is θ ± t ·
the root of that, with Student's t of the domain's categories less one. A category is one by its name, whichever
benchmark it is of: benchmarks share questions, as gpqa_diamond does with gpqa_main. So the interval says what other
categories of such a domain might give. A domain of one category has none.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ..selection.intervals import LEVEL, student
from .summaries import Summary
from .usage import usage


class Specificity(NamedTuple):
    """Of each expert, all [L, E]: its share in the domain and in all, and the ratio of both with its interval.

    The ratio is 0, from 0 to ∞, where nobody chose the expert. An interval that is not known is from 0 to ∞.
    """

    share: Float[np.ndarray, "L E"]
    share_of_all: Float[np.ndarray, "L E"]
    ratio: Float[np.ndarray, "L E"]
    low: Float[np.ndarray, "L E"]
    high: Float[np.ndarray, "L E"]

    def best(self, number: int) -> list[tuple[int, int]]:
        """Layer and expert of those that the domain uses the most beyond the rest: by the low end, then the ratio."""
        ordered = np.lexsort((-self.ratio.reshape(-1), -self.low.reshape(-1)))
        return [divmod(int(at), self.ratio.shape[1]) for at in ordered[:number]]

    def words(self, layer: int, expert: int) -> str:
        """What is known of an expert, as part of a sentence."""
        share, of_all, ratio, low, high = (values[layer, expert] for values in self)
        interval = f" ({low:.2f} to {high:.2f})" if np.isfinite(high) else ""
        return f"{share:.2%} of choices, {of_all:.2%} of all's: {ratio:.2f} times as many{interval}"


def specificity(domain: Sequence[Summary], every: Sequence[Summary], weight: str) -> Specificity:
    """The specificity of all experts for some summaries among `every`. FingerprintError as `usage` has it."""
    used_LE, of_all_LE = usage(domain, weight), usage(every, weight)
    log_LE = _log_ratio(used_LE, of_all_LE)
    ratio_LE = np.where(of_all_LE > 0, np.exp(log_LE), 0.0)
    half_LE = np.where(of_all_LE > 0, _half_width(domain, every, weight), np.inf)
    with np.errstate(invalid="ignore"):  # 0 times ∞, where nothing is known
        low_LE, high_LE = (np.where(np.isfinite(half_LE), ratio_LE * np.exp(way * half_LE), 0.0) for way in (-1, 1))
    high_LE = np.where(np.isfinite(half_LE), high_LE, np.inf)
    return Specificity(shares(used_LE), shares(of_all_LE), ratio_LE, low_LE, high_LE)


def shares(used: np.ndarray) -> np.ndarray:
    """Of each layer's choices the shares of its experts."""
    total = used.sum(-1, keepdims=True)
    return used / np.where(total > 0, total, 1)


def _log_ratio(used: np.ndarray, of_all: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(shares(used)) - np.log(shares(of_all))


def _half_width(domain: Sequence[Summary], every: Sequence[Summary], weight: str) -> np.ndarray:
    """Of the log of the ratio, [L, E]; ∞ where one category alone has the expert, or the domain is one category."""
    own, all_ = (_by_category(some, weight) for some in (domain, every))
    if len(own) < 2:
        return np.full(domain[0].count_frequency_LE.shape, np.inf)
    names = [*own, *(all_.keys() - own.keys())]
    used, of_all = _without_each(own, [*own]), _without_each(all_, names)
    whole_LE = np.sum([*own.values()], axis=0)
    strata = [_log_ratio(used, of_all[: len(own)]), _log_ratio(whole_LE, of_all[len(own) :])]
    with np.errstate(invalid="ignore"):  # of what is infinite no variance is known
        variance_LE = sum(
            (len(some) - 1) / len(some) * ((some - some.mean(0)) ** 2).sum(0) for some in strata if len(some)
        )
        half_LE = student(LEVEL, len(own) - 1) * np.sqrt(variance_LE)
    return np.where(np.isfinite(half_LE), half_LE, np.inf)


def _by_category(summaries: Sequence[Summary], weight: str) -> dict[str, np.ndarray]:
    found: dict[str, list[Summary]] = {}
    for one in summaries:
        found.setdefault(one.group.category, []).append(one)
    return {name: usage(some, weight) for name, some in found.items()}


def _without_each(used: dict[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
    """The sums [names, L, E] without each category: they are added anew, since a difference leaves no zeros."""
    stacked = np.stack([used[name] for name in names])
    return np.tensordot(1 - np.eye(len(names)), stacked, 1)
