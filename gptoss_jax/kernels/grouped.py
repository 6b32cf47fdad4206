"""Products of rows, sorted by expert, with their experts' weights: one kernel for each platform.

Rows come in tiles, each of one expert alone. Letters: see `config`.
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

# Rows of a tile, which holds one expert's rows only and wastes half of its last tile on average: a fifth of an
# expert's rows wastes a tenth of the work. On CPU 192 rows of 20b's shape took less time than 128, 256 or 512
# (docs/measurements.md); on TPU it is the kernel's own tile; on GPU a product must fill the chip.
TILES = {"cpu": (128, 192), "tpu": (128, 256), "gpu": (1024,)}
# Where gradients are made without those of kernels. Products with transposed weights bring these into another order for
# each tile: on CPU 256 rows of 20b's shape took two thirds of the time of 128 and of 192.
BACKWARD_TILES = {**TILES, "cpu": (256,)}
# Rows that pass the kernel in one call, and so are in memory at once: 0.7 GiB with all that is made of them
# at 20b's and 120b's sizes.
TPU_PIECE = 16384
UNEVEN = 1.1  # what a device's experts may get, over an even share, before there is a piece more
ALL_TILES = 1 << 30  # of a step, in one call
# Bytes of an expert's weights that the kernel holds at once. They are held twice, beside two tiles of rows and of
# results, and a kernel may take 16 MiB of VMEM.
TPU_TILE_BYTES = 4 << 20


class ExpertWeights(NamedTuple):
    """The weights of one product of many experts."""

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

    @property
    def transposed(self) -> "ExpertWeights":
        """The same array, for the product that leads back from outputs to inputs."""
        return ExpertWeights(self.array, not self.inputs_first)


class Kernel(NamedTuple):
    """How a platform multiplies grouped rows."""

    tile: int
    """Rows of a tile."""
    tiles: int
    """Tiles of one call."""
    product: Callable[[Array, ExpertWeights, Array], Array]
    """x [tiles·tile, I], weights, group of each tile [tiles] → float32 [tiles·tile, O].

    Where a group does not exist, neither do its tile's results: what stands there is not defined."""
    by_expert: bool = False
    """Whether one expert after the other runs, its weights alone made floats. A call then has one tile."""

    def pieces(self, num_pairs: int, num_experts: int) -> tuple[int, int]:
        """Calls for the worst split of so many pairs over so many experts, and tiles of each."""
        tiles = min(num_pairs, num_pairs // self.tile + num_experts)
        per_piece = min(self.tiles, tiles)
        return -(-tiles // per_piece), per_piece


def choose(
    place: Placement, rows_per_expert: int, num_experts: int, four_bits: bool = False, backward: bool = False
) -> Kernel:
    """The product for a platform and an even load of so many experts here, whose weights are floats or `four_bits`; the
    one place where it is chosen. `backward` says that it leads back from gradients."""
    tiles = (BACKWARD_TILES if backward else TILES)[place.platform]
    tile = max([b for b in tiles if 5 * b <= rows_per_expert], default=tiles[0])
    if place.differentiable:
        return Kernel(min(tile, max(8, rows_per_expert)), ALL_TILES, _each_with_its_own)
    if place.platform == "tpu":
        rows = UNEVEN * num_experts * visited_rows(rows_per_expert, tile)
        pieces = math.ceil(rows / TPU_PIECE)
        return Kernel(tile, math.ceil(rows / pieces / tile), partial(_megablox, interpret=place.interpret))
    # Of few pairs, as when one token is generated, only the experts that were chosen are looked at; of four bits those
    # of all would become floats.
    return Kernel(min(tile, max(8, rows_per_expert)), 1, _one_tile, by_expert=rows_per_expert > 1 or four_bits)


def visited_rows(rows_per_expert: int, tile: int) -> int:
    """Rows that an expert's tiles have, its last one half full."""
    return rows_per_expert + tile // 2


def _one_tile(x_NI: Float[Array, "N I"], weights: ExpertWeights, group_ids: Int[Array, " 1"]) -> Float[Array, "N O"]:
    # preferred_element_type decides a factor of 4 on CPU: bfloat16 results are rounded one by one there.
    axes = "NI,IO->NO" if weights.inputs_first else "NI,OI->NO"
    matrix = picked(weights.array, group_ids[0]) if len(weights.array) > 1 else weights.array[0]
    return jnp.einsum(axes, x_NI, matrix, preferred_element_type=jnp.float32)


def picked(weights: Array, index: Any) -> Array:
    """weights[index]. XLA's CPU backend slices no bfloat16: without the barrier it makes all weights float32 ahead of
    the first one's product, and keeps them."""
    weights, index = lax.optimization_barrier((weights, index))
    return weights[index]


def _each_with_its_own(
    x_NI: Float[Array, "N I"], weights: ExpertWeights, group_ids: Int[Array, " tiles"]
) -> Float[Array, "N O"]:
    """One product for all tiles, each with a copy of its weights: what has a gradient on every platform."""
    x_tMI = x_NI.reshape(len(group_ids), -1, x_NI.shape[1])
    # Clipped, not filled: of weights of NaN, tiles that do not exist would have gradients of NaN.
    weights_t = weights.array.at[group_ids].get(mode="clip")
    axes = "tMI,tIO->tMO" if weights.inputs_first else "tMI,tOI->tMO"
    out_tMO = jnp.einsum(axes, x_tMI, weights_t, preferred_element_type=jnp.float32)
    return out_tMO.reshape(len(x_NI), -1)


def _megablox(
    x_NI: Float[Array, "N I"], weights: ExpertWeights, group_ids: Int[Array, " tiles"], interpret: bool
) -> Float[Array, "N O"]:
    """The kernel that MaxText trains with: it visits the tiles of existing groups alone."""
    tile = x_NI.shape[0] // group_ids.shape[0]
    sizes = jnp.zeros(len(weights.array), jnp.int32).at[group_ids].add(tile, mode="drop")
    # All inputs in each tile: then consecutive tiles of one expert read its weights once.
    width = tile_width(weights.outputs, weights.inputs * weights.array.dtype.itemsize)
    tiling = (tile, weights.inputs, width)
    with mosaic_precision(x_NI.dtype):
        return gmm(
            x_NI, weights.array, sizes, jnp.float32, tiling, transpose_rhs=not weights.inputs_first, interpret=interpret
        )


def tile_width(width: int, input_bytes: int) -> int:
    """Outputs of a tile: of those that fit, the number that computes fewest outputs too many."""
    fitting = range(LANES, max(LANES, TPU_TILE_BYTES // input_bytes) + 1, LANES)
    return min(reversed(fitting), key=lambda tile: -(-width // tile) * tile)
