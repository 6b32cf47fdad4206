"""From arrays of the model back to tensors of the Hugging Face form, a tensor's rows at a time."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gptoss_jax.config import Config

from . import mxfp4
from .cut import plan as cut_plan
from .mapping import Named, all_tensors
from .rounding import Rounding
from .shards import DTYPES, Planned, Rows
from .tensors import AnyCheckpoint


class Arrays(Protocol):
    """A checkpoint of the model's own arrays, in BF16 or as MXFP4 that a device wants."""

    @property
    def config(self) -> Config: ...

    @property
    def quantized(self) -> bool: ...

    def read(self, path: str, index: tuple[Any, ...]) -> np.ndarray:
        """A part of the array at a parameter's path, layers' stacked [L, …]."""
        ...


@dataclass(frozen=True)
class Rearranged:
    """A tensor of the Hugging Face form, made from the model's array when its rows are read."""

    source: Arrays
    named: Named
    name: str
    shape: tuple[int, ...]
    form: str | None = None
    """packed or scales: the array's part that a quantised kernel's blocks or scales come from."""

    @property
    def dtype(self) -> str:
        return "U8" if self.form else "BF16"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def read(self, first: int = 0, count: int | None = None) -> np.ndarray:
        """Rows [first, first + count) of the first axis; all of them without arguments."""
        last = self.shape[0] if count is None else first + count
        _, tensor, layer = self.named
        config = self.source.config
        rows = self.shape[0] // tensor.model_shape(config)[0]  # for each one of the array, as heads have
        begin, end = first // rows, -(-last // rows)
        path, index = (tensor.path, ()) if layer is None else (f"layers/{tensor.path}", (layer,))
        if self.form:
            path = f"{path.removesuffix('_kernel')}_{self.form}"
        part = self.source.read(path, (*index, slice(begin, end)))
        whole = self._bytes(part) if self.form else tensor.to_hf(part, config)
        return whole[first - begin * rows : last - begin * rows]

    def _bytes(self, part: np.ndarray) -> np.ndarray:
        """Blocks or scales of some experts, from [E, I / 2 or 32, O]."""
        tensor, config = self.named.tensor, self.source.config
        part = mxfp4.pairs(part) if self.form == "packed" else part
        part = part.reshape(*part.shape[:2], *tensor.model_shape(config)[1:-1])
        rows = tensor.model_to_mxfp4(np.moveaxis(part, 1, -1), config)
        return rows.reshape(len(part), *self.shape[1:])


def tensors(source: Arrays) -> Mapping[str, Rows]:
    """Every tensor of the Hugging Face form by its name."""
    made: dict[str, Rows] = {}
    for named in all_tensors(source.config):
        name, tensor, _ = named
        if source.quantized and tensor.mxfp4:
            blocks = tensor.blocks_shape(source.config)
            made[f"{name}_blocks"] = Rearranged(source, named, f"{name}_blocks", blocks, "packed")
            made[f"{name}_scales"] = Rearranged(source, named, f"{name}_scales", blocks[:-1], "scales")
        else:
            made[name] = Rearranged(source, named, name, tensor.hf_shape(source.config))
    return made


def plan(checkpoint: AnyCheckpoint, quantize: bool, rounding: Rounding | None = None) -> list[list[Planned]]:
    """All tensors, experts' kernels in MXFP4 or BF16; what has its form already keeps its bytes."""
    config = checkpoint.config
    return cut_plan(checkpoint, [range(config.num_experts)] * config.num_layers, quantize, rounding)
