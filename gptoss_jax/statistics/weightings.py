"""Weightings of tokens by name: beside the sums in which every kept token counts alike, Σ w·g·n with weights w that
rest on how the model expected the tokens. Letters: see `config`."""

from collections.abc import Callable
from typing import Any

import numpy as np

from . import eaft

WEIGHTINGS: dict[str, Callable[[np.ndarray, np.ndarray, Any], np.ndarray]] = {"eaft": eaft.weights}
"""The function of each weighting by its name. It takes the scores, float32 [n, 2], of this process' kept tokens and of
those of all processes, and the weighting's options; it gives the weights of this process' tokens, float32 [n]."""


def column(weighting: str) -> str:
    """The name of its sums in tables and in the store."""
    return f"{weighting}_gate_norm_sum"
