"""Every option of every command reaches what it names: seen in what the command makes, not in what it notes down.

The table at the end names for each option the test that shows it. A new option fails here until it stands there.
"""

import ast
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors import safe_open

import gptoss_jax as gj
from gptoss_jax.cli import cli
from gptoss_jax.cli.generate import _by_channel
from gptoss_jax.devices import topologies
from gptoss_jax.generation import choose
from gptoss_jax.interface import jobs
from gptoss_jax.run import engine

from .bad_input import RANKING, Program, dump
from .commands import COMMANDS, FINGERPRINTS
from .conftest import ROWS
from .made_up import Finished
from .test_plan import TWO_LAYERS

HERE = Path(__file__).parent
LENGTH = 64


def run(*argv: object) -> str:
    """What a command that succeeds prints."""
    result = CliRunner().invoke(cli, [str(word) for word in argv], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return result.stdout


# profile: the command's artifacts equal what Python measures, and differ from those without the option.

THOUGHT = [
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "thinking": "Adding is easy.", "content": "2"},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "thinking": "So it is.", "content": "4"},
]
CARD = """---
configs:
- config_name: easy
  data_files: train.jsonl
- config_name: hard
  data_files: test.jsonl
---
"""


def changed(**columns: str) -> list[dict[str, str]]:
    """The rows, with columns that hold what others of them hold."""
    return [row | {name: row[other] for name, other in columns.items()} for row in ROWS]


def is_for_evaluation(row: dict[str, str]) -> bool:
    digest = hashlib.sha256(f"part\n{row['id']}\n{row['text']}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % 5 == 0


def kept(profile: gj.Profile) -> int:
    tokens: int = profile.info["kept_tokens"]
    return tokens


@dataclass(frozen=True)
class Way:
    """An option on the command line, and the same in Python: by options, or by rows for which it is not needed."""

    words: tuple[object, ...]
    python: dict[str, Any] = field(default_factory=dict)
    rows: Any = None
    data: str = "train.jsonl"
    without: tuple[object, ...] = ()
    """Other words beside it, which the run without the option has too."""
    seen: Callable[[gj.Profile, gj.Profile], bool] = lambda with_, without: True
    """What else differs between the run with the option and the one without."""


TOPICS = {"domain_column": "domain"}
WAYS: dict[str, Way] = {
    "data": Way((), rows=ROWS[:3], data="test.jsonl"),
    "split": Way(("--split", "test"), rows=ROWS[:3], data="folder"),
    "subset": Way(("--subset", "hard"), rows=ROWS[:3], data="subsets", without=("--subset", "easy")),
    "text_column": Way(("--text-column", "other"), rows=changed(text="other")),
    "id_column": Way(("--id-column", "key"), rows=changed(id="key")),
    "domain_column": Way(("--domain-column", "topic"), TOPICS, changed(domain="topic")),
    "domain": Way(("--domain", "b"), TOPICS, ROWS[1::2], without=("--domain-column", "domain")),
    "num_rows": Way(("--num-rows", 2), {"num_rows": 2}, seen=lambda a, b: len(a.sums.row_hashes) == 2),
    "seed": Way(("--seed", 5), {"num_rows": 2, "seed": 5}, without=("--num-rows", 2)),
    "keep_thinking": Way(
        ("--keep-thinking",),
        {"keep_thinking": True},
        data="thinking.jsonl",
        seen=lambda a, b: (a.sums.row_hashes != b.sums.row_hashes).all(),
    ),
    "max_seq_length": Way(
        ("--max-seq-length", 40),
        {"max_seq_length": 40},
        seen=lambda a, b: a.info["total_tokens"] == len(ROWS) * 40,
    ),
    "truncate": Way(
        ("--truncate", "right"),
        {"truncate": "right", "keep": "assistant"},
        rows=ROWS,
        without=("--keep", "assistant"),
        seen=lambda a, b: kept(a) < kept(b),
    ),  # the ends of rows are the assistant's
    "pack": Way(("--pack",), {"pack": True}, seen=lambda a, b: a.info["total_tokens"] > b.info["total_tokens"]),
    "cross_document": Way(("--cross-document",), {"pack": True, "cross_document": True}, without=("--pack",)),
    "keep": Way(
        ("--keep", "assistant"), {"keep": "assistant"}, seen=lambda a, b: kept(a) < kept(b) == b.info["total_tokens"]
    ),
    "channel_weights": Way(
        ("--channel-weights", "analysis=0.5,final=2"),
        {"keep": "reply", "channel_weights": {"analysis": 0.5, "final": 2.0}},
        without=("--keep", "reply"),
    ),
    "part": Way(
        ("--part", "evaluation"),
        rows=[row for row in changed(id="key") if is_for_evaluation(row)],
        without=("--id-column", "key"),
        seen=lambda a, b: 0 < len(a.sums.row_hashes) < len(b.sums.row_hashes) == len(ROWS),
    ),
    "skip_first": Way(("--skip-first", 30), {"skip_first": 30}, seen=lambda a, b: 0 < kept(a) < kept(b)),
    "eaft": Way(("--eaft",), {"eaft": True}, seen=lambda a, b: [*a.sums.weighted] == ["eaft"] and not b.sums.weighted),
    "swap": Way(("--swap",), {"swap": True}, seen=lambda a, b: differences(a, b) == ["swap_sum"]),
    "engine": Way(
        ("--engine", "streamed"), {"engine": "streamed"}, seen=lambda a, b: a.info["engine"] != b.info["engine"]
    ),
    "dtype": Way(("--dtype", "float32"), {"dtype": "float32"}),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files and folders with the rows."""
    folder = tmp_path_factory.mktemp("data")

    def write(file: Path, rows: list[Any]) -> None:
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    for parent in (folder, folder / "folder", folder / "subsets"):
        write(parent / "train.jsonl", ROWS)
        write(parent / "test.jsonl", ROWS[:3])
    (folder / "subsets" / "README.md").write_text(CARD)
    write(folder / "thinking.jsonl", [{"messages": THOUGHT}])
    write(folder / "bad.jsonl", [*ROWS[:3], {"text": 3}])
    return folder


@pytest.fixture(scope="module")
def made(tiny_mxfp4: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., gj.Profile]:
    """A profile by the command; each command line runs once."""
    done: dict[Any, gj.Profile] = {}

    def profile(name: str, *words: object) -> gj.Profile:
        if (name, words) not in done:
            out = tmp_path_factory.mktemp("made") / "out"
            argv = ["profile", tiny_mxfp4, "--data", data / name, "--max-seq-length", LENGTH, "--out", out, *words]
            run(*argv)
            done[name, words] = gj.Profile.open(out)
        return done[name, words]

    return profile


def differences(one: gj.Profile, two: gj.Profile) -> list[str]:
    """The names of what two profiles measured otherwise."""
    a, b = ({**vars(p.sums.statistics), **p.sums.weighted, "rows": p.sums.row_hashes} for p in (one, two))
    found = [name for name in {*a, *b} if name not in a or name not in b or not np.array_equal(a[name], b[name])]
    return found + ["domains"] * (one.sums.domains != two.sums.domains)


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
def test_an_option_of_profile_is_that_of_python(
    name: str, made: Callable[..., gj.Profile], data: Path, tiny_mxfp4: Path
) -> None:
    way = WAYS[name]
    ours = made(way.data, *way.without, *way.words)
    plain = made("train.jsonl" if name == "data" else way.data, *way.without)
    given = str(data / way.data) if way.rows is None else way.rows
    expected = gj.profile(str(tiny_mxfp4), given, **{"max_seq_length": LENGTH} | way.python)
    assert differences(ours, expected) == []
    # Engines give the same sums: which of them ran stands elsewhere.
    assert (differences(ours, plain) or name == "engine") and way.seen(ours, plain)
    assert ours.info["prompts_hash"] == expected.info["prompts_hash"]


@pytest.mark.slow
def test_rows_that_cannot_be_read_are_left_out(made: Callable[..., gj.Profile]) -> None:
    assert differences(made("bad.jsonl", "--skip-bad-rows"), made("test.jsonl")) == []


RIGHT, WRONG, OTHER = 3.0, 5.0, 7.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("probability", "entropy", "weight"),
    [
        (0, 1, RIGHT),  # all tokens are confident, and none is less probable than the least probable one
        (1, 1, WRONG),  # all are confident, and all but one less probable than the most probable one
        (1, 0, OTHER),  # none but one is confident
    ],
)
def test_quantiles_and_weights_of_eaft_keep_their_places(
    probability: float, entropy: float, weight: float, made: Callable[..., gj.Profile], tiny_mxfp4: Path
) -> None:
    """They are told apart by what they mean, so that an exchange on the command line or behind it is seen."""
    words = ("--eaft", "--eaft-quantiles", probability, entropy, "--eaft-weights", RIGHT, WRONG, OTHER)
    sums = made("train.jsonl", *words).sums
    share = sums.weighted["eaft"].sum() / sums.statistics.gate_norm_sum.sum()
    assert abs(share - weight) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_batch_size_is_that_of_steps(
    batch_size: int, tiny_mxfp4: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes, call = [], engine.Timed.__call__

    def spy(self: Any, shape: tuple[int, ...], *arguments: Any) -> Any:
        shapes.append(shape)
        return call(self, shape, *arguments)

    monkeypatch.setattr(engine.Timed, "__call__", spy)
    argv = ["profile", tiny_mxfp4, "--data", data / "test.jsonl", "--max-seq-length", LENGTH, "--out", tmp_path / "out"]
    run(*argv, "--engine", "resident", "--batch-size", batch_size)
    assert {shape[0] for shape in shapes} == {batch_size}


# generate: what is printed is what Python's reply says, and not what it says without the option.

ASKED = [{"role": "user", "content": "1 + 1?"}]
REPLIED = [*ASKED, {"role": "assistant", "content": "2"}]
SAYING = {
    "max_new_tokens": (("--max-new-tokens", 3), {"max_new_tokens": 3}),
    "temperature": (("--temperature", 0), {"temperature": 0.0}),
    "top_k": (("--top-k", 2), {"top_k": 2}),
    "top_p": (("--top-p", 0.05), {"top_p": 0.05}),
    "seed": (("--seed", 7), {"seed": 7}),
    "reasoning_effort": (("--reasoning-effort", "high"), {"reasoning_effort": "high"}),
    "keep_reply": (("--keep-reply",), {"keep_reply": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAYING)
def test_an_option_of_generate_is_that_of_python(name: str, tiny_mxfp4: Path, tmp_path: Path) -> None:
    words, options = SAYING[name]
    messages = dump(tmp_path / "m.json", REPLIED)
    usual = {"max_new_tokens": 8}
    said = run("generate", tiny_mxfp4, "--messages", messages, "--max-new-tokens", 8, *words)
    (with_,) = gj.generate(str(tiny_mxfp4), [REPLIED], **usual | options)
    (without,) = gj.generate(str(tiny_mxfp4), [REPLIED], **usual)
    assert with_.token_ids != without.token_ids
    assert said == printed(with_)


@pytest.mark.slow
def test_keep_sets_are_a_soft_prune(tiny_mxfp4: Path, data: Path, tmp_path: Path) -> None:
    """What a command does of a masked model is what Python does of it, and its profile says so."""
    kept, sets = [[0, 1, 3, 5]] * 4, dump(tmp_path / "keep.json", [[0, 1, 3, 5]] * 4)
    masked = gj.open(str(tiny_mxfp4)).masked(kept)
    rows = ["--data", data / "test.jsonl", "--max-seq-length", LENGTH]
    run("profile", tiny_mxfp4, *rows, "--keep-sets", sets, "--out", tmp_path / "out")
    ours = gj.Profile.open(tmp_path / "out")
    assert differences(ours, gj.profile(masked, str(data / "test.jsonl"), max_seq_length=LENGTH)) == []
    assert not ours.columns()["count"][:, [2, 4, 6]].any() and str(sets) in ours.info["model"]
    asked = ["--prompt", "1 + 1?", "--max-new-tokens", 8, "--temperature", 0]
    said = run("generate", tiny_mxfp4, *asked, "--keep-sets", sets)
    (reply,) = gj.generate(masked, ["1 + 1?"], max_new_tokens=8, temperature=0)
    (plain,) = gj.generate(str(tiny_mxfp4), ["1 + 1?"], max_new_tokens=8, temperature=0)
    assert said == printed(reply) and reply.token_ids != plain.token_ids


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_reply_is_computed_in_the_type(dtype: str, tiny_mxfp4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the network that is asked: rounding changes no token of so small a model."""
    networks, load = [], choose.load

    def spy(*arguments: Any) -> Any:
        networks.append(load(*arguments))
        return networks[-1]

    monkeypatch.setattr(choose, "load", spy)
    run("generate", tiny_mxfp4, "--prompt", "Hi", "--max-new-tokens", 1, "--dtype", dtype)
    types = {str(leaf.dtype) for network in networks for leaf in jax.tree.leaves(network)}
    assert ("bfloat16" in types) == (dtype == "bfloat16")


def printed(reply: Any) -> str:
    return _by_channel(reply, whole=True) + "\n"


# rank


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (("--criterion", "frequency"), {"criterion": "frequency"}),
        (("--criterion", "random"), {"criterion": "random"}),
        (("--criterion", "random", "--seed", 5), {"criterion": "random", "seed": 5}),
        (("--domain", "b"), {"domain": "b"}),
        (("--domain", "a", "--domain", "b=5"), {"domain": {"a": 1, "b": 5}}),
        (("--min-count", 100), {"min_count": 100}),
    ],
    ids=["criterion", "random", "seed", "domain", "mix", "min_count"],
)
def test_an_option_of_rank_is_that_of_python(
    words: tuple[object, ...], options: dict[str, Any], finished: Finished, tmp_path: Path
) -> None:
    profile = finished("profile", 1, domains=("a", "b"))
    run("rank", profile, *words, "--out", tmp_path / "ranking.json")
    layers = json.loads((tmp_path / "ranking.json").read_text())["layers"]
    assert layers == gj.rank(profile, **options).layers
    smaller = dict([*options.items()][:-1])
    assert layers != gj.rank(profile, **smaller).layers


# select: by what it says itself, and on the same tables as Python.

CHOICES: dict[str, tuple[tuple[object, ...], dict[str, Any]]] = {
    "keep": (("--keep", 2), {"keep": 2}),
    "coverage": (("--coverage", 0.7), {"coverage": 0.7}),
    "budget_gib": (("--budget-gib", 4.8e-4, "--model", "MODEL"), {"budget_gib": 4.8e-4}),
    "context": (("--budget-gib", 4.4e-4, "--model", "MODEL", "--context", 50), {"budget_gib": 4.4e-4, "context": 50}),
    "rows": (
        ("--budget-gib", 4.5e-4, "--model", "MODEL", "--context", 9, "--rows", 7),
        {"budget_gib": 4.5e-4, "context": 9, "rows": 7},
    ),
    "format": (
        ("--budget-gib", 5e-4, "--model", "MODEL", "--format", "bf16"),
        {"budget_gib": 5e-4, "format": "bf16"},
    ),
    "criterion": (("--keep", 2, "--criterion", "frequency"), {"keep": 2, "criterion": "frequency"}),
    "seed": (
        ("--keep", 2, "--criterion", "random", "--seed", 5),
        {"keep": 2, "criterion": "random", "seed": 5},
    ),
    "domain": (("--keep", 2, "--domain", "b=2"), {"keep": 2, "domain": {"b": 2}}),
    "blend": (("--keep", 2, "--blend", "maxmin"), {"keep": 2, "blend": "maxmin"}),
    "floor": (("--keep", 2, "--floor", "b=0.9"), {"keep": 2, "floor": {"b": 0.9}}),
    "min_count": (("--keep", 2, "--min-count", 90), {"keep": 2, "min_count": 90}),
    "protect_outliers": (("--keep", 2, "--protect-outliers", 3), {"keep": 2, "protect_outliers": 3}),
}


@pytest.mark.parametrize("name", CHOICES)
def test_an_option_of_select_is_that_of_python(name: str, finished: Finished, tiny_mxfp4: Path, tmp_path: Path) -> None:
    words, options = CHOICES[name]
    profile = finished("profile", 1, domains=("a", "b"), shape=(4, 7))
    run("select", profile, *(tiny_mxfp4 if w == "MODEL" else w for w in words), "--out", tmp_path / "keep.json")
    written = json.loads((tmp_path / "keep.json").read_text())
    model = {"model": str(tiny_mxfp4)} if "budget_gib" in options else {}
    kept = gj.select(profile, **options, **model)
    assert (written["layers"], written["rule"]) == (kept.layers, kept.origin.rule)
    fewer = {n: value for n, value in options.items() if n != name} or {"keep": 3}
    assert kept.layers != gj.select(profile, **fewer, **(model if "budget_gib" in fewer else {})).layers


# prune and convert


def held(folder: Path) -> dict[str, str]:
    """The types of the tensors of a checkpoint, by their names."""
    types = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "numpy") as opened:
            types |= {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    return types


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def cut(model: Path, out: Path, *words: object) -> Path:
    run("prune", model, "--out", out, *words)
    return out


def test_experts_that_stay_are_those_of_the_options(tiny_mxfp4: Path, tmp_path: Path) -> None:
    best_last = dump(tmp_path / "a.json", RANKING)
    best_first = dump(tmp_path / "b.json", [layer[::-1] for layer in RANKING])
    sets = dump(tmp_path / "keep.json", {"keep": [[0, 2, 4, 6]] * 4})
    for number, (words, stay) in enumerate(
        [
            (("--ranking", best_last, "--keep", 4), [3, 4, 5, 6]),
            (("--ranking", best_first, "--keep", 4), [0, 1, 2, 3]),
            (("--ranking", best_last, "--keep", 5), [2, 3, 4, 5, 6]),
            (("--keep-sets", sets), [0, 2, 4, 6]),
        ]
    ):
        out = cut(tiny_mxfp4, tmp_path / str(number), *words)
        assert read(out, "config.json")["num_local_experts"] == len(stay)
        layers = read(out, "expert_mapping.json")
        assert [[*map(int, layer)] for layer in (layers.values() if isinstance(layers, dict) else layers)] == [stay] * 4


def test_forms_and_names_of_a_pruned_checkpoint(
    program: Program, tiny_mxfp4: Path, ranking: Path, tmp_path: Path
) -> None:
    words = ("--ranking", ranking, "--keep", 4)
    plain = cut(tiny_mxfp4, tmp_path / "plain", *words)
    wide = cut(tiny_mxfp4, tmp_path / "wide", *words, "--format", "bf16", "--domain", "chess")
    small = cut(tiny_mxfp4, tmp_path / "small", *words, "--max-shard-size", "100KB")
    assert {*held(wide).values()} == {"BF16"} and "U8" in held(plain).values()
    assert len([*small.glob("*.safetensors")]) > len([*plain.glob("*.safetensors")]) and held(small) == held(plain)
    assert "chess" in (wide / "README.md").read_text() and "chess" not in (plain / "README.md").read_text()
    few = ("--ranking", ranking, "--keep", 2)
    assert program("prune", tiny_mxfp4, *few, "--out", tmp_path / "few")[0] == 2
    assert read(cut(tiny_mxfp4, tmp_path / "few", *few, "--lower-top-k"), "config.json")["num_experts_per_tok"] == 2


def test_forms_of_a_converted_checkpoint(program: Program, tiny_mxfp4: Path, tmp_path: Path) -> None:
    def convert(to: str, *words: object) -> Path:
        out = tmp_path / f"{to}{len([*tmp_path.iterdir()])}"
        run("convert", tiny_mxfp4, "--to", to, "--out", out, *words)
        return out

    plain, small = convert("hf"), convert("hf", "--max-shard-size", "100KB")
    assert held(plain) == held(small) == held(tiny_mxfp4)
    assert len([*small.glob("*.safetensors")]) > len([*plain.glob("*.safetensors")])
    assert {*held(convert("hf", "--format", "bf16")).values()} == {"BF16"}
    assert held(convert("orbax")) == {}
    argv = ("convert", tiny_mxfp4, "--to", "orbax", "--out", tmp_path / "many")
    status, error = program(*argv, "--mesh", "data=4,expert=1")
    assert status == 2 and "4 places" in error


# Outputs of all commands.


@pytest.mark.parametrize(
    "command",
    ["profile", "eval", "merge", "prune", "heal", "rank", "select", "convert", "report", *FINGERPRINTS],
)
@pytest.mark.slow
def test_an_output_is_where_it_is_asked_for_and_replaces_when_asked(
    command: str, argv: list[Any], program: Program, tmp_path: Path
) -> None:
    argv = [*argv, "--out", tmp_path / "there"]
    assert program(*argv)[0] == 0
    made_at = (tmp_path / "there").stat().st_ino
    assert program(*argv)[0] == 2 and (tmp_path / "there").stat().st_ino == made_at
    assert program(*argv, "--overwrite")[0] == 0 and (tmp_path / "there").stat().st_ino != made_at


def test_merge_adds_the_profiles_that_are_named(finished: Finished, tmp_path: Path) -> None:
    one, two = finished("one", 1), finished("two", 2)
    finished("three", 3)
    run("merge", one, two, "--out", tmp_path / "out")
    merged, parts = gj.Profile.open(tmp_path / "out"), [gj.Profile.open(folder) for folder in (one, two)]
    expected = sum(part.sums.statistics.count for part in parts)
    np.testing.assert_array_equal(merged.sums.statistics.count, expected)


@pytest.mark.slow
@pytest.mark.skipif(not topologies.has_compiler(), reason="needs libtpu, of the extra tpu")
def test_options_of_plan_are_those_of_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is compiled once: what is printed second is what was planned first; test_plan.py looks for the largest
    batch."""
    monkeypatch.setattr(jobs.pods, "MOST_COMPILED", 1)
    real, planned = jobs.plan, {}

    def plan(model: str, *, progress: Any, **options: Any) -> Any:
        key = json.dumps([model, options])
        if key not in planned:
            planned[key] = real(model, progress=progress, **options)
        return planned[key]

    monkeypatch.setattr(jobs, "plan", plan)
    dump(tmp_path / "config.json", TWO_LAYERS.to_json())
    argv = ["plan", tmp_path, "--topology", "v5e:2x4", "--mesh", "data=4,expert=2", "--batch-size", 8]
    argv += ["--max-seq-length", 256, "--weights", "mxfp4"]
    table = run(*argv, "--tokens", 12345)
    for words in ("v5e:2x4, 8 chips, data=4 × expert=2", "8 × 256 = 2,048 tokens, mxfp4 experts", "12,345 tokens"):
        assert words in table
    figures = json.loads(run(*argv, "--json"))
    assert len(planned) == 1
    names = ("topology", "mesh", "batch", "seq_len", "weights")
    assert [figures[name] for name in names] == ["v5e:2x4", {"data": 4, "expert": 2}, 8, 256, "mxfp4"]


WHERE = {
    "engine": (("--engine", "streamed"), lambda decoder: type(decoder).__name__ == "Streamed"),
    "batch_size": (("--batch-size", 3), lambda decoder: decoder.batch_size == 3),
    "weights": (("--weights", "mxfp4"), lambda decoder: decoder.network.layers[0].moe.experts.form == "mxfp4"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WHERE)
def test_replies_come_from_the_engine_that_is_named(
    name: str, tiny_mxfp4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a reply is computed changes nothing but where."""
    made, make = [], choose.decoder

    def spy(*arguments: Any) -> Any:
        made.append(make(*arguments))
        return made[-1]

    monkeypatch.setattr(choose, "decoder", spy)
    words, is_so = WHERE[name]
    argv = ["generate", tiny_mxfp4, "--prompt", "Hi", "--max-new-tokens", 9, "--temperature", 0, "--dtype", "float32"]
    assert run(*argv, *words) == run(*argv)
    assert [is_so(decoder) for decoder in made] == [True, False]


# The table: where each option is seen.

PROFILE = "test_an_option_of_profile_is_that_of_python"
EAFT = "test_quantiles_and_weights_of_eaft_keep_their_places"
GENERATE = "test_an_option_of_generate_is_that_of_python"
RANK = "test_an_option_of_rank_is_that_of_python"
STAY, PRUNED = "test_experts_that_stay_are_those_of_the_options", "test_forms_and_names_of_a_pruned_checkpoint"
CONVERTED = "test_forms_of_a_converted_checkpoint"
OUT = "test_an_output_is_where_it_is_asked_for_and_replaces_when_asked"
ADDED = "test_merge_adds_the_profiles_that_are_named"
PLAN = "test_options_of_plan_are_those_of_the_step"
EVAL = "test_eval_command.py::"
OF_ANSWERS = "test_fingerprints.py::"
OF_TRACE = "test_generate_trace.py::"
RECORD = "test_fingerprint_record.py::"
SEARCH, PICK, HEAL = "test_search.py::", "test_pick.py::", "test_heal.py::"
SEARCHED = (
    *("data", "text_column", "id_column", "domain_column", "part", "num_rows", "max_seq_length", "truncate"),
    *("tokens", "dtype"),
)
HEALED = (
    *("text_column", "id_column", "part", "num_rows", "seed", "max_seq_length", "truncate", "tokens", "batch_size"),
    "dtype",
)
HOSTS = "test_hosts.py::test_equals_one_process"

SEEN: dict[str, dict[str, str]] = {
    "profile": {
        **dict.fromkeys(WAYS, PROFILE),
        "model": PROFILE,
        "keep_sets": "test_keep_sets_are_a_soft_prune",
        "until_stable": "test_stable.py::test_rows_are_taken_until_the_keep_set_stays",
        "skip_bad_rows": "test_rows_that_cannot_be_read_are_left_out",
        **dict.fromkeys(["eaft_quantiles", "eaft_weights"], EAFT),
        "batch_size": "test_the_batch_size_is_that_of_steps",
        "memory_gib": "test_stream.py::test_the_profile_says_which_engine_ran_and_why",
        "activation_gib": "test_stream.py::test_hidden_states_in_files_change_no_bit",
        "weights": "test_mesh.py::test_four_bits_of_a_bf16_checkpoint_are_refused",
        **dict.fromkeys(["mesh", "mapping"], "test_mesh.py::test_on_one_device_is_refused"),
        **dict.fromkeys(["coordinator", "num_processes", "process_id"], HOSTS),
        **dict.fromkeys(["out", "overwrite"], OUT),
        "trace": "test_tracing.py::test_a_trace_adds_up_to_its_profile",
        "resume": "test_resume.py::test_from_any_moment",
    },
    "merge": {"profiles": ADDED, **dict.fromkeys(["out", "overwrite"], OUT)},
    "rank": {
        **dict.fromkeys(["profile", "criterion", "domain", "seed", "min_count"], RANK),
        **dict.fromkeys(["out", "overwrite"], OUT),
    },
    "select": {
        **dict.fromkeys(CHOICES, "test_an_option_of_select_is_that_of_python"),
        **dict.fromkeys(["profile", "model"], "test_an_option_of_select_is_that_of_python"),
        **dict.fromkeys(["out", "overwrite"], OUT),
        **dict.fromkeys(SEARCHED, SEARCH + "test_an_option_of_a_search_is_that_of_python"),
        **dict.fromkeys(["split", "subset", "keep_thinking", "skip_bad_rows"], PROFILE),  # read by the same function
        "rule": SEARCH + "test_who_goes_first_is_whose_absence_changes_the_layer_least",
        "engine": SEARCH + "test_engines_agree",
        "memory_gib": SEARCH + "test_bad_input",
        "resume": SEARCH + "test_from_wherever_it_is_killed",
        # The same engines run as for a profile.
        "batch_size": "test_the_batch_size_is_that_of_steps",
        "activation_gib": "test_stream.py::test_hidden_states_in_files_change_no_bit",
        "weights": "test_mesh.py::test_four_bits_in_memory_change_no_bit_of_the_results",
        "mesh": "test_mesh.py::test_grams_are_those_of_one_device",
        **dict.fromkeys(
            ["coordinator", "num_processes", "process_id"], "test_hosts.py::test_eliminates_as_one_process"
        ),
        "pick": PICK + "test_rows_that_judge_are_none_that_candidates_are_made_of",
        "scored": PICK + "test_other_tokens_judge_otherwise",
        "max_kl": PICK + "test_a_bound_is_kept_by_the_fewest",
        "min_match": PICK + "test_bounds_are_kept_by_the_ends_of_intervals",
        **dict.fromkeys(
            ["replies", "answer_column", "answer_kind", "max_new_tokens"], PICK + "test_right_answers_stand_beside"
        ),
    },
    "heal": {
        **dict.fromkeys(["coordinator", "num_processes", "process_id"], "test_hosts.py::test_heals_as_one_process"),
        "model": HEAL + "test_what_is_written_is_what_was_judged",
        **dict.fromkeys(["keep_sets", "steps", "rate"], HEAL + "test_routers_alone_change_and_learn"),
        "data": HEAL + "test_a_fifth_is_held_out_by_hash_and_learnt_by_nobody",
        **dict.fromkeys(["domain", "domain_column"], HEAL + "test_rows_of_other_domains_are_only_looked_at"),
        **dict.fromkeys(["split", "subset", "keep_thinking", "skip_bad_rows"], PROFILE),  # read by the same function
        **dict.fromkeys(HEALED, HEAL + "test_an_option_of_heal_is_that_of_python"),
        "train": HEAL + "test_small_parameters_are_trained_when_asked",
        "reconstruct": "test_reconstruction.py::test_without_steps_what_was_reconstructed_is_written",
        "teacher": HEAL + "test_the_most_probable_tokens_teach_as_well",
        "check_every": HEAL + "test_a_training_ends_where_looks_do_not_become_better",
        "engine": HEAL + "test_engines_find_the_same",
        "memory_gib": HEAL + "test_bad_input",
        "mesh": "test_mesh.py::test_distillation_over_meshes",
        "weights": HEAL + "test_an_option_of_heal_is_that_of_python",
        **dict.fromkeys(["format", "max_shard_size"], PRUNED),  # written by the same function
        **dict.fromkeys(["out", "overwrite"], OUT),
        "resume": HEAL + "test_from_wherever_it_is_killed",
    },
    "prune": {
        **dict.fromkeys(["model", "ranking", "keep", "keep_sets"], STAY),
        **dict.fromkeys(["format", "max_shard_size", "domain", "lower_top_k"], PRUNED),
        **dict.fromkeys(["out", "overwrite"], OUT),
        "verify": "convert/test_prune.py::test_verify_finds_a_byte_that_differs",
        "eval": "convert/test_card.py::test_the_command_puts_what_was_measured_into_the_card",
    },
    "convert": {
        **dict.fromkeys(["model", "to", "format", "max_shard_size", "mesh"], CONVERTED),
        **dict.fromkeys(["out", "overwrite"], OUT),
    },
    "generate": {
        **dict.fromkeys([*SAYING, "model", "messages"], GENERATE),
        "dtype": "test_a_reply_is_computed_in_the_type",
        **dict.fromkeys(["engine", "batch_size", "weights"], "test_replies_come_from_the_engine_that_is_named"),
        "memory_gib": "test_generate.py::test_rows_that_memory_does_not_hold_are_refused",
        "mesh": "test_mesh.py::test_replies_over_meshes",
        **dict.fromkeys(["coordinator", "num_processes", "process_id"], "test_hosts.py::test_generates_as_one_process"),
        "keep_sets": "test_keep_sets_are_a_soft_prune",
        "prompts": "test_generate.py::test_the_command_shows_what_was_generated",
        "trace": OF_TRACE + "test_what_is_printed_is_the_same_with_a_trace",
        "overwrite": OF_TRACE + "test_a_trace_is_replaced_when_asked",
        "resume": OF_TRACE + "test_a_killed_run_goes_on",
    },
    "eval": {
        **dict.fromkeys(
            [
                *("data", "split", "text_column", "domain_column", "domain", "keep_thinking", "num_rows", "seed"),
                *("seq_len", "blocks", "keep", "cross_document", "whole_rows", "replies", "max_new_tokens"),
                *("answer_column", "answer_kind"),
            ],
            EVAL + "test_an_option_of_eval_is_that_of_python",
        ),
        **dict.fromkeys(["id_column", "part"], EVAL + "test_ids_and_parts_decide_by_hashes"),
        "subset": PROFILE,  # read by the same function
        "skip_bad_rows": EVAL + "test_rows_that_cannot_be_read_are_left_out",
        **dict.fromkeys(
            ["engine", "memory_gib", "activation_gib", "mesh", "weights", "dtype"],
            EVAL + "test_where_it_runs_changes_nothing_but_where",
        ),
        "batch_size": EVAL + "test_the_batch_size_is_that_of_steps",
        **dict.fromkeys(["model", "baseline", "write_baseline"], EVAL + "test_another_model_is_the_baseline"),
        **dict.fromkeys(["keep_sets", "out"], EVAL + "test_what_a_run_leaves"),
        "exclude_calibrated": EVAL + "test_rows_of_the_calibration_are_no_evaluation",
        "overwrite": OUT,
        "resume": "test_evaluation.py::test_a_killed_run_goes_on",
    },
    "fingerprint record": {
        **dict.fromkeys(
            ["text_column", "id_column", "num_rows", "benchmark", "benchmark_column", "category_column"],
            RECORD + "test_columns_and_benchmarks_are_those_that_are_named",
        ),
        **dict.fromkeys(["model", "data", "max_new_tokens"], RECORD + "test_answers_are_what_the_model_says"),
        **dict.fromkeys(["split", "subset", "part"], PROFILE),  # read by the same function
        **dict.fromkeys(
            ["reasoning_effort", "temperature", "top_k", "top_p", "seed", "dtype", "engine"],
            RECORD + "test_options_of_record_are_those_of_generate",
        ),
        "keep_sets": RECORD + "test_experts_that_are_masked_are_never_chosen",
        "domains": RECORD + "test_summaries_are_those_of_a_loop_over_the_trace",
        "skip_bad_rows": RECORD + "test_rows_that_ask_nothing_are_left_out_when_asked",
        "resume": RECORD + "test_a_killed_run_goes_on",
        **dict.fromkeys(
            ["batch_size", "memory_gib"], "test_generate.py::test_rows_that_memory_does_not_hold_are_refused"
        ),
        # Replies come from the same decoder as those of generate.
        "weights": "test_replies_come_from_the_engine_that_is_named",
        "mesh": "test_mesh.py::test_replies_over_meshes",
        **dict.fromkeys(["coordinator", "num_processes", "process_id"], "test_hosts.py::test_generates_as_one_process"),
        **dict.fromkeys(["out", "overwrite"], OUT),
    },
    "fingerprint import": {
        **dict.fromkeys(["source", "domains"], OF_ANSWERS + "test_the_commands_do_what_python_does"),
        **dict.fromkeys(["out", "overwrite"], OUT),
    },
    "fingerprint rank": {
        **dict.fromkeys(
            ["dataset", "domain", "domains", "segment", "by", "mode", "reverse", "keep", "category", "weight"],
            OF_ANSWERS + "test_the_commands_do_what_python_does",
        ),
        **dict.fromkeys(["out", "overwrite"], OUT),
    },
    "report": {
        **dict.fromkeys(["paths", "model", "title"], "test_page.py::test_the_command_writes_what_the_function_does"),
        **dict.fromkeys(["out", "overwrite"], OUT),
    },
    "plan": dict.fromkeys(
        ["model", "topology", "mesh", "batch_size", "max_seq_length", "weights", "tokens", "as_json"], PLAN
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_stands_in_the_table(command: str) -> None:
    options = {p.name for p in COMMANDS[command].params if isinstance(p, click.Option | click.Argument)}
    assert options == {*SEEN[command]}


@pytest.mark.parametrize("place", sorted({place for options in SEEN.values() for place in options.values()}))
def test_what_the_table_names_is_a_test(place: str) -> None:
    file, _, name = place.rpartition("::")
    tree = ast.parse((HERE / (file or Path(__file__).name)).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
