"""The jitted steps. What a step does not return, the compiler removes: one model serves them all."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .batching import Batch
from .model import GptOss, Output
from .saliency import Statistics

TOP_LOGITS = 20  # over which EAFT takes a token's entropy
# Tokens unembedded at once: 128 × 201,088 logits in float32 are 98 MiB.
UNEMBED_BLOCK = 128

# Operands of float32 stay float32 on TPU and GPU too, where the default rounds them to bfloat16 or
# TF32; for bfloat16 operands the setting changes nothing.
_float32_is_float32 = jax.default_matmul_precision("highest")


@jax.jit
@_float32_is_float32
def forward_step(model: GptOss, batch: Batch) -> Output:
    """Logits [B, S, V] and, stacked over layers, hidden states, routing and statistics."""
    return model(batch)


@jax.jit
@_float32_is_float32
def profile_step(model: GptOss, batch: Batch) -> Statistics:
    """The statistics of every layer, [L, G, …]; no unembedding is computed."""
    return model(batch).layers.statistics


class TokenScores(NamedTuple):
    """How the model expected each token; −1 where a document begins, and in padding."""

    probability: Float[Array, "B S"]
    """Of the true token, from the logits before it."""
    entropy: Float[Array, "B S"]
    """Of the top 20 logits before it, renormalised, over ln 20."""


@jax.jit
@_float32_is_float32
def scored_profile_step(model: GptOss, batch: Batch) -> tuple[Statistics, TokenScores]:
    """The statistics of every layer, and the scores of every token; [B, S, V] never exists."""
    output = model(batch)
    B, S, D = output.final.shape
    padding = -(B * S) % UNEMBED_BLOCK
    # The logits at a position score the token after it.
    targets = jnp.roll(batch.token_ids, -1, axis=1).reshape(-1)
    blocks = (
        jnp.pad(output.final.reshape(-1, D), ((0, padding), (0, 0))).reshape(-1, UNEMBED_BLOCK, D),
        jnp.pad(targets, (0, padding)).reshape(-1, UNEMBED_BLOCK),
    )

    def score(block: tuple[Array, Array]) -> tuple[Array, Array]:
        final_MD, target_M = block
        logits_MV = model.logits(final_MD)
        log_p = jax.nn.log_softmax(logits_MV, axis=-1)
        top = jax.nn.log_softmax(lax.top_k(logits_MV, min(TOP_LOGITS, logits_MV.shape[-1]))[0], axis=-1)
        entropy = -jnp.sum(jnp.exp(top) * top, axis=-1) / jnp.log(TOP_LOGITS)
        return jnp.exp(jnp.take_along_axis(log_p, target_M[:, None], axis=-1)[:, 0]), entropy

    def at_target(values: Array) -> Array:
        values_BS = jnp.roll(values.reshape(-1)[: B * S].reshape(B, S), 1, axis=1)
        segments = batch.segment_ids
        scored = (segments > 0) & (segments == jnp.roll(segments, 1, axis=1)) & (jnp.arange(S) > 0)[None]
        return jnp.where(scored, values_BS, -1.0)

    probability, entropy = lax.map(score, blocks)
    return output.layers.statistics, TokenScores(at_target(probability), at_target(entropy))
