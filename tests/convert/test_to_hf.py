"""The command `convert` to the Hugging Face form: what keeps its bytes, and what other forms become."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from convert.hf import Checkpoint
from convert.mapping import all_tensors
from convert.orbax import OrbaxCheckpoint
from convert.published import plan
from convert.shards import Rows, find_tensors
from gptoss_jax.cli import cli
from gptoss_jax.config import TINY
from tests.bad_input import edit
from tests.convert.test_prune import assert_same_bytes, contents, dequantised, raw, raw_file

FORMS = ("mxfp4", "bf16")
# Beside weights and config.json: what a published or a pruned folder also has.
EXPERTS = {str(2 * expert): expert for expert in range(TINY.num_experts)}
MAPPING = {str(layer): EXPERTS for layer in range(TINY.num_layers)}
OTHER_FILES = {
    "LICENSE": b"\xff\x00 no text\r\n",
    "README.md": b"The card.\n",
    "expert_mapping.json": json.dumps(MAPPING).encode(),
}

Folders = dict[str, Path]


def convert(model: Path, out: Path, to: str, *options: str) -> Path:
    arguments = ["convert", str(model), "--to", to, "--out", str(out), *options]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory, tiny_mxfp4: Path, tiny_bf16: Path) -> Folders:
    """Both forms, with the other files and the odd keys of a published folder."""
    found = {}
    for form, folder in zip(FORMS, (tiny_mxfp4, tiny_bf16), strict=True):
        found[form] = Path(shutil.copytree(folder, tmp_path_factory.mktemp("hf") / form))
        for name, content in OTHER_FILES.items():
            (found[form] / name).write_bytes(content)
        edit(found[form] / "config.json", rope_theta=5000, task_specific_params=[1, {"z": 0, "a": 1}])
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, hf: Folders) -> Folders:
    """Both as Orbax checkpoints."""
    folder = tmp_path_factory.mktemp("orbax")
    return {form: convert(model, folder / form, "orbax") for form, model in hf.items()}


@pytest.fixture(scope="module")
def back(tmp_path_factory: pytest.TempPathFactory, saved: Folders) -> Folders:
    """And these in Hugging Face form again."""
    folder = tmp_path_factory.mktemp("back")
    return {form: convert(model, folder / form, "hf") for form, model in saved.items()}


STORED = pytest.mark.parametrize("form", FORMS)


@STORED
def test_every_tensor_comes_back_byte_for_byte(hf: Folders, back: Folders, form: str) -> None:
    before = raw(hf[form])
    assert any(name.endswith("_scales") for name in before) == (form == "mxfp4")
    assert_same_bytes(raw(back[form]), before)
    assert list(find_tensors(back[form])) == [
        name
        for named in all_tensors(TINY)
        for name in (named.name, f"{named.name}_blocks", f"{named.name}_scales")
        if name in before
    ]


@STORED
def test_other_files_come_back_as_they_were(hf: Folders, back: Folders, form: str) -> None:
    def others(folder: Path) -> dict[str, bytes]:
        own = {n for n in contents(folder) if n.endswith((".safetensors", ".index.json"))} | {
            "config.json",
            "SHA256SUMS",
        }
        return {name: content for name, content in contents(folder).items() if name not in own}

    assert others(back[form]) == others(hf[form])
    assert OTHER_FILES.keys() < others(back[form]).keys()
    # As text, so that 150000 does not become 150000.0, nor the order of keys another.
    configs = (json.dumps(json.loads((f[form] / "config.json").read_text())) for f in (hf, back))
    assert len(set(configs)) == 1


@pytest.mark.parametrize("kind", ["hf", "orbax"])
class TestForms:
    """From both kinds of checkpoint alike."""

    @pytest.fixture
    def models(self, kind: str, hf: Folders, saved: Folders) -> Folders:
        return hf if kind == "hf" else saved

    def test_mxfp4_to_bf16_is_the_dequantised_model(self, models: Folders, hf: Folders, tmp_path: Path) -> None:
        out = convert(models["mxfp4"], tmp_path / "out", "hf", "--format", "bf16")
        assert_same_bytes(raw(out), dequantised(raw(hf["mxfp4"])))
        assert "quantization_config" not in json.loads((out / "config.json").read_text())
        Checkpoint(out)

    def test_bf16_to_mxfp4_and_back_again(self, models: Folders, hf: Folders, tmp_path: Path) -> None:
        """To the nearest value, as `prune` rounds, which its tests hold against a search."""
        out = convert(models["bf16"], tmp_path / "out", "hf", "--format", "mxfp4")
        ranking = tmp_path / "ranking.json"
        ranking.write_text(json.dumps([list(range(TINY.num_experts))] * TINY.num_layers))
        options = ["--ranking", str(ranking), "--keep", "7", "--format", "mxfp4", "--out", str(tmp_path / "pruned")]
        assert CliRunner().invoke(cli, ["prune", str(hf["bf16"]), *options], catch_exceptions=False).exit_code == 0
        assert_same_bytes(raw(out), raw(tmp_path / "pruned"))
        assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "mxfp4"
        again = convert(out, tmp_path / "again", "hf", "--format", "bf16")
        twice = convert(again, tmp_path / "twice", "hf", "--format", "mxfp4")
        assert_same_bytes(raw(twice), raw(out))

    @STORED
    def test_the_form_that_it_has(self, models: Folders, back: Folders, tmp_path: Path, form: str) -> None:
        named = convert(models[form], tmp_path / "named", "hf", "--format", form)
        assert contents(named) == contents(back[form])

    def test_small_shards(self, models: Folders, back: Folders, tmp_path: Path) -> None:
        out = convert(models["mxfp4"], tmp_path / "out", "hf", "--max-shard-size", "60KB")
        shards = list(out.glob("*.safetensors"))
        assert len(shards) > 3
        assert all(sum(t.nbytes for t in raw_file(file).values()) <= 60_000 for file in shards)
        assert_same_bytes(raw(out), raw(back["mxfp4"]))


def test_through_the_model_that_was_dequantised(hf: Folders, tmp_path: Path) -> None:
    """Saved in BF16, and quantised again: as from files in BF16."""
    dense = convert(hf["mxfp4"], tmp_path / "dense", "orbax", "--format", "bf16")
    files = convert(hf["mxfp4"], tmp_path / "files", "hf", "--format", "bf16")
    assert_same_bytes(raw(convert(dense, tmp_path / "same", "hf")), raw(files))
    ours, theirs = (convert(m, tmp_path / f"{m.name}-again", "hf", "--format", "mxfp4") for m in (dense, files))
    assert contents(ours) == contents(theirs)


@pytest.fixture(scope="module", params=FORMS)
def tensors(request: pytest.FixtureRequest, saved: Folders) -> Mapping[str, Rows]:
    return OrbaxCheckpoint(saved[request.param]).tensors


@given(data=st.data())
def test_any_run_of_rows(tensors: Mapping[str, Rows], data: Any) -> None:
    """Also one that begins or ends inside a head."""
    tensor = tensors[data.draw(st.sampled_from(sorted(tensors)))]
    first = data.draw(st.integers(0, tensor.shape[0] - 1))
    count = data.draw(st.integers(1, tensor.shape[0] - first))
    whole = tensor.read()
    assert (whole.shape, whole.nbytes) == (tensor.shape, tensor.nbytes)
    assert tensor.read(first, count).tobytes() == whole[first : first + count].tobytes()


@STORED
@pytest.mark.parametrize("quantize", [False, True])
def test_kernels_come_an_expert_at_a_time(saved: Folders, form: str, quantize: bool) -> None:
    tensors = [tensor for group in plan(OrbaxCheckpoint(saved[form]), quantize) for tensor in group]
    kernels = [t for t in tensors if "_proj" in t.name and "experts" in t.name and "bias" not in t.name]
    assert len(kernels) == 2 * TINY.num_layers * (1 + quantize)
    assert all([len(piece) for piece in t.pieces()] == [1] * TINY.num_experts for t in kernels)
