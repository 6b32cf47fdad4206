"""What a step takes. Letters: see `config`."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32, Int32


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["token_ids", "positions", "segment_ids", "weights", "domains"],
    meta_fields=["num_domains"],
)
@dataclass(frozen=True)
class Batch:
    """What the forward takes: all arrays [B, S]; padding has segment 0, weight 0 and token 0."""

    token_ids: Int32[Any, "B S"]
    positions: Int32[Any, "B S"]
    """Position for the rotary embedding; restarts at each document."""
    segment_ids: Int32[Any, "B S"]
    """1, 2, … for the documents of a row: attention stays inside one. 0 is padding."""
    weights: Float32[Any, "B S"]
    domains: Int32[Any, "B S"]
    num_domains: int = 1
    """G; static, since it is a dimension of the statistics."""

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding (on the host)."""
        return int((np.asarray(self.segment_ids) > 0).sum())
