"""Grouped-query attention with one learned sink logit per query head. Letters: see `config`."""

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ..config import Config
from ..devices.placement import Placement
from ..kernels import splash
from .batch import Tokens
from .cache import Cache
from .rope import rotate

# Queries, and keys, of one block: on CPU 128 took two thirds of the time of 256 (docs/measurements.md).
BLOCK = 128
# Scores in memory at once, at least one row's: on CPU 4 MiB in float32, which caches hold; a GPU wants large products.
SCORES_AT_ONCE = {"cpu": 1 << 20, "gpu": 1 << 26}
# Where gradients are taken every block keeps its scores, and many small ones took twice the time of few large ones.
GRADIENT_BLOCK, GRADIENT_SCORES = 512, 1 << 25

# Of a block of queries over the keys so far: the highest score, the sum of weights, the sum of weighted values.
Sums = tuple[Float[Array, "R K q M"], Float[Array, "R K q M"], Float[Array, "R K q M h"]]


class Attention(nnx.Module):
    """Projections with biases, rotary embedding, sinks. Kernels lie [out…, in], as checkpoints store them."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        D, H, K, h = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        kernel, zeros = nnx.initializers.normal(0.02), nnx.initializers.zeros
        self.q_kernel = nnx.Param(kernel(rngs.params(), (H, h, D)))
        self.q_bias = nnx.Param(zeros(rngs.params(), (H, h)))
        self.k_kernel = nnx.Param(kernel(rngs.params(), (K, h, D)))
        self.k_bias = nnx.Param(zeros(rngs.params(), (K, h)))
        self.v_kernel = nnx.Param(kernel(rngs.params(), (K, h, D)))
        self.v_bias = nnx.Param(zeros(rngs.params(), (K, h)))
        self.o_kernel = nnx.Param(kernel(rngs.params(), (D, H, h)))
        self.o_bias = nnx.Param(zeros(rngs.params(), (D,)))
        self.sinks = nnx.Param(zeros(rngs.params(), (H,)))
        self.sliding_window = config.sliding_window

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        rope: tuple[Float[Array, "B S half"], Float[Array, "B S half"]],
        tokens: Tokens,
        sliding: Bool[Array, ""],
        place: Placement,
        cache: Cache | None = None,
        follows: bool = False,
    ) -> tuple[Float[Array, "B S D"], Cache | None]:
        """Attend and project. With `sliding` a query sees `sliding_window` tokens, itself included; else all before it.

        With a cache, keys and values go into it too. One token alone sees what stands there, and so do several that
        are said to follow it; others are the first of their rows.
        """
        q_BSHh = rotate(project(x_BSD, self.q_kernel[...], self.q_bias[...]), *rope)
        k_BSKh = rotate(project(x_BSD, self.k_kernel[...], self.k_bias[...]), *rope)
        v_BSKh = project(x_BSD, self.v_kernel[...], self.v_bias[...])
        sequences = q_BSHh, k_BSKh, v_BSKh, self.sinks[...], tokens.segments
        if cache is not None:
            cache = cache.store(k_BSKh, v_BSKh, tokens.positions, tokens.segments)
        if cache is not None and (follows or x_BSD.shape[1] == 1):
            window = jnp.where(sliding, self.sliding_window, jnp.iinfo(jnp.int32).max)
            mixed_BSHh = attend_to_cache(q_BSHh, cache, self.sinks[...], tokens.positions, window)
        elif place.platform == "tpu" and not place.differentiable:
            mixed_BSHh = splash.attend(*sequences, sliding, self.sliding_window, place.interpret)
        else:
            window = jnp.where(sliding, self.sliding_window, x_BSD.shape[1])
            mixed_BSHh = attend(*sequences, window, place)
        o_kernel_DI = self.o_kernel[...].reshape(x_BSD.shape[-1], -1)
        return project(mixed_BSHh.reshape(*x_BSD.shape[:2], -1), o_kernel_DI, self.o_bias[...], place), cache


def project(
    x_BSI: Float[Array, "B S I"],
    kernel: Float[Array, "*out I"],
    bias: Float[Array, "*out"],
    split: Placement | None = None,
) -> Float[Array, "B S *out"]:
    """x·Wᵀ + b, [B, S, *out], summed in float32 and returned in x's dtype; `split` says over what I is split.

    Flat matrices and a float32 result: XLA's CPU backend transposes kernels of more axes at each call, and
    rounds bfloat16 results one by one, at a quarter of the speed; on TPU rows become a convolution's window.
    """
    flat_TI = x_BSI.reshape(-1, x_BSI.shape[-1])
    flat_OI = kernel.reshape(-1, kernel.shape[-1])
    out_TO = jnp.einsum("TI,OI->TO", flat_TI, flat_OI, preferred_element_type=jnp.float32)
    if split is not None:
        out_TO = split.sum_experts(out_TO, x_BSI.dtype)
    out_TO = (out_TO + bias.reshape(1, -1)).astype(x_BSI.dtype)
    return out_TO.reshape(*x_BSI.shape[:2], *bias.shape)


def attend(
    q_BSHh: Float[Array, "B S H h"],
    k_BSKh: Float[Array, "B S K h"],
    v_BSKh: Float[Array, "B S K h"],
    sinks_H: Float[Array, " H"],
    segment_ids_BS: Int[Array, "B S"],
    window: Int[Array, ""],
    place: Placement,
) -> Float[Array, "B S H h"]:
    """Softmax attention in float32, a block of queries with a block of keys at a time.

    A query sees the keys of its own segment (a document, or padding) that are not after it and
    less than `window` before it. The sink joins the maximum and the denominator, and has no value.
    Blocks of keys that no query of a block sees are left out; where there is only padding, the result is 0.
    """
    B, S, H, h = q_BSHh.shape
    K = k_BSKh.shape[2]
    M = min(GRADIENT_BLOCK if place.differentiable else BLOCK, S)
    blocks = -(-S // M)
    at_once = (GRADIENT_SCORES if place.differentiable else SCORES_AT_ONCE[place.platform]) // (H * M * M)
    R = max(rows for rows in range(1, B + 1) if B % rows == 0 and rows <= max(1, at_once))

    def by_block(x: Array) -> Array:
        """[B, S, …] → [B/R, R, blocks, M, …]"""
        padded = jnp.pad(x, ((0, 0), (0, blocks * M - S)) + ((0, 0),) * (x.ndim - 2))
        return padded.reshape(B // R, R, blocks, M, *x.shape[2:])

    q, k, v = (jnp.moveaxis(by_block(x), 3, 4) for x in (q_BSHh.reshape(B, S, K, -1), k_BSKh, v_BSKh))
    segments = by_block(segment_ids_BS)
    starts = by_block(_document_starts(segment_ids_BS))
    sinks = jnp.broadcast_to(sinks_H.astype(jnp.float32).reshape(1, K, H // K, 1), (R, K, H // K, M))

    def one_block(index: Array) -> Array:
        rows, query = jnp.divmod(index, blocks)
        q_RKXh = jnp.moveaxis(q[rows, :, query].reshape(R, K, M, H // K, h), 2, 3).reshape(R, K, -1, h)

        def one_key_block(key: Array, sums: Sums) -> Sums:
            distance_MN = (query - key) * M + jnp.arange(M)[:, None] - jnp.arange(M)[None]
            same_RMN = segments[rows, :, query][:, :, None] == segments[rows, :, key][:, None]
            visible_RMN = same_RMN & ((distance_MN >= 0) & (distance_MN < window))[None]
            return _add_keys(sums, q_RKXh, k[rows, :, key], v[rows, :, key], visible_RMN)

        # Keys before the first query's document, or before its window, serve no later query of the block either.
        lowest = jnp.maximum(starts[rows, :, query, 0].min(), query * M - window + 1)
        any_token = (segments[rows, :, query, 0] > 0).any()
        start, stop = (0, blocks) if place.differentiable else (lowest // M, jnp.where(any_token, query + 1, 0))
        nothing = sinks, jnp.ones(sinks.shape), jnp.zeros((*sinks.shape, h))
        _, total, mixed = lax.fori_loop(start, stop, one_key_block, nothing)
        return jnp.moveaxis((mixed / total[..., None]).astype(v.dtype), 3, 1)  # [R, M, K, H/K, h]

    mixed = lax.map(one_block, jnp.arange(B // R * blocks))
    mixed = jnp.moveaxis(mixed.reshape(B // R, blocks, R, M, H, h), 2, 1)
    return mixed.reshape(B, blocks * M, H, h)[:, :S]


def _add_keys(
    sums: Sums,
    q_RKXh: Float[Array, "R K X h"],
    k_RKNh: Float[Array, "R K N h"],
    v_RKNh: Float[Array, "R K N h"],
    visible_RMN: Bool[Array, "R M N"],
) -> Sums:
    """The softmax over a block of keys more (X: q·M queries): earlier sums shrink where a higher score comes."""
    top, total, mixed = sums
    scores = jnp.einsum("RKXh,RKNh->RKXN", q_RKXh, k_RKNh, preferred_element_type=jnp.float32)
    scores = scores.reshape(*top.shape, -1) * q_RKXh.shape[-1] ** -0.5
    scores = jnp.where(visible_RMN[:, None, None], scores, -jnp.inf)
    higher = jnp.maximum(top, scores.max(-1))
    weights = jnp.exp(scores - higher[..., None])
    shrink = jnp.exp(top - higher)
    weights_RKXN = weights.astype(v_RKNh.dtype).reshape(*q_RKXh.shape[:3], -1)
    values = jnp.einsum("RKXN,RKNh->RKXh", weights_RKXN, v_RKNh, preferred_element_type=jnp.float32)
    mixed = mixed * shrink[..., None] + values.reshape(mixed.shape)
    return higher, total * shrink + weights.sum(-1), mixed


def attend_to_cache(
    q_BSHh: Float[Array, "B S H h"],
    cache: Cache,
    sinks_H: Float[Array, " H"],
    positions_BS: Int[Array, "B S"],
    window: Int[Array, ""],
) -> Float[Array, "B S H h"]:
    """Softmax attention in float32 of a row's last queries to what its cache holds, themselves included; `attend` says
    the rest. What stands at a later position is not seen: a draft that was rejected leaves such keys."""
    B, S, H, h = q_BSHh.shape
    K, C = cache.keys.shape[1:3]
    q_BKXh = jnp.moveaxis(q_BSHh.reshape(B, S, K, H // K, h), 1, 3).reshape(B, K, -1, h)  # X: q·S queries
    scores = jnp.einsum("BKXh,BKCh->BKXC", q_BKXh, cache.keys, preferred_element_type=jnp.float32)
    scores_BKqSC = scores.reshape(B, K, H // K, S, C) * h**-0.5
    before_BSC = positions_BS[:, :, None] - cache.positions[:, None]
    visible_BSC = (cache.positions >= 0)[:, None] & (before_BSC >= 0) & (before_BSC < window)
    scores_BKqSC = jnp.where(visible_BSC[:, None, None], scores_BKqSC, -jnp.inf)
    sinks_Kq = sinks_H.astype(jnp.float32).reshape(1, K, H // K, 1, 1)
    top = jnp.maximum(scores_BKqSC.max(-1, keepdims=True), sinks_Kq)
    weights_BKqSC = jnp.exp(scores_BKqSC - top)
    total = weights_BKqSC.sum(-1, keepdims=True) + jnp.exp(sinks_Kq - top)
    weights_BKXC = weights_BKqSC.astype(q_BSHh.dtype).reshape(B, K, -1, C)
    mixed = jnp.einsum("BKXC,BKCh->BKXh", weights_BKXC, cache.values, preferred_element_type=jnp.float32)
    mixed = (mixed.reshape(*total.shape[:-1], h) / total).astype(q_BSHh.dtype)
    return jnp.moveaxis(mixed, 3, 1).reshape(B, S, H, h)


def _document_starts(segment_ids_BS: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """Where the document of each token begins."""
    before = jnp.pad(segment_ids_BS, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    return lax.cummax(jnp.where(segment_ids_BS != before, jnp.arange(segment_ids_BS.shape[1])[None], 0), axis=1)
