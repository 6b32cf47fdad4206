"""The mixture-of-experts block of a layer: router and experts. Letters: see `config`; P are pairs of experts."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ..config import Config, Form
from ..devices.placement import Placement
from .experts import Experts, Mixture
from .products import mixed_of_all
from .router import Router, Routing
from .swap import coefficients, squared_changes, with_runner_up


class Further(NamedTuple):
    """What a layer is to show beside its output, of the tokens for which it is true; None asks for nothing."""

    swap_BS: Bool[Array, "B S"] | None = None
    """What dropping a chosen expert changes: these tokens take k + 1 experts."""
    products_BS: Bool[Array, "B S"] | None = None
    """The products of all experts' outputs: these tokens take all experts."""


NOTHING = Further()


class Mixed(NamedTuple):
    """What the block returns; the last two are None where nobody asks for them."""

    output_BSD: Float[Array, "B S D"]
    routing: Routing
    mixture: Mixture
    changes_Tk: Float[Array, "T k"] | None = None
    """The squared norm by which the output changes where a chosen expert is dropped."""
    products_TP: Float[Array, "T P"] | None = None
    """f_i·f_j of all experts, in the order of `products.pairs`."""


class MoE(nnx.Module):
    """Router and experts. What was routed and mixed is returned beside the output, so that whoever observes the layer
    computes nothing of it again."""

    def __init__(self, config: Config, form: Form = "bf16", *, rngs: nnx.Rngs):
        self.router = Router(config, rngs=rngs)
        self.experts = Experts(config, form, rngs=rngs)

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        valid_BS: Bool[Array, "B S"],
        place: Placement,
        layer: Int[Array, ""] | None = None,
        gates_BSk: Float[Array, "B S k"] | None = None,
        kept_BE: Bool[Array, "B E"] | None = None,
        further: Further = NOTHING,
    ) -> Mixed:
        """Invalid tokens, which are padding, get no expert. `gates_BSk` takes the place of the router's gates;
        `kept_BE` says what experts the tokens of a row may choose."""
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        kept_TE = None if kept_BE is None else jnp.repeat(kept_BE, x_BSD.shape[1], axis=0)
        routing = self.router(x_TD, place, kept_TE)
        if gates_BSk is not None:
            routing = routing._replace(gates_Tk=gates_BSk.reshape(routing.gates_Tk.shape).astype(jnp.float32))
        runner_up_T = None
        if further.swap_BS is not None:
            experts_Tr, logits_Tr = with_runner_up(routing)
            runner_up_T = jnp.where(further.swap_BS.reshape(-1), experts_Tr[:, -1], routing.logits_TE.shape[1])
        valid_T, mixture, products_TP, changes_Tk = valid_BS.reshape(-1), None, None, None
        if further.products_BS is not None:
            wanted_T = further.products_BS.reshape(-1)
            mixture, products_TP = mixed_of_all(self.experts, x_TD, routing, valid_T, wanted_T, place, layer)
        # Of what dropping an expert changes the chosen ones' outputs alone are kept: beside products these run again.
        if mixture is None or runner_up_T is not None:
            mixture = self.experts(x_TD, routing, valid_T, place, layer, runner_up_T)
        if mixture.outputs is not None:
            changes_Tk = squared_changes(mixture.outputs, coefficients(logits_Tr), place)
        output_TD = place.sum_experts(mixture.output_TD, x_TD.dtype)
        output_BSD = output_TD.reshape(x_BSD.shape).astype(x_BSD.dtype)
        return Mixed(output_BSD, routing, mixture, changes_Tk, products_TP)
