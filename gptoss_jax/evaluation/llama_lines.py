"""Statistics of token probabilities as `llama-perplexity --kl-divergence` of llama.cpp prints them at its end.

People's scripts find these lines by their words. What stands behind ± is llama.cpp's: a standard error that takes
tokens for independent, and is too small where documents differ.
"""

import math
from collections.abc import Callable

import numpy as np

from .quality import probability
from .scored import Scored

FEWEST = 100  # scored tokens: below this llama.cpp prints no statistics
KL_LINES = {
    "Maximum KLD:": 100.0,
    "99.9%   KLD:": 99.9,
    "99.0%   KLD:": 99.0,
    "95.0%   KLD:": 95.0,
    "90.0%   KLD:": 90.0,
    "Median  KLD:": 50.0,
    "10.0%   KLD:": 10.0,
    " 5.0%   KLD:": 5.0,
    " 1.0%   KLD:": 1.0,
    " 0.1%   KLD:": 0.1,
    "Minimum KLD:": 0.0,
}
DP_LINES = {
    "Maximum Δp:": 100.0,
    "99.9%   Δp:": 99.9,
    "99.0%   Δp:": 99.0,
    "95.0%   Δp:": 95.0,
    "90.0%   Δp:": 90.0,
    "75.0%   Δp:": 75.0,
    "Median  Δp:": 50.0,
    "25.0%   Δp:": 25.0,
    "10.0%   Δp:": 10.0,
    " 5.0%   Δp:": 5.0,
    " 1.0%   Δp:": 1.0,
    " 0.1%   Δp:": 0.1,
    "Minimum Δp:": 0.0,
}


def llama_lines(baseline: Scored, other: Scored) -> list[str]:
    """The lines of the three sections, without line ends; none where there are fewer than 100 scored tokens."""
    if len(other.nats) < FEWEST:
        return []
    return [
        "====== Perplexity statistics ======",
        *_perplexity(baseline.nats, other.nats),
        "",
        "====== KL divergence statistics ======",
        "Mean    KLD: {:10.6f} ± {:10.6f}".format(*_mean(other.kl)),
        *(f"{what} {value:10.6f}" for what, value in _at(KL_LINES, other.kl)),
        "",
        "====== Token probability statistics ======",
        *_probabilities(probability(other) - probability(baseline)),
        "Same top p: {:6.3f} ± {:5.3f} %".format(*_share(other.best == baseline.best)),
    ]


def _perplexity(base: np.ndarray, other: np.ndarray) -> list[str]:
    (log, log_error), (log_base, log_base_error) = _mean(other), _mean(base)
    ppl, ppl_base = math.exp(log), math.exp(log_base)
    covariance = float(((other - log) * (base - log_base)).mean()) / (len(base) - 1)
    errors = log_error * log_base_error
    ratio, ratio_error = math.exp(log - log_base), _mean(other - base)[1]
    wide: Callable[[str, float, float], str] = "{:<30}: {:10.6f} ± {:10.6f}".format
    # The error of a difference of perplexities: that of ppl · x − ppl_base · y over tokens.
    difference_error = _mean(ppl * other - ppl_base * base)[1]
    return [
        wide("Mean PPL(Q)", ppl, ppl * log_error),
        wide("Mean PPL(base)", ppl_base, ppl_base * log_base_error),
        f"Cor(ln(PPL(Q)), ln(PPL(base))): {100 * covariance / errors if errors else 0:6.2f}%",
        wide("Mean ln(PPL(Q)/PPL(base))", log - log_base, ratio_error),
        wide("Mean PPL(Q)/PPL(base)", ratio, ratio * ratio_error),
        wide("Mean PPL(Q)-PPL(base)", ppl - ppl_base, difference_error),
    ]


def _probabilities(difference: np.ndarray) -> list[str]:
    mean, error = _mean(difference)
    square, square_error = _mean(difference**2)
    rms = math.sqrt(square)
    return [
        f"Mean    Δp: {100 * mean:6.3f} ± {100 * error:5.3f} %",
        *(f"{what} {100 * value:6.3f}%" for what, value in _at(DP_LINES, difference)),
        f"RMS Δp    : {100 * rms:6.3f} ± {100 * (0.5 * square_error / rms if rms else 0):5.3f} %",
    ]


def _mean(values: np.ndarray) -> tuple[float, float]:
    """The mean, and its standard error over independent tokens."""
    return float(values.mean()), float(values.std() / math.sqrt(len(values) - 1))


def _share(holds: np.ndarray) -> tuple[float, float]:
    """A share and its standard error, in per cent."""
    share = float(holds.mean())
    return 100 * share, 100 * math.sqrt(share * (1 - share) / (len(holds) - 1))


def _at(lines: dict[str, float], values: np.ndarray) -> list[tuple[str, float]]:
    found = np.percentile(values, [*lines.values()])
    return [(what, float(value)) for what, value in zip(lines, found, strict=True)]
