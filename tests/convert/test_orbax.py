"""Orbax checkpoints: what they hold, on which mesh they are restored, and which are refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from flax.traverse_util import flatten_dict
from jax.sharding import SingleDeviceSharding

from convert import orbax
from convert.hf import Checkpoint
from convert.orbax import OrbaxCheckpoint
from convert.sources import open_source
from gptoss_jax.cli import cli
from gptoss_jax.config import TINY
from gptoss_jax.devices import mesh
from gptoss_jax.errors import CheckpointError
from gptoss_jax.network.source import Weights
from tests.bad_input import SHORT, Refused, case, dump, edit, poke, tree
from tests.devices import seen
from tests.test_hosts import free_port
from tests.test_interrupted import on_disk

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
EXPERTS = "layers/moe/experts"
Damage = Callable[[Path], Any]


def convert(model: Path, out: Path, *options: str) -> Path:
    arguments = ["convert", str(model), "--to", "orbax", "--out", str(out), *options]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return out


def wanted(form: str, dtype: str = "bfloat16") -> Weights:
    """All parameters on one device."""
    leaves = orbax.plan(TINY, mesh.make(TINY, 1, 1, jax.devices()[:1]), form)
    as_dtype = {p: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=x.sharding) for p, x in leaves.items()}
    return {path: leaf if leaf.dtype == jnp.uint8 else as_dtype[path] for path, leaf in leaves.items()}


def assert_same(ours: Weights, theirs: Weights) -> None:
    assert ours.keys() == theirs.keys()
    for path, array in theirs.items():
        assert (ours[path].shape, ours[path].dtype) == (array.shape, array.dtype), path
        assert np.asarray(ours[path]).tobytes() == np.asarray(array).tobytes(), path


@pytest.fixture(scope="module")
def hf(tiny_mxfp4: Path, tiny_bf16: Path) -> dict[str, Path]:
    return {"mxfp4": tiny_mxfp4, "bf16": tiny_bf16}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, hf: dict[str, Path]) -> dict[str, Path]:
    """Each form as an Orbax checkpoint. Not to be changed."""
    folder = tmp_path_factory.mktemp("orbax")
    return {form: convert(model, folder / form) for form, model in hf.items()}


@pytest.fixture
def model(saved: dict[str, Path], tmp_path: Path) -> Path:
    """One that a test may break."""
    return Path(shutil.copytree(saved["mxfp4"], tmp_path / "model"))


FORMS = pytest.mark.parametrize("form", ["mxfp4", "bf16"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("stored", "form"), [("mxfp4", "mxfp4"), ("mxfp4", "bf16"), ("bf16", "bf16")])
def test_arrays_are_those_of_the_source(
    hf: dict[str, Path], saved: dict[str, Path], stored: str, form: str, dtype: str
) -> None:
    leaves = wanted(form, dtype)
    assert_same(OrbaxCheckpoint(saved[stored]).load(leaves), Checkpoint(hf[stored]).load(leaves))


@FORMS
def test_one_layer_has_the_weights_of_the_stack(saved: dict[str, Path], form: str) -> None:
    source, one = OrbaxCheckpoint(saved[form]), SingleDeviceSharding(jax.devices()[0])
    for path, stack in source.load(wanted("bf16")).items():
        if path.startswith("layers/"):
            leaf = jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype, sharding=one)
            names = [path.replace("layers/", f"layers/{index}/") for index in range(TINY.num_layers)]
            assert_same(source.load(dict.fromkeys(names, leaf)), dict(zip(names, stack, strict=True)))


@FORMS
def test_a_chunk_is_a_layers_or_a_kernel_of_one_expert(saved: dict[str, Path], form: str) -> None:
    for path, array in OrbaxCheckpoint(saved[form])._arrays.items():
        if path.startswith("layers/"):
            ones = 2 if "experts/" in path and not path.endswith("_bias") else 1
            assert array.chunk_layout.read_chunk.shape == (1,) * ones + array.shape[ones:], path


def test_mxfp4_can_become_bf16_when_saved(hf: dict[str, Path], tmp_path: Path) -> None:
    out = convert(hf["mxfp4"], tmp_path / "out", "--format", "bf16")
    leaves = wanted("bf16")
    assert_same(OrbaxCheckpoint(out).load(leaves), Checkpoint(hf["mxfp4"]).load(leaves))
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


def test_groups_of_parameters_make_one_checkpoint(
    saved: dict[str, Path], tiny_mxfp4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orbax, "SAVED_AT_ONCE", 100_000)
    groups = list(orbax._groups(dict(wanted("mxfp4"))))
    assert 4 < len(groups) < len(wanted("mxfp4"))
    out = convert(tiny_mxfp4, tmp_path / "out")
    assert_same(*(OrbaxCheckpoint(folder).load(wanted("mxfp4")) for folder in (out, saved["mxfp4"])))


def test_bf16_does_not_become_mxfp4_when_loaded(saved: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="its experts are BF16"):
        OrbaxCheckpoint(saved["bf16"]).load(wanted("mxfp4"))


@pytest.mark.filterwarnings("ignore:Sharding info not provided")  # which the tests of meshes do
@FORMS
def test_orbax_alone_restores_it(saved: dict[str, Path], form: str) -> None:
    """A tree by the names of the model, without anything of this project."""
    tree = flatten_dict(ocp.load(saved[form] / "orbax"), sep="/")
    assert_same(tree, OrbaxCheckpoint(saved[form]).load(wanted(form)))


@FORMS
def test_a_saved_checkpoint_can_be_saved_again(saved: dict[str, Path], tmp_path: Path, form: str) -> None:
    again = OrbaxCheckpoint(convert(saved[form], tmp_path / "out"))
    first = OrbaxCheckpoint(saved[form])
    assert_same(again.load(wanted(form)), first.load(wanted(form)))
    assert again.fingerprint() == first.fingerprint()


@FORMS
def test_all_that_is_no_weight_is_copied(hf: dict[str, Path], saved: dict[str, Path], form: str) -> None:
    def others(folder: Path) -> dict[str, bytes]:
        files = [p for p in folder.iterdir() if p.is_file() and p.suffix != ".safetensors"]
        return {p.name: p.read_bytes() for p in files if not p.name.endswith(".index.json")}

    assert others(saved[form]) == others(hf[form])
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= others(saved[form]).keys()
    assert {p.name for p in saved[form].iterdir()} - others(saved[form]).keys() == {"orbax", "orbax.index.json"}


def test_what_is_not_wanted_is_not_read(model: Path) -> None:
    checkpoint = OrbaxCheckpoint(model)
    for file in (model / "orbax").glob("*/ocdbt.process_*/d/*"):
        if file.stat().st_size > 20_000:  # more than all norms have
            file.unlink()
    path = "layers/moe_norm/scale"
    assert set(checkpoint.load({path: wanted("mxfp4")[path]})) == {path}
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load({"embedding": wanted("mxfp4")["embedding"]})


@FORMS
def test_the_model_is_open_source(hf: dict[str, Path], saved: dict[str, Path], form: str) -> None:
    ours, theirs = open_source(str(saved[form])), open_source(str(hf[form]))
    assert (type(ours), type(theirs)) == (OrbaxCheckpoint, Checkpoint)
    assert ours.config == theirs.config == TINY
    assert ours.config_json == theirs.config_json
    assert ours.quantized == theirs.quantized == (form == "mxfp4")
    assert ours.folder == saved[form]


def test_fingerprint_stays_when_files_are_copied(saved: dict[str, Path], model: Path) -> None:
    assert OrbaxCheckpoint(model).fingerprint() == OrbaxCheckpoint(saved["mxfp4"]).fingerprint()


def test_fingerprint_changes_with_the_config(saved: dict[str, Path], model: Path) -> None:
    edit(model / "config.json", swiglu_limit=6.5)
    assert OrbaxCheckpoint(model).fingerprint() != OrbaxCheckpoint(saved["mxfp4"]).fingerprint()


@pytest.mark.parametrize("tensor", ["model.layers.2.mlp.experts.down_proj_bias", "lm_head.weight", "model.norm.weight"])
def test_fingerprint_changes_with_first_values_of_a_weight(
    tiny_mxfp4: Path, saved: dict[str, Path], tmp_path: Path, tensor: str
) -> None:
    other = Path(shutil.copytree(tiny_mxfp4, tmp_path / "other"))
    poke(other, tensor, (0,), 0.5)
    changed = OrbaxCheckpoint(convert(other, tmp_path / "out")).fingerprint()
    assert changed != OrbaxCheckpoint(saved["mxfp4"]).fingerprint()


def test_profile_is_that_of_the_source(
    tiny_mxfp4: Path, saved: dict[str, Path], rows_jsonl: Path, tmp_path: Path
) -> None:
    for name, folder in (("hf", tiny_mxfp4), ("orbax", saved["mxfp4"])):
        arguments = ["profile", str(folder), "--data", str(rows_jsonl), *SHORT, "--out", str(tmp_path / name)]
        assert CliRunner().invoke(cli, arguments, catch_exceptions=False).exit_code == 0
    for file in ("saliency.parquet", "usage.parquet"):
        assert pq.read_table(tmp_path / "orbax" / file).equals(pq.read_table(tmp_path / "hf" / file)), file
    info = json.loads((tmp_path / "orbax" / "profile.json").read_text())
    assert info["model_fingerprint"] == OrbaxCheckpoint(saved["mxfp4"]).fingerprint()


# On several devices.


def start(checkpoint: Path, out: Path, devices: int, *processes: str) -> "subprocess.Popen[str]":
    out.mkdir(exist_ok=True)
    argv = [sys.executable, "-m", "tests.convert.orbax_on_devices", str(checkpoint), str(out), *processes]
    return subprocess.Popen(argv, cwd=ROOT, env=os.environ | seen(devices), stdout=subprocess.PIPE, text=True)


def fingerprint_of(process: "subprocess.Popen[str]") -> str:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return said.splitlines()[-1]


@pytest.fixture(scope="module")
def on_one_device(eight_mxfp4: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The fingerprint of what is saved from one device, which is that of what any mesh saves."""
    return OrbaxCheckpoint(convert(eight_mxfp4, tmp_path_factory.mktemp("eight") / "orbax")).fingerprint()


def test_eight_devices(eight_mxfp4: Path, tmp_path: Path, on_one_device: str) -> None:
    assert fingerprint_of(start(eight_mxfp4, tmp_path / "out", 8)) == on_one_device


def test_two_processes_of_four_devices(eight_mxfp4: Path, tmp_path: Path, on_one_device: str) -> None:
    where = f"127.0.0.1:{free_port()}"
    both = [start(eight_mxfp4, tmp_path / "out", 4, where, "2", str(i)) for i in range(2)]
    assert [fingerprint_of(process) for process in both] == [on_one_device] * 2
    assert OrbaxCheckpoint(tmp_path / "out").fingerprint() == on_one_device


# What is refused.


def file_of(model: Path, pattern: str) -> Path:
    """The largest file of that name."""
    return max((model / "orbax").rglob(pattern), key=lambda p: p.stat().st_size if p.is_file() else -1)


def cut(pattern: str, at: int) -> Damage:
    def damage(model: Path) -> None:
        file = file_of(model, pattern)
        file.write_bytes(file.read_bytes()[:at])

    return damage


def flip(pattern: str) -> Damage:
    """Change bytes, and no size."""

    def damage(model: Path) -> None:
        for file in (model / "orbax").glob(pattern):
            file.write_bytes(bytes(byte ^ 0x55 for byte in file.read_bytes()))

    return damage


def another(**changes: Any) -> Damage:
    """The config of another model."""

    def damage(model: Path) -> None:
        dump(model / "config.json", replace(TINY, **changes).to_json())

    return damage


DAMAGES = [
    case("another number of experts", another(num_experts=8), EXPERTS, "expected", "different models"),
    case("another size", another(expert_hidden_size=128), EXPERTS, "down", "different models"),
    case("another vocabulary", another(vocab_size=321), "embedding", "[320, 64]", "[321, 64]"),
    case("another number of layers", another(num_layers=1, layer_types=("full_attention",)), "different models"),
    case("no config", lambda m: (m / "config.json").unlink(), "config.json", "no such file"),
    case("data missing", lambda m: file_of(m, "d/*").unlink(), "/d/", "missing", "copy"),
    case("data truncated", cut("d/*", -1), "/d/", "orbax.index.json says", "copy"),
    case("data empty", cut("d/*", 0), "/d/", " 0 bytes", "copy"),
    case("manifest missing", lambda m: (file_of(m, "manifest.ocdbt")).unlink(), "manifest.ocdbt", "missing"),
    case("metadata truncated", cut("_METADATA", 20), "_METADATA", "20 bytes"),
    case("arrays missing", lambda m: shutil.rmtree(m / "orbax") or (m / "orbax").mkdir(), "orbax/", "missing"),
    case("tree damaged", flip("*/d/*"), "model/orbax", "cannot be read", "convert the model again"),
    case("manifest damaged", flip("*/manifest.ocdbt"), "model/orbax", "cannot be read"),
    case("no index", lambda m: (m / "orbax.index.json").unlink(), "orbax.index.json", "no usable index"),
    case("index is no JSON", lambda m: (m / "orbax.index.json").write_text("{"), "orbax.index.json", "copy"),
    case("index is a list", lambda m: dump(m / "orbax.index.json", []), "orbax.index.json", "copy"),
]


@pytest.mark.parametrize(("damage", "says"), DAMAGES)
def test_damaged(damage: Damage, says: tuple[str, ...], model: Path, refused: Refused) -> None:
    damage(model)
    refused("convert", "model", "--to", "hf", "--out", "out", says=says)


def test_damaged_metadata_is_found_when_arrays_are_restored(model: Path, rows_jsonl: Path, refused: Refused) -> None:
    flip("*/_METADATA")(model)
    arguments = ["profile", "model", "--data", rows_jsonl, *SHORT, "--out", "out"]
    refused(*arguments, says=("model/orbax", "cannot be read", "convert the model again"))


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_weights_that_are_no_numbers(model: Path, value: float) -> None:
    checkpoint = OrbaxCheckpoint(model)
    path = "layers/moe/experts/down_bias"
    damaged = np.zeros((4, 7, 64), jnp.bfloat16)
    damaged[3, 6, 5] = value
    checkpoint._restored = lambda *_: jnp.asarray(damaged)  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match=f"{path} holds NaN or infinity"):
        checkpoint.load({path: wanted("mxfp4")[path]})


REFUSALS = [
    case("not a checkpoint", ["empty", "--to", "orbax", "--out", "out"], "empty/config.json", "no such file"),
    case("no folder", ["gone", "--to", "orbax", "--out", "out"], "gone", "no such folder"),
    case("existing output", ["model", "--to", "orbax", "--out", "empty"], "empty", "exists", "--overwrite"),
    case("output over the source", ["model", "--to", "hf", "--out", "model", "--overwrite"], "model", "another --out"),
    case("output in the source", ["model", "--to", "hf", "--out", "model/out"], "model/out", "another --out"),
    case("no form", ["model", "--out", "out"], "--to"),
    case("another form", ["model", "--to", "gguf", "--out", "out"], "gguf", "orbax"),
    case("no output", ["model", "--to", "hf"], "--out"),
    case("more devices", ["model", "--to", "orbax", "--mesh", "data=1,expert=7", "--out", "out"], "7 places"),
    case("mesh for files", ["model", "--to", "hf", "--mesh", "data=1,expert=1", "--out", "out"], "--to orbax"),
    case("size", ["model", "--to", "hf", "--max-shard-size", "5XB", "--out", "out"], "5XB", "give a size as 5GB"),
    case("to be quantised", ["bf16", "--to", "orbax", "--format", "mxfp4", "--out", "out"], "BF16", "--to hf"),
]


@pytest.mark.parametrize(("argv", "says"), REFUSALS)
def test_refused(
    argv: list[str], says: tuple[str, ...], model: Path, tiny_bf16: Path, tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bf16").symlink_to(tiny_bf16)
    refused("convert", *argv, says=says)


@FORMS
@pytest.mark.parametrize("to", ["mxfp4", "bf16"])
def test_prune_writes_what_it_writes_of_the_source(
    hf: dict[str, Path], saved: dict[str, Path], tmp_path: Path, form: str, to: str
) -> None:
    """Byte for byte, in all files: from the arrays as from the files that they were made of."""
    dump(tmp_path / "ranking.json", [np.random.default_rng(layer).permutation(7).tolist() for layer in range(4)])
    options = ["--ranking", str(tmp_path / "ranking.json"), "--keep", "4", "--format", to]
    for kind, models in (("hf", hf), ("orbax", saved)):
        model = Path(shutil.copytree(models[form], tmp_path / kind / "model"))  # the card has the folder's name
        arguments = ["prune", str(model), *options, "--out", str(tmp_path / kind / "pruned")]
        assert CliRunner().invoke(cli, arguments, catch_exceptions=False).exit_code == 0
    ours, theirs = tree(tmp_path / "orbax" / "pruned"), tree(tmp_path / "hf" / "pruned")
    assert ours == theirs
    assert "model-00001-of-00001.safetensors" in ours


def test_arrays_of_another_form_beside_the_models_are_refused(tiny_mxfp4: Path, tmp_path: Path) -> None:
    """Kernels as floats and in four bits: they need not hold the same."""
    orbax.write(Checkpoint(tiny_mxfp4), tmp_path, wanted("bf16") | wanted("mxfp4"))
    with pytest.raises(CheckpointError, match="down_kernel is no parameter of this GPT-OSS model"):
        OrbaxCheckpoint(tmp_path)


# What is left behind.


@pytest.mark.parametrize("options", ["size=600k", "ro"])
def test_disk(tiny_mxfp4: Path, tmp_path: Path, options: str) -> None:
    done = on_disk(options, tmp_path, ["convert", tiny_mxfp4, "--to", "orbax", "--out", "disk/out"])
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert "disk/out: " + ("no space left" if options != "ro" else "read-only file system") in done.stderr


STOPPING = """
import signal, sys, time

# What runs in the background inherits an ignored SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
import convert.orbax

def slow(*args):
    print("now", flush=True)
    save(*args)
    time.sleep(0.5)

save, convert.orbax._save = convert.orbax._save, slow
from gptoss_jax.cli import main
main()
"""


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_signal(tiny_mxfp4: Path, tmp_path: Path, stop: signal.Signals) -> None:
    """While Orbax's threads write."""
    before = tree(tmp_path)
    argv = [sys.executable, "-c", STOPPING, "convert", str(tiny_mxfp4), "--to", "orbax", "--out", "out"]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(argv, cwd=tmp_path, **pipes) as process:
        assert process.stdout is not None and process.stdout.readline() == "now\n"
        process.send_signal(stop)
        _, error = process.communicate()
    assert (process.returncode, error.strip()) == (128 + stop, "gptoss-jax: stopped; nothing was written")
    assert tree(tmp_path) == before
