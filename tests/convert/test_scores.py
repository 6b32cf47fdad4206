"""Scores by the weights alone, against a plain loop over a checkpoint's own tensors."""

import math
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors import safe_open

import gptoss_jax as gj
from convert.scores import aimer, columns_of_weights
from convert.sources import open_source
from gptoss_jax.cli import cli
from gptoss_jax.config import TINY
from gptoss_jax.errors import CheckpointError, InputError, OptionError, ProfileError
from gptoss_jax.selection.origin import Origin
from gptoss_jax.selection.ranking import Ranking

from ..bad_input import Program, Refused, edit, poke, read_shard, shard_of, write_shard
from ..made_up import Finished

L, E = TINY.num_layers, TINY.num_experts
FP4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def tensor(folder: Path, name: str) -> np.ndarray:
    with safe_open(shard_of(folder, name), "numpy") as file:
        return np.asarray(file.get_tensor(name))


def values_of(folder: Path, layer: int, projection: str, expert: int) -> np.ndarray:
    """One expert's weights of one projection, float64, in any order."""
    name = f"model.layers.{layer}.mlp.experts.{projection}"
    try:
        return tensor(folder, name)[expert].astype(np.float64).reshape(-1)
    except KeyError:
        blocks, scales = (tensor(folder, f"{name}_{part}")[expert] for part in ("blocks", "scales"))
    codes = np.stack([blocks & 15, blocks >> 4])
    magnitudes = np.array(FP4)[codes & 7] * np.where(codes & 8, -1, 1)
    return (magnitudes * 2.0 ** (scales.astype(np.float64) - 127)[None, ..., None]).reshape(-1)


def aimer_by_loop(folder: Path) -> np.ndarray:
    scores = np.zeros((L, E))
    for layer, expert in np.ndindex(L, E):
        w = np.concatenate([values_of(folder, layer, name, expert) for name in ("gate_up_proj", "down_proj")])
        assert len(w) == 3 * TINY.hidden_size * TINY.expert_hidden_size
        scores[layer, expert] = np.abs(w).mean() / math.sqrt((w**2).mean())
    return scores


def orbax_of(folder: Path, out: Path) -> Path:
    assert CliRunner().invoke(cli, ["convert", str(folder), "--to", "orbax", "--out", str(out)]).exit_code == 0
    return out


@pytest.mark.parametrize("form", ["mxfp4", "bf16", "orbax mxfp4", "orbax bf16"])
def test_aimer_equals_a_loop(form: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder: Path = request.getfixturevalue(f"tiny_{form.split()[-1]}")
    expected = aimer_by_loop(folder)
    assert len(np.unique(expected)) == L * E and (expected > 0).all() and (expected < 1).all()
    source = orbax_of(folder, tmp_path / "orbax") if "orbax" in form else folder
    np.testing.assert_allclose(aimer(open_source(str(source))), expected, rtol=1e-6)


def test_the_least_even_experts_stay(tiny_mxfp4: Path) -> None:
    ranking = gj.rank(str(tiny_mxfp4), "aimer")
    assert ranking.layers == np.argsort(aimer_by_loop(tiny_mxfp4), axis=1, kind="stable").tolist()


def wide(folder: Path, names: tuple[str, ...]) -> None:
    """The experts' kernels as float32, of which bfloat16 would lose digits."""
    for name in names:
        shard = shard_of(folder, name)
        header, tensors = read_shard(shard)
        begin, end = header[name]["data_offsets"]
        values = np.frombuffer(tensors[begin:end], ml_dtypes.bfloat16).astype(np.float32)
        data = (values * np.float32(1 + 2**-10) + np.float32(2**-12)).tobytes()
        for other in header.values():
            if "data_offsets" in other and other["data_offsets"][0] >= end:
                other["data_offsets"] = [offset + len(data) - (end - begin) for offset in other["data_offsets"]]
        header[name] |= {"dtype": "F32", "data_offsets": [begin, begin + len(data)]}
        write_shard(shard, header, tensors[:begin] + data + tensors[end:])


def test_wider_floats_keep_their_digits(tiny_bf16: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bf16, tmp_path / "wide"))
    wide(folder, ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"))
    np.testing.assert_allclose(aimer(open_source(str(folder))), aimer_by_loop(folder), rtol=1e-6)


def test_an_expert_of_zeros_is_the_first_to_go(tiny_bf16: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bf16, tmp_path / "zeros"))
    for name in ("gate_up_proj", "down_proj"):
        poke(folder, f"model.layers.2.mlp.experts.{name}", (3,), 0)
    ranking = gj.rank(str(folder), "aimer")
    assert ranking.layers[2][-1] == 3
    assert aimer(open_source(str(folder)))[2, 3] == 1


def test_a_weight_that_is_no_number_is_named(tiny_bf16: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bf16, tmp_path / "broken"))
    poke(folder, "model.layers.1.mlp.experts.down_proj", (4, 5, 6), float("nan"))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.down_proj, expert 4: holds NaN"):
        columns_of_weights(open_source(str(folder)), ["aimer"])


# The front door.


def test_the_file_names_criterion_and_model_and_nothing_of_a_profile(
    program: Program, tiny_mxfp4: Path, tmp_path: Path
) -> None:
    assert program("rank", tiny_mxfp4, "--criterion", "aimer", "--out", "ranking.json") == (0, "")
    ranking = Ranking.read(tmp_path / "ranking.json", TINY)
    fingerprint = open_source(str(tiny_mxfp4)).fingerprint()
    expected = Origin("aimer", rule="falling score", seed=0, model_fingerprint=fingerprint)
    assert (ranking.origin, ranking.counts) == (expected, None)
    assert str(ranking.origin) == "by `aimer` of the weights alone"
    assert ranking == gj.rank(gj.open(str(tiny_mxfp4)), "aimer")
    assert gj.select("nano", 4, "aimer").layers == gj.rank("nano", "aimer").keep(4).layers


def test_the_card_says_so(program: Program, tiny_mxfp4: Path, tiny_bf16: Path, tmp_path: Path) -> None:
    gj.rank(str(tiny_mxfp4), "aimer", out=tmp_path / "ranking.json")
    for model, doubted in ((tiny_mxfp4, False), (tiny_bf16, True)):
        argv = ["prune", model, "--ranking", "ranking.json", "--keep", 4, "--out", f"pruned-{doubted}"]
        assert program(*argv)[0] == 0
        card = (tmp_path / f"pruned-{doubted}" / "README.md").read_text()
        assert "The choice of experts is by `aimer` of the weights alone" in card and "profile" not in card
        assert ("rests on the weights of a checkpoint with another fingerprint" in card) == doubted


def test_a_profile_in_the_place_of_the_model(refused: Refused, finished: Finished) -> None:
    folder = finished("made", 1)
    for given in (folder, folder / "saliency.parquet"):
        refused("rank", given, "--criterion", "aimer", says=("'aimer'", "weights alone", "give the model"))
    with pytest.raises(ProfileError, match="give the model in the place of the profile"):
        gj.rank(gj.Profile.open(folder), "aimer")


def test_a_model_in_the_place_of_a_profile(refused: Refused, model: Path) -> None:
    for given in (model, "nano"):
        says = (f"{given} is a model", "'reap'", "gptoss-jax profile", "aimer")
        refused("rank", given, "--out", "ranking.json", says=says)
    with pytest.raises(ProfileError, match=r"nano is a model, and 'gate'"):
        gj.rank(gj.open("nano"), "gate")


REFUSED: list[tuple[list[Any], tuple[str, ...]]] = [
    (["--domain", "law"], ("--domain", "'aimer'", "leave it out")),
    (["--out", "model/ranking.json"], ("model",)),
]


@pytest.mark.parametrize(("options", "says"), REFUSED)
def test_what_means_nothing_is_refused(
    options: list[Any], says: tuple[str, ...], refused: Refused, model: Path
) -> None:
    refused("rank", model, "--criterion", "aimer", *options, says=says)


def test_a_model_that_is_none(refused: Refused, model: Path) -> None:
    refused("rank", "gone", "--criterion", "aimer", says=("gone", "no such folder"))
    edit(model / "config.json", model_type="other")
    refused("rank", model, "--criterion", "aimer", says=("config.json", "model_type"))
    with pytest.raises(InputError, match="is no checkpoint"):
        gj.rank(gj.open("nano").masked({0: [1]}), "aimer")
    with pytest.raises(OptionError, match="--domain"):
        gj.rank("nano", "aimer", "law")
