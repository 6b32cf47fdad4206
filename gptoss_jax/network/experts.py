"""The experts: gated feed-forward networks, each applied to the tokens that chose it.

Letters: see `config`. A *pair* is a (token, chosen expert); there are T·k of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ..config import Config, Form
from ..devices.mesh import path_of
from ..devices.placement import Placement
from ..kernels import grouped
from ..kernels.mxfp4 import BLOCK, dequantise, dequantise_pairs
from .router import Routing
from .swap import Outputs


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
    outputs: Outputs | None = None
    """f_j(x) of each pair, and of the runner-up, in the type of x; where a runner-up was given."""


class Experts(nnx.Module):
    """Weights of a layer's experts. They lie [E, out, in], the order in which MXFP4 stores them: arrays of a float
    type, or with `form="blocks"` four bits a value, of which one expert's at a time become floats. With
    `form="mxfp4"` they lie [E, in, out], and all become floats at once. For both see `kernels.mxfp4`."""

    def __init__(self, config: Config, form: Form = "bf16", *, rngs: nnx.Rngs):
        E, D, F = config.num_experts, config.hidden_size, config.expert_hidden_size
        kernel, zeros = nnx.initializers.normal(0.02), nnx.initializers.zeros
        # Gate and up of four bits as one run of outputs: an axis of 2 would be moved, and back at each layer, on TPU.
        for name, inputs, outputs in (("gate_up", D, 2 * F), ("down", F, D)):
            if form == "mxfp4":
                setattr(self, f"{name}_packed", nnx.Param(jnp.zeros((E, inputs // 2, outputs), jnp.uint8)))
                setattr(self, f"{name}_scales", nnx.Param(jnp.zeros((E, inputs // BLOCK, outputs), jnp.uint8)))
            elif form == "blocks":
                setattr(self, f"{name}_blocks", nnx.Param(jnp.zeros((E, outputs, inputs // 2), jnp.uint8)))
                setattr(self, f"{name}_exponents", nnx.Param(jnp.zeros((E, outputs, inputs // BLOCK), jnp.uint8)))
        if form == "bf16":
            self.gate_up_kernel = nnx.Param(kernel(rngs.params(), (E, 2, F, D)))
            self.down_kernel = nnx.Param(kernel(rngs.params(), (E, D, F)))
        self.gate_up_bias = nnx.Param(zeros(rngs.params(), (E, 2, F)))
        self.down_bias = nnx.Param(zeros(rngs.params(), (E, D)))
        self.swiglu_limit, self.swiglu_alpha = config.swiglu_limit, config.swiglu_alpha
        self.form = form

    def weights(
        self, name: str, dtype: Any, layer: Int[Array, ""] | None, expert: Int[Array, ""] | None = None
    ) -> tuple[grouped.ExpertWeights, Any]:
        """The weights `name` as floats, of the layer's experts or of one, and what is added to an expert's id to find
        its own among them."""
        at = tuple(index for index in (layer, expert) if index is not None)
        offset = 0 if expert is None else -expert
        if self.form == "mxfp4":
            packed, scales = (getattr(self, f"{name}_{part}")[at] for part in ("packed", "scales"))
            array = dequantise(packed, scales, dtype)
        elif self.form == "blocks":
            blocks, exponents = (getattr(self, f"{name}_{part}")[at] for part in ("blocks", "exponents"))
            array = dequantise_pairs(blocks, exponents, dtype)
        else:
            stack = getattr(self, f"{name}_kernel")[...]
            stack = stack.reshape(*stack.shape[: 1 if layer is None else 2], -1, stack.shape[-1])
            if expert is None and layer is not None:
                # The stack of all layers as it is: a slice of it would be copied at each layer.
                offset, at = layer * stack.shape[1], ()
            array = grouped.picked(stack, at) if at else stack
        return grouped.ExpertWeights(array.reshape(-1, *array.shape[-2:]), inputs_first=self.form == "mxfp4"), offset

    def activate(self, hidden_NI: Float[Array, "N I"]) -> Float[Array, "N F"]:
        """Clamped SwiGLU of gate and up, which lie one after the other."""
        gate, up = jnp.split(hidden_NI, 2, axis=-1)
        gate = jnp.minimum(gate, self.swiglu_limit)
        up = jnp.clip(up, -self.swiglu_limit, self.swiglu_limit)
        return (up + 1) * gate * jax.nn.sigmoid(self.swiglu_alpha * gate)

    def at(
        self,
        dtype: Any,
        kernel: grouped.Kernel,
        layer: Int[Array, ""] | None,
        expert: Int[Array, ""] | None = None,
    ) -> "_Floats":
        """The layer's experts, or one of them, with weights of floats."""
        gate_up, offset = self.weights("gate_up", dtype, layer, expert)
        down, _ = self.weights("down", dtype, layer, expert)
        gate_up_bias, down_bias = self.gate_up_bias[...], self.down_bias[...]
        gate_up_bias = gate_up_bias.reshape(len(gate_up_bias), -1)
        return _Floats(kernel, gate_up, down, gate_up_bias, down_bias, offset, self.activate)

    def __call__(
        self,
        x_TD: Float[Array, "T D"],
        routing: Routing,
        valid_T: Bool[Array, " T"],
        place: Placement,
        layer: Int[Array, ""] | None = None,
        runner_up_T: Int[Array, " T"] | None = None,
    ) -> Mixture:
        """Apply to each token those of the experts here that it chose, once each; invalid tokens get zeros.

        Where the kernels are those of all layers, [L, E, …], `layer` says whose experts they are. With `runner_up_T`
        one more expert runs for each token, which adds nothing to the output, and what each expert gave is kept; an id
        that is no expert's runs none.

        Pairs are sorted by expert and cut into tiles that hold one expert's pairs only. Where a call of the grouped
        product takes one tile, one expert after the other has its weights made floats and its tiles run. Else some
        tiles at a time, a piece, pass the product. No pair is ever dropped: the number of pieces covers the
        worst split of T·k pairs over E experts, and pieces left over are skipped at run time.

        Of the output x, the gates and the biases have gradients; kernels, norms and peaks have none. Where
        `place.differentiable` all of them do. With a runner-up there are no gradients.
        """
        T, k = routing.experts_Tk.shape
        first_id, E = place.local(routing.logits_TE.shape[-1])
        load = place, -(-T * k // routing.logits_TE.shape[-1]), E, self.form != "bf16"
        kernel = grouped.choose(*load)
        # Invalid tokens, and experts of other devices, go to an expert E that does not exist, behind all others.
        experts_Tr = routing.experts_Tk
        if runner_up_T is not None:
            experts_Tr = jnp.concatenate([experts_Tr, runner_up_T[:, None]], axis=1)
        local_Tr = experts_Tr - first_id
        expert_Tr = jnp.where(valid_T[:, None] & (local_Tr >= 0) & (local_Tr < E), local_Tr, E)

        gates_Tk, keep = routing.gates_Tk, runner_up_T is not None
        if place.differentiable or keep:
            return self.mix(x_TD, gates_Tk, expert_Tr, layer, kernel, keep)
        backward_kernel = grouped.choose(*load, backward=True)
        return self._mix_with_gradients(x_TD, gates_Tk, expert_Tr, layer, kernel, backward_kernel)

    def mix(
        self,
        x_TD: Array,
        gates_Tk: Array,
        expert_Tr: Array,
        layer: Array | None,
        kernel: grouped.Kernel,
        keep: bool = False,
    ) -> Mixture:
        """The mixture of all pairs, E being the expert of those that are none; with `keep` their outputs too."""
        pairs = _sort(x_TD, expert_Tr, gates_Tk, len(self.down_bias[...]), kernel)

        def add(mixture: Mixture, floats: _Floats, piece: Array) -> Mixture:
            return pairs.add(mixture, floats.run, piece)

        return self._over_pieces(pairs, kernel, layer, pairs.nothing(keep), add)

    def _mix_with_gradients(
        self,
        x_TD: Array,
        gates_Tk: Array,
        expert_Tk: Array,
        layer: Array | None,
        kernel: grouped.Kernel,
        backward_kernel: grouped.Kernel,
    ) -> Mixture:
        """The mixture, whose gradients are made from what it is made of: nothing is kept for them."""

        def run(experts: Experts, x_TD: Array, gates_Tk: Array, expert_Tk: Array, layer: Array | None) -> Mixture:
            return experts.mix(x_TD, gates_Tk, expert_Tk, layer, kernel)

        def backward(inputs: Any, change: Mixture) -> tuple[Any, ...]:
            experts, x_TD, gates_Tk, expert_Tk, layer = inputs
            pairs = _sort(x_TD, expert_Tk, gates_Tk, len(experts.down_bias[...]), backward_kernel)
            found = experts.mix_backward(pairs, change.output_TD, backward_kernel, layer)
            of_experts = experts.cotangents(found.gate_up_bias, found.down_bias)
            return of_experts, found.x_TD.astype(x_TD.dtype), found.gates_Tk, None, None

        mixed = jax.custom_vjp(run)
        mixed.defvjp(lambda *inputs: (run(*inputs), inputs), backward)
        return mixed(self, x_TD, gates_Tk, expert_Tk, layer)

    def mix_backward(
        self, pairs: "_Pairs", change_TD: Float[Array, "T D"], kernel: grouped.Kernel, layer: Array | None
    ) -> "_Gradients":
        """From the gradient by the mixture's output those by what it is made of."""
        x_TD, gates_Tk = (jnp.zeros(x.shape, jnp.float32) for x in (pairs.x_TD, pairs.gates_Tk))
        biases = (jnp.zeros(bias.shape, jnp.float32) for bias in (self.gate_up_bias, self.down_bias))

        def add(gradients: _Gradients, floats: _Floats, piece: Array) -> _Gradients:
            return pairs.add_gradients(gradients, floats, change_TD, piece)

        return self._over_pieces(pairs, kernel, layer, _Gradients(x_TD, gates_Tk, *biases), add)

    def cotangents(self, gate_up_bias: Array, down_bias: Array) -> "Experts":
        """The experts with these gradients in the place of biases, and None, which is no gradient, in that of
        kernels."""
        found = {"gate_up_bias": gate_up_bias, "down_bias": down_bias}

        def of(path: Any, x: Array) -> Array | None:
            gradient = found.get(path_of(path))
            return None if gradient is None else gradient.astype(x.dtype)

        return jax.tree_util.tree_map_with_path(of, self)

    def _over_pieces(
        self,
        pairs: "_Pairs",
        kernel: grouped.Kernel,
        layer: Array | None,
        nothing: Any,
        add: Callable[[Any, "_Floats", Array], Any],
    ) -> Any:
        """What `add` makes of `nothing` with one piece of pairs after the other."""
        dtype, E = pairs.x_TD.dtype, len(pairs.tiles_E)

        def one_expert(total: Any, expert: Array) -> tuple[Any, None]:
            stop = pairs.tiles_end_E[expert]
            start = stop - pairs.tiles_E[expert]

            def runs() -> Any:
                floats = self.at(dtype, kernel, layer, expert)
                return lax.fori_loop(start, stop, lambda piece, total: add(total, floats, piece), total)

            # Of an expert that no token chose the weights are not made floats.
            return lax.cond(start < stop, runs, lambda: total), None

        if kernel.by_expert:
            return lax.scan(one_expert, nothing, jnp.arange(E))[0]
        floats = self.at(dtype, kernel, layer)

        def one_piece(total: Any, piece: Array) -> tuple[Any, None]:
            exists = pairs.experts[piece, 0] < E
            return lax.cond(exists, lambda: add(total, floats, piece), lambda: total), None

        return lax.scan(one_piece, nothing, jnp.arange(len(pairs.experts)))[0]


class _Floats(NamedTuple):
    """Experts whose weights are floats: all of a layer, or one. Where a tile's expert does not exist, its results are
    not defined."""

    kernel: grouped.Kernel
    gate_up: grouped.ExpertWeights
    down: grouped.ExpertWeights
    gate_up_bias_EI: Float[Array, "E I"]
    down_bias_ED: Float[Array, "E D"]
    offset: Any
    """What is added to an expert's id to find its weights."""
    activate: Callable[[Array], Array]

    def run(self, x_ND: Array, experts: Array) -> Array:
        """x, by tiles of rows, and the expert of each tile → f(x), float32."""
        hidden_NI, groups = self._hidden(x_ND, experts)
        activated_NF = self.activate(hidden_NI).astype(x_ND.dtype)
        return self.kernel.product(activated_NF, self.down, groups) + self._by_row(self.down_bias_ED, experts)

    def run_backward(
        self, x_ND: Array, gates_N: Array, change_ND: Array, experts: Array
    ) -> tuple[Array, Array, Array, Array]:
        """From the gradient by the output of each row's token, which adds gate · f(x) to it, those by x, by the gate,
        and by what the two biases gave, [N, D], [N], [N, I] and [N, D]; float32.

        No product of the gradient by a kernel is made, and f(x) is not made again: change·f(x) is
        (change·W₂)·activated + change·b₂.
        """
        dtype = x_ND.dtype
        hidden_NI, groups = self._hidden(x_ND, experts)
        activated_NF, activate_backward = jax.vjp(self.activate, hidden_NI)
        back_NF = self.kernel.product(change_ND.astype(dtype), self.down.transposed, groups)
        of_gate_N = (activated_NF * back_NF).sum(-1) + (self._by_row(self.down_bias_ED, experts) * change_ND).sum(-1)
        (of_hidden_NI,) = activate_backward(gates_N[:, None] * back_NF)
        of_x_ND = self.kernel.product(of_hidden_NI.astype(dtype), self.gate_up.transposed, groups)
        return of_x_ND, of_gate_N, of_hidden_NI, gates_N[:, None] * change_ND

    def _hidden(self, x_ND: Array, experts: Array) -> tuple[Array, Array]:
        """Gate and up of each row, and the group of each tile."""
        groups = jnp.where(experts < len(self.down_bias_ED), experts + self.offset, len(self.gate_up.array))
        return self.kernel.product(x_ND, self.gate_up, groups) + self._by_row(self.gate_up_bias_EI, experts), groups

    def _by_row(self, bias_EO: Array, experts: Array) -> Array:
        # 0 where there is no expert: from NaN there, gradients of all kernels would be NaN.
        bias = bias_EO.at[experts].get(mode="fill", fill_value=0).astype(jnp.float32)
        return jnp.repeat(bias, self.kernel.tile, axis=0)


class _Gradients(NamedTuple):
    """By what a mixture is made of, float32."""

    x_TD: Float[Array, "T D"]
    gates_Tk: Float[Array, "T k"]
    gate_up_bias: Float[Array, "E 2 F"]
    down_bias: Float[Array, "E D"]


class _Pairs(NamedTuple):
    """Pairs sorted by expert, in tiles of one expert's alone; some tiles are a piece."""

    x_TD: Float[Array, "T D"]
    gates_Tk: Float[Array, "T k"]
    order: Int[Array, " pairs"]
    """The pairs t·r + j, sorted; r is k where no runner-up runs."""
    experts: Int[Array, "pieces tiles"]
    """The expert of each tile; E where there is none."""
    rows: Int[Array, "pieces tiles tile"]
    """Where in `order` its pairs stand; T·r, which is out of range, behind the expert's last."""
    tiles_E: Int[Array, " E"]
    tiles_end_E: Int[Array, " E"]
    """How many tiles each expert has, and the number of the one behind its last."""

    def nothing(self, keep: bool) -> Mixture:
        """The mixture before any expert has run; with `keep` their outputs are kept."""
        zeros = jnp.zeros(self.gates_Tk.shape, jnp.float32)
        output_TD, computed_Tk = jnp.zeros(self.x_TD.shape, jnp.float32), jnp.zeros(self.gates_Tk.shape, bool)
        return Mixture(output_TD, zeros, zeros, computed_Tk, self._outputs() if keep else None)

    def _outputs(self) -> Outputs:
        """The rows of all pieces, one after the other, before any has run."""
        num_pairs, rows = len(self.order), self.rows.size
        pair = self.order.at[self.rows.reshape(-1)].get(mode="fill", fill_value=num_pairs)
        places = jnp.full(num_pairs, rows).at[pair].set(jnp.arange(rows), mode="drop")
        return Outputs.none(places.reshape(len(self.x_TD), -1), rows, self.x_TD.shape[1], self.x_TD.dtype)

    def add(self, mixture: Mixture, run: Callable[[Array, Array], Array], piece: Array) -> Mixture:
        """The mixture with the results of one piece; out of range, reads are filled and writes are dropped."""
        T, k = self.gates_Tk.shape
        r = len(self.order) // T
        pair = self.order.at[self.rows[piece].reshape(-1)].get(mode="fill", fill_value=T * r)
        token, rank = jnp.divmod(pair, r)
        out = run(self.x_TD.at[token].get(mode="fill", fill_value=0), self.experts[piece])
        # The root has no gradient at 0, which is what stands behind an expert's last pair.
        real = jnp.where((pair < T * r)[:, None], out, 1)
        gated = self.gates_Tk.at[token, rank].get(mode="fill", fill_value=0)[:, None] * out
        # A runner-up, whose rank is k, is out of range of all but the last.
        mixes = token if r == k else jnp.where(rank < k, token, T)
        outputs = mixture.outputs and mixture.outputs.put(piece * len(out), out, self.x_TD.dtype)
        return Mixture(
            mixture.output_TD.at[mixes].add(gated, mode="drop"),
            mixture.norms_Tk.at[token, rank].set(jnp.linalg.norm(real, axis=-1), mode="drop"),
            mixture.peaks_Tk.at[token, rank].set(jnp.abs(out).max(-1), mode="drop"),
            mixture.computed_Tk.at[token, rank].set(True, mode="drop"),
            outputs,
        )

    def add_gradients(
        self, gradients: _Gradients, floats: _Floats, change_TD: Float[Array, "T D"], piece: Array
    ) -> _Gradients:
        """The gradients with those of one piece; rows without a pair have a gate and a change of 0."""
        experts = self.experts[piece]
        pair = self.order.at[self.rows[piece].reshape(-1)].get(mode="fill", fill_value=len(self.order))
        token, rank = jnp.divmod(pair, self.gates_Tk.shape[1])
        x_ND, change_ND = (x.at[token].get(mode="fill", fill_value=0) for x in (self.x_TD, change_TD))
        gates_N = self.gates_Tk.at[token, rank].get(mode="fill", fill_value=0)
        of_x_ND, of_gate_N, *of_biases = floats.run_backward(x_ND, gates_N, change_ND, experts)
        gate_up_bias, down_bias = (
            total.at[experts].add(rows.reshape(len(experts), -1, *total.shape[1:]).sum(1), mode="drop")
            for total, rows in zip(gradients[2:], of_biases, strict=True)
        )
        return _Gradients(
            gradients.x_TD.at[token].add(of_x_ND, mode="drop"),
            gradients.gates_Tk.at[token, rank].set(of_gate_N, mode="drop"),
            gate_up_bias,
            down_bias,
        )


def _sort(
    x_TD: Float[Array, "T D"],
    expert_Tr: Int[Array, "T r"],
    gates_Tk: Float[Array, "T k"],
    num_experts: int,
    kernel: grouped.Kernel,
) -> _Pairs:
    """Pairs by expert; those of the expert `num_experts`, which does not exist, are in no tile."""
    E, tile, num_pairs = num_experts, kernel.tile, expert_Tr.size
    pieces, per_piece = kernel.pieces(num_pairs, E)
    sizes_E = jnp.bincount(expert_Tr.reshape(-1), length=E)
    ends_E = jnp.cumsum(sizes_E)
    tiles_E = -(-sizes_E // tile)
    tiles_end_E = jnp.cumsum(tiles_E)
    index = jnp.arange(pieces * per_piece)
    experts = jnp.searchsorted(tiles_end_E, index, side="right")
    nth = index - (tiles_end_E - tiles_E).at[experts].get(mode="fill", fill_value=0)
    starts = (ends_E - sizes_E).at[experts].get(mode="fill", fill_value=0) + nth * tile
    rows = starts[:, None] + jnp.arange(tile)[None]
    rows = jnp.where(rows < ends_E.at[experts].get(mode="fill", fill_value=0)[:, None], rows, num_pairs)
    order = jnp.argsort(expert_Tr.reshape(-1), stable=True)
    shape = pieces, per_piece
    by_piece = experts.reshape(shape), rows.reshape(*shape, tile)
    return _Pairs(x_TD, gates_Tk, order, *by_piece, tiles_E, tiles_end_E)
