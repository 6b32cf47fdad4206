"""The router: which experts see a token, and with what gate. Letters: see `config`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ..config import Config
from ..devices.placement import Placement


class Routing(NamedTuple):
    """The router's choice for each token."""

    logits_TE: Float[Array, "*layers T E"]
    """x·Wᵀ + b, float32."""
    experts_Tk: Int[Array, "*layers T k"]
    """The chosen experts, best first; equal logits give the lower id."""
    gates_Tk: Float[Array, "*layers T k"]
    """The softmax over the chosen logits, float32; each row sums to 1."""


class Router(nnx.Module):
    """Linear scores of all experts, top k of them, softmax over these k."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        shape = (config.num_experts, config.hidden_size)
        self.kernel = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), shape))
        self.bias = nnx.Param(nnx.initializers.zeros(rngs.params(), shape[:1]))
        self.top_k = config.top_k

    def __call__(
        self, x_TD: Float[Array, "T D"], place: Placement, kept_TE: Bool[Array, "T E"] | None = None
    ) -> Routing:
        """The choice among all experts, or among those that `kept_TE` leaves: others' logits become −∞. Where fewer are
        left than a token takes, the rest of its k has a gate of 0."""
        # float32 results even of bfloat16 inputs: rounded logits tie, and ties change the choice.
        logits = jnp.einsum("TD,ED->TE", x_TD, self.kernel[...], preferred_element_type=jnp.float32)
        # Each device scores its own experts; the choice needs the scores of all.
        logits = place.gather_experts(logits + self.bias[None].astype(jnp.float32))
        if kept_TE is not None:
            logits = jnp.where(kept_TE, logits, -jnp.inf)
        chosen, experts = lax.top_k(logits, self.top_k)
        return Routing(logits, experts, jax.nn.softmax(chosen, axis=-1))


def entropy(logits_TE: Float[Array, "T E"]) -> Float[Array, " T"]:
    """Entropy of the softmax over all experts, in nats; a logit of −∞ contributes nothing."""
    log_p = jax.nn.log_softmax(logits_TE, axis=-1)
    p = jnp.exp(log_p)
    return -jnp.sum(jnp.where(p > 0, p * log_p, 0), axis=-1)
