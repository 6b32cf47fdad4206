"""The front door for Python: arrays against transformers, interventions, gradients, and what wrong arguments get."""

import doctest
import inspect
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jaxtyping
import numpy as np
import pytest

import gptoss_jax as gj
from gptoss_jax.cli import cli
from gptoss_jax.config import TINY
from gptoss_jax.data.spellings import harmony_of
from gptoss_jax.data.template import Template
from gptoss_jax.data.tokens import token_ids
from gptoss_jax.errors import DataError, InputError, OptionError, OutputError, ProfileError, RankingError
from gptoss_jax.run.choosing import OF_DATA, OF_JUDGING, OF_PLACING, Searching
from gptoss_jax.run.options import Answering, Options, Sampling, Slice, Writing, declared_options

from . import oracle
from .commands import COMMANDS

IDS = [np.random.default_rng(n).integers(0, TINY.vocab_size, n).astype(np.int32) for n in (21, 9)]
L, E, K, D, V = TINY.num_layers, TINY.num_experts, TINY.top_k, TINY.hidden_size, TINY.vocab_size


@pytest.fixture(scope="module")
def model(tiny_mxfp4: Path) -> gj.Model:
    return gj.open(str(tiny_mxfp4), dtype="float32")


@pytest.fixture(scope="module")
def out(model: gj.Model) -> gj.Forward:
    return model.forward(IDS)


def test_forward_equals_transformers_in_every_array(tiny_mxfp4: Path, out: gj.Forward) -> None:
    network = oracle.load(tiny_mxfp4)
    for row, ids in enumerate(IDS):
        theirs, n = oracle.forward(network, ids), len(ids)
        assert oracle.relative(out.logits[row, :n], theirs.logits) < 1e-5
        for layer in range(L):
            np.testing.assert_array_equal(out.experts[layer, row, :n], theirs.experts[layer])
            saliency = theirs.gates[layer] * theirs.norms[layer]
            for ours, expected in (
                (out.hidden, theirs.hidden[layer]),
                (out.router_logits, theirs.router_logits[layer]),
                (out.gates, theirs.gates[layer]),
                (out.norms, theirs.norms[layer]),
                (out.saliency, saliency),
            ):
                assert oracle.relative(ours[layer, row, :n], expected) < 1e-5


def test_shapes(out: gj.Forward) -> None:
    B, S = 2, 21
    assert out.logits.shape == (B, S, V) and out.hidden.shape == (L, B, S, D)
    assert out.router_logits.shape == (L, B, S, E) and out.experts.shape == out.gates.shape == (L, B, S, K)
    assert out.norms.shape == out.saliency.shape == (L, B, S, K)
    assert (np.asarray(out.tokens.segments).sum(1) == [21, 9]).all()


def test_a_text_messages_and_ids_are_one(model: gj.Model) -> None:
    messages = [{"role": "user", "content": "What is 1 plus 1?"}]
    template = Template(model.tokenizer)
    written = harmony_of(messages, template, str, generate=True)
    text, ids = written.text, token_ids(written, model.tokenizer, V)
    for one in (text, messages, ids, ids.tolist(), [text], [messages], [ids]):
        np.testing.assert_array_equal(model.token_ids(one)[0], ids)
    assert [len(row) for row in model.token_ids([text, ids[:3]])] == [len(ids), 3]
    answered = [*messages, {"role": "assistant", "content": "2"}]
    whole = token_ids(harmony_of(answered, template, str), model.tokenizer, V)
    np.testing.assert_array_equal(model.token_ids(answered)[0], whole)


def test_its_own_gates_change_nothing_and_zero_silences(model: gj.Model, out: gj.Forward) -> None:
    same = model.forward(IDS, gates=out.gates)
    np.testing.assert_allclose(same.logits, out.logits, atol=1e-5)
    silenced = model.forward(IDS[0], gates=np.asarray(out.gates[:, :1]) * (np.arange(L) != 1)[:, None, None, None])
    # In the layer whose experts are silent the residual stream is what attention made of it; nothing is rerouted.
    np.testing.assert_array_equal(silenced.experts[:2, 0], out.experts[:2, 0])
    assert np.abs(silenced.hidden[1, 0] - out.hidden[1, 0]).max() > 1e-3
    np.testing.assert_allclose(silenced.hidden[0, 0], out.hidden[0, 0], atol=1e-5)


def difference(function: Callable[[Any], Any], at: np.ndarray, way: np.ndarray) -> float:
    """The derivative along `way`, by central differences."""
    step = 1e-3  # longer ones change what the router chooses, where the function jumps
    return float(function(at + step * way) - function(at - step * way)) / (2 * step)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gates", "steering"])
def test_gradients_equal_differences(name: str, model: gj.Model, out: gj.Forward) -> None:
    """Of a logit, and of the saliency of all pairs, with respect to gates and to the layers' inputs."""
    ids, rng = IDS[1], np.random.default_rng(0)
    at = np.asarray(out.gates[:, 1:, :9]) if name == "gates" else np.zeros((L, 1, 9, D), np.float32)
    way = rng.normal(size=at.shape).astype(np.float32) * (0.1 if name == "steering" else 1)

    def logit(values: Any) -> Any:
        return model.forward(ids, **{name: values}).logits[0, -1, 7]

    gradient = np.asarray(jax.grad(logit)(at))
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0
    expected = difference(logit, at, way)
    assert abs(float((gradient * way).sum()) - expected) < 2e-2 * max(abs(expected), 0.05)
    saliency = np.asarray(jax.grad(lambda x: model.forward(ids, **{name: x}).saliency.sum())(at))
    assert np.isfinite(saliency).all() and np.abs(saliency).max() > 0


@pytest.mark.slow
def test_a_gradient_of_the_weights(model: gj.Model) -> None:
    gradient = jax.grad(lambda network: model.forward(IDS[1], network=network).logits[0, -1].max())(model.network)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(gradient)]
    assert all(np.isfinite(leaf).all() for leaf in leaves) and any(leaf.any() for leaf in leaves)


def test_masked_experts_are_not_chosen_and_others_take_over(model: gj.Model, out: gj.Forward) -> None:
    chosen = int(out.experts[2, 0, 5, 0])
    masked = model.masked({2: [chosen]})
    without = masked.forward(IDS)
    assert not (np.asarray(without.experts[2]) == chosen).any()
    np.testing.assert_array_equal(without.experts[:2], out.experts[:2])
    np.testing.assert_allclose(np.asarray(without.gates).sum(-1), 1, atol=1e-5)
    kept = [[e for e in range(E) if e != chosen or layer != 2] for layer in range(L)]
    np.testing.assert_array_equal(model.masked(kept).forward(IDS).logits, without.logits)


WRONG = {
    "gates of another shape": lambda m: m.forward(IDS, gates=np.zeros((L, 2, 21, K + 1))),
    "gates as a list": lambda m: m.forward(IDS, gates=[[1.0]]),
    "steering of one layer": lambda m: m.forward(IDS, steering=np.zeros((2, 21, D))),
    "no input": lambda m: m.forward([]),
    "an empty row": lambda m: m.forward([np.zeros(0, np.int32)]),
    "fractions": lambda m: m.forward(np.zeros(3)),
    "a token that does not exist": lambda m: m.forward([3, V]),
    "a negative token": lambda m: m.forward([3, -1]),
    "an object": lambda m: m.forward(object()),
    "a layer that does not exist": lambda m: m.masked({L: [0]}),
    "an expert that does not exist": lambda m: m.masked({0: [E]}),
    "an expert without a list": lambda m: m.masked({0: 3}),
    "no prompt": lambda m: gj.generate(m, []),
    "a ranking, not keep-sets": lambda m: gj.prune(m, gj.Ranking([[0]])),
    "experts by layer": lambda m: gj.prune(m, {0: [1]}),
    "numbers of experts": lambda m: gj.prune(m, [1, 2]),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_named_before_anything_is_computed(call: Callable[[Any], Any], tiny_mxfp4: Path) -> None:
    fresh = gj.open(str(tiny_mxfp4))
    with pytest.raises(InputError) as refusal:
        call(fresh)
    assert "\n" not in str(refusal.value) and "network" not in vars(fresh)


TYPES = {
    "--batch-size is 'x': give a whole number of at least 1": {"batch_size": "x"},
    "--batch-size is True: give a whole number of at least 1": {"batch_size": True},
    "--mesh is 'data=1,expert=1': give": {"mesh": "data=1,expert=1"},
    "--pack is 1: give true or false": {"pack": 1},
    "--eaft-weights is (1.0, 2.0): give 3 values (in Python a tuple), each a finite": {"eaft_weights": (1.0, 2.0)},
    "--domain is 'a': give any number of values (in Python a tuple), each a text": {"domain": "a"},
    "--memory-gib is nan: give a finite number above 0": {"memory_gib": float("nan")},
    "there is no option 'batch'": {"batch": 3},
}


@pytest.mark.parametrize("says", TYPES)
def test_options_of_wrong_types(says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What users get must not rest on the checked annotations of the tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(OptionError) as refusal:
        gj.profile("nano", "rows.jsonl", **TYPES[says])
    assert str(refusal.value).startswith(says)


def test_too_few_experts_left(model: gj.Model) -> None:
    with pytest.raises(RankingError, match="keep at least 3"):
        model.masked({0: [0, 1, 2, 3, 4]})


REFUSED: dict[str, tuple[type[Exception], Callable[[str, str], Any], list[str]]] = {
    "batch size": (
        OptionError,
        lambda m, rows: gj.profile(m, rows, batch_size=0),
        ["profile", "--batch-size", "0"],
    ),
    "no such option": (OptionError, lambda m, rows: gj.profile(m, rows, batchsize=1), []),
    "mesh": (OptionError, lambda m, rows: gj.profile(m, rows, mesh=(0, 1)), ["profile", "--mesh", "data=0,expert=1"]),
    "together": (
        OptionError,
        lambda m, rows: gj.profile(m, rows, domain=("a",)),
        ["profile", "--domain", "a"],
    ),
    "no column": (
        DataError,
        lambda m, rows: gj.profile(m, rows, text_column="gone"),
        ["profile", "--text-column", "gone"],
    ),
    "no profile": (ProfileError, lambda m, rows: gj.merge(["gone", "away"]), ["merge", "gone", "away"]),
    "temperature": (
        OptionError,
        lambda m, rows: gj.generate(m, "x", temperature=-1.0),
        ["generate", "--prompt", "x", "--temperature", "-1"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_python_says_what_the_command_line_says(
    name: str, tiny_mxfp4: Path, rows_jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the letter."""
    monkeypatch.chdir(tmp_path)
    kind, call, words = REFUSED[name]
    with pytest.raises(kind) as refusal:
        call(str(tiny_mxfp4), str(rows_jsonl))
    assert "\n" not in str(refusal.value)
    if words:
        data = ["--data", str(rows_jsonl)] if words[0] == "profile" else []
        model = [] if words[0] == "merge" else [str(tiny_mxfp4)]
        with pytest.raises(kind) as error:
            cli.main([words[0], *model, *data, *words[1:]], standalone_mode=False)
        assert str(error.value) == str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_a_profile_in_memory_is_the_one_that_is_written(tiny_mxfp4: Path, rows_jsonl: Path, tmp_path: Path) -> None:
    options = {"domain_column": "domain", "max_seq_length": 64, "num_rows": 6}
    held = gj.profile(str(tiny_mxfp4), str(rows_jsonl), **options)
    written = gj.profile(str(tiny_mxfp4), str(rows_jsonl), **options, out=tmp_path / "written")
    held.save(tmp_path / "held")
    assert held.folder is None and written.folder == tmp_path / "written"
    for name in ("saliency.parquet", "saliency_by_domain.parquet", "usage.parquet", "statistics.safetensors"):
        assert (tmp_path / "held" / name).read_bytes() == (tmp_path / "written" / name).read_bytes()
    assert gj.Profile.open(tmp_path / "held").rank("gate", "a").layers == gj.rank(written, "gate", "a").layers
    assert gj.select(held, keep=4).layers == gj.rank(tmp_path / "written").keep(4).layers
    with pytest.raises(OutputError, match="exists already"):
        held.save(tmp_path / "written")


def test_a_profile_runs_in_the_type_of_the_open_model(model: gj.Model, rows_jsonl: Path) -> None:
    options = {"max_seq_length": 64, "num_rows": 1}
    assert gj.profile(model, str(rows_jsonl), **options).info["options"]["dtype"] == "float32"
    assert gj.profile(model, str(rows_jsonl), **options, dtype="bfloat16").info["options"]["dtype"] == "bfloat16"


def test_records_of_python_are_rows(tiny_mxfp4: Path, rows_jsonl: Path) -> None:
    import json

    records = [json.loads(line) for line in rows_jsonl.read_text().splitlines()]
    options = {"domain_column": "domain", "max_seq_length": 64}
    ours = gj.profile(str(tiny_mxfp4), records, **options)
    theirs = gj.profile(str(tiny_mxfp4), str(rows_jsonl), **options)
    assert ours.info["prompts_hash"] == theirs.info["prompts_hash"]
    for name, column in theirs.columns("b").items():
        np.testing.assert_array_equal(ours.columns("b")[name], column)


@pytest.mark.newest
@pytest.mark.slow
def test_prune_and_generate(tiny_mxfp4: Path, tmp_path: Path) -> None:
    kept = [[0, 2, 3, 6]] * L
    pruned = gj.prune(str(tiny_mxfp4), kept, "some", out=tmp_path / "cut")
    assert (pruned.num_kept, pruned.folder) == (4, tmp_path / "cut")
    ours = gj.generate(gj.open(pruned.folder, dtype="float32"), ["1 + 1", "2"], temperature=0, max_new_tokens=8)
    theirs = gj.generate(
        gj.open(str(tiny_mxfp4), dtype="float32").masked(kept), ["1 + 1", "2"], temperature=0, max_new_tokens=8
    )
    assert [reply.token_ids for reply in ours] == [reply.token_ids for reply in theirs]
    assert all(0 < len(reply.token_ids) <= 8 for reply in ours)


OF_SEARCH = {*OF_DATA, *OF_JUDGING, *OF_PLACING, *declared_options(Searching)} - {"rule"}
NAMES = sorted({*COMMANDS} - {"generate", "plan"})  # these two hand on the options of their option types
OWN = {
    "model",
    "profile",
    "profiles",
    "paths",
    "to",
    "ranking",
    "keep",
    "keep_sets",
    "out",
    "source",
    "dataset",
}  # given otherwise in Python


@pytest.mark.parametrize("name", NAMES)
def test_names_and_defaults_are_those_of_the_command_line(name: str) -> None:
    holder = gj.fingerprint if name.startswith("fingerprint ") else gj
    parameters = inspect.signature(getattr(holder, COMMANDS[name].callback.__name__)).parameters
    options = {p.name: p for p in COMMANDS[name].params if p.name not in OWN}
    if name in (
        "profile",
        "eval",
        "fingerprint record",
        "heal",
    ):  # their options are the option types', which the command line is made of
        options = {n: p for n, p in options.items() if n in ("overwrite", "resume", "baseline", "write_baseline")}
    if name == "select":  # what a search takes of options of other types
        options = {n: p for n, p in options.items() if n not in OF_SEARCH}
    for option, parameter in options.items():
        assert parameters[str(option)].default == parameter.to_info_dict()["default"], option


@pytest.mark.parametrize("kind", [Sampling, Answering, Writing, Slice])
def test_every_option_has_help_in_a_whole_sentence(kind: type[Options]) -> None:
    assert all(o.help.endswith(".") and o.help[0].isupper() for o in declared_options(kind).values())


def test_importing_the_front_door_imports_no_jax() -> None:
    code = "import sys, gptoss_jax as gj; dir(gj); print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_names_that_do_not_exist_are_no_attributes() -> None:
    with pytest.raises(AttributeError, match="gone"):
        gj.gone  # noqa: B018


def test_every_public_function_has_an_example() -> None:
    public = {name: getattr(gj, name) for name in gj.__all__}
    public |= {name: getattr(gj.fingerprint, name) for name in ("record", "import_published", "rank", "specificity")}
    for name, thing in public.items():
        if inspect.isfunction(thing):
            assert ">>>" in (thing.__doc__ or ""), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    [
        "interface.model",
        "interface.jobs",
        "interface.judging",
        "interface.choosing",
        "interface.checkpoints",
        "interface.healing",
        "interface.fingerprint",
        "run.profile",
        "routing.traces",
    ],
)
def test_examples_run(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(import_module(f"gptoss_jax.{module}"))
    assert result.attempted > 0 and result.failed == 0
