"""Choosing experts of a layer together: again and again the one goes whose absence changes the layer's output least.

A score of each expert alone does not see who takes over its tokens. Here every set is judged as the layer would run
with it: the choice is made among the experts that stay, and their gates sum to 1 again. The output is linear in what
experts give, y = Σ_e g_e·f_e(x), so that the change by a set S needs of each token only its logits and the products of
its experts' outputs, f_i·f_j: ‖y − y_S‖² = Σ_ij δ_i·δ_j·(f_i·f_j), δ = g^S − g. Letters: see `config`; P are the pairs
i ≤ j of experts.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

AT_ONCE = 4096  # tokens whose changes are in memory: 8 MiB for 32 experts


class Grams(NamedTuple):
    """All that choosing needs to know of a layer's tokens, however wide its outputs are. Arrays are float32."""

    logits_TE: Float[Array, "T E"]
    """The router's."""
    products_TP: Float[Array, "T P"]
    """f_i·f_j, in the order of `pairs`."""
    weights_T: Float[Array, " T"]
    """What a token's squared change counts: 1/‖h‖², h the residual stream behind the layer; 0 leaves it out."""


class Elimination(NamedTuple):
    """The experts of a layer that go, first to last, and the loss after each."""

    gone: tuple[int, ...]
    losses: tuple[float, ...]

    def kept(self, num_experts: int, number: int) -> tuple[int, ...]:
        """The experts that stay where so many do, ascending: sets of all sizes come of one elimination."""
        return tuple(sorted({*range(num_experts)} - {*self.gone[: num_experts - number]}))


def pairs(num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """The experts i and j of each pair, [P] each."""
    return np.triu_indices(num_experts)


def eliminate(grams: Grams, top_k: int, least: int) -> Elimination:
    """Remove experts until `least` are left. Of several that cost the same the one with the highest id goes."""
    E = grams.logits_TE.shape[1]
    kept, gone, losses = np.ones(E, bool), list[int](), list[float]()
    while kept.sum() > least:
        without = np.asarray(losses_without(grams, jnp.asarray(kept), top_k))
        expert = E - 1 - int(np.argmin(without[::-1]))
        kept[expert] = False
        gone.append(expert)
        losses.append(float(without[expert]))
    return Elimination(tuple(gone), tuple(losses))


@partial(jax.jit, static_argnames="top_k")
def losses_without(grams: Grams, kept_E: Bool[Array, " E"], top_k: int) -> Float[Array, " E"]:
    """The loss if an expert goes from those that are kept; +∞ for one that has gone."""

    def without(expert: Array) -> Array:
        return loss(grams, kept_E.at[expert].set(False), top_k)

    candidates = lax.map(without, jnp.arange(len(kept_E)))
    return jnp.where(kept_E, candidates, jnp.inf)


@partial(jax.jit, static_argnames="top_k")
def loss(grams: Grams, kept_E: Bool[Array, " E"], top_k: int) -> Float[Array, ""]:
    """Σ_t q_t·‖y_t − y_S,t‖² of a set S, q the tokens' weights."""
    first_P, second_P = pairs(len(kept_E))
    times_P = np.where(first_P == second_P, 1, 2).astype(np.float32)

    def of_token(token: Grams) -> Array:
        logits_E, products_P, weight = token
        change_E = gates(logits_E, kept_E, top_k) - gates(logits_E, jnp.ones_like(kept_E), top_k)
        pairs_P = change_E[first_P] * change_E[second_P]
        return weight * jnp.dot(products_P, times_P * pairs_P, precision=lax.Precision.HIGHEST)

    return lax.map(of_token, grams, batch_size=AT_ONCE).sum()


def gates(logits_E: Float[Array, " E"], kept_E: Bool[Array, " E"], top_k: int) -> Float[Array, " E"]:
    """The gate of every expert where a token takes the best of those that are kept; 0 of the others."""
    best_k, experts_k = lax.top_k(jnp.where(kept_E, logits_E, -jnp.inf), top_k)
    return jnp.zeros_like(logits_E).at[experts_k].set(jax.nn.softmax(best_k))
