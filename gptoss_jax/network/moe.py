"""The mixture-of-experts block of a layer: router and experts. Letters: see `config`."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ..config import Config, Form
from ..devices.placement import Placement
from .experts import Experts, Mixture
from .router import Router, Routing
from .swap import coefficients, squared_changes, with_runner_up


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
        swap_BS: Bool[Array, "B S"] | None = None,
    ) -> tuple[Float[Array, "B S D"], Routing, Mixture, Float[Array, "T k"] | None]:
        """Invalid tokens, which are padding, get no expert. `gates_BSk` takes the place of the router's gates;
        `kept_BE` says what experts the tokens of a row may choose.

        With `swap_BS` the last result is the squared norm by which the output changes where a chosen expert is dropped,
        defined for tokens where it is true: k + 1 experts run for these.
        """
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        kept_TE = None if kept_BE is None else jnp.repeat(kept_BE, x_BSD.shape[1], axis=0)
        routing = self.router(x_TD, place, kept_TE)
        if gates_BSk is not None:
            routing = routing._replace(gates_Tk=gates_BSk.reshape(routing.gates_Tk.shape).astype(jnp.float32))
        runner_up_T = None
        if swap_BS is not None:
            experts_Tr, logits_Tr = with_runner_up(routing)
            runner_up_T = jnp.where(swap_BS.reshape(-1), experts_Tr[:, -1], routing.logits_TE.shape[1])
        mixture = self.experts(x_TD, routing, valid_BS.reshape(-1), place, layer, runner_up_T)
        changes_Tk = None
        if mixture.outputs is not None:
            changes_Tk = squared_changes(mixture.outputs, coefficients(logits_Tr), place)
        output_TD = place.sum_experts(mixture.output_TD, x_TD.dtype)
        return output_TD.reshape(x_BSD.shape).astype(x_BSD.dtype), routing, mixture, changes_Tk
