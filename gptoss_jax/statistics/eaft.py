"""Weights of EAFT-REAP: tokens count by how sure the model was, and whether it was right."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class EaftOptions:
    """Where the classes of tokens are cut, and what each class counts."""

    probability_quantile: float = 0.15
    entropy_quantile: float = 0.15
    """Both quantiles are over all kept, scored tokens."""
    right: float = 1.0
    """Confident (low entropy) and right (probability not low)."""
    wrong: float = -2.0
    """Confident and wrong: experts behind confident errors lose."""
    other: float = 0.25


def cuts(probability: np.ndarray, entropy: np.ndarray, options: EaftOptions) -> tuple[float, float]:
    """Below which probability, and up to which entropy: quantiles over all scored tokens."""
    # float64: the cuts interpolate between scores, and float32 would move them past one.
    probability, entropy = probability.astype(np.float64), entropy.astype(np.float64)
    scored = probability >= 0
    if not scored.any():
        return 0.0, 0.0
    return (
        float(np.quantile(probability[scored], options.probability_quantile)),
        float(np.quantile(entropy[scored], options.entropy_quantile)),
    )


def class_weights(
    probability: np.ndarray, entropy: np.ndarray, cuts: tuple[float, float], options: EaftOptions
) -> np.ndarray:
    """The weight of each kept token, float32; 0 where it is unscored (a probability below 0)."""
    probability, entropy = probability.astype(np.float64), entropy.astype(np.float64)
    low_probability, low_entropy = cuts
    weights = np.full(probability.shape, options.other, np.float32)
    weights[(entropy <= low_entropy) & (probability >= low_probability)] = options.right
    weights[(entropy <= low_entropy) & (probability < low_probability)] = options.wrong
    weights[~(probability >= 0)] = 0
    return weights


def weights(own: np.ndarray, every: np.ndarray, options: EaftOptions) -> np.ndarray:
    """The weights of some tokens by their scores [n, 2], probability and entropy, cut where all tokens' lie."""
    return class_weights(own[:, 0], own[:, 1], cuts(every[:, 0], every[:, 1], options), options)
