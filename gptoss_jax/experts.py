"""The experts: gated feed-forward networks, each applied to the tokens that chose it.

Letters: see `config`. A *pair* is a (token, chosen expert); there are T·k of them.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from . import grouped
from .config import Config
from .mesh import Placement
from .packed import BLOCK, dequantise
from .router import Routing

SIGMOID_SLOPE = 1.702  # of GPT-OSS's swish, the slope that makes x·σ(1.702x) approximate GELU


class Mixture(NamedTuple):
    """What this device's experts give for each token; zeros for pairs of experts that it does not hold."""

    output_TD: Float[Array, "T D"]
    """Σ_j g_j·f_j(x), float32."""
    norms_Tk: Float[Array, "T k"]
    """‖f_j(x)‖₂ of each pair, before the gate, float32."""
    peaks_Tk: Float[Array, "T k"]
    """max |f_j(x)| of each pair, float32."""
    computed_Tk: Bool[Array, "T k"]
    """Whether the pair's expert ran: over all devices, once for each valid token and chosen expert."""


class Experts(nnx.Module):
    """Weights of a layer's experts. Kernels lie [E, out, in], the order in which MXFP4 stores them; they are
    arrays of a float type, or with `weights="mxfp4"` stay in four bits, [E, in, out] (see `packed`)."""

    def __init__(self, config: Config, weights: str = "bf16", *, rngs: nnx.Rngs):
        E, D, F = config.num_experts, config.hidden_size, config.expert_hidden_size
        kernel, zeros = nnx.initializers.normal(0.02), nnx.initializers.zeros
        if weights == "mxfp4":
            # Gate and up as one run of columns: an axis of 2 would be moved, and back at each layer, on TPU.
            self.gate_up_packed = nnx.Param(jnp.zeros((E, D // 2, 2 * F), jnp.uint8))
            self.gate_up_scales = nnx.Param(jnp.zeros((E, D // BLOCK, 2 * F), jnp.uint8))
            self.down_packed = nnx.Param(jnp.zeros((E, F // 2, D), jnp.uint8))
            self.down_scales = nnx.Param(jnp.zeros((E, F // BLOCK, D), jnp.uint8))
        else:
            self.gate_up_kernel = nnx.Param(kernel(rngs.params(), (E, 2, F, D)))
            self.down_kernel = nnx.Param(kernel(rngs.params(), (E, D, F)))
        self.gate_up_bias = nnx.Param(zeros(rngs.params(), (E, 2, F)))
        self.down_bias = nnx.Param(zeros(rngs.params(), (E, D)))
        self.swiglu_limit = config.swiglu_limit
        self.weights = weights

    def kernels(self, name: str, layer: Int[Array, ""] | None, dtype: Any) -> tuple[grouped.Kernels, Any]:
        """All kernels `name` that are at hand as floats, and which of them is this layer's first expert's."""
        if self.weights == "mxfp4":
            at = () if layer is None else layer
            packed, scales = (getattr(self, f"{name}_{part}")[at] for part in ("packed", "scales"))
            return grouped.Kernels(dequantise(packed, scales, dtype), inputs_first=True), 0
        # The stack of all layers as it is: a slice of it would be copied at each layer.
        stack = getattr(self, f"{name}_kernel")[...]
        outputs = math.prod(stack.shape[-3:-1]) if name == "gate_up" else stack.shape[-2]
        kernels = grouped.Kernels(stack.reshape(-1, outputs, stack.shape[-1]), inputs_first=False)
        return kernels, 0 if layer is None else layer * self.down_bias.shape[-2]

    def activate(self, hidden_NI: Float[Array, "N I"]) -> Float[Array, "N F"]:
        """Clamped SwiGLU of gate and up, which lie one after the other."""
        gate, up = jnp.split(hidden_NI, 2, axis=-1)
        gate = jnp.minimum(gate, self.swiglu_limit)
        up = jnp.clip(up, -self.swiglu_limit, self.swiglu_limit)
        return (up + 1) * gate * jax.nn.sigmoid(SIGMOID_SLOPE * gate)

    def at(
        self, layer: Int[Array, ""] | None, dtype: Any, spelling: grouped.Grouped
    ) -> Callable[[Array, Array], Array]:
        """The layer's experts as a function: x [N, D], by blocks of rows, and the expert of each block → f(x) [N, D],
        float32. Where a block's expert does not exist, its results are not defined."""
        gate_up, first = self.kernels("gate_up", layer, dtype)
        down, _ = self.kernels("down", layer, dtype)
        gate_up_bias, down_bias = (b[...] if layer is None else b[layer] for b in (self.gate_up_bias, self.down_bias))
        gate_up_bias = gate_up_bias.reshape(len(gate_up_bias), -1)

        def run(x_ND: Array, experts: Array) -> Array:
            def by_row(bias_EO: Array) -> Array:
                bias = bias_EO.at[experts].get(mode="fill").astype(jnp.float32)
                return jnp.repeat(bias, spelling.block, axis=0)

            groups = jnp.where(experts < len(down_bias), first + experts, gate_up.array.shape[0])
            hidden = spelling.product(x_ND, gate_up, groups) + by_row(gate_up_bias)
            return spelling.product(self.activate(hidden).astype(dtype), down, groups) + by_row(down_bias)

        return run

    def __call__(
        self,
        x_TD: Float[Array, "T D"],
        routing: Routing,
        valid_T: Bool[Array, " T"],
        place: Placement,
        layer: Int[Array, ""] | None = None,
    ) -> Mixture:
        """Apply to each token those of the experts here that it chose, once each; invalid tokens get zeros.

        Where the weights are those of all layers, [L, E, …], `layer` says whose experts they are.

        Pairs are sorted by expert and cut into blocks that hold one expert's pairs only; some blocks at a
        time, a piece, pass the grouped product. No pair is ever dropped: the number of pieces covers
        the worst split of T·k pairs over E experts, and pieces left over are skipped at run time.
        """
        T, k = routing.experts_Tk.shape
        first_id, E = place.local(routing.logits_TE.shape[-1])
        spelling = grouped.choose(place, -(-T * k // routing.logits_TE.shape[-1]), E)
        run = self.at(layer, x_TD.dtype, spelling)

        # Invalid tokens, and experts of other devices, go to an expert E that does not exist, behind all others.
        local_Tk = routing.experts_Tk - first_id
        pair_expert = jnp.where(valid_T[:, None] & (local_Tk >= 0) & (local_Tk < E), local_Tk, E).reshape(-1)
        order = jnp.argsort(pair_expert, stable=True)
        *pieces, group_end = _pieces(jnp.bincount(pair_expert, length=E), T * k, spelling)
        gates = routing.gates_Tk.reshape(-1)

        def one_piece(mixture: Mixture, piece: tuple[Array, ...]) -> tuple[Mixture, None]:
            experts, starts = piece

            def compute() -> Mixture:
                rows = starts[:, None] + jnp.arange(spelling.block)[None]
                # Rows past the group's end belong to the next expert: T·k is out of range everywhere
                # below, where reads are filled and writes are dropped.
                inside = rows < group_end.at[experts].get(mode="fill", fill_value=0)[:, None]
                pair = jnp.where(inside, order.at[rows].get(mode="fill"), T * k).reshape(-1)
                token = pair // k

                out = run(x_TD.at[token].get(mode="fill", fill_value=0), experts)
                gated = gates.at[pair].get(mode="fill", fill_value=0)[:, None] * out
                return Mixture(
                    mixture.output_TD.at[token].add(gated, mode="drop"),
                    mixture.norms_Tk.at[pair].set(jnp.linalg.norm(out, axis=-1), mode="drop"),
                    mixture.peaks_Tk.at[pair].set(jnp.abs(out).max(-1), mode="drop"),
                    mixture.computed_Tk.at[pair].set(True, mode="drop"),
                )

            return lax.cond(experts[0] < E, compute, lambda: mixture), None

        zeros = jnp.zeros(T * k, jnp.float32)
        mixture = Mixture(jnp.zeros(x_TD.shape, jnp.float32), zeros, zeros, jnp.zeros(T * k, bool))
        output, *by_pair = lax.scan(one_piece, mixture, tuple(pieces))[0]
        return Mixture(output, *(values.reshape(T, k) for values in by_pair))


def _pieces(
    sizes_E: Int[Array, " E"], num_pairs: int, spelling: grouped.Grouped
) -> tuple[Int[Array, "pieces blocks"], Int[Array, "pieces blocks"], Int[Array, " E"]]:
    """Expert (E where there is none) and first row of each block, by pieces, and where each group ends."""
    E, block = sizes_E.shape[0], spelling.block
    pieces, per_piece = spelling.pieces(num_pairs, E)
    ends = jnp.cumsum(sizes_E)
    blocks_E = -(-sizes_E // block)
    blocks_before = jnp.cumsum(blocks_E)
    index = jnp.arange(pieces * per_piece)
    expert = jnp.searchsorted(blocks_before, index, side="right")
    nth = index - (blocks_before - blocks_E)[jnp.minimum(expert, E - 1)]
    start = (ends - sizes_E)[jnp.minimum(expert, E - 1)] + nth * block
    return expert.reshape(-1, per_piece), start.reshape(-1, per_piece), ends
