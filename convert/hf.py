"""A checkpoint in Hugging Face form, checked against its config, as a source of weights."""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gptoss_jax.config import Form
from gptoss_jax.errors import CheckpointError
from gptoss_jax.files.paths import AnyPath
from gptoss_jax.network.source import ALL, Weights, split_path

from . import mxfp4
from .folder import check_no_adapter, read_config
from .forms import as_published
from .mapping import LAYER, OUTER, Tensor, all_tensors, layer_name
from .shards import Stored, find_tensors
from .tensors import check_finite, is_quantized, read_values, stored_forms

ALIGNMENT = 64  # bytes, of XLA's CPU buffers
FOUR_BITS = {"packed": "blocks", "scales": "scales", "blocks": "blocks", "exponents": "scales"}  # as they are stored
FINGERPRINT_BYTES = 4096  # of the head of each tensor; all of 120b would take minutes to read


class Checkpoint:
    """Reads tensors on demand; implements `tensors.AnyCheckpoint`."""

    four_bits: Form = "blocks"

    def __init__(self, folder: AnyPath):
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder: give a checkpoint in Hugging Face form, or a hub id")
        check_no_adapter(folder)
        self.folder = folder
        self.config_json, self.config = read_config(folder)
        if other := self.config_json.get("transformers_weights"):
            raise CheckpointError(
                f"{folder}: config.json has transformers_weights {other!r}: transformers takes that file, other "
                "programs do not: give it its usual name, and remove the key"
            )
        found = find_tensors(folder)
        self.tensors: Mapping[str, Stored] = as_published(found, self.config, self.config_json, folder)
        # As floats where experts are MXFP4 in some layers alone: those hold all values of both.
        kernels = [entry.name for entry in all_tensors(self.config) if entry.tensor.mxfp4]
        self.quantized = all(is_quantized(self, name) for name in kernels)

    def load(self, wanted: Weights) -> Weights:
        """The arrays, one device's part after the other: beside what devices hold, one part is in memory."""
        return {path: self._placed(path, array) for path, array in wanted.items()}

    def _placed(self, path: str, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        devices = defaultdict(list)
        for device, index in wanted.sharding.addressable_devices_indices_map(wanted.shape).items():
            devices[tuple(s.indices(n)[:2] for s, n in zip(index, wanted.shape, strict=True))].append(device)
        parts = []
        for ranges, holders in devices.items():
            part = self.part(path, ranges, wanted.dtype)
            parts += [jax.device_put(part, device) for device in holders]
            del part
        return jax.make_array_from_single_device_arrays(wanted.shape, wanted.sharding, parts)

    def part(self, path: str, ranges: tuple[tuple[int, int], ...], dtype: Any) -> np.ndarray:
        """The parameter at `path`, from first to last + 1 along each axis."""
        layer, inner = split_path(path)
        row = {t.path: t for t in (LAYER if layer else OUTER)}
        name, _, form = inner.rpartition("_")
        tensor = row[f"{name}_kernel" if form in FOUR_BITS else inner]
        if layer == ALL:
            names = [layer_name(index, tensor) for index in range(*ranges[0])]
            ranges = ranges[1:]
        else:
            names = [layer_name(int(layer), tensor) if layer else tensor.hf_name]
        whole = _aligned((len(names), *(stop - start for start, stop in ranges)), dtype)
        for one, name in zip(whole, names, strict=True):
            self._read(name, tensor, form, ranges, one)
        return whole if layer == ALL else whole[0]

    def rows(self, path: str, ids: np.ndarray) -> np.ndarray:
        """Rows of a parameter outside the layers; each is read once."""
        (tensor,) = (t for t in OUTER if t.path == path)
        stored = self.tensors[tensor.hf_name]
        distinct, places = np.unique(ids, return_inverse=True)
        values = stored.pick(distinct.tolist())
        check_finite(values, tensor.hf_name, tensor)
        return values[places]

    def fingerprint(self) -> str:
        """SHA-256 over config, tensor table and the first bytes of each tensor."""
        digest = hashlib.sha256(json.dumps(self.config_json, sort_keys=True).encode())
        for name in sorted(self.tensors):
            t = self.tensors[name]
            with t.file.open("rb") as file:
                file.seek(t.offset)
                head = file.read(min(t.nbytes, FINGERPRINT_BYTES))
            digest.update(f"\n{name} {t.dtype} {t.shape}\n".encode() + head)
        return digest.hexdigest()

    def _read(self, name: str, tensor: Tensor, form: str, ranges: Sequence[tuple[int, int]], into: np.ndarray) -> None:
        """Fill `into` with a part of one parameter; reads the rows of `ranges[0]` where these are the tensor's."""
        (first, last), *others = ranges
        if form in FOUR_BITS or is_quantized(self, name):
            # An expert at a time: what is made on the way is several times its size, and new memory takes longer to
            # get than these bytes to be read.
            for one, expert in zip(into, range(first, last), strict=True):
                if form in FOUR_BITS:
                    one[...] = self._four_bits(name, tensor, form, expert)
                else:
                    one[...] = self._decoded(name, tensor, expert)
            return
        shape = tensor.model_shape(self.config)
        stored = self.tensors[name]
        rows = stored.shape[0] // shape[0]  # of the tensor for each one of the parameter, as heads have
        columns = None
        if others and others[0] != (0, shape[1]):
            width = stored.shape[1] // shape[1]
            columns = others[0][0] * width, others[0][1] * width
        values = stored.read(first * rows, (last - first) * rows, columns)
        check_finite(values, name, tensor, first)
        into[...] = tensor.to_model(values, self.config)

    def _decoded(self, name: str, tensor: Tensor, expert: int) -> np.ndarray:
        """One expert's rows of a kernel that is stored in MXFP4."""
        values = read_values(self, name, expert, 1)
        check_finite(values, name, tensor, expert)
        return tensor.mxfp4_to_model(values, self.config)[0]

    def _four_bits(self, name: str, tensor: Tensor, form: str, expert: int) -> np.ndarray:
        """One expert's codes or scales in a layout of `kernels.mxfp4`: outputs first as stored, or inputs first."""
        if not self.quantized:
            forms = " and ".join(stored_forms(self)[0])
            raise CheckpointError(f"{self.folder}: its experts are {forms}: --weights mxfp4 needs MXFP4 in all layers")
        stored = self.tensors[f"{name}_{FOUR_BITS[form]}"].read(expert, 1)
        rows = stored.reshape(*stored.shape[:2], -1)  # of one output each, blocks of 16 bytes joined
        outputs_first = tensor.mxfp4_to_model(rows, self.config)
        if form in ("blocks", "exponents"):
            return outputs_first.reshape(rows.shape[1:])
        inputs_first = np.ascontiguousarray(np.moveaxis(outputs_first, -1, 1))
        inputs_first = inputs_first.reshape(*inputs_first.shape[:2], -1)
        return (mxfp4.halves(inputs_first) if form == "packed" else inputs_first)[0]


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An empty array that JAX's CPU backend takes over, where it would copy a less aligned one."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    first = -raw.ctypes.data % ALIGNMENT
    return raw[first : first + nbytes].view(dtype).reshape(shape)
