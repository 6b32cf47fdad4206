"""From arrays of the model back to tensors of the Hugging Face form, a tensor's rows at a time."""

import math
from dataclasses import dataclass

import numpy as np

from . import mxfp4
from .cut import plan as cut_plan
from .hf import Checkpoint
from .mapping import Named, all_tensors
from .orbax import OrbaxCheckpoint
from .shards import DTYPES, Planned
from .tensors import Tensors


@dataclass(frozen=True)
class Rearranged:
    """A tensor of the Hugging Face form, made from the model's array when its rows are read."""

    source: OrbaxCheckpoint
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


class Published(Tensors):
    """An Orbax checkpoint seen as one in Hugging Face form."""

    def __init__(self, source: OrbaxCheckpoint):
        self.config, self.quantized = source.config, source.quantized
        made: dict[str, Rearranged] = {}
        for named in all_tensors(self.config):
            name, tensor, _ = named
            if self.is_quantized(tensor):
                blocks = tensor.blocks_shape(self.config)
                made[f"{name}_blocks"] = Rearranged(source, named, f"{name}_blocks", blocks, "packed")
                made[f"{name}_scales"] = Rearranged(source, named, f"{name}_scales", blocks[:-1], "scales")
            else:
                made[name] = Rearranged(source, named, name, tensor.hf_shape(self.config))
        self.tensors = made


def plan(source: Checkpoint | OrbaxCheckpoint, quantize: bool) -> list[list[Planned]]:
    """All tensors, experts' kernels in MXFP4 or BF16; what has its form already keeps its bytes."""
    tensors: Tensors = Published(source) if isinstance(source, OrbaxCheckpoint) else source
    return cut_plan(tensors, [range(source.config.num_experts)] * source.config.num_layers, quantize)
