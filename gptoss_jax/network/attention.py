"""Grouped-query attention with one learned sink logit per query head. Letters: see `config`."""

from typing import Any, NamedTuple

import jax
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
        q_BSHh = rotate(project(x_BSD, self.q_kernel[...], self.q_bias[...], place), *rope)
        k_BSKh = rotate(project(x_BSD, self.k_kernel[...], self.k_bias[...], place), *rope)
        v_BSKh = project(x_BSD, self.v_kernel[...], self.v_bias[...], place)
        sequences = q_BSHh, k_BSKh, v_BSKh, self.sinks[...], tokens.segments
        if cache is not None:
            cache = cache.store(k_BSKh, v_BSKh, tokens.positions, tokens.segments)
        if cache is not None and (follows or x_BSD.shape[1] == 1):
            window = jnp.where(sliding, self.sliding_window, jnp.iinfo(jnp.int32).max)
            mixed_BSHh = attend_to_cache(q_BSHh, cache, self.sinks[...], tokens.positions, window)
        else:
            mixed_BSHh = self._attend(sequences, sliding, place)
        o_kernel_DI = self.o_kernel[...].reshape(x_BSD.shape[-1], -1)
        mixed_BSI = mixed_BSHh.reshape(*x_BSD.shape[:2], -1)
        return project(mixed_BSI, o_kernel_DI, self.o_bias[...], place, split=True), cache

    def _attend(self, sequences: tuple[Array, ...], sliding: Bool[Array, ""], place: Placement) -> Array:
        """Attention of rows from their first tokens on. Its gradients are made by blocks from what it takes, whichever
        kernel runs; where `place.differentiable` they are those of the operations themselves."""

        def window(segment_ids_BS: Array, sliding: Array) -> Array:
            return jnp.where(sliding, self.sliding_window, segment_ids_BS.shape[1])

        def run(q: Array, k: Array, v: Array, sinks: Array, segments: Array, sliding: Array) -> Array:
            if place.platform == "tpu" and not place.differentiable:
                return splash.attend(q, k, v, sinks, segments, sliding, self.sliding_window, place.interpret)
            return attend(q, k, v, sinks, segments, window(segments, sliding), place)

        def backward(inputs: tuple[Array, ...], change_BSHh: Array) -> tuple[Array | None, ...]:
            q, k, v, sinks, segments, sliding = inputs
            seen = window(segments, sliding)
            return *attend_backward(q, k, v, sinks, segments, seen, change_BSHh, place), None, None

        inputs: Any = (*sequences, sliding)
        if place.differentiable:
            return run(*inputs)
        attended = jax.custom_vjp(run)
        attended.defvjp(lambda *inputs: (run(*inputs), inputs), backward)
        return attended(*inputs)


def project(
    x_BSI: Float[Array, "B S I"],
    kernel: Float[Array, "*out I"],
    bias: Float[Array, "*out"],
    place: Placement,
    split: bool = False,
) -> Float[Array, "B S *out"]:
    """x·Wᵀ + b, [B, S, *out], summed in float32 and returned in x's dtype; `split` says that I is split over devices.

    Flat matrices and a float32 result: XLA's CPU backend transposes kernels of more axes at each call, and
    rounds bfloat16 results one by one, at a quarter of the speed; on TPU rows become a convolution's window.
    """
    flat_TI = x_BSI.reshape(-1, x_BSI.shape[-1])
    flat_OI = kernel.reshape(-1, kernel.shape[-1])
    out_TO = (_product if place.differentiable else _product_for_x)(flat_TI, flat_OI)
    if split:
        out_TO = place.sum_experts(out_TO, x_BSI.dtype)
    out_TO = (out_TO + bias.reshape(1, -1)).astype(x_BSI.dtype)
    return out_TO.reshape(*x_BSI.shape[:2], *bias.shape)


def _product(x_TI: Float[Array, "T I"], kernel_OI: Float[Array, "O I"]) -> Float[Array, "T O"]:
    return jnp.einsum("TI,OI->TO", x_TI, kernel_OI, preferred_element_type=jnp.float32)


def _product_backward(kernel_OI: Array, change_TO: Array) -> tuple[Array, None]:
    # Of float32 with bfloat16 XLA's CPU backend makes a product of float32, at a third of the speed.
    change_TO = change_TO.astype(kernel_OI.dtype)
    of_x_TI = jnp.einsum("TO,OI->TI", change_TO, kernel_OI, preferred_element_type=jnp.float32)
    return of_x_TI.astype(kernel_OI.dtype), None


_product_for_x = jax.custom_vjp(_product)  # x alone has a gradient
_product_for_x.defvjp(lambda x_TI, kernel_OI: (_product(x_TI, kernel_OI), kernel_OI), _product_backward)


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
    blocks = _Blocks.of(q_BSHh, k_BSKh, v_BSKh, sinks_H, segment_ids_BS, window, place)

    def one_block(index: Array) -> Array:
        at = jnp.divmod(index, blocks.per_row)
        _, total, mixed = blocks.sums(*at, place)
        return jnp.moveaxis((mixed / total[..., None]).astype(v_BSKh.dtype), 3, 1)  # [R, M, K, H/K, h]

    return blocks.joined(lax.map(one_block, jnp.arange(len(blocks.q) * blocks.per_row)), q_BSHh.shape)


def attend_backward(
    q_BSHh: Float[Array, "B S H h"],
    k_BSKh: Float[Array, "B S K h"],
    v_BSKh: Float[Array, "B S K h"],
    sinks_H: Float[Array, " H"],
    segment_ids_BS: Int[Array, "B S"],
    window: Int[Array, ""],
    change_BSHh: Float[Array, "B S H h"],
    place: Placement,
) -> tuple[Float[Array, "B S H h"], Float[Array, "B S K h"], Float[Array, "B S K h"], Float[Array, " H"]]:
    """From the gradient by what `attend` gives those by queries, keys, values and sinks, each in its own type.

    Scores are made again, block by block, with those left out that `attend` leaves out (Dao et al. 2022,
    arXiv:2205.14135, appendix B.4).
    """
    blocks = _Blocks.of(q_BSHh, k_BSKh, v_BSKh, sinks_H, segment_ids_BS, window, place)
    change = _Blocks.of(change_BSHh, k_BSKh, v_BSKh, sinks_H, segment_ids_BS, window, place)
    dtype = q_BSHh.dtype

    def one_block(totals: tuple[Array, ...], index: Array) -> tuple[tuple[Array, ...], Array]:
        rows, query = jnp.divmod(index, blocks.per_row)
        top, total, mixed = blocks.sums(rows, query, place)
        log_total, q_RKXh, change_RKXh = top + jnp.log(total), blocks.queries(rows, query), change.queries(rows, query)
        change_RKqMh = change_RKXh.astype(jnp.float32).reshape(mixed.shape)
        # What each score's gradient lacks: the mean of the others', weighted as they are.
        mean = (change_RKqMh * mixed).sum(-1) / total

        def one_key_block(key: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            of_q_RKXh, of_k, of_v = sums
            k_RKNh, v_RKNh = blocks.k[rows, :, key], blocks.v[rows, :, key]
            scores = _scores(q_RKXh, k_RKNh, blocks.visible(rows, query, key), top.shape)
            weights = jnp.exp(scores - log_total[..., None])
            more_RKXh, of_k_RKNh, of_v_RKNh = _of_keys(weights, mean, change_RKXh, q_RKXh, k_RKNh, v_RKNh)
            return of_q_RKXh + more_RKXh, of_k.at[rows, :, key].add(of_k_RKNh), of_v.at[rows, :, key].add(of_v_RKNh)

        of_k, of_v, of_sinks = totals
        nothing = jnp.zeros(q_RKXh.shape, jnp.float32)
        of_q_RKXh, of_k, of_v = lax.fori_loop(
            *blocks.keys_seen(rows, query, place), one_key_block, (nothing, of_k, of_v)
        )
        of_sinks -= (jnp.exp(blocks.sinks - log_total) * mean).sum((0, 3))
        of_q = jnp.moveaxis(of_q_RKXh.astype(dtype).reshape(mixed.shape), 3, 1)
        return (of_k, of_v, of_sinks), of_q

    nothing = *(jnp.zeros(x.shape, jnp.float32) for x in (blocks.k, blocks.v)), jnp.zeros(blocks.sinks.shape[1:3])
    (of_k, of_v, of_sinks), of_q = lax.scan(one_block, nothing, jnp.arange(len(blocks.q) * blocks.per_row))
    of_k, of_v = (blocks.tokens_first(x).astype(dtype) for x in (of_k, of_v))
    return blocks.joined(of_q, q_BSHh.shape), of_k, of_v, of_sinks.reshape(-1).astype(sinks_H.dtype)


def _of_keys(
    weights: Float[Array, "R K q M N"],
    mean: Float[Array, "R K q M"],
    change_RKXh: Float[Array, "R K X h"],
    q_RKXh: Float[Array, "R K X h"],
    k_RKNh: Float[Array, "R K N h"],
    v_RKNh: Float[Array, "R K N h"],
) -> tuple[Float[Array, "R K X h"], Float[Array, "R K N h"], Float[Array, "R K N h"]]:
    """What a block of queries with a block of keys adds to the gradients by queries, keys and values, float32, where
    keys have these weights."""
    dtype, scale = q_RKXh.dtype, q_RKXh.shape[-1] ** -0.5
    of_weights = jnp.einsum("RKXh,RKNh->RKXN", change_RKXh, v_RKNh, preferred_element_type=jnp.float32)
    of_scores = weights * (of_weights.reshape(weights.shape) - mean[..., None]) * scale
    weights_RKXN, of_scores_RKXN = (x.astype(dtype).reshape(of_weights.shape) for x in (weights, of_scores))
    return (
        jnp.einsum("RKXN,RKNh->RKXh", of_scores_RKXN, k_RKNh, preferred_element_type=jnp.float32),
        jnp.einsum("RKXN,RKXh->RKNh", of_scores_RKXN, q_RKXh, preferred_element_type=jnp.float32),
        jnp.einsum("RKXN,RKXh->RKNh", weights_RKXN, change_RKXh, preferred_element_type=jnp.float32),
    )


class _Blocks(NamedTuple):
    """Sequences cut into blocks of M tokens, of which R rows are at hand at once."""

    q: Float[Array, "some R blocks K M qh"]
    k: Float[Array, "some R blocks K M h"]
    v: Float[Array, "some R blocks K M h"]
    sinks: Float[Array, "R K q M"]
    segments: Int[Array, "some R blocks M"]
    starts: Int[Array, "some R blocks M"]
    """Where the document of each token begins."""
    window: Int[Array, ""]
    length: int
    """S."""

    @classmethod
    def of(
        cls,
        q_BSHh: Array,
        k_BSKh: Array,
        v_BSKh: Array,
        sinks_H: Array,
        segments: Array,
        window: Array,
        place: Placement,
    ) -> "_Blocks":
        B, S, H, _ = q_BSHh.shape
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
        starts = by_block(_document_starts(segments))
        sinks = jnp.broadcast_to(sinks_H.astype(jnp.float32).reshape(1, K, H // K, 1), (R, K, H // K, M))
        return cls(q, k, v, sinks, by_block(segments), starts, window, S)

    @property
    def per_row(self) -> int:
        """Blocks of a row."""
        return self.q.shape[2]

    def queries(self, rows: Array, query: Array) -> Float[Array, "R K X h"]:
        """A block of queries; X: q·M of them."""
        R, K, q, M = self.sinks.shape
        q_RKMqh = self.q[rows, :, query].reshape(R, K, M, q, -1)
        return jnp.moveaxis(q_RKMqh, 2, 3).reshape(R, K, q * M, -1)

    def visible(self, rows: Array, query: Array, key: Array) -> Bool[Array, "R M M"]:
        """Which keys of a block each query of a block sees."""
        M = self.segments.shape[-1]
        distance_MN = (query - key) * M + jnp.arange(M)[:, None] - jnp.arange(M)[None]
        same_RMN = self.segments[rows, :, query][:, :, None] == self.segments[rows, :, key][:, None]
        return same_RMN & ((distance_MN >= 0) & (distance_MN < self.window))[None]

    def keys_seen(self, rows: Array, query: Array, place: Placement) -> tuple[Any, Any]:
        """The first block of keys that any query of a block sees, and the one behind the last."""
        M = self.segments.shape[-1]
        # Keys before the first query's document, or before its window, serve no later query of the block either.
        lowest = jnp.maximum(self.starts[rows, :, query, 0].min(), query * M - self.window + 1)
        any_token = (self.segments[rows, :, query, 0] > 0).any()
        return (0, self.per_row) if place.differentiable else (lowest // M, jnp.where(any_token, query + 1, 0))

    def sums(self, rows: Array, query: Array, place: Placement) -> Sums:
        """Those of a block of queries over all keys that it sees."""
        q_RKXh = self.queries(rows, query)

        def one_key_block(key: Array, sums: Sums) -> Sums:
            k_RKNh, v_RKNh = self.k[rows, :, key], self.v[rows, :, key]
            return _add_keys(sums, q_RKXh, k_RKNh, v_RKNh, self.visible(rows, query, key))

        nothing = self.sinks, jnp.ones(self.sinks.shape), jnp.zeros((*self.sinks.shape, q_RKXh.shape[-1]))
        return lax.fori_loop(*self.keys_seen(rows, query, place), one_key_block, nothing)

    def joined(self, mixed: Array, shape: tuple[int, ...]) -> Float[Array, "B S H h"]:
        """Blocks of queries, each [R, M, K, q, h], as sequences again."""
        B, S, H, h = shape
        R, M = self.segments.shape[1], self.segments.shape[-1]
        mixed = jnp.moveaxis(mixed.reshape(B // R, self.per_row, R, M, H, h), 2, 1)
        return mixed.reshape(B, self.per_row * M, H, h)[:, :S]

    def tokens_first(self, blocks: Array) -> Float[Array, "B S K h"]:
        """Blocks of keys as sequences again."""
        some, R, per_row, K, M, h = blocks.shape
        return jnp.moveaxis(blocks, 4, 3).reshape(some * R, per_row * M, K, h)[:, : self.length]


def _add_keys(
    sums: Sums,
    q_RKXh: Float[Array, "R K X h"],
    k_RKNh: Float[Array, "R K N h"],
    v_RKNh: Float[Array, "R K N h"],
    visible_RMN: Bool[Array, "R M N"],
) -> Sums:
    """The softmax over a block of keys more (X: q·M queries): earlier sums shrink where a higher score comes."""
    top, total, mixed = sums
    scores = _scores(q_RKXh, k_RKNh, visible_RMN, top.shape)
    higher = jnp.maximum(top, scores.max(-1))
    weights = jnp.exp(scores - higher[..., None])
    shrink = jnp.exp(top - higher)
    weights_RKXN = weights.astype(v_RKNh.dtype).reshape(*q_RKXh.shape[:3], -1)
    values = jnp.einsum("RKXN,RKNh->RKXh", weights_RKXN, v_RKNh, preferred_element_type=jnp.float32)
    mixed = mixed * shrink[..., None] + values.reshape(mixed.shape)
    return higher, total * shrink + weights.sum(-1), mixed


def _scores(q_RKXh: Array, k_RKNh: Array, visible_RMN: Array, shape: tuple[int, ...]) -> Float[Array, "R K q M N"]:
    """Of a block of queries, which are of that shape, and a block of keys; −∞ where a key is not seen."""
    scores = jnp.einsum("RKXh,RKNh->RKXN", q_RKXh, k_RKNh, preferred_element_type=jnp.float32)
    scores = scores.reshape(*shape, -1) * q_RKXh.shape[-1] ** -0.5
    return jnp.where(visible_RMN[:, None, None], scores, -jnp.inf)


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
