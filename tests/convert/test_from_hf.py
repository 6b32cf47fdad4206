"""What a checkpoint gives the model, against what transformers loads from the same folder."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from convert.hf import Checkpoint
from convert.mapping import LAYER, OUTER, Tensor, all_tensors, layer_name
from convert.shards import find_tensors
from convert.tensors import read_values
from gptoss_jax.config import TINY
from gptoss_jax.devices.mesh import by_path
from gptoss_jax.network.source import load
from tests.oracle import needs_torch


@pytest.fixture(scope="module", params=["mxfp4", "bf16"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"tiny_{request.param}")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> dict[str, np.ndarray]:
    """The state dict of transformers in float32, into which every stored value goes exactly."""
    torch = needs_torch()
    from transformers import GptOssForCausalLM

    model = GptOssForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def assert_same_bits(ours: np.ndarray, theirs: np.ndarray, tensor: Tensor) -> None:
    published = tensor.to_hf(np.asarray(ours), TINY).astype(np.float32)
    assert published.shape == theirs.shape, tensor.hf_name
    assert np.array_equal(published.view(np.uint32), theirs.view(np.uint32)), tensor.hf_name


def test_weights_are_what_transformers_loads(folder: Path, theirs: dict[str, np.ndarray]) -> None:
    ours = by_path(load(Checkpoint(folder), "bfloat16"))
    assert len(ours) == len(LAYER) + len(OUTER)
    for name, tensor, layer in all_tensors(TINY):
        array = ours[tensor.path] if layer is None else ours[f"layers/{tensor.path}"][layer]
        assert_same_bits(array, theirs[name], tensor)


def test_transformers_has_no_other_tensors(folder: Path, theirs: dict[str, np.ndarray]) -> None:
    checkpoint = Checkpoint(folder)
    layers = {layer_name(i, t) for i in range(checkpoint.config.num_layers) for t in LAYER}
    assert set(theirs) == layers | {t.hf_name for t in OUTER}


def test_values_of_some_experts(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    for tensor in (t for t in LAYER if t.per_expert):
        name = layer_name(2, tensor)
        some, every = read_values(checkpoint, name, 3, 2), read_values(checkpoint, name)
        assert np.array_equal(some, every[3:5])


def test_a_checkpoint_knows_its_form(tiny_mxfp4: Path, tiny_bf16: Path) -> None:
    assert Checkpoint(tiny_mxfp4).quantized
    assert not Checkpoint(tiny_bf16).quantized
    assert Checkpoint(tiny_mxfp4).config == Checkpoint(tiny_bf16).config == TINY


def test_fingerprint_stays_when_files_are_copied(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    assert Checkpoint(tmp_path / "copy").fingerprint() == Checkpoint(folder).fingerprint()


def test_fingerprint_changes_with_the_config(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"swiglu_limit": 6.5}))
    assert Checkpoint(copy).fingerprint() != Checkpoint(folder).fingerprint()


@pytest.mark.parametrize("tensor", ["model.layers.2.mlp.experts.down_proj_bias", "lm_head.weight", "model.norm.weight"])
def test_fingerprint_changes_with_first_bytes_of_a_weight(folder: Path, tmp_path: Path, tensor: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    stored = find_tensors(copy)[tensor]
    data = bytearray(stored.file.read_bytes())
    data[stored.offset] ^= 1
    stored.file.write_bytes(data)
    assert Checkpoint(copy).fingerprint() != Checkpoint(folder).fingerprint()
