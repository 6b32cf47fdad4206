"""Choosing experts of a layer together: again and again the one goes whose absence changes the layer's output least.

A score of each expert alone does not see who takes over its tokens. Here every set is judged as the layer would run
with it: the choice is made among the experts that stay, and their gates sum to 1 again. The output is linear in what
experts give, y = Σ_e g_e·f_e(x), so that the change by a set S needs of each token only its logits and the products of
its experts' outputs, f_i·f_j: ‖y − y_S‖² = Σ_ij δ_i·δ_j·(f_i·f_j), δ = g^S − g. Letters: see `config`; P are the pairs
i ≤ j of experts, d are domains.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ..network.products import pairs
from .criteria import GREEDY_COSINE

AT_ONCE = 1024  # tokens whose changes are in memory: 11 MiB for 32 experts, of which a token takes 4


class Grams(NamedTuple):
    """All that choosing needs to know of a layer's tokens, however wide its outputs are."""

    logits_TE: Float[Any, "T E"]
    """The router's, float32."""
    products_TP: Float[Any, "T P"]
    """f_i·f_j, in the order of `pairs`, float32."""
    weights_T: Float[Any, " T"]
    """What a token's squared change counts: w/‖h‖², w the token's own weight and h the residual stream behind the
    layer; 0 leaves it out. float32."""
    turns_T: Float[Any, " T"]
    """How far the layer turns the stream: 1 − the cosine of it before and behind the layer, float32."""
    domains_T: Int[Any, " T"]
    """The domain in whose loss it counts."""


WIDE = Grams(True, True, False, False, False)  # which of them have a last axis beside that of tokens


def weighted(grams: Grams, rule: str) -> Grams:
    """With the weights that tokens have by a rule of `criteria.ELIMINATIONS`: all alike, or the more the more of its
    work the layer does on them."""
    return grams._replace(weights_T=grams.weights_T * grams.turns_T) if rule == GREEDY_COSINE else grams


class Aim(NamedTuple):
    """What is to be small: the sum of the domains' losses, each with its factor, or the largest of these."""

    factors_d: Sequence[float] = (1.0,)
    largest: bool = False

    def of(self, losses: np.ndarray) -> np.ndarray:
        """[…] of losses […, d]."""
        weighted = losses * np.asarray(self.factors_d)
        return weighted.max(-1) if self.largest else weighted.sum(-1)


OVERALL = Aim()


class Elimination(NamedTuple):
    """The experts of a layer that go, first to last, and what was to be small after each."""

    gone: tuple[int, ...]
    losses: tuple[float, ...]

    def kept(self, num_experts: int, number: int) -> tuple[int, ...]:
        """The experts that stay where so many do, ascending: sets of all sizes come of one elimination."""
        return tuple(sorted({*range(num_experts)} - {*self.gone[: num_experts - number]}))


def eliminate(grams: Grams, top_k: int, least: int = 1, aim: Aim = OVERALL) -> Elimination:
    """Remove experts until `least` are left. Of several that cost the same the one with the highest id goes."""
    E = grams.logits_TE.shape[1]
    kept, gone, losses = np.ones(E, bool), list[int](), list[float]()
    while kept.sum() > least:
        without = aim.of(np.asarray(losses_without(grams, jnp.asarray(kept), top_k, len(aim.factors_d)), np.float64))
        without[~kept] = np.inf
        expert = E - 1 - int(np.argmin(without[::-1]))
        kept[expert] = False
        gone.append(expert)
        losses.append(float(without[expert]))
    return Elimination(tuple(gone), tuple(losses))


@partial(jax.jit, static_argnums=(2, 3))
def losses_without(grams: Grams, kept_E: Bool[Array, " E"], top_k: int, domains: int) -> Float[Array, "E d"]:
    """Each domain's loss if an expert goes from those that are kept.

    It rises by what changes for the tokens that have chosen the expert among these: for all others nothing does.
    """
    E = len(kept_E)
    r = min(top_k + 1, E)  # who is chosen, and behind them the runner-up

    def of_token(token: Grams) -> tuple[Array, Array]:
        logits_r, experts_r = lax.top_k(jnp.where(kept_E, token.logits_TE, -jnp.inf), r)
        # The first case is the set itself, the others are it without one of the chosen.
        is_left = jnp.concatenate([jnp.arange(r)[None] < top_k, ~jnp.eye(r, dtype=bool)[:top_k]])
        gates_cr = jax.nn.softmax(jnp.where(is_left, logits_r[None], -jnp.inf), axis=-1)
        gates_cE = jnp.zeros((len(gates_cr), E)).at[:, experts_r].set(gates_cr)
        changes_cE = gates_cE - gates(token.logits_TE, top_k)[None]
        squared_c = jax.vmap(partial(squared, token.products_TP))(changes_cE)
        rises_E = jnp.zeros(E).at[experts_r[:top_k]].set(squared_c[1:] - squared_c[0])
        return token.weights_T * squared_c[0], token.weights_T * rises_E

    losses_T, rises_TE = lax.map(of_token, grams, batch_size=AT_ONCE)
    is_of_Td = (grams.domains_T[:, None] == jnp.arange(domains)[None]).astype(jnp.float32)
    rises_Ed = jnp.einsum("TE,Td->Ed", rises_TE, is_of_Td, precision=lax.Precision.HIGHEST)
    return rises_Ed + jnp.einsum("T,Td->d", losses_T, is_of_Td, precision=lax.Precision.HIGHEST)[None]


@partial(jax.jit, static_argnums=2)
def loss(grams: Grams, kept_E: Bool[Array, " E"], top_k: int) -> Float[Array, ""]:
    """Σ_t q_t·‖y_t − y_S,t‖² of a set S over the tokens of all domains, q their weights."""

    def of_token(token: Grams) -> Array:
        left_E = jnp.where(kept_E, token.logits_TE, -jnp.inf)
        change_E = gates(left_E, top_k) - gates(token.logits_TE, top_k)
        return token.weights_T * squared(token.products_TP, change_E)

    return lax.map(of_token, grams, batch_size=AT_ONCE).sum()


def gates(logits_E: Float[Array, " E"], top_k: int) -> Float[Array, " E"]:
    """The gate of every expert where a token takes the best; 0 of the others, and of those whose logit is −∞."""
    best_k, experts_k = lax.top_k(logits_E, top_k)
    return jnp.zeros_like(logits_E).at[experts_k].set(jax.nn.softmax(best_k))


def squared(products_P: Float[Array, " P"], change_E: Float[Array, " E"]) -> Float[Array, ""]:
    """The squared norm of Σ_e δ_e·f_e."""
    first_P, second_P = pairs(len(change_E))
    times_P = np.where(first_P == second_P, 1, 2).astype(np.float32)
    return jnp.dot(products_P, times_P * (change_E[first_P] * change_E[second_P]), precision=lax.Precision.HIGHEST)
