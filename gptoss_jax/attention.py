"""Grouped-query attention with one learned sink logit per query head. Letters: see `config`."""

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from . import splash
from .config import Config
from .mesh import Placement
from .rope import rotate

# Scores of queries with keys held at once, over all rows and heads: 256 MiB in float32, where all scores
# of a single row of 4,096 tokens at 64 heads are 4 GiB.
SCORES_AT_ONCE = 1 << 26


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
        segment_ids_BS: Int[Array, "B S"],
        sliding: Bool[Array, ""],
        place: Placement,
    ) -> Float[Array, "B S D"]:
        """With `sliding` a query sees `sliding_window` tokens, itself included; else all before it."""
        q_BSHh = rotate(project(x_BSD, self.q_kernel[...], self.q_bias[...]), *rope)
        k_BSKh = rotate(project(x_BSD, self.k_kernel[...], self.k_bias[...]), *rope)
        v_BSKh = project(x_BSD, self.v_kernel[...], self.v_bias[...])
        sequences = q_BSHh, k_BSKh, v_BSKh, self.sinks[...], segment_ids_BS
        if place.platform == "tpu":
            mixed_BSHh = splash.attend(*sequences, sliding, self.sliding_window, place.interpret)
        else:
            S = x_BSD.shape[1]
            mixed_BSHh = attend(*sequences, jnp.where(sliding, self.sliding_window, S))
        o_kernel_DI = self.o_kernel[...].reshape(x_BSD.shape[-1], -1)
        return project(mixed_BSHh.reshape(*x_BSD.shape[:2], -1), o_kernel_DI, self.o_bias[...], place)


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
) -> Float[Array, "B S H h"]:
    """Softmax attention in float32, a block of queries at a time.

    A query sees the keys of its own segment (a document, or padding) that are not after it and
    less than `window` before it. The sink joins the maximum and the denominator, and has no value.
    """
    B, S, H, h = q_BSHh.shape
    K = k_BSKh.shape[2]
    block = max(1, min(S, SCORES_AT_ONCE // (B * H * S)))
    num_blocks = -(-S // block)
    padding = num_blocks * block - S
    q = jnp.pad(q_BSHh, ((0, 0), (0, padding), (0, 0), (0, 0))).reshape(B, num_blocks, block, K, H // K, h)
    q_segments = jnp.pad(segment_ids_BS, ((0, 0), (0, padding))).reshape(B, num_blocks, block)
    sinks = sinks_H.astype(jnp.float32).reshape(1, K, H // K, 1)
    keys = jnp.arange(S)

    def one_block(args: tuple[Array, Array, Array]) -> Array:
        index, q_BMKqh, segments_BM = args
        distance_MS = (index * block + jnp.arange(block))[:, None] - keys[None, :]
        same_document_BMS = segments_BM[:, :, None] == segment_ids_BS[:, None, :]
        visible_BMS = same_document_BMS & ((distance_MS >= 0) & (distance_MS < window))[None]
        scores = jnp.einsum("BMKqh,BSKh->BKqMS", q_BMKqh, k_BSKh, preferred_element_type=jnp.float32)
        scores = jnp.where(visible_BMS[:, None, None], scores * h**-0.5, -jnp.inf)
        top = jnp.maximum(scores.max(-1), sinks)
        weights = jnp.exp(scores - top[..., None])
        weights = weights / (weights.sum(-1) + jnp.exp(sinks - top))[..., None]
        weights = weights.astype(v_BSKh.dtype)
        mixed = jnp.einsum("BKqMS,BSKh->BMKqh", weights, v_BSKh, preferred_element_type=jnp.float32)
        return mixed.astype(v_BSKh.dtype)

    blocks = lax.map(one_block, (jnp.arange(num_blocks), jnp.moveaxis(q, 1, 0), jnp.moveaxis(q_segments, 1, 0)))
    return jnp.moveaxis(blocks, 0, 1).reshape(B, num_blocks * block, H, h)[:, :S]
