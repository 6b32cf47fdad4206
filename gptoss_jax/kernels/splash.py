"""Attention on TPU: JAX's splash attention with sinks, which never holds an S × S array. Letters: see `config`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Bool, Float, Int

from ..devices.placement import LANES, mosaic_precision

# Scores are computed by blocks of queries × keys, and blocks that nothing of the mask lies in are skipped.
# A window of 128 wants few keys a block, full attention large products.
QUERIES, KEYS, KEYS_IN_WINDOW = 512, 512, 128


def attend(
    q_BSHh: Float[Array, "B S H h"],
    k_BSKh: Float[Array, "B S K h"],
    v_BSKh: Float[Array, "B S K h"],
    sinks_H: Float[Array, " H"],
    segment_ids_BS: Int[Array, "B S"],
    sliding: Bool[Array, ""],
    window: int,
    interpret: bool = False,
) -> Float[Array, "B S H h"]:
    """Does what `attention.attend` does, with `window` for sliding layers; a layer runs one of the two kernels."""
    S, h = q_BSHh.shape[1], q_BSHh.shape[-1]
    length = padded_length(S)

    def heads_first(x_BSNh: Array) -> Array:
        return jnp.pad(x_BSNh, ((0, 0), (0, length - S), (0, 0), (0, 0))).swapaxes(1, 2)

    # Scaled in float32: h^-0.5 is no power of two unless h is one of four.
    q = heads_first((q_BSHh.astype(jnp.float32) * h**-0.5).astype(q_BSHh.dtype))
    k, v = heads_first(k_BSKh), heads_first(v_BSKh)
    # What the padding added sees nothing but itself, and nothing sees it.
    segments = jnp.pad(segment_ids_BS, ((0, 0), (0, length - S)), constant_values=-1)

    def run(keys: int, mask: masks.Mask) -> Any:
        attention = kernel.make_splash_mha(
            masks.MultiHeadMask([mask] * q.shape[1]),
            block_sizes=kernel.BlockSizes(block_q=min(QUERIES, length), block_kv=min(keys, length)),
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )

        def of_row(q: Array, k: Array, v: Array, ids: Array) -> Array:
            return attention(q, k, v, kernel.SegmentIds(ids, ids), sinks=sinks_H.astype(jnp.float32))

        with mosaic_precision(q.dtype):
            return jax.vmap(of_row)(q, k, v, segments)

    local = masks.LocalMask((length, length), window_size=(window - 1, 0), offset=0)
    mixed = lax.cond(
        sliding,
        lambda: run(KEYS_IN_WINDOW, local),
        lambda: run(KEYS, masks.CausalMask((length, length))),
    )
    return mixed.swapaxes(1, 2)[:, :S].astype(v_BSKh.dtype)


def padded_length(length: int) -> int:
    """The length that a row of `length` tokens is padded to: blocks must divide it."""
    whole = -(-length // LANES) * LANES
    return whole if whole <= QUERIES else -(-whole // QUERIES) * QUERIES


def visited_scores(length: int, window: int | None) -> int:
    """Scores that a head computes for one row: whole blocks in which the mask shows anything."""
    S = padded_length(length)
    queries, keys = min(QUERIES, S), min(KEYS if window is None else KEYS_IN_WINDOW, S)
    blocks = 0
    for first in range(0, S, queries):
        oldest = 0 if window is None else max(0, first - window + 1)
        blocks += (first + queries - 1) // keys - oldest // keys + 1
    return blocks * queries * keys
