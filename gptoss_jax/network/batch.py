"""What a step takes: tokens for the network, and what each of them counts. Letters: see `config`."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float32, Int32


@partial(jax.tree_util.register_dataclass, data_fields=["ids", "positions", "segments"], meta_fields=[])
@dataclass(frozen=True)
class Tokens:
    """What the network takes: all arrays [B, S]."""

    ids: Int32[Any, "B S"]
    """0 in padding."""
    positions: Int32[Any, "B S"]
    """Position for the rotary embedding; restarts at each document."""
    segments: Int32[Any, "B S"]
    """1, 2, … for the documents of a row: attention stays inside one. 0 is padding."""

    @property
    def count(self) -> int:
        """Tokens that are not padding (on the host)."""
        return int((np.asarray(self.segments) > 0).sum())


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "weights", "groups", "kept", "at"],
    meta_fields=["num_groups", "joint"],
)
@dataclass(frozen=True)
class Batch:
    """Tokens, and for who counts them what each counts and in which group."""

    tokens: Tokens
    weights: Float32[Any, "B S"]
    """What each token counts in the statistics; 0 is a token that is not kept, as all padding is."""
    groups: Int32[Any, "B S"]
    """The group, as a fold of a domain, whose statistics each token counts in."""
    num_groups: int = 1
    """G; static, since it is a dimension of the statistics."""
    joint: tuple[int, ...] = ()
    """The joint group, of J, that each group's co-activations are counted in. Co-activations are [E, E] for each joint
    group, so that there may be fewer of these. Empty where they are the groups themselves; static."""
    kept: Bool[Any, "B L E"] | None = None
    """The experts of each layer that the tokens of a row may choose; None for all."""
    at: Int32[Any, "B N"] | None = None
    """The positions of a row, some perhaps twice, whose final outputs are asked for."""

    @property
    def num_joint(self) -> int:
        """J."""
        return max(self.joint) + 1 if self.joint else self.num_groups

    @property
    def shape(self) -> tuple[int, int]:
        """B and S."""
        B, S = self.tokens.ids.shape
        return B, S
