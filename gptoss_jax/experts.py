"""The experts: gated feed-forward networks, each applied to the tokens that chose it.

Letters: see `config`. A *pair* is a (token, chosen expert); there are T·k of them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .config import Config
from .router import Routing

SIGMOID_SLOPE = 1.702  # of GPT-OSS's swish, the slope that makes x·σ(1.702x) approximate GELU
# Pairs in one product at most: on CPU the rate of 20b's shape levels off here, and the last block of
# a group wastes half of it on average (docs/measurements.md).
BLOCK = 128


class Mixture(NamedTuple):
    """What the experts give for each token."""

    output_TD: Float[Array, "T D"]
    """Σ_j g_j·f_j(x), float32."""
    norms_Tk: Float[Array, "T k"]
    """‖f_j(x)‖₂ of each pair, before the gate, float32."""
    peaks_Tk: Float[Array, "T k"]
    """max |f_j(x)| of each pair, float32."""


class Experts(nnx.Module):
    """Weights of all experts of a layer. Kernels lie [E, out, in], the order in which MXFP4 stores them."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        E, D, F = config.num_experts, config.hidden_size, config.expert_hidden_size
        kernel, zeros = nnx.initializers.normal(0.02), nnx.initializers.zeros
        self.gate_up_kernel = nnx.Param(kernel(rngs.params(), (E, 2, F, D)))
        self.gate_up_bias = nnx.Param(zeros(rngs.params(), (E, 2, F)))
        self.down_kernel = nnx.Param(kernel(rngs.params(), (E, D, F)))
        self.down_bias = nnx.Param(zeros(rngs.params(), (E, D)))
        self.swiglu_limit = config.swiglu_limit

    def expert(self, at: tuple[Int[Array, ""], ...], x_MD: Float[Array, "M D"]) -> Float[Array, "M D"]:
        """f(x) of the expert that `at` indexes, in float32 whatever the dtype of the weights."""
        # One matrix [2F, D] and not "MD,cFD->McF": XLA's CPU backend would transpose the weights for that.
        # preferred_element_type decides a factor of 4 there: bfloat16 results are rounded one by one.
        kernel_ID = self.gate_up_kernel[at].reshape(-1, x_MD.shape[-1])
        hidden_MI = jnp.einsum("MD,ID->MI", x_MD, kernel_ID, preferred_element_type=jnp.float32)
        hidden_MI = hidden_MI + self.gate_up_bias[at].reshape(1, -1).astype(jnp.float32)
        gate, up = jnp.split(hidden_MI, 2, axis=-1)
        gate = jnp.minimum(gate, self.swiglu_limit)
        up = jnp.clip(up, -self.swiglu_limit, self.swiglu_limit)
        act = ((up + 1) * gate * jax.nn.sigmoid(SIGMOID_SLOPE * gate)).astype(x_MD.dtype)
        out = jnp.einsum("MF,DF->MD", act, self.down_kernel[at], preferred_element_type=jnp.float32)
        return out + self.down_bias[at][None].astype(jnp.float32)

    def __call__(
        self,
        x_TD: Float[Array, "T D"],
        routing: Routing,
        valid_T: Bool[Array, " T"],
        layer: Int[Array, ""] | None = None,
    ) -> Mixture:
        """Apply to each token the experts that it chose, once each; invalid tokens get zeros.

        Where the weights are those of all layers, [L, E, …], `layer` says whose experts they are.

        Pairs are sorted by expert and cut into blocks that hold one expert's pairs only, so that
        each block is one dense product. No pair is ever dropped: the number of blocks covers the
        worst split of T·k pairs over E experts, and blocks left over are skipped at run time.
        """
        T, k = routing.experts_Tk.shape
        E = self.down_bias.shape[-2]
        prefix = () if layer is None else (layer,)
        block = min(BLOCK, max(8, -(-T * k // E)))
        # Invalid tokens go to an expert E that does not exist, behind all others.
        pair_expert = jnp.where(valid_T[:, None], routing.experts_Tk, E).reshape(-1)
        order = jnp.argsort(pair_expert, stable=True)
        block_expert, block_start, group_end = _blocks(jnp.bincount(pair_expert, length=E), T * k, block)
        gates = routing.gates_Tk.reshape(-1)

        def one_block(mixture: Mixture, spec: tuple[Array, Array]) -> tuple[Mixture, None]:
            expert, start = spec

            def compute() -> Mixture:
                rows = start + jnp.arange(block)
                # Rows past the group's end belong to the next expert: T·k is out of range everywhere
                # below, where reads are filled and writes are dropped.
                pair = jnp.where(rows < group_end[expert], order.at[rows].get(mode="fill"), T * k)
                token = pair // k
                out = self.expert((*prefix, expert), x_TD.at[token].get(mode="fill", fill_value=0))
                gated = gates.at[pair].get(mode="fill", fill_value=0)[:, None] * out
                return Mixture(
                    mixture.output_TD.at[token].add(gated, mode="drop"),
                    mixture.norms_Tk.at[pair].set(jnp.linalg.norm(out, axis=-1), mode="drop"),
                    mixture.peaks_Tk.at[pair].set(jnp.abs(out).max(-1), mode="drop"),
                )

            return lax.cond(expert < E, compute, lambda: mixture), None

        zeros = Mixture(
            jnp.zeros(x_TD.shape, jnp.float32), jnp.zeros(T * k, jnp.float32), jnp.zeros(T * k, jnp.float32)
        )
        output, norms, peaks = lax.scan(one_block, zeros, (block_expert, block_start))[0]
        return Mixture(output, norms.reshape(T, k), peaks.reshape(T, k))


def _blocks(
    sizes_E: Int[Array, " E"], num_pairs: int, block: int
) -> tuple[Int[Array, " blocks"], Int[Array, " blocks"], Int[Array, " E"]]:
    """Expert (E where there is none) and first row of each block, and where each group ends."""
    E = sizes_E.shape[0]
    ends = jnp.cumsum(sizes_E)
    blocks_E = -(-sizes_E // block)
    blocks_before = jnp.cumsum(blocks_E)
    index = jnp.arange(num_pairs // block + E)
    expert = jnp.searchsorted(blocks_before, index, side="right")
    nth = index - (blocks_before - blocks_E)[jnp.minimum(expert, E - 1)]
    start = (ends - sizes_E)[jnp.minimum(expert, E - 1)] + nth * block
    return expert, start, ends
