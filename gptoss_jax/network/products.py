"""What all experts give for a token, as the products f_i·f_j of their outputs: enough to know what any choice among
them, with any gates, would change. Letters: see `config`; P are the pairs i ≤ j of experts."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ..devices.placement import Placement
from .experts import Experts
from .router import Routing
from .swap import Outputs, blocks

# Tokens that run through all experts at once, and of which products are made at once. Five tiles of rows of CPU's
# kernel: at 20b's sizes the outputs of as many take 170 MiB.
AT_ONCE, MULTIPLIED = 960, 64


def pairs(num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """The experts i and j of each pair, [P] each."""
    return np.triu_indices(num_experts)


def products(
    experts: Experts,
    x_TD: Float[Array, "T D"],
    wanted_T: Bool[Array, " T"],
    num_experts: int,
    place: Placement,
    layer: Int[Array, ""] | None = None,
    only_N: Int[Array, " N"] | None = None,
    beside_TbD: Float[Array, "T b D"] | None = None,
) -> Float[Array, "T P"]:
    """f_i(x)·f_j(x), float32, of the tokens that are wanted, from outputs in the type of x; zeros of the others.

    `only_N` names the experts that run, in the order of their pairs; by default all do. Each token's vectors in
    `beside_TbD` are multiplied as outputs of further experts would be, which stand behind all others.

    Where experts are split over devices, each gets all outputs of its share of the tokens.
    """
    T, E = len(x_TD), num_experts
    only_N = jnp.arange(E) if only_N is None else only_N
    beside_TbD = jnp.zeros((T, 0, x_TD.shape[1])) if beside_TbD is None else beside_TbD
    N, P = len(only_N), len(pairs(len(only_N) + beside_TbD.shape[1])[0])

    def of_block(block: tuple[Array, Array, Array]) -> Array:
        x_MD, wanted_M, beside_MbD = block
        M = len(x_MD)
        routing = Routing(jnp.zeros((M, E)), jnp.broadcast_to(only_N, (M, N)), jnp.zeros((M, N)))
        # Outputs are kept where a runner-up is given; E is no expert's id.
        outputs = experts(x_MD, routing, wanted_M, place, layer, jnp.full(M, E)).outputs
        assert outputs is not None

        def multiplied(block: tuple[Array, Array]) -> Array:
            return _multiplied(outputs, *block, place)

        beside_MbD = jnp.where(wanted_M[:, None, None], beside_MbD, 0)
        of_tokens = blocks(outputs.places_Tr[:, :N], MULTIPLIED), blocks(beside_MbD, MULTIPLIED)
        return lax.map(multiplied, of_tokens).reshape(-1, P)[:M]

    found = lax.map(of_block, (blocks(x_TD, AT_ONCE), blocks(wanted_T, AT_ONCE), blocks(beside_TbD, AT_ONCE)))
    return found.reshape(-1, found.shape[-1])[:T]


def _multiplied(
    outputs: Outputs, places_mN: Int[Array, "m N"], beside_mbD: Float[Array, "m b D"], place: Placement
) -> Float[Array, "m P"]:
    whole_mND = place.sum_to_share(outputs.at(places_mN)).astype(jnp.float32)
    vectors_mvD = jnp.concatenate([whole_mND, place.share(beside_mbD).astype(jnp.float32)], axis=1)
    products_mvv = jnp.einsum("mvD,mwD->mvw", vectors_mvD, vectors_mvD, precision=lax.Precision.HIGHEST)
    first_P, second_P = pairs(vectors_mvD.shape[1])
    return place.join_shares(products_mvv[:, first_P, second_P], len(places_mN))
