"""Products of rows, sorted by expert, with their experts' kernels: one spelling for each platform.

Rows come in blocks, each of one expert alone. Letters: see `config`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm
from jaxtyping import Array, Float, Int

from ..devices.placement import LANES, Placement, mosaic_precision

# Rows of a block, which holds one expert's rows only and wastes half of its last block on average: a fifth of an
# expert's rows wastes a tenth of the work. On CPU 192 rows of 20b's shape took less time than 128, 256 or 512
# (docs/measurements.md); on TPU a block is a tile of the kernel; on GPU a product must fill the chip.
BLOCKS = {"cpu": (128, 192), "tpu": (128, 256), "gpu": (1024,)}
# Rows that pass the kernel in one call, and so are in memory at once: 0.7 GiB with all that is made of them
# at 20b's and 120b's sizes.
TPU_PIECE = 16384
UNEVEN = 1.1  # what a device's experts may get, over an even share, before there is a piece more
ALL_BLOCKS = 1 << 30  # of a step, in one call
# Bytes of an expert's kernel in one tile. It is held twice, beside two tiles of rows and of results, and a
# kernel may take 16 MiB of VMEM.
TPU_TILE_BYTES = 4 << 20


class Kernels(NamedTuple):
    """Kernels of many experts."""

    array: Array
    """[groups, O, I], or with `inputs_first` [groups, I, O]."""
    inputs_first: bool

    @property
    def outputs(self) -> int:
        """O."""
        return self.array.shape[2 if self.inputs_first else 1]

    @property
    def inputs(self) -> int:
        """I."""
        return self.array.shape[1 if self.inputs_first else 2]


class Grouped(NamedTuple):
    """How a platform multiplies grouped rows."""

    block: int
    """Rows of a block."""
    blocks: int
    """Blocks of one call."""
    product: Callable[[Array, Kernels, Array], Array]
    """x [blocks·block, I], kernels, group of each block [blocks] → float32 [blocks·block, O].

    Where a group does not exist, neither do its block's results: what stands there is not defined."""
    by_expert: bool = False
    """Whether one expert after the other runs, its kernels alone made floats. A call then has one block."""

    def pieces(self, num_pairs: int, num_experts: int) -> tuple[int, int]:
        """Calls for the worst split of so many pairs over so many experts, and blocks of each."""
        blocks = min(num_pairs, num_pairs // self.block + num_experts)
        per_piece = min(self.blocks, blocks)
        return -(-blocks // per_piece), per_piece


def choose(place: Placement, rows_per_expert: int, num_experts: int) -> Grouped:
    """The product for a platform and an even load of so many experts here; the one place where it is chosen."""
    blocks = BLOCKS[place.platform]
    block = max([b for b in blocks if 5 * b <= rows_per_expert], default=blocks[0])
    if place.differentiable:
        return Grouped(min(block, max(8, rows_per_expert)), ALL_BLOCKS, _each_with_its_own)
    if place.platform == "tpu":
        rows = UNEVEN * num_experts * visited_rows(rows_per_expert, block)
        pieces = math.ceil(rows / TPU_PIECE)
        return Grouped(block, math.ceil(rows / pieces / block), partial(_megablox, interpret=place.interpret))
    # Of few pairs, as when one token is generated, only the experts that were chosen are looked at.
    return Grouped(min(block, max(8, rows_per_expert)), 1, _one_block, by_expert=rows_per_expert > 1)


def visited_rows(rows_per_expert: int, block: int) -> int:
    """Rows that an expert's blocks have, its last one half full."""
    return rows_per_expert + block // 2


def _one_block(x_NI: Float[Array, "N I"], kernels: Kernels, group_ids: Int[Array, " 1"]) -> Float[Array, "N O"]:
    # preferred_element_type decides a factor of 4 on CPU: bfloat16 results are rounded one by one there.
    axes = "NI,IO->NO" if kernels.inputs_first else "NI,OI->NO"
    kernel = picked(kernels.array, group_ids[0]) if len(kernels.array) > 1 else kernels.array[0]
    return jnp.einsum(axes, x_NI, kernel, preferred_element_type=jnp.float32)


def picked(kernels: Array, index: Any) -> Array:
    """kernels[index]. XLA's CPU backend slices no bfloat16: without the barrier it makes all kernels float32 ahead of
    the first one's product, and keeps them."""
    kernels, index = lax.optimization_barrier((kernels, index))
    return kernels[index]


def _each_with_its_own(
    x_NI: Float[Array, "N I"], kernels: Kernels, group_ids: Int[Array, " blocks"]
) -> Float[Array, "N O"]:
    """One product for all blocks, each with a copy of its kernel: what has a gradient on every platform."""
    x_bMI = x_NI.reshape(len(group_ids), -1, x_NI.shape[1])
    # Clipped, not filled: of a kernel of NaN, blocks that do not exist would have gradients of NaN.
    kernels_b = kernels.array.at[group_ids].get(mode="clip")
    axes = "bMI,bIO->bMO" if kernels.inputs_first else "bMI,bOI->bMO"
    out_bMO = jnp.einsum(axes, x_bMI, kernels_b, preferred_element_type=jnp.float32)
    return out_bMO.reshape(len(x_NI), -1)


def _megablox(
    x_NI: Float[Array, "N I"], kernels: Kernels, group_ids: Int[Array, " blocks"], interpret: bool
) -> Float[Array, "N O"]:
    """The kernel that MaxText trains with: it visits the blocks of existing groups alone."""
    block = x_NI.shape[0] // group_ids.shape[0]
    sizes = jnp.zeros(len(kernels.array), jnp.int32).at[group_ids].add(block, mode="drop")
    # All inputs in each tile: then consecutive blocks of one expert read its kernel once.
    width = tile_width(kernels.outputs, kernels.inputs * kernels.array.dtype.itemsize)
    tiling = (block, kernels.inputs, width)
    with mosaic_precision(x_NI.dtype):
        return gmm(
            x_NI, kernels.array, sizes, jnp.float32, tiling, transpose_rhs=not kernels.inputs_first, interpret=interpret
        )


def tile_width(width: int, input_bytes: int) -> int:
    """Outputs of a tile: of those that fit, the number that computes fewest outputs too many."""
    fitting = range(LANES, max(LANES, TPU_TILE_BYTES // input_bytes) + 1, LANES)
    return min(reversed(fitting), key=lambda tile: -(-width // tile) * tile)
