"""Intervals of means over tokens or replies, clustered by document. D documents, M columns of which means are taken.

Tokens of one document resemble one another, so documents are what is drawn, and two models are compared on the same
documents. Two things are said of each quantity:

- its standard error, robust against clusters: the root of Σ_d (Σ_i (x_di − x̄))² / N², in which x may be the difference
  of two models (E. Miller, Adding Error Bars to Evals, arXiv:2411.00640: clustered and paired standard errors), times
  D / (D − 1) for few documents; of functions of means by the delta method. The p-value rests on it, with Student's
  distribution for the effective number of documents, (Σ n_d)² / Σ n_d², less one.
- its interval by bootstrap over documents. For means over tokens it is studentised (bootstrap-t): each draw has a
  standard error of its own. Percentiles of draws were tried there too: with skewed lengths or skewed values they held
  the truth in 81 to 96 of 100 simulated cases, from setting to setting, and the studentised interval in 88 to 96; few
  documents with heavy tails are the worst. Replies count one each, and most are 0 or 1: there percentiles hold, and the
  errors of draws that miss the few that differ are useless.
  `tests/test_intervals.py` simulates both.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import stdtr, stdtrit

from ..errors import DataError

DRAWS = 2000
LEVEL = 0.95
TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
CHUNK = 1 << 22  # draws times documents that are held at once: 32 MiB
STEP = 1e-30  # of a complex step, which has no rounding: f(x + ih) = f(x) + i h f'(x)

Quantity = Callable[[np.ndarray], np.ndarray]
"""A function of means, [..., M] → [...]. It is analytic, since its slopes are taken with complex steps."""


@dataclass(frozen=True)
class Estimate:
    """A quantity as measured, and how far its true value may be."""

    value: float
    low: float
    high: float
    """The ends of the 95 % interval."""
    error: float
    """The standard error, robust against clusters."""
    p_value: float
    """Two-sided, of a true value of zero."""

    def within(self, least: float, most: float) -> "Estimate":
        """With an interval that ends where the quantity does."""
        return replace(self, low=max(least, self.low), high=min(most, self.high))


@dataclass(frozen=True)
class Clusters:
    """Columns summed within each document."""

    sums_DM: np.ndarray
    counts_D: np.ndarray


def clusters(documents_N: np.ndarray, columns: Sequence[np.ndarray]) -> Clusters:
    """The sums of columns [N] within each document. DataError where there are fewer than two documents."""
    _, document_N = np.unique(documents_N, return_inverse=True)
    counts_D = np.bincount(document_N)
    if len(counts_D) < 2:
        raise DataError(f"{len(counts_D)} rows have scored tokens: an interval needs 2 rows at least: give more")
    sums = [np.bincount(document_N, weights=column) for column in columns]
    return Clusters(np.stack(sums, axis=1), counts_D.astype(np.float64))


def estimates(
    of: Clusters, quantities: Sequence[Quantity], draws: int = DRAWS, seed: int = 0, studentised: bool = True
) -> list[Estimate]:
    """Each quantity of the means with its interval, studentised or of percentiles.

    Equal seeds draw equal documents, whatever is estimated."""
    D, N = len(of.counts_D), of.counts_D.sum()
    means_M = of.sums_DM.sum(0) / N
    residuals_DM = of.sums_DM - means_M * of.counts_D[:, None]
    values, slopes = _values_and_slopes(quantities, means_M)
    spread_MM = residuals_DM.T @ residuals_DM
    few = D / (D - 1)
    errors = [float(np.sqrt(few * max(slope @ spread_MM @ slope, 0.0)) / N) for slope in slopes]
    drawn = [*_drawn(of.counts_D, residuals_DM, means_M, quantities, few, draws, seed)]
    differences_QC = np.concatenate([some for some, _ in drawn], axis=1) - values[:, None]
    errors_QC = np.concatenate([some for _, some in drawn], axis=1)
    freedom = max(1.0, N**2 / (of.counts_D**2).sum() - 1)
    found = []
    for value, error, differences_C, errors_C in zip(
        map(float, values), errors, differences_QC, errors_QC, strict=True
    ):
        if studentised:
            low, high = _studentised(error, differences_C, errors_C, freedom)
        else:
            low, high = np.quantile(differences_C, TAILS)
        p_value = 2 * float(stdtr(freedom, -abs(value) / error)) if error else float(value == 0)
        found.append(Estimate(value, value + float(low), value + float(high), error, p_value))
    return found


def _studentised(error: float, differences_C: np.ndarray, errors_C: np.ndarray, freedom: float) -> tuple[float, float]:
    """How far the ends lie from the value."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios_C = np.where(differences_C == 0, 0.0, differences_C / errors_C)
    # "lower" and "higher": between infinite ratios nothing can be interpolated.
    least, most = np.quantile(ratios_C, TAILS[0], method="lower"), np.quantile(ratios_C, TAILS[1], method="higher")
    if not (np.isfinite(least) and np.isfinite(most)):
        # Many draws miss the few documents that differ, and have no error: the symmetric interval stands.
        most = stdtrit(freedom, TAILS[1])
        least = -most
    return -float(most) * error, -float(least) * error


def _values_and_slopes(quantities: Sequence[Quantity], means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantities of means [..., M], [quantities, ...], and how they change with each mean, [quantities, ..., M]."""
    stepped = means[..., None, :] + 1j * STEP * np.eye(means.shape[-1])
    # What is not finite is told of where it is written; a root of what rounding took below zero is one such draw.
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.stack([quantity(means) for quantity in quantities])
        return values, np.stack([quantity(stepped).imag / STEP for quantity in quantities])


def _drawn(
    counts_D: np.ndarray,
    residuals_DM: np.ndarray,
    means_M: np.ndarray,
    quantities: Sequence[Quantity],
    few: float,
    draws: int,
    seed: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The quantities of some draws at a time and their standard errors, [quantities, draws] each."""
    D, M = residuals_DM.shape
    rng = np.random.default_rng(seed)
    columns_DK = np.concatenate([residuals_DM, counts_D[:, None]], axis=1)
    products_DKK = (columns_DK[:, :, None] * columns_DK[:, None, :]).reshape(D, -1)
    step = max(1, CHUNK // D)
    for first in range(0, draws, step):
        times_CD = rng.multinomial(D, np.full(D, 1 / D), size=min(step, draws - first)).astype(np.float64)
        sums_CK, products_CKK = times_CD @ columns_DK, (times_CD @ products_DKK).reshape(-1, M + 1, M + 1)
        counts_C = sums_CK[:, -1]
        moved_CM = sums_CK[:, :M] / counts_C[:, None]
        drawn_QC, slopes_QCM = _values_and_slopes(quantities, means_M + moved_CM)
        # What a document adds is slope · (residual − moved · count): a quadratic form of the products.
        along_QC1 = -(slopes_QCM * moved_CM).sum(-1, keepdims=True)
        along_QCK = np.concatenate([slopes_QCM, along_QC1], axis=-1)
        squares_QC = np.einsum("qck,ckl,qcl->qc", along_QCK, products_CKK, along_QCK, optimize=True)
        yield drawn_QC, np.sqrt(few * np.maximum(squares_QC, 0)) / counts_C


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values, corrected so that of all true null hypotheses together none is rejected in 95 of 100 cases.

    References: S. Holm, A simple sequentially rejective multiple test procedure, 1979."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, at in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, p_values[at] * (len(p_values) - rank)))
        corrected[at] = largest
    return corrected
