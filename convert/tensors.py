"""What every checkpoint gives: its tensors by their names in the Hugging Face form."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np

from gptoss_jax.errors import CheckpointError
from gptoss_jax.network.source import Source

from . import mxfp4
from .mapping import Tensor
from .shards import Rows

FINITE_PIECE = 1 << 22  # values checked at once


@runtime_checkable
class AnyCheckpoint(Source, Protocol):
    """A source that gives itself in Hugging Face form as well, whatever its files are: from it any other is written."""

    @property
    def tensors(self) -> Mapping[str, Rows]:
        """Every tensor by its name in the Hugging Face form; its rows are read, or made, when they are asked for."""
        ...


def is_quantized(checkpoint: AnyCheckpoint, tensor: Tensor) -> bool:
    """Whether this tensor is stored as MXFP4."""
    return checkpoint.quantized and tensor.mxfp4 is not None


def read_values(
    checkpoint: AnyCheckpoint, name: str, tensor: Tensor, first: int = 0, count: int | None = None
) -> np.ndarray:
    """Values of some experts' rows: as in the BF16 form, or as in the MXFP4 form if stored so."""
    if not is_quantized(checkpoint, tensor):
        return checkpoint.tensors[name].read(first, count)
    blocks, scales = (checkpoint.tensors[f"{name}_{part}"].read(first, count) for part in ("blocks", "scales"))
    return mxfp4.decode(blocks, scales)


def check_finite(values: np.ndarray, name: str, tensor: Tensor, first_expert: int = 0) -> None:
    """CheckpointError where a bfloat16 tensor holds NaN or infinity: its exponent bits are all ones."""
    # As integers: comparing bfloat16 values would convert them one by one. In pieces: the embedding of
    # 20b is over 1 GiB, and so would be what is made on the way.
    bits = values.reshape(-1).view(np.uint16)
    for start in range(0, len(bits), FINITE_PIECE):
        bad = np.flatnonzero((bits[start : start + FINITE_PIECE] & 0x7F80) == 0x7F80)
        if len(bad):
            expert = first_expert + (start + bad[0]) // (values.size // len(values))
            where = f"{name}, expert {expert}" if tensor.per_expert else name
            raise CheckpointError(f"{where}: holds NaN or infinity: download the checkpoint again")
