"""How sure scores are, by the jackknife over folds of the rows. Letters: see `config`.

Each of n folds is left out once, and what is asked for is computed from the others. With θ_f what comes without fold f,
the variance of θ is (n − 1)/n · Σ (θ_f − mean of θ_f)², and its interval θ ± t · the root of that, with Student's t of
n − 1 degrees of freedom (Wolter, Introduction to Variance Estimation, chapter 4). The tokens of a row need not be
independent: they are in one fold. Folds that hold no token do not count.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from .criteria import scores

LEVEL = 0.95


class Intervals(NamedTuple):
    """Scores with their intervals, all arrays [L, E].

    An expert that no token chose has the score 0, of which nothing is known: from −∞ to ∞. So is every interval where
    all tokens are of one fold.
    """

    score: np.ndarray
    low: np.ndarray
    high: np.ndarray


def intervals(
    columns_by_fold: Mapping[str, np.ndarray], criterion: str = "reap", seed: int = 0, level: float = LEVEL
) -> Intervals:
    """The scores of all experts by a criterion, with their intervals.

    `columns_by_fold` are [L, folds, E], as `Sums.by_fold` gives them. ProfileError where a column is missing that the
    criterion needs.
    """
    never = _whole(columns_by_fold)["count"] == 0
    score, without = _scores(columns_by_fold, criterion, seed)
    score, half = np.where(never, 0.0, score), np.where(never, np.inf, _half_width(without, level))
    return Intervals(score, score - half, score + half)


def unsettled(
    columns_by_fold: Mapping[str, np.ndarray], keep: int, criterion: str = "reap", seed: int = 0, level: float = LEVEL
) -> list[list[int]]:
    """The experts of each layer, in order of id, whose side of the cut may be chance where the `keep` best stay.

    The cut lies halfway between the scores of places `keep` and `keep` + 1. Scores and cut vary together: an expert is
    settled where the interval of its score minus the cut does not hold 0. One that no token chose counts as the lowest.
    `columns_by_fold` are [L, folds, E], as `Sums.by_fold` gives them. ProfileError where a column is missing.

        unsettled(profile.sums.by_fold("science"), 12, "reap_sum")
    """
    score, without = _scores(columns_by_fold, criterion, seed)
    if not 0 < keep < score.shape[-1]:
        return [[] for _ in score]
    above, without = score - _cut(score, keep), without - _cut(without, keep)
    is_open = ~(np.abs(above) > _half_width(without, level))
    return [np.flatnonzero(is_open_E).tolist() for is_open_E in is_open]


def _cut(scores_E: np.ndarray, keep: int) -> np.ndarray:
    """[…, E] → […, 1]. Of each replicate its own: the expert at one place may be a rare one, whose score jumps."""
    ordered = -np.sort(-scores_E, axis=-1)
    return ordered[..., keep - 1 : keep + 1].mean(-1, keepdims=True)


def _scores(columns: Mapping[str, np.ndarray], criterion: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The scores [L, E] of all rows, and those without each fold that holds a token, [n, L, E]."""
    without = []
    for fold in np.flatnonzero(columns["count"].any((0, 2))):
        left = {name: np.delete(sums, fold, axis=1).sum(1) for name, sums in columns.items()}
        # Of the size of the whole, so that sums can be compared with its sums; means stay as they are.
        grown = columns["count"].sum((1, 2))[:, None] / np.maximum(1, left["count"].sum(1, keepdims=True))
        without.append(_ranked({name: sums * grown for name, sums in left.items()}, criterion, seed))
    whole = _ranked(_whole(columns), criterion, seed)
    return whole, np.array(without).reshape(-1, *whole.shape)


def _whole(columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: sums.sum(1) for name, sums in columns.items()}


def _ranked(columns: Mapping[str, np.ndarray], criterion: str, seed: int) -> np.ndarray:
    """The scores [L, E], with those of experts that no token chose at the bottom, where rankings have them."""
    never = columns["count"] == 0
    score = np.where(never, 0.0, scores(columns, criterion, seed))
    return np.where(never, score.min(-1, keepdims=True), score)


def _half_width(without: np.ndarray, level: float) -> np.ndarray:
    """[n, L, E] → [L, E]."""
    n = len(without)
    if n < 2:
        return np.full(without.shape[1:], np.inf)
    variance = (n - 1) / n * ((without - without.mean(0)) ** 2).sum(0)
    return student(level, n - 1) * np.sqrt(variance)


def student(level: float, degrees: int) -> float:
    """The t that a variable of Student's distribution stays within, up or down, with this probability.

    By halving: with θ = arctan(t / √degrees) the probability is a finite sum (Abramowitz and Stegun, 26.7.3, 26.7.4).
    """
    low, high = 0.0, math.pi / 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if _within(middle, degrees) < level else (low, middle)
    return math.tan(low) * math.sqrt(degrees)


def _within(angle: float, degrees: int) -> float:
    odd, cosine = degrees % 2, math.cos(angle)
    term, total = (cosine if odd else 1.0), 0.0
    for i in range(1 + odd, degrees, 2):
        total += term
        term *= cosine**2 * i / (i + 1)
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if odd else total
