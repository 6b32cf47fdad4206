"""How a model expects tokens: what its logits say of them, and the scores of EAFT. Letters: see `config`."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ..devices.placement import Placement
from ..network.batch import Tokens

TOP_LOGITS = 20  # over which EAFT takes a token's entropy
# Tokens unembedded at once: 128 × 201,088 logits in float32 are 98 MiB.
UNEMBED_BLOCK = 128


class Logits(NamedTuple):
    """Logits of some positions, normalised, and what they say of the token behind each; V may be split over devices."""

    log_p: Float[Array, "M V"]
    true: Float[Array, " M"]
    """ln p of the true token."""
    entropy: Float[Array, " M"]
    """The entropy of the top 20 logits, renormalised, over ln 20."""
    best: Int[Array, " M"]
    """The most probable token; of equal ones the first."""


def expect(logits_MV: Float[Array, "M V"], target_M: Int[Array, " M"], vocab_size: int, place: Placement) -> Logits:
    """What logits say of the tokens that come. Of a vocabulary that is split each device adds its part."""
    first, count = place.local(vocab_size)
    own_M = logits_MV.max(-1)
    largest_M = place.max_experts(own_M)
    sum_M = place.sum_experts(jnp.exp(logits_MV - largest_M[:, None]).sum(-1))
    log_p = logits_MV - (largest_M + jnp.log(sum_M))[:, None]
    top = place.gather_experts(lax.top_k(logits_MV, min(TOP_LOGITS, count))[0])
    top = jax.nn.log_softmax(lax.top_k(top, min(TOP_LOGITS, vocab_size))[0], axis=-1)
    entropy_M = -jnp.sum(jnp.exp(top) * top, axis=-1) / jnp.log(TOP_LOGITS)
    best_M = jnp.where(own_M == largest_M, first + jnp.argmax(logits_MV, axis=-1), vocab_size)
    best_M = -place.max_experts(-best_M)
    return Logits(log_p, log_p_of(log_p, target_M[:, None], vocab_size, place)[:, 0], entropy_M, best_M)


def log_p_of(
    log_p_MV: Float[Array, "M V"], ids_Mn: Int[Array, "M n"], vocab_size: int, place: Placement
) -> Float[Array, "M n"]:
    """ln p of some tokens, whichever device has them."""
    first, count = place.local(vocab_size)
    here_Mn = jnp.where(ids_Mn >= first, ids_Mn - first, count)
    return place.sum_experts(jnp.take_along_axis(log_p_MV, here_Mn, axis=-1, mode="fill", fill_value=0))


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

    def score(block: tuple[Array, Array]) -> tuple[Array, Array]:
        final_MD, target_M = block
        found = expect(logits(final_MD), target_M, vocab_size, place)
        return jnp.exp(found.true), found.entropy

    def at_target(values: Array) -> Array:
        values_BS = jnp.roll(values.reshape(-1)[: B * S].reshape(B, S), 1, axis=1)
        segments = tokens.segments
        scored = (segments > 0) & (segments == jnp.roll(segments, 1, axis=1)) & (jnp.arange(S) > 0)[None]
        return jnp.where(scored, values_BS, -1.0)

    probability, entropy = lax.map(score, blocks)
    return TokenScores(at_target(probability), at_target(entropy))
