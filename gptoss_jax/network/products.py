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
) -> Float[Array, "T P"]:
    """f_i(x)·f_j(x), float32, of the tokens that are wanted, from outputs in the type of x; zeros of the others.

    Where experts are split over devices, each gets all outputs of its share of the tokens.
    """
    T, E = len(x_TD), num_experts

    def of_block(block: tuple[Array, Array]) -> Array:
        x_MD, wanted_M = block
        M = len(x_MD)
        every_ME = jnp.broadcast_to(jnp.arange(E), (M, E))
        routing = Routing(jnp.zeros((M, E)), every_ME, jnp.zeros((M, E)))
        # Outputs are kept where a runner-up is given; E is no expert's id.
        outputs = experts(x_MD, routing, wanted_M, place, layer, jnp.full(M, E)).outputs
        assert outputs is not None

        def multiplied(places_mE: Array) -> Array:
            return _multiplied(outputs, places_mE, place)

        return lax.map(multiplied, blocks(outputs.places_Tr[:, :E], MULTIPLIED)).reshape(-1, len(pairs(E)[0]))[:M]

    found = lax.map(of_block, (blocks(x_TD, AT_ONCE), blocks(wanted_T, AT_ONCE)))
    return found.reshape(-1, found.shape[-1])[:T]


def _multiplied(outputs: Outputs, places_mE: Int[Array, "m E"], place: Placement) -> Float[Array, "m P"]:
    whole_mED = place.sum_to_share(outputs.at(places_mE)).astype(jnp.float32)
    products_mEE = jnp.einsum("mED,mFD->mEF", whole_mED, whole_mED, precision=lax.Precision.HIGHEST)
    first_P, second_P = pairs(places_mE.shape[1])
    return place.join_shares(products_mEE[:, first_P, second_P], len(places_mE))
