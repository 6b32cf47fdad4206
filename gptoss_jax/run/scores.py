"""How the model expected each token: the scores of EAFT. Letters: see `config`."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ..devices.placement import Placement
from ..network.batch import Tokens

TOP_LOGITS = 20  # over which EAFT takes a token's entropy
# Tokens unembedded at once: 128 × 201,088 logits in float32 are 98 MiB.
UNEMBED_BLOCK = 128


class TokenScores(NamedTuple):
    """How the model expected each token; −1 where a document begins, and in padding."""

    probability: Float[Array, "B S"]
    """The true token's, from the logits before it."""
    entropy: Float[Array, "B S"]
    """The entropy of the top 20 logits before it, renormalised, over ln 20."""


def token_scores(
    logits: Callable[[Array], Array],
    vocab_size: int,
    final_BSD: Float[Array, "B S D"],
    tokens: Tokens,
    place: Placement,
) -> TokenScores:
    """The scores of all tokens; `logits` unembeds some of them."""
    B, S, D = final_BSD.shape
    padding = -(B * S) % UNEMBED_BLOCK
    # The logits at a position score the token after it.
    targets = jnp.roll(tokens.ids, -1, axis=1).reshape(-1)
    blocks = (
        jnp.pad(final_BSD.reshape(-1, D), ((0, padding), (0, 0))).reshape(-1, UNEMBED_BLOCK, D),
        jnp.pad(targets, (0, padding)).reshape(-1, UNEMBED_BLOCK),
    )
    first, count = place.local(vocab_size)

    def score(block: tuple[Array, Array]) -> tuple[Array, Array]:
        final_MD, target_M = block
        logits_MV = logits(final_MD)
        # Of a vocabulary that is split each device adds its part to the softmax's sum.
        largest_M = place.max_experts(logits_MV.max(-1))
        sum_M = place.sum_experts(jnp.exp(logits_MV - largest_M[:, None]).sum(-1))
        here_M = jnp.where(target_M >= first, target_M - first, count)
        true_M = jnp.take_along_axis(logits_MV, here_M[:, None], axis=-1, mode="fill", fill_value=-jnp.inf)[:, 0]
        probability = jnp.exp(place.max_experts(true_M) - largest_M) / sum_M
        top = place.gather_experts(lax.top_k(logits_MV, min(TOP_LOGITS, count))[0])
        top = jax.nn.log_softmax(lax.top_k(top, min(TOP_LOGITS, vocab_size))[0], axis=-1)
        entropy = -jnp.sum(jnp.exp(top) * top, axis=-1) / jnp.log(TOP_LOGITS)
        return probability, entropy

    def at_target(values: Array) -> Array:
        values_BS = jnp.roll(values.reshape(-1)[: B * S].reshape(B, S), 1, axis=1)
        segments = tokens.segments
        scored = (segments > 0) & (segments == jnp.roll(segments, 1, axis=1)) & (jnp.arange(S) > 0)[None]
        return jnp.where(scored, values_BS, -1.0)

    probability, entropy = lax.map(score, blocks)
    return TokenScores(at_target(probability), at_target(entropy))
