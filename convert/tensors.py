"""What every checkpoint gives: its tensors by their names in the Hugging Face form."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np

from gptoss_jax.errors import CheckpointError
from gptoss_jax.network.source import Source

from . import mxfp4
from .mapping import Tensor, all_tensors
from .shards import Rows

FINITE_PIECE = 1 << 22  # values checked at once
EXPONENT_BITS = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}


@runtime_checkable
class AnyCheckpoint(Source, Protocol):
    """A source that gives itself in Hugging Face form as well, whatever its files are: from it any other is written."""

    @property
    def tensors(self) -> Mapping[str, Rows]:
        """Every tensor by its name in the Hugging Face form; its rows are read, or made, when they are asked for."""
        ...


def is_quantized(checkpoint: AnyCheckpoint, name: str) -> bool:
    """Whether the tensor of this name is stored as MXFP4."""
    return f"{name}_blocks" in checkpoint.tensors


def stored_forms(checkpoint: AnyCheckpoint) -> tuple[list[str], list[str]]:
    """The forms in which the experts' kernels are stored, and those in which all else is: MXFP4, BF16, F16, F32."""
    kernels: set[str] = set()
    others: set[str] = set()
    for name, tensor, _ in all_tensors(checkpoint.config):
        form = "MXFP4" if is_quantized(checkpoint, name) else checkpoint.tensors[name].dtype
        (kernels if tensor.mxfp4 else others).add(form)
    return sorted(kernels), sorted(others)


def told_forms(checkpoint: AnyCheckpoint, quantize: bool) -> tuple[str, ...]:
    """Lines about what the published form has in another way than the source: experts of several forms, one tensor for
    both embeddings."""
    told = []
    kernels, _ = stored_forms(checkpoint)
    if "MXFP4" in kernels and len(kernels) > 1:
        written = "MXFP4, rounded where they were not" if quantize else "BF16, which holds every value of MXFP4"
        told.append(f"experts are {' and '.join(kernels)} in the source, and now all {written}")
    if checkpoint.config_json.get("tie_word_embeddings") is True:
        told.append(
            "the embeddings of the source are tied: they are written as two tensors, tie_word_embeddings: false"
        )
    return tuple(told)


def read_values(checkpoint: AnyCheckpoint, name: str, first: int = 0, count: int | None = None) -> np.ndarray:
    """Values of some experts' rows: as in the BF16 form, or as in the MXFP4 form if stored so."""
    if not is_quantized(checkpoint, name):
        return checkpoint.tensors[name].read(first, count)
    blocks, scales = (checkpoint.tensors[f"{name}_{part}"].read(first, count) for part in ("blocks", "scales"))
    return mxfp4.decode(blocks, scales)


def check_finite(values: np.ndarray, name: str, tensor: Tensor, first_expert: int = 0) -> None:
    """CheckpointError where a tensor holds NaN or infinity: its exponent bits are all ones."""
    # As integers: comparing bfloat16 values would convert them one by one. In pieces: the embedding of
    # 20b is over 1 GiB, and so would be what is made on the way.
    exponent = EXPONENT_BITS[values.dtype.name]
    bits = values.reshape(-1).view(f"u{values.itemsize}")
    for start in range(0, len(bits), FINITE_PIECE):
        bad = np.flatnonzero((bits[start : start + FINITE_PIECE] & exponent) == exponent)
        if len(bad):
            expert = first_expert + (start + bad[0]) // (values.size // len(values))
            where = f"{name}, expert {expert}" if tensor.per_expert else name
            raise CheckpointError(
                f"{where}: holds NaN or infinity, as damaged files and training that diverged do: copy the checkpoint "
                "again, or take an earlier one"
            )
