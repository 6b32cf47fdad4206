"""Weightings of tokens by name: beside the sums in which every kept token counts alike, Σ w·g·n with weights w that
rest on how the model expected the tokens. Letters: see `config`."""

from collections.abc import Callable
from typing import Any

import numpy as np

from . import eaft

WEIGHTINGS: dict[str, Callable[[np.ndarray, np.ndarray, Any], np.ndarray]] = {"eaft": eaft.weights}
"""By its name what gives a weighting's weights, float32 [kept tokens of this process], from the scores of these and of
the kept tokens of all processes, each float32 [n, 2], and the weighting's options."""


def column(weighting: str) -> str:
    """The name of its sums in tables and in the store."""
    return f"{weighting}_gate_norm_sum"
