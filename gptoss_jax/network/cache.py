"""Keys and values of the tokens that passed a layer, for those that follow. Letters: see `config`; C slots of a row."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..config import SLIDING, Config


class Cache(NamedTuple):
    """One layer's. The token at position p has slot p % C: where a layer slides, C is its window, and a token takes the
    place of the one that has just left it. Where drafts may be rejected C is more: see `empty`."""

    keys: Float[Array, "B K C h"]
    """Heads before slots: XLA's CPU backend would transpose the whole at each product."""
    values: Float[Array, "B K C h"]
    positions: Int[Array, "B C"]
    """The position of the token in each slot; −1 where there is none."""

    def store(
        self,
        k_BSKh: Float[Array, "B S K h"],
        v_BSKh: Float[Array, "B S K h"],
        positions_BS: Int[Array, "B S"],
        segment_ids_BS: Int[Array, "B S"],
    ) -> "Cache":
        """The cache with tokens that follow those in it; of the new ones of a row it takes the last C."""
        slots = self.positions.shape[1]
        valid_BS = segment_ids_BS > 0
        ends_B1 = jnp.where(valid_BS, positions_BS + 1, 0).max(1, keepdims=True)
        # What is not stored has a slot behind the last, and is dropped.
        slot_BS = jnp.where(valid_BS & (positions_BS >= ends_B1 - slots), positions_BS % slots, slots)
        rows_B1 = jnp.arange(len(slot_BS))[:, None]
        return Cache(
            self.keys.at[rows_B1, :, slot_BS].set(k_BSKh, mode="drop"),
            self.values.at[rows_B1, :, slot_BS].set(v_BSKh, mode="drop"),
            self.positions.at[rows_B1, slot_BS].set(positions_BS, mode="drop"),
        )

    def empty(self, batch_size: int) -> "Cache":
        """An empty one for so many rows, of the same slots and heads."""
        keys, values = (jnp.zeros((batch_size, *x.shape[1:]), x.dtype) for x in (self.keys, self.values))
        return Cache(keys, values, jnp.full((batch_size, self.positions.shape[1]), -1, jnp.int32))


def empty(config: Config, batch_size: int, capacity: int, kind: str, dtype: Any, ahead: int = 0) -> Cache:
    """A layer's, for rows of at most `capacity` tokens.

    Steps may store so many tokens `ahead` of one that still sees its window, or of one that takes their place when
    they are rejected: the window's keys stay."""
    slots = min(capacity, config.sliding_window + ahead) if kind == SLIDING else capacity
    shape = batch_size, config.num_kv_heads, slots, config.head_dim
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.full((batch_size, slots), -1, jnp.int32))
