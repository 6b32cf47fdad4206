"""What a layer's output would be without one of the experts that a token chose. Letters: see `config`.

Without expert j the choice is made again: the runner-up, which was the best of the others, enters, and the gates are a
softmax over those that are left. The change Δ_j of the output is linear in the experts' outputs f_i, so that it is known
exactly where k + 1 experts ran for a token.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from ..devices.placement import Placement
from .router import Routing

AT_ONCE = 256  # tokens whose changes are in memory: 11 MiB at 20b's sizes


def with_runner_up(routing: Routing) -> tuple[Int[Array, "T r"], Float[Array, "T r"]]:
    """The chosen experts, and behind them the runner-up, with their logits.

    Where nobody is left to enter, its logit is −∞ and its id is E, which is no expert's.
    """
    k, E = routing.experts_Tk.shape[1], routing.logits_TE.shape[1]
    one_more = jnp.pad(routing.logits_TE, ((0, 0), (0, 1)), constant_values=-jnp.inf)
    logits, experts = lax.top_k(one_more, k + 1)
    runner_up_T1 = jnp.where(logits[:, k:] > -jnp.inf, experts[:, k:], E)
    return jnp.concatenate([routing.experts_Tk, runner_up_T1], axis=1), logits


def coefficients(logits_Tr: Float[Array, "T r"]) -> Float[Array, "T k r"]:
    """a, with which Δ_j = Σ_i a_ji·f_i: the gates g' without expert j less the gates g with all; the runner-up is last.

    Between those that stay it is g'_i − g_i = g_j·g'_i − g_i·g', g' the gate of who enters. So written it keeps its
    digits where the gates hardly change; and g' comes from logits, since g_i / (1 − g_j) loses them where g_j is near 1.
    """
    k = logits_Tr.shape[1] - 1
    gates_Tk = jax.nn.softmax(logits_Tr[:, :k], axis=-1)
    itself_kr = jnp.eye(k, k + 1, dtype=bool)
    left_Tkr = (logits_Tr > -jnp.inf)[:, None] & ~itself_kr[None]
    after_Tkr = jax.nn.softmax(jnp.broadcast_to(logits_Tr[:, None], left_Tkr.shape), axis=-1, where=left_Tkr)
    enters_Tk1 = after_Tkr[..., k:]
    stay_Tkk = gates_Tk[:, :, None] * after_Tkr[..., :k] - gates_Tk[:, None, :] * enters_Tk1
    change_Tkk = jnp.where(itself_kr[None, :, :k], -gates_Tk[:, :, None], stay_Tkk)
    return jnp.concatenate([change_Tkk, enters_Tk1], axis=-1)


def squared_changes(
    outputs_TrD: Shaped[Array, "T r D"], coefficients_Tkr: Float[Array, "T k r"], place: Placement
) -> Float[Array, "T k"]:
    """‖Δ_j‖₂² of each chosen expert, float32, from the outputs that this device's experts have, as `to_bits` keeps them.

    Where experts are split over devices, each gets all outputs of its share of the tokens.
    """

    def of_token(token: tuple[Array, Array]) -> Array:
        outputs_rD, coefficients_kr = token
        outputs_rD = from_bits(outputs_rD).astype(jnp.float32)
        change_kD = jnp.einsum("kr,rD->kD", coefficients_kr, outputs_rD, precision=lax.Precision.HIGHEST)
        return jnp.sum(change_kD**2, axis=-1)

    whole = to_bits(place.sum_to_share(from_bits(outputs_TrD)))
    squared = lax.map(of_token, (whole, place.share(coefficients_Tkr)), batch_size=AT_ONCE)
    return place.join_shares(squared, len(outputs_TrD))


def to_bits(x: Shaped[Array, "*any"]) -> Shaped[Array, "*any"]:
    """bfloat16 as whole numbers, and others as they are: where a part of an array of bfloat16 is written or read, XLA's
    CPU backend makes all of it float32."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def from_bits(x: Shaped[Array, "*any"]) -> Shaped[Array, "*any"]:
    """Do the reverse of `to_bits`."""
    return lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x
