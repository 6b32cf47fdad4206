"""The choice of a token from its logits. Letters: see `config`."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ..run.options import Sampling


def sample(
    logits_BV: Float[Array, "B V"], rows_B: Int[Array, " B"], positions_B: Int[Array, " B"], sampling: Sampling
) -> Int[Array, " B"]:
    """A token a row, for the position that it will have.

    What is drawn depends on the seed, the row's number and the position: not on which other rows run, or when."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    B, V = logits_BV.shape
    kept = sampling.top_k if 0 < sampling.top_k < V else V
    # The largest is 0, and stays so however small the temperature is.
    temperature = max(sampling.temperature, float(jnp.finfo(jnp.float32).tiny))
    ordered_BK, ids_BK = (logits_BV - logits_BV.max(-1, keepdims=True)) / temperature, None
    if kept < V or sampling.top_p < 1:
        ordered_BK, ids_BK = lax.top_k(ordered_BK, kept)
        before_BK = jnp.cumsum(jax.nn.softmax(ordered_BK, axis=-1), axis=-1)
        before_BK = jnp.pad(before_BK, ((0, 0), (1, 0)))[:, :-1]
        # The first one always stays: nothing stands before it.
        ordered_BK = jnp.where(before_BK < sampling.top_p, ordered_BK, -jnp.inf)
    keys_B = jax.vmap(
        lambda row, position: jax.random.fold_in(jax.random.fold_in(jax.random.key(sampling.seed), row), position)
    )(rows_B, positions_B)
    drawn_B = jax.vmap(jax.random.categorical)(keys_B, ordered_BK)
    return (drawn_B if ids_BK is None else ids_BK[jnp.arange(B), drawn_B]).astype(jnp.int32)
