"""What all experts give for a token, as the products f_i·f_j of their outputs: enough to know what any choice among
them, with any gates, would change. Letters: see `config`; P are the pairs i ≤ j of experts."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ..devices.placement import Placement
from .experts import Experts, Mixture
from .router import Routing
from .swap import Outputs, blocks

# Outputs that are in memory at once: at 20b's sizes those of 2,048 tokens, 360 MiB. For each such block of tokens the
# weights of all experts are made floats. And tokens of which products are made at once.
OUTPUTS, MULTIPLIED = 1 << 16, 64


def pairs(num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """The experts i and j of each pair, [P] each."""
    return np.triu_indices(num_experts)


def products(
    experts: Experts,
    x_TD: Float[Array, "T D"],
    wanted_T: Bool[Array, " T"],
    num_experts: int,
    place: Placement,
    only_N: Int[Array, " N"],
    beside_TbD: Float[Array, "T b D"],
) -> Float[Array, "T P"]:
    """f_i(x)·f_j(x), float32, of the tokens that are wanted, from outputs in the type of x; zeros of the others.

    `only_N` names the experts that run, in the order of their pairs. Each token's vectors in
    `beside_TbD` are multiplied as outputs of further experts would be, which stand behind all others.

    Where experts are split over devices, each gets all outputs of its share of the tokens.
    """
    T, E = len(x_TD), num_experts
    N, at_once = len(only_N), tokens_at_once(T, len(only_N))

    def of_block(block: tuple[Array, Array, Array]) -> Array:
        x_MD, wanted_M, beside_MbD = block
        M = len(x_MD)
        routing = Routing(jnp.zeros((M, E)), jnp.broadcast_to(only_N, (M, N)), jnp.zeros((M, N)))
        # Outputs are kept where a runner-up is given; E is no expert's id.
        outputs = experts(x_MD, routing, wanted_M, place, runner_up_T=jnp.full(M, E)).outputs
        assert outputs is not None
        return _multiplied(outputs, N, jnp.where(wanted_M[:, None, None], beside_MbD, 0), place)

    found = lax.map(of_block, tuple(blocks(x, at_once) for x in (x_TD, wanted_T, beside_TbD)))
    return found.reshape(-1, found.shape[-1])[:T]


def mixed_of_all(
    experts: Experts,
    x_TD: Float[Array, "T D"],
    routing: Routing,
    valid_T: Bool[Array, " T"],
    wanted_T: Bool[Array, " T"],
    place: Placement,
    layer: Int[Array, ""] | None = None,
) -> tuple[Mixture, Float[Array, "T P"]]:
    """The mixture that the experts give, and `products` of all of them, for which each runs once: of a token that is
    wanted those that it did not choose have a gate of 0."""
    (T, k), E = routing.experts_Tk.shape, routing.logits_TE.shape[1]
    at_once = tokens_at_once(T, E)

    def of_block(block: tuple[Array, Routing, Array, Array]) -> tuple[Mixture, Array]:
        x_MD, chosen, valid_M, wanted_M = block
        M = len(x_MD)
        tokens_M1 = jnp.arange(M)[:, None]
        # The experts of a token that is wanted stand in their order, of any other those that it chose, and none behind.
        at_Mk = jnp.where(wanted_M[:, None], chosen.experts_Tk, jnp.arange(k))
        alone_ME = jnp.full((M, E), E).at[tokens_M1, at_Mk].set(chosen.experts_Tk)
        experts_ME = jnp.where(wanted_M[:, None], jnp.arange(E), alone_ME)
        gates_ME = jnp.zeros((M, E)).at[tokens_M1, at_Mk].set(chosen.gates_Tk)
        of_all = Routing(chosen.logits_TE, experts_ME, gates_ME)
        # Outputs are kept where a runner-up is given; E is no expert's id.
        found = experts(x_MD, of_all, valid_M, place, layer, jnp.full(M, E))
        assert found.outputs is not None
        norms_Mk, peaks_Mk, computed_Mk = (
            x_ME[tokens_M1, at_Mk] for x_ME in (found.norms_Tk, found.peaks_Tk, found.computed_Tk)
        )
        mixture = Mixture(found.output_TD, norms_Mk, peaks_Mk, computed_Mk)
        # Of other tokens nothing is multiplied.
        places_ME = jnp.where(wanted_M[:, None], found.outputs.places_Tr[:, :E], len(found.outputs.rows_ND))
        nothing_M0D = jnp.zeros((M, 0, x_MD.shape[1]))
        return mixture, _multiplied(found.outputs._replace(places_Tr=places_ME), E, nothing_M0D, place)

    in_blocks = jax.tree.map(lambda x: blocks(x, at_once), (x_TD, routing, valid_T, wanted_T))
    found = lax.map(of_block, in_blocks)
    return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1])[:T], found)


def tokens_at_once(tokens: int, num_experts: int) -> int:
    """Of blocks of about one size."""
    most = max(MULTIPLIED, OUTPUTS // num_experts)
    number = -(-tokens // most)
    return -(-tokens // (number * MULTIPLIED)) * MULTIPLIED


def _multiplied(
    outputs: Outputs, num_experts: int, beside_MbD: Float[Array, "M b D"], place: Placement
) -> Float[Array, "M P"]:
    """The products of so many outputs of each token, and of what stands beside them."""
    first_P, second_P = pairs(num_experts + beside_MbD.shape[1])

    def of_some(block: tuple[Array, Array]) -> Array:
        places_mN, beside_mbD = block
        whole_mND = place.sum_to_share(outputs.at(places_mN)).astype(jnp.float32)
        vectors_mvD = jnp.concatenate([whole_mND, place.share(beside_mbD).astype(jnp.float32)], axis=1)
        products_mvv = jnp.einsum("mvD,mwD->mvw", vectors_mvD, vectors_mvD, precision=lax.Precision.HIGHEST)
        return place.join_shares(products_mvv[:, first_P, second_P], len(places_mN))

    of_tokens = blocks(outputs.places_Tr[:, :num_experts], MULTIPLIED), blocks(beside_MbD, MULTIPLIED)
    return lax.map(of_some, of_tokens).reshape(-1, len(first_P))[: len(beside_MbD)]
