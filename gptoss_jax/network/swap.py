"""What a layer's output would be without one of the experts that a token chose. Letters: see `config`.

Without expert j the choice is made again: the runner-up, which was the best of the others, enters, and the gates are a
softmax over those that are left. The change Δ_j of the output is linear in the experts' outputs f_i, so that k + 1
experts a token give it exactly.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from ..devices.placement import Placement
from .router import Routing

AT_ONCE = 256  # tokens whose changes are in memory: 11 MiB at 20b's sizes


class Outputs(NamedTuple):
    """What experts gave, in the order in which they ran.

    bfloat16 is kept as whole numbers: where a part of an array of bfloat16 is written or read, XLA's CPU backend makes
    all of it float32.
    """

    rows_ND: Shaped[Array, "N D"]
    """f_j(x), a row each."""
    places_Tr: Int[Array, "T r"]
    """The row of each pair, and of the runner-up; N where the expert did not run here."""

    @classmethod
    def none(cls, places_Tr: Int[Array, "T r"], rows: int, size: int, dtype: Any) -> "Outputs":
        """Before any expert has run."""
        return cls(jnp.zeros((rows, size), jnp.uint16 if dtype == jnp.bfloat16 else dtype), places_Tr)

    def put(self, first: Int[Array, ""], rows_XD: Float[Array, "X D"], dtype: Any) -> "Outputs":
        """With the rows from `first` on, rounded to `dtype`."""
        rounded = rows_XD.astype(dtype)
        if self.rows_ND.dtype != dtype:
            rounded = lax.bitcast_convert_type(rounded, self.rows_ND.dtype)
        return self._replace(rows_ND=lax.dynamic_update_slice_in_dim(self.rows_ND, rounded, first, axis=0))

    def at(self, places: Int[Array, "*any"]) -> Float[Array, "*any D"]:
        """The rows at these places; zeros where there is none."""
        rows = self.rows_ND.at[places].get(mode="fill", fill_value=0)
        return lax.bitcast_convert_type(rows, jnp.bfloat16) if rows.dtype == jnp.uint16 else rows


def with_runner_up(routing: Routing) -> tuple[Int[Array, "T r"], Float[Array, "T r"]]:
    """The chosen experts, and behind them the runner-up, with their logits.

    Where nobody is left to enter, its logit is −∞ and its id is E, which is no expert's.
    """
    # Not by a top-k of one more: of two of them, XLA's CPU backend makes a sort of all experts.
    E = routing.logits_TE.shape[1]
    chosen_TE = (routing.experts_Tk[..., None] == jnp.arange(E)[None, None]).any(1)
    others_TE = jnp.where(chosen_TE, -jnp.inf, routing.logits_TE)
    best_T1 = others_TE.max(1, keepdims=True)
    enters_T1 = jnp.where(best_T1 > -jnp.inf, others_TE.argmax(1, keepdims=True), E)
    logits_Tk = jnp.take_along_axis(routing.logits_TE, routing.experts_Tk, axis=1)
    return jnp.concatenate([routing.experts_Tk, enters_T1], axis=1), jnp.concatenate([logits_Tk, best_T1], axis=1)


def coefficients(logits_Tr: Float[Array, "T r"]) -> Float[Array, "T k r"]:
    """a, with which Δ_j = Σ_i a_ji·f_i: the gates g' without expert j less the gates g with all; the runner-up is last.

    Of those that stay it is g'_i − g_i = g_j·g'_i − g_i·g', g' the gate of who enters. So written it keeps its digits
    where gates hardly change; and g' comes from logits, since g_i / (1 − g_j) loses them where g_j is near 1.
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


def squared_changes(outputs: Outputs, coefficients_Tkr: Float[Array, "T k r"], place: Placement) -> Float[Array, "T k"]:
    """‖Δ_j‖₂² of each chosen expert, float32, from what this device's experts gave.

    Where experts are split over devices, each gets all outputs of its share of the tokens.
    """
    T = len(outputs.places_Tr)
    block = min(AT_ONCE, T)

    def of_block(tokens: tuple[Array, Array]) -> Array:
        places_Mr, coefficients_Mkr = tokens
        whole_MrD = place.sum_to_share(outputs.at(places_Mr)).astype(jnp.float32)
        change_MkD = jnp.einsum(
            "Mkr,MrD->MkD", place.share(coefficients_Mkr), whole_MrD, precision=lax.Precision.HIGHEST
        )
        return place.join_shares(jnp.sum(change_MkD**2, axis=-1), block)

    squared = lax.map(of_block, (blocks(outputs.places_Tr, AT_ONCE), blocks(coefficients_Tkr, AT_ONCE)))
    return squared.reshape(-1, squared.shape[-1])[:T]


def blocks(x: Shaped[Array, "T ..."], most: int) -> Shaped[Array, "blocks M ..."]:
    """Tokens in blocks of one size, at most so many in each, with zeros behind."""
    block = min(most, len(x))
    number = -(-len(x) // block)
    return jnp.pad(x, ((0, number * block - len(x)), *((0, 0),) * (x.ndim - 1))).reshape(number, block, *x.shape[1:])
