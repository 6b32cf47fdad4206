"""Eight devices against one: results, what each device holds, what moves between them, and what is refused."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.shards import find_tensors
from gptoss_jax.config import GPT_OSS_20B, GPT_OSS_120B, TINY, Config
from gptoss_jax.devices import mesh
from gptoss_jax.devices.mesh import DATA, EXPERT, RULES
from gptoss_jax.errors import MeshError
from gptoss_jax.network import model
from gptoss_jax.network.products import MULTIPLIED, pairs
from gptoss_jax.network.source import abstract
from gptoss_jax.network.swap import AT_ONCE
from gptoss_jax.run.scores import TOP_LOGITS, UNEMBED_BLOCK
from gptoss_jax.statistics.sums import DECLARED
from tests.on_eight_devices import EIGHT, GOLDEN, HEALED, LENGTHS, MESHES, ON_ONE_DEVICE, REFUSED, SPLITS, SPOKEN, named

from .bad_input import SHORT, Refused, case

pytestmark = [pytest.mark.slow, pytest.mark.newest]

ROOT = Path(__file__).resolve().parents[1]
RUNS = [*MESHES, "pmap"]
INTEGERS = {name for name, statistic in DECLARED.items() if statistic.integer}


class Eight:
    """What `tests.on_eight_devices` wrote."""

    def __init__(self, folder: Path):
        self.results = dict(np.load(folder / "results.npz"))
        self.facts: dict[str, Any] = json.loads((folder / "facts.json").read_text(encoding="utf-8"))

    def of(self, run: str, kind: str = "statistics") -> dict[str, np.ndarray]:
        """The arrays of a run by name; rows as they were fed, also where pmap split them."""
        prefix = f"{run}/{kind}/"
        return {name.removeprefix(prefix): x for name, x in self.results.items() if name.startswith(prefix)}


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory, eight_mxfp4: Path, tiny_mxfp4: Path, rows_jsonl: Path) -> Eight:
    folder = tmp_path_factory.mktemp("on-eight-devices")
    command = [sys.executable, "-m", "tests.on_eight_devices", folder, eight_mxfp4, tiny_mxfp4, rows_jsonl]
    subprocess.run(command, cwd=ROOT, check=True)
    return Eight(folder)


def assert_close(ours: np.ndarray, theirs: np.ndarray, name: str) -> None:
    """To 1e-6 of the largest magnitude."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max(), err_msg=name)


def test_this_process_keeps_its_one_device() -> None:
    assert jax.device_count() == 1


@pytest.mark.parametrize("run", RUNS)
def test_statistics_are_those_of_one_device(run: str, eight: Eight) -> None:
    one, ours = eight.of("one"), eight.of(run)
    assert ours.keys() == one.keys() == DECLARED.keys()
    for name in INTEGERS:
        np.testing.assert_array_equal(ours[name], one[name], err_msg=name)
    for name in one.keys() - INTEGERS:
        assert_close(ours[name], one[name], name)


@pytest.mark.parametrize("run", RUNS)
def test_routing_is_that_of_one_device(run: str, eight: Eight) -> None:
    """[L, B, S, k]; pmap has the devices as a further axis."""
    one = eight.of("one", "routing")
    assert one["experts"].shape == (EIGHT.num_layers, len(LENGTHS), max(LENGTHS), EIGHT.top_k)
    ours = {name: x.reshape(one[name].shape) for name, x in eight.of(run, "routing").items()}
    valid = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    np.testing.assert_array_equal(ours["experts"][:, valid], one["experts"][:, valid])
    assert_close(ours["gates"][:, valid], one["gates"][:, valid], "gates")


@pytest.mark.parametrize("run", RUNS)
def test_grams_are_those_of_one_device(run: str, eight: Eight) -> None:
    """What choosing experts together needs; pmap has the devices as a further axis."""
    valid = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    for name, theirs in eight.of("one", "grams").items():
        ours = eight.of(run, "grams")[name].reshape(theirs.shape)
        assert_close(ours[:, valid], theirs[:, valid], name)


@pytest.mark.parametrize("run", RUNS)
def test_scores_are_those_of_one_device(run: str, eight: Eight) -> None:
    for name, theirs in eight.of("one", "scores").items():
        assert_close(eight.of(run, "scores")[name].reshape(theirs.shape), theirs, name)


def test_scores_leave_the_statistics_as_they_are(eight: Eight) -> None:
    with_scores = eight.of("1x8")
    for name, ours in eight.of("1x8 without scores").items():
        np.testing.assert_array_equal(ours, with_scores[name], err_msg=name)


@pytest.mark.parametrize("kind", ["statistics", "scores"])
def test_four_bits_in_memory_change_no_bit_of_the_results(kind: str, eight: Eight) -> None:
    floats = eight.of("2x4", kind)
    for name, ours in eight.of("2x4 mxfp4", kind).items():
        np.testing.assert_array_equal(ours, floats[name], err_msg=name)


@pytest.mark.parametrize("run", [*SPOKEN, "2x4 mxfp4"])
def test_replies_over_meshes(run: str, eight: Eight) -> None:
    """Tokens and experts are those of one device, where rows end and prompts that waited take their places."""
    one, ours = eight.of("generated one", "said"), eight.of(f"generated {run}", "said")
    assert one["tokens"].shape == (len(LENGTHS) + 2, 18)
    np.testing.assert_array_equal(ours["tokens"], one["tokens"])
    np.testing.assert_array_equal(ours["experts"], one["experts"])
    np.testing.assert_allclose(ours["gates"], one["gates"], rtol=2**-10)


@pytest.mark.parametrize("teacher", ["Finals", "Top"])
@pytest.mark.parametrize("run", HEALED)
def test_distillation_over_meshes(run: str, teacher: str, eight: Eight) -> None:
    """Losses and gradients are those of one device, whether a parameter is split or each device has it."""
    for kind in ("loss", "gradients"):
        one, ours = (eight.of(f"healed {name} {teacher}", kind) for name in ("one", run))
        assert ours.keys() == one.keys()
        for name, theirs in one.items():
            assert np.any(theirs), name
            np.testing.assert_allclose(ours[name], theirs, rtol=0, atol=1e-5 * np.abs(theirs).max(), err_msg=name)


@pytest.mark.parametrize("run", ["masked 2x4", "masked 1x8"])
def test_a_masked_model_is_the_pruned_one(run: str, eight: Eight) -> None:
    """Its experts lie where they did, so that devices may hold any number of those that are left."""
    assert np.abs(eight.results[f"{run}/logits"] - eight.results["pruned 2x4/logits"]).max() <= 1e-6
    assert eight.facts["shards"][run] == eight.facts["shards"][run.removeprefix("masked ")]


def pairs_to_compute() -> np.ndarray:
    """int [G]: k for each token that is no padding; rows are of the groups in turn."""
    return EIGHT.top_k * np.array([sum(LENGTHS[group::4]) for group in range(4)])


@pytest.mark.parametrize("run", ["one", *RUNS, "2x4 mxfp4", "crowded"])
def test_no_pair_is_dropped(run: str, eight: Eight) -> None:
    """Whatever was kept: tokens that are not pass the experts too."""
    computed_LG = eight.of(run)["computed"]
    np.testing.assert_array_equal(computed_LG, np.tile(pairs_to_compute(), (EIGHT.num_layers, 1)))
    assert (EIGHT.top_k * eight.of(run)["tokens"] < computed_LG).all()


@pytest.mark.parametrize("run", ["crowded", "dropped"])
def test_a_crowded_run_sends_all_tokens_to_one_device(run: str, eight: Eight) -> None:
    count_LGE = eight.of(run)["count"]
    assert EIGHT.num_experts // 8 == EIGHT.top_k == len(ON_ONE_DEVICE)
    assert count_LGE[..., ON_ONE_DEVICE].min() > 0
    assert np.delete(count_LGE, ON_ONE_DEVICE, axis=-1).max() == 0


def test_pairs_that_a_device_drops_are_missed(eight: Eight) -> None:
    """The same run with a cap on each device's blocks: the count that proves the others can fail."""
    assert (eight.of("dropped")["computed"] < pairs_to_compute()[None]).all()


@pytest.mark.parametrize("name", ["4x2", "2x4", "1x8"])
def test_statistics_stay_split_by_expert(name: str, eight: Eight) -> None:
    specs = eight.facts["specs"][name]
    assert specs["statistics/count"][:3] == specs["statistics/coactivation"][:3] == [None, None, EXPERT]
    assert set(specs["statistics/coactivation"][3:]) <= {None}
    assert not any(specs["statistics/tokens"])


@pytest.mark.parametrize("name", ["8x1", "4x2", "2x4"])
def test_scores_stay_with_their_rows(name: str, eight: Eight) -> None:
    assert eight.facts["specs"][name]["scores/probability"][0] == DATA


@pytest.mark.parametrize("name", [*MESHES, "2x4 mxfp4"])
def test_no_weight_that_a_rule_splits_is_whole_on_a_device(name: str, eight: Eight) -> None:
    expert = MESHES[name.split()[0]][1]
    shards = eight.facts["shards"][name]
    assert len(shards) == (22 if "mxfp4" in name else 20)
    for path, shard in shards.items():
        split = [expert if axis == EXPERT else 1 for axis in mesh.spec(path, len(shard["whole"]))]
        part = [whole // ways for whole, ways in zip(shard["whole"], split, strict=True)]
        assert shard["parts"] == [part] * 8, path


def test_each_of_eight_devices_holds_an_eighth_and_the_norms(eight: Eight) -> None:
    shards = eight.facts["shards"]["1x8"].values()
    replicated = 4 * EIGHT.hidden_size * (3 * EIGHT.num_layers + 1)  # float32: both norms and o_bias, final norm
    whole = 4 * EIGHT.num_parameters()
    each = np.sum([shard["nbytes"] for shard in shards], axis=0)
    assert each.tolist() == [replicated + (whole - replicated) // 8] * 8 == [1_155_664] * 8
    assert each[0] < 1.01 * whole / 8


@pytest.mark.parametrize("run", [*(f"{name} bf16" for name in MESHES), "2x4 mxfp4"])
def test_every_byte_of_the_checkpoint_is_read_once(run: str, eight: Eight, eight_mxfp4: Path) -> None:
    """Also where several devices hold it."""
    assert eight.facts["bytes_read"][run] == sum(t.nbytes for t in find_tensors(eight_mxfp4).values())


def moved(lines: list[str]) -> set[tuple[str, str]]:
    """What moves arrays between devices, and the shapes that it makes."""
    return {re.search(r"= (\w+\[[\d,]*\])\S* ([\w-]+)\(", line).groups()[::-1] for line in lines}


def test_nothing_but_router_logits_is_gathered(eight: Eight) -> None:
    """Sums aside, that is all that moves between devices in the compiled program: no weight does.

    Where it is asked what dropping an expert changes, or for products of experts' outputs, each device has all outputs
    of some tokens, and no more.
    """
    tokens = len(LENGTHS) * max(LENGTHS)
    router_logits, largest = f"f32[{tokens},{EIGHT.num_experts}]", f"f32[{UNEMBED_BLOCK},{8 * TOP_LOGITS}]"
    assert moved(eight.facts["moves"]["1x8"]) == {("all-gather", router_logits)}
    outputs = f"f32[{AT_ONCE // 8},{EIGHT.top_k + 1},{EIGHT.hidden_size}]"
    of_all = f"f32[{MULTIPLIED // 8},{EIGHT.num_experts},{EIGHT.hidden_size}]"
    products = f"f32[{MULTIPLIED},{len(pairs(EIGHT.num_experts)[0])}]"
    assert moved(eight.facts["moves"]["scored 1x8"]) == {
        *(("all-gather", shape) for shape in (router_logits, largest, f"f32[{AT_ONCE},{EIGHT.top_k}]", products)),
        ("reduce-scatter", outputs),
        ("reduce-scatter", of_all),
    }


def test_shardings_of_the_published_models(eight: Eight) -> None:
    golden = GOLDEN.read_text(encoding="utf-8")
    assert eight.facts["shardings"] == golden, "if this is meant: python -m tests.on_eight_devices golden"


@pytest.fixture(scope="module")
def arrays() -> dict[str, int]:
    """Path and number of axes of all parameters, in both forms."""
    one = mesh.make(TINY, 1, 1)
    networks = [abstract(TINY, one, form=weights) for weights in ("bf16", "mxfp4")]
    return {path: x.ndim for tree in networks for path, x in named(tree)}


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_the_only_one_of_some_array(
    rule: str, arrays: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert all(len(mesh.spec(path, ndim)) == ndim for path, ndim in arrays.items())
    monkeypatch.delitem(RULES, rule)
    with pytest.raises(LookupError):
        for path, ndim in arrays.items():
            mesh.spec(path, ndim)


def test_a_parameter_without_a_rule_is_refused() -> None:
    network = nnx.eval_shape(lambda: model.GptOss(TINY, rngs=nnx.Rngs(0)))
    network.layers.moe.experts.gate_up_adapter = nnx.Param(jnp.zeros((4, 7, 2)))
    with pytest.raises(LookupError, match="layers/moe/experts/gate_up_adapter: no rule"):
        mesh.specs(network)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [(GPT_OSS_20B, [1, 2, 4, 8]), (GPT_OSS_120B, [1, 2, 4, 8]), (EIGHT, [1, 2, 4, 8]), (TINY, [1])],
)
def test_experts_heads_and_tokens_bound_the_expert_axis(config: Config, sizes: list[int]) -> None:
    assert mesh.expert_sizes(config) == sizes
    assert mesh.default_sizes(config, 32) == (32 // sizes[-1], sizes[-1])
    assert mesh.default_sizes(config, 6) == (6 // sizes[:2][-1], sizes[:2][-1])


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"num_experts": 28}, "28 experts"),
        ({"num_kv_heads": 12}, "12 key/value heads"),
        ({"vocab_size": 324}, "324 tokens"),
    ],
)
def test_what_the_expert_axis_does_not_divide_is_named(sizes: dict[str, int], says: str) -> None:
    with pytest.raises(MeshError, match=f"expert=8 does not divide the model's {says}: expert may be 1, 2, 4"):
        mesh.make(replace(EIGHT, **sizes), 1, 8, [None] * 8)


@pytest.mark.parametrize("name", REFUSED)
def test_on_eight_devices_is_refused(name: str, eight: Eight) -> None:
    answer = eight.facts["refused"][name]
    error = answer["error"]
    assert (answer["status"], error.count("\n"), answer["written"]) == (2, 1, []), error
    assert error.startswith("gptoss-jax: ")
    assert [text for text in REFUSED[name][1] if text not in error] == [], error


MALFORMED = ["", "2x4", "8", "data=2", "expert=4", "expert=4,data=2", "data=0,expert=8", "data=-1,expert=-8"]
MALFORMED += ["data=2,expert=4,", "data=2.0,expert=4", "data=2;expert=4", "data=²,expert=4", "data=1,expert=1,data=1"]
OPTIONS = [
    *(case(f"mesh {text}", ["--mesh", text], "--mesh", "data=2,expert=4") for text in MALFORMED),
    case("more places than devices", ["--mesh", "data=2,expert=4"], "8 places", "1 devices"),
    case("experts split by pmap", ["--map", "pmap", "--mesh", "data=1,expert=2"], "--map pmap", "--map mesh"),
    case("unknown map", ["--map", "xmap"], "--map"),
    case("no rows a step", ["--batch-size", 0], "--batch-size"),
    case("unknown form of weights", ["--weights", "int4"], "--weights"),
]


@pytest.mark.parametrize(("options", "says"), OPTIONS)
def test_on_one_device_is_refused(
    options: list[Any], says: tuple[str, ...], tiny_mxfp4: Path, rows_jsonl: Path, refused: Refused
) -> None:
    refused("profile", tiny_mxfp4, "--data", rows_jsonl, *options, *SHORT, "--out", "out", says=says)


def test_four_bits_of_a_bf16_checkpoint_are_refused(tiny_bf16: Path, rows_jsonl: Path, refused: Refused) -> None:
    command = ["profile", tiny_bf16, "--data", rows_jsonl, "--weights", "mxfp4", *SHORT, "--out", "out"]
    refused(*command, says=(str(tiny_bf16), "BF16", "--weights mxfp4", "MXFP4"))


@pytest.mark.parametrize("name", SPLITS)
def test_an_evaluation_is_that_of_one_device(name: str, eight: Eight) -> None:
    """Rows and the vocabulary are split: beside the model itself, beside another model, and beside its top tokens."""
    for kind in ("model", "other", "of top"):
        one, ours = eight.of("evaluated one", kind), eight.of(f"evaluated {name}", kind)
        assert ours.keys() == one.keys() == {"nats", "entropy", "best", "kl"}
        np.testing.assert_array_equal(ours["best"], one["best"])
        for field in ("nats", "entropy"):
            assert_close(ours[field], one[field], f"{kind} {field}")
        np.testing.assert_allclose(ours["kl"], one["kl"], rtol=1e-2, atol=1e-9)
        assert one["kl"][:, 1].mean() > 1e-6 and not eight.of(f"evaluated {name}", "model")["kl"][:, 0].any()
