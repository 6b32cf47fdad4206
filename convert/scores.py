"""What the weights of experts say of them without a token: the columns of criteria that need no profile.

Letters: see `gptoss_jax.config`.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gptoss_jax.kernels.mxfp4 import dequantise_pairs

from .cut import Bar, silent
from .mapping import all_tensors
from .tensors import AnyCheckpoint, check_finite, is_quantized, read_values


def columns_of_weights(
    checkpoint: AnyCheckpoint, names: Sequence[str], progress: Bar = silent
) -> dict[str, np.ndarray]:
    """The columns of these names, each [L, E]; CheckpointError where a tensor holds NaN or infinity."""
    return {name: COLUMNS[name](checkpoint, progress) for name in names}


def aimer(checkpoint: AnyCheckpoint, progress: Bar = silent) -> np.ndarray:
    """The absolute mean of each expert's weights over their root mean square, float64 [L, E].

    AIMER(w) = (‖w‖₁ / N) / √(‖w‖₂² / N), w the N weights of gate, up and down together, without biases. It is between
    1/√N, where one weight alone is not 0, and 1, where all have one magnitude, as for 0 it is taken to be. Those with
    the largest are pruned: Liu et al. 2026 (arXiv:2603.18492), section 3.
    """
    config = checkpoint.config
    shape = config.num_layers, config.num_experts
    kernels = [entry for entry in all_tensors(config) if entry.tensor.mxfp4]
    number = sum(math.prod(tensor.model_shape(config)[1:]) for _, tensor, layer in kernels if layer == 0)
    sums, squares = np.zeros(shape), np.zeros(shape)
    with progress(len(kernels) * config.num_experts, "kernels") as advance:
        for name, tensor, layer in kernels:
            for expert in range(config.num_experts):
                some, more = _sums(checkpoint, name, expert)
                if not np.isfinite(some):
                    check_finite(read_values(checkpoint, name, expert, 1), name, tensor, expert)
                sums[layer, expert] += some
                squares[layer, expert] += more
                advance(1)
    root = np.sqrt(squares * number)
    return np.divide(sums, root, out=np.ones(shape), where=root > 0)


COLUMNS: dict[str, Callable[[AnyCheckpoint, Bar], np.ndarray]] = {"aimer": aimer}
"""The function of each column by its name."""


def _sums(checkpoint: AnyCheckpoint, name: str, expert: int) -> tuple[float, ...]:
    """Σ|w| and Σw² of one expert's kernel."""
    parts = [f"{name}_blocks", f"{name}_scales"] if is_quantized(checkpoint, name) else [name]
    read = [checkpoint.tensors[part].read(expert, 1) for part in parts]
    by_row = (_of_values if len(read) == 1 else _of_blocks)(*read)
    # Rows have some thousands of values, which float32 adds well enough; all of an expert's it would not.
    return tuple(float(np.asarray(rows, np.float64).sum()) for rows in by_row)


@jax.jit
def _of_values(values: Array) -> tuple[Array, Array]:
    """Σ|w| and Σw² along the last axis."""
    wide = values.astype(jnp.float32)
    return jnp.abs(wide).sum(-1), (wide**2).sum(-1)


@jax.jit
def _of_blocks(blocks: Array, scales: Array) -> tuple[Array, Array]:
    """The same of four bits a value, which are exact in bfloat16."""
    return _of_values(dequantise_pairs(blocks.reshape(*scales.shape[:-1], -1), scales, jnp.bfloat16))
