"""Which drafted tokens are accepted, and what takes the place of the first that is not. Letters: see `config`.

Source: Leviathan, Kalman and Matias 2023 (arXiv:2211.17192), algorithm 1. N tokens are drafted.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Judged(NamedTuple):
    """What became of a draft."""

    accepted: Int[Array, " B"]
    """How many of its tokens stay: the first ones."""
    following: Int[Array, " B"]
    """The token behind them, which the target chooses."""


def distribution(logits: Float[Array, "*any V"], temperature: float) -> Float[Array, "*any V"]:
    """The probabilities that tokens are drawn with; at a temperature of 0 all is on the likeliest."""
    if temperature == 0:
        return jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=jnp.float32)
    return jax.nn.softmax(logits / temperature, axis=-1)


def accepting(target: Float[Array, "*any V"], draft: Float[Array, "*any V"]) -> Float[Array, "*any V"]:
    """The probability that a token stays if it is drafted: min(1, p/q)."""
    return jnp.where(draft > 0, jnp.minimum(1, target / jnp.where(draft > 0, draft, 1)), 1)


def replacing(target: Float[Array, "*any V"], draft: Float[Array, "*any V"]) -> Float[Array, "*any V"]:
    """What a rejected token's place is drawn from: max(0, p − q), scaled to 1; p where nothing can be rejected."""
    rest = jnp.maximum(target - draft, 0)
    total = rest.sum(-1, keepdims=True)
    return jnp.where(total > 0, rest / jnp.where(total > 0, total, 1), target)


def judge(
    target_BMV: Float[Array, "B M V"], draft_BNV: Float[Array, "B N V"], drafted_BN: Int[Array, "B N"], key: Array
) -> Judged:
    """What becomes of tokens that were drawn from `draft`, where `target` has one position more (M = N + 1)."""
    B, N = drafted_BN.shape
    stays, draws = jax.random.split(key)
    chance_BNV = accepting(target_BMV[:, :N], draft_BNV)
    chance_BN = jnp.take_along_axis(chance_BNV, drafted_BN[..., None], axis=-1)[..., 0]
    is_kept_BN = jax.random.uniform(stays, (B, N)) < chance_BN
    accepted_B = jnp.cumprod(is_kept_BN, axis=1).sum(1)
    # Behind a draft that is accepted whole nothing was drafted, and the target alone draws.
    draft_BMV = jnp.pad(draft_BNV, ((0, 0), (0, 1), (0, 0)))
    last_BV = replacing(target_BMV, draft_BMV)[jnp.arange(B), accepted_B]
    return Judged(accepted_B, jax.random.categorical(draws, jnp.log(last_BV)).astype(jnp.int32))
