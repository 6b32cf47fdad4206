"""A checkpoint with other values of some of its small tensors, as healing leaves it: nothing is written."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from gptoss_jax.network.source import ALL, Weights, split_path

from .mapping import all_tensors
from .mxfp4 import BF16
from .shards import Rows
from .tensors import AnyCheckpoint


@dataclass(frozen=True)
class Held:
    """A tensor in memory, in the Hugging Face form."""

    name: str
    array: np.ndarray
    """bfloat16."""
    dtype: str = "BF16"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all rows."""
        return self.array.shape

    @property
    def nbytes(self) -> int:
        """Of all rows."""
        return self.array.nbytes

    def read(self, first: int = 0, count: int | None = None) -> np.ndarray:
        """Rows [first, first + count) of the first axis; all of them without arguments."""
        return self.array[first : None if count is None else first + count]


class Changed:
    """A checkpoint whose parameters at some paths, of all layers [L, …] or outside of them, have other values."""

    def __init__(self, checkpoint: AnyCheckpoint, values: Mapping[str, Any]):
        """`values` are rounded to BF16, as they will be written."""
        self.checkpoint, self.config, self.config_json = checkpoint, checkpoint.config, checkpoint.config_json
        self.folder, self.quantized, self.four_bits = checkpoint.folder, checkpoint.quantized, checkpoint.four_bits
        self.values = {path: np.asarray(value).astype(BF16) for path, value in sorted(values.items())}

    @cached_property
    def tensors(self) -> Mapping[str, Rows]:
        """All tensors; those of other values lie in memory."""
        found = dict(self.checkpoint.tensors)
        for name, tensor, layer in all_tensors(self.config):
            path = tensor.path if layer is None else f"layers/{tensor.path}"
            if path in self.values:
                value = self.values[path] if layer is None else self.values[path][layer]
                found[name] = Held(name, tensor.to_hf(value, self.config))
        return MappingProxyType(found)

    def load(self, wanted: Weights) -> Weights:
        """The checkpoint's arrays, and in the place of some the other values; each process takes what its devices
        hold."""
        theirs = {path: leaf for path, leaf in wanted.items() if self._of(path) is None}
        arrays = dict(self.checkpoint.load(theirs))
        for path, leaf in wanted.items():
            value = self._of(path)
            if value is not None:
                typed = value.astype(leaf.dtype)
                arrays[path] = jax.make_array_from_callback(leaf.shape, leaf.sharding, typed.__getitem__)
        return {path: arrays[path] for path in wanted}

    def _of(self, path: str) -> np.ndarray | None:
        """The other value of a parameter, of one layer where its number is in the path; None where it has none."""
        layer, inner = split_path(path)
        value = self.values.get(f"layers/{inner}" if layer else inner)
        return value if value is None or layer in ("", ALL) else value[int(layer)]

    def rows(self, path: str, ids: np.ndarray) -> np.ndarray:
        """The checkpoint's: embeddings have no other values."""
        return self.checkpoint.rows(path, ids)

    def fingerprint(self) -> str:
        """SHA-256 over the checkpoint's and the other values."""
        digest = hashlib.sha256(self.checkpoint.fingerprint().encode())
        for path, value in self.values.items():
            digest.update(f"\n{path}\n".encode() + value.tobytes())
        return digest.hexdigest()
