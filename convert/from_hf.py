"""A checkpoint in Hugging Face form, checked against its config, as a source of layers."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from gptoss_jax.config import HUB_ID, Config, read_json
from gptoss_jax.errors import CheckpointError, reason

from . import mxfp4
from .mapping import LAYER, OUTER, Tensor, all_tensors, layer_name
from .shards import find_tensors

FIRST_BLOCKS = "model.layers.0.mlp.experts.gate_up_proj_blocks"
# A hub repository may hold the weights again in other forms, in folders of their own.
HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "LICENSE*", "README.md", "USAGE_POLICY*"]
FINITE_PIECE = 1 << 22  # values checked at once
FINGERPRINT_BYTES = 4096  # of the head of each tensor; all of 120b would take minutes to read


def locate(model: str) -> Path:
    """The folder of a model: `model` itself, or where the hub repository of that id is downloaded to."""
    if not model:
        raise CheckpointError("MODEL is empty: name a folder in Hugging Face form, or a hub id")
    if Path(model).exists() or not HUB_ID.fullmatch(model):
        return Path(model)
    from huggingface_hub import snapshot_download  # slow to import, and needed for hub ids only

    try:
        return Path(snapshot_download(model, allow_patterns=HUB_PATTERNS, ignore_patterns=["*/*"]))
    # The hub client raises errors of several packages; all mean that the model is not to be had.
    except Exception as error:
        raise CheckpointError(f"{model}: no such folder, and the hub does not give it: {reason(error)}") from error


class Checkpoint:
    """Reads tensors on demand; implements `gptoss_jax.model.LayerSource`."""

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder: give a checkpoint in Hugging Face form, or a hub id")
        self.folder = folder
        self.config_json: dict[str, Any] = read_json(folder / "config.json")
        self.config = Config.from_json(self.config_json, str(folder / "config.json"))
        self.tensors = find_tensors(folder)
        self.quantized = FIRST_BLOCKS in self.tensors
        self._check()

    def outer(self) -> dict[str, Any]:
        """Embedding, final norm and unembedding."""
        return unflatten_dict({t.path: self._read(t.hf_name, t) for t in OUTER}, sep="/")

    def layer(self, index: int) -> dict[str, Any]:
        """Layer `index`, MXFP4 dequantised to bfloat16."""
        return unflatten_dict({t.path: self._read(layer_name(index, t), t) for t in LAYER}, sep="/")

    def values(self, name: str, tensor: Tensor, first: int = 0, count: int | None = None) -> np.ndarray:
        """Values of some experts' rows: as in the BF16 form, or as in the MXFP4 form if stored so."""
        if not self.is_quantized(tensor):
            return self.tensors[name].read(first, count)
        blocks = self.tensors[f"{name}_blocks"].read(first, count)
        return mxfp4.decode(blocks, self.tensors[f"{name}_scales"].read(first, count))

    def is_quantized(self, tensor: Tensor) -> bool:
        """Whether this tensor is stored as MXFP4."""
        return self.quantized and tensor.mxfp4 is not None

    def fingerprint(self) -> str:
        """SHA-256 over config, tensor table and the first bytes of each tensor."""
        digest = hashlib.sha256(json.dumps(self.config_json, sort_keys=True).encode())
        for name in sorted(self.tensors):
            t = self.tensors[name]
            with open(t.file, "rb") as file:
                file.seek(t.offset)
                head = file.read(min(t.nbytes, FINGERPRINT_BYTES))
            digest.update(f"\n{name} {t.dtype} {t.shape}\n".encode() + head)
        return digest.hexdigest()

    def _read(self, name: str, tensor: Tensor) -> np.ndarray:
        if not self.is_quantized(tensor):
            values = self.values(name, tensor)
            check_finite(values, name, tensor)
            return tensor.to_model(values, self.config)
        # An expert at a time into its place: decoding has temporaries of several times its result.
        whole = np.empty(tensor.model_shape(self.config), mxfp4.BF16)
        for expert in range(self.config.num_experts):
            values = self.values(name, tensor, expert, 1)
            check_finite(values, name, tensor, expert)
            whole[expert] = tensor.mxfp4_to_model(values, self.config)[0]
        return whole

    def _check(self) -> None:
        expected: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, tensor, _ in all_tensors(self.config):
            if self.is_quantized(tensor):
                blocks = tensor.blocks_shape(self.config)
                expected[f"{name}_blocks"] = ("U8", blocks)
                expected[f"{name}_scales"] = ("U8", blocks[:-1])
            else:
                expected[name] = ("BF16", tensor.hf_shape(self.config))
        for name, (dtype, shape) in expected.items():
            found = self.tensors.get(name)
            if found is None:
                raise CheckpointError(f"{self.folder}: {name} is missing: download the checkpoint again")
            if (found.dtype, found.shape) != (dtype, shape):
                what = "config.json and weights are of different models"
                if found.shape == shape:
                    what = "convert the checkpoint to the published form, BF16 with BF16 or MXFP4 experts"
                raise CheckpointError(
                    f"{found.file}: {name} is {found.dtype} {list(found.shape)}, expected {dtype} {list(shape)}: {what}"
                )
        unknown = sorted(set(self.tensors) - set(expected))
        if unknown:
            raise CheckpointError(
                f"{self.tensors[unknown[0]].file}: {unknown[0]} is no tensor of this GPT-OSS model: "
                "config.json and weights are of different models"
            )


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
