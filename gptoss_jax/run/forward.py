"""One forward with everything that it shows: logits, hidden states, routing, saliency. Letters: see `config`."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from ..devices.placement import Placement
from ..network.batch import Tokens
from ..network.model import NONE, GptOss, Interventions, LayerOutput
from .steps import float32_is_float32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Forward:
    """What the network gives of some rows. Positions behind a row's end are padding, of segment 0: what stands there
    means nothing."""

    tokens: Tokens
    """Ids, positions and segments, each [B, S]."""
    logits: Float[Any, "B S V"]
    """The logits of the token after each, float32."""
    hidden: Float[Any, "L B S D"]
    """The residual stream after each layer."""
    router_logits: Float[Any, "L B S E"]
    experts: Int[Any, "L B S k"]
    """The chosen experts, best first."""
    gates: Float[Any, "L B S k"]
    """The gate of each chosen expert; those of a token sum to 1."""
    norms: Float[Any, "L B S k"]
    """‖f_j(x)‖₂ of each chosen expert's output, before the gate."""

    @property
    def saliency(self) -> Float[Array, "L B S k"]:
        """g·‖f_j(x)‖₂ of each chosen expert, whose mean over tokens is REAP's score."""
        return self.gates * self.norms


class _Shown(NamedTuple):
    """What is kept of each layer; T counts tokens of all rows."""

    hidden: Array
    router_logits: Array
    experts: Array
    gates: Array
    norms: Array


def _show(output: LayerOutput) -> _Shown:
    routing = output.routing
    return _Shown(output.hidden, routing.logits_TE, routing.experts_Tk, routing.gates_Tk, output.mixture.norms_Tk)


@partial(jax.jit, static_argnames="place")
@float32_is_float32
def forward(network: GptOss, tokens: Tokens, place: Placement, interventions: Interventions = NONE) -> Forward:
    """The forward of all rows on one device."""
    output = network(tokens, place, _show, interventions)
    B, S = tokens.ids.shape
    shown = output.layers
    by_row = (x.reshape(len(x), B, S, -1) for x in shown)
    return Forward(tokens, network.logits(output.final), *by_row)
