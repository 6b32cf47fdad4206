"""How a model expects text, beside the baseline: perplexity, divergence, agreement, confidence. N scored tokens.

Every number that is a function of means over tokens has an interval. Two kinds have none. Percentiles are single
tokens, and the far ones rest on a handful of them. JS2D is larger than zero by chance alone wherever tokens move
between bins, and draws of documents add that chance a second time: an interval would lie above what it is of.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..errors import DataError
from .intervals import DRAWS, Estimate, clusters, estimates
from .scored import Scored

KL_PERCENTILES = (100.0, 99.9, 99.0, 95.0, 90.0, 50.0, 10.0, 5.0, 1.0, 0.1, 0.0)
DP_PERCENTILES = (100.0, 99.9, 99.0, 95.0, 90.0, 75.0, 50.0, 25.0, 10.0, 5.0, 1.0, 0.1, 0.0)
CONFLICT_QUANTILE = 0.15  # of both p and H, as the criterion eaft_reap cuts its classes
BINS = (160, 120)  # of p and H in JS2D


class Means(NamedTuple):
    """Means over all scored tokens, in order of the columns. What is of the other model is held as a difference from
    the baseline, so that equal models differ by exactly zero, whatever is rounded."""

    nats: np.ndarray
    nats_more: np.ndarray
    kl: np.ndarray
    agrees: np.ndarray
    p: np.ndarray
    p_more: np.ndarray
    p_more_squared: np.ndarray
    conflict: np.ndarray
    conflict_more: np.ndarray


@dataclass(frozen=True)
class Quantity:
    """A number of the comparison: a function of the means, and how it is shown."""

    label: str
    of: Callable[[Means], np.ndarray]
    percent: bool = False
    is_difference: bool = False
    """Whether equal models have zero, so that its p-value says something."""
    least: float = -math.inf
    most: float = math.inf


QUANTITIES: dict[str, Quantity] = {
    "ppl": Quantity("PPL", lambda m: np.exp(m.nats + m.nats_more), least=1.0),
    "ppl_baseline": Quantity("PPL of the baseline", lambda m: np.exp(m.nats), least=1.0),
    "ppl_difference": Quantity("ΔPPL", lambda m: np.exp(m.nats) * np.expm1(m.nats_more), is_difference=True),
    "ln_ppl_ratio": Quantity("ln PPL ratio", lambda m: m.nats_more, is_difference=True),
    "kl": Quantity("KL (nats)", lambda m: m.kl, least=0.0),
    "agreement": Quantity("same top token", lambda m: m.agrees, percent=True, least=0.0, most=1.0),
    "p": Quantity("p of the true token", lambda m: m.p + m.p_more, percent=True, least=0.0, most=1.0),
    "p_difference": Quantity("Δp", lambda m: m.p_more, percent=True, is_difference=True),
    "p_difference_rms": Quantity(
        "Δp, root mean square", lambda m: np.sqrt(m.p_more_squared), percent=True, least=0.0, most=1.0
    ),
    "conflicts": Quantity(
        "confident conflicts", lambda m: m.conflict + m.conflict_more, percent=True, least=0.0, most=1.0
    ),
    "conflict_difference": Quantity("Δ conflicts", lambda m: m.conflict_more, percent=True, is_difference=True),
}


@dataclass(frozen=True)
class Quality:
    """A model beside the baseline on the same tokens. The baseline beside itself has its own numbers, and zeros."""

    tokens: int
    documents: int
    estimates: Mapping[str, Estimate]
    """Of each of QUANTITIES."""
    kl_percentiles: Mapping[str, float]
    dp_percentiles: Mapping[str, float]
    """Percentiles by their names, as "99.9"; "100" is the maximum."""
    js2d: float
    """The Jensen–Shannon divergence in nats between the histograms of (p, H); at most ln 2."""


def compare(
    documents_N: np.ndarray, baseline: Scored, other: Scored, name: str = "model", draws: int = DRAWS, seed: int = 0
) -> Quality:
    """`other` beside `baseline`; `name` is what errors call it.

    StatisticsError where a score is not finite, DataError where fewer than two documents have scored tokens."""
    baseline.check("baseline")
    other.check(name)
    if not len(documents_N) == len(baseline.nats) == len(other.nats):
        raise DataError(
            f"{name}: has {len(other.nats):,} scored tokens, the baseline {len(baseline.nats):,}: score both on the "
            "same rows"
        )
    of = clusters(documents_N, _columns(baseline, other))
    found = estimates(of, [_of_array(quantity.of) for quantity in QUANTITIES.values()], draws, seed)
    return Quality(
        len(documents_N),
        len(of.counts_D),
        {name: one.within(what.least, what.most) for (name, what), one in zip(QUANTITIES.items(), found, strict=True)},
        _percentiles(other.kl, KL_PERCENTILES),
        _percentiles(probability(other) - probability(baseline), DP_PERCENTILES),
        js2d(baseline, other),
    )


def probability(scored: Scored) -> np.ndarray:
    """The probability of each true token, float64 [N]."""
    return np.exp(-scored.nats)


def _of_array(of: Callable[[Means], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda means: of(Means(*np.moveaxis(means, -1, 0)))


def _columns(baseline: Scored, other: Scored) -> Means:
    """What `Means` are means of, each [N]."""
    p, p_more = probability(baseline), probability(other) - probability(baseline)
    conflict, conflict_other = conflicts(baseline, other)
    return Means(
        nats=baseline.nats,
        nats_more=other.nats - baseline.nats,
        kl=other.kl,
        agrees=(other.best == baseline.best).astype(np.float64),
        p=p,
        p_more=p_more,
        p_more_squared=p_more**2,
        conflict=conflict,
        conflict_more=conflict_other - conflict,
    )


def conflicts(baseline: Scored, other: Scored) -> tuple[np.ndarray, np.ndarray]:
    """Where each model is sure and wrong, 0 or 1 [N]: H at most its 15 % quantile, and p below its own.

    Both quantiles are the baseline's, for both models: with cuts of its own, a model that grew unsure everywhere would
    look no worse."""
    # float64: the cuts interpolate between tokens, and float32 would move them past one.
    (p, entropy), (p_other, entropy_other) = (
        (probability(scored), scored.entropy.astype(np.float64)) for scored in (baseline, other)
    )
    least_p, most_entropy = np.quantile(p, CONFLICT_QUANTILE), np.quantile(entropy, CONFLICT_QUANTILE)
    own, others = (entropy <= most_entropy) & (p < least_p), (entropy_other <= most_entropy) & (p_other < least_p)
    return own.astype(np.float64), others.astype(np.float64)


def js2d(baseline: Scored, other: Scored) -> float:
    """The Jensen–Shannon divergence, in nats, between the models' histograms of (p, H), both in [0, 1]."""
    first, second = (_histogram(scored) for scored in (baseline, other))
    middle = (first + second) / 2
    return float(sum((_divergence(histogram, middle) for histogram in (first, second)), start=0.0) / 2)


def _histogram(scored: Scored) -> np.ndarray:
    # Rounding may leave an entropy a little above 1, where no bin is.
    p, entropy = probability(scored), np.clip(scored.entropy, 0, 1)
    counts, _, _ = np.histogram2d(p, entropy, BINS, ((0, 1), (0, 1)))
    return counts / len(p)


def _divergence(of: np.ndarray, against: np.ndarray) -> float:
    some = of > 0
    return float((of[some] * np.log(of[some] / against[some])).sum())


def _percentiles(values: np.ndarray, percentiles: tuple[float, ...]) -> dict[str, float]:
    found = np.percentile(values, percentiles)
    return {f"{percentile:g}": float(value) for percentile, value in zip(percentiles, found, strict=True)}
