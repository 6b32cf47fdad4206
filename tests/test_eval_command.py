"""The command `eval`: its options are those of Python and reach what they name, and bad input gets one line."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import gptoss_jax as gj
from gptoss_jax.cli import cli
from gptoss_jax.config import TINY
from gptoss_jax.evaluation import stored
from gptoss_jax.run import engine
from gptoss_jax.selection.keep_sets import KeepSets

from . import conftest
from .bad_input import Program, Refused, case, dump

pytestmark = pytest.mark.slow

L, E = TINY.num_layers, TINY.num_experts
KEPT = KeepSets([[0, 1, 3, 5]] * L)
ROWS = [row | {"answer": f"It is {2 * i}.", "number": str(2 * i)} for i, row in enumerate(conftest.ROWS)]
THOUGHT = [
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "thinking": "Adding is easy.", "content": "2"},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "thinking": "So it is.", "content": "4"},
]
FIXED = {"seq_len": (64,), "dtype": "float32"}
REPLIES = {"replies": 2, "max_new_tokens": 3}
# An option: words of the command line, the same in Python, the data, and what the run without it is given in Python.
WAYS: dict[str, tuple[tuple[object, ...], dict[str, Any], str, dict[str, Any]]] = {
    "data": ((), {}, "test.jsonl", {"data": "train.jsonl"}),
    "split": (("--split", "test"), {"split": "test"}, "folder", {}),
    "text_column": (("--text-column", "other"), {"text_column": "other"}, "train.jsonl", {"text_column": "text"}),
    "domain": (
        ("--domain-column", "topic", "--domain", "x"),
        {"domain_column": "topic", "domain": ("x",)},
        "train.jsonl",
        {"domain_column": "topic"},
    ),
    "domain_column": (("--domain-column", "domain"), {"domain_column": "domain"}, "train.jsonl", {}),
    "keep_thinking": (("--keep-thinking",), {"keep_thinking": True}, "thinking.jsonl", {}),
    "num_rows": (("--num-rows", 3), {"num_rows": 3}, "train.jsonl", {}),
    "seed": (("--num-rows", 3, "--seed", 5), {"num_rows": 3, "seed": 5}, "train.jsonl", {"num_rows": 3}),
    "seq_len": (("--seq-len", 32), {"seq_len": (64, 32)}, "train.jsonl", {}),
    "blocks": (("--blocks", 10), {"blocks": 10}, "train.jsonl", {}),
    "keep": (("--keep", "reply"), {"keep": "reply"}, "train.jsonl", {}),
    "cross_document": (("--cross-document",), {"cross_document": True}, "train.jsonl", {}),
    "whole_rows": (("--whole-rows",), {"whole_rows": True}, "train.jsonl", {}),
    "replies": (("--replies", 2, "--max-new-tokens", 3), REPLIES, "train.jsonl", {}),
    "max_new_tokens": (
        ("--replies", 2, "--max-new-tokens", 4),
        {"replies": 2, "max_new_tokens": 4},
        "train.jsonl",
        REPLIES,
    ),
    "answer_column": (
        ("--replies", 2, "--max-new-tokens", 3, "--answer-column", "answer"),
        REPLIES | {"answer_column": "answer"},
        "plain.jsonl",
        REPLIES,
    ),
    "answer_kind": (
        ("--replies", 2, "--max-new-tokens", 3, "--answer-kind", "last-number"),
        REPLIES | {"answer_kind": "last-number"},
        "train.jsonl",
        REPLIES,
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files and folders with the rows."""
    folder = tmp_path_factory.mktemp("data")
    asked = [{**row, "text": row["text"].rpartition("<|start|>assistant")[0]} for row in ROWS]

    def write(file: Path, rows: list[Any]) -> None:
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    for parent in (folder, folder / "folder"):
        write(parent / "train.jsonl", ROWS)
        write(parent / "test.jsonl", ROWS[1:5])
    write(folder / "plain.jsonl", asked)
    write(folder / "thinking.jsonl", [{"messages": THOUGHT}] * 3)
    write(folder / "bad.jsonl", [*ROWS[1:5], {"text": 3}])
    return folder


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dump(tmp_path_factory.mktemp("kept") / "some.json", KEPT.layers)


def command(*argv: object) -> str:
    """What the command prints where it succeeds."""
    result = CliRunner().invoke(cli, ["eval", *map(str, argv)], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.fixture
def by_command(tiny_mxfp4: Path, data: Path, kept: Path, tmp_path: Path) -> Callable[..., Any]:
    def run(name: str, *words: object) -> Any:
        fixed = ["--data", data / name, "--keep-sets", kept, "--seq-len", 64, "--dtype", "float32"]
        command(tiny_mxfp4, *fixed, *words, "--out", tmp_path / "out")
        return stored.read(tmp_path / "out")

    return run


def same(one: Any, other: Any) -> bool:
    """Whether two evaluations measured the same on the same rows."""
    a, b = (
        dataclasses.replace(of, setting=dataclasses.replace(of.setting, command="", data="")) for of in (one, other)
    )
    return stored.to_json(a) == stored.to_json(b)


@pytest.mark.parametrize("name", WAYS)
def test_an_option_of_eval_is_that_of_python(
    name: str, by_command: Callable[..., Any], tiny_mxfp4: Path, data: Path, kept: Path
) -> None:
    words, python, file, without = WAYS[name]
    ours = by_command(file, *words)
    plain = {"data": file, **without}
    given = str(data / plain.pop("data"))
    theirs = gj.evaluate(str(tiny_mxfp4), str(data / file), keep_sets=kept, **FIXED | python)
    assert same(ours, theirs)
    assert not same(ours, gj.evaluate(str(tiny_mxfp4), given, keep_sets=kept, **FIXED | plain))


def test_ids_and_parts_decide_by_hashes(tiny_mxfp4: Path, data: Path, kept: Path) -> None:
    """The prompts hash is over ids; a part is some of the rows."""
    file, options = str(data / "train.jsonl"), {"keep_sets": kept, **FIXED}
    plain = gj.evaluate(str(tiny_mxfp4), file, **options)
    keyed = gj.evaluate(str(tiny_mxfp4), file, **options, id_column="key")
    assert plain.setting.prompts_hash != keyed.setting.prompts_hash and plain.setting.rows == keyed.setting.rows
    part = gj.evaluate(str(tiny_mxfp4), file, **options, id_column="key", part="calibration")
    assert 1 < part.setting.rows < plain.setting.rows


def test_rows_that_cannot_be_read_are_left_out(by_command: Callable[..., Any], tiny_mxfp4: Path, data: Path) -> None:
    found = by_command("bad.jsonl", "--skip-bad-rows")
    assert found.setting.rows == 4 and any("cannot be read" in warning for warning in found.setting.warnings)


def test_where_it_runs_changes_nothing_but_where(
    by_command: Callable[..., Any], tiny_mxfp4: Path, tmp_path: Path
) -> None:
    """The engine, its memory, and the form of weights."""
    whole = by_command("train.jsonl")
    for words in (
        ("--engine", "streamed", "--memory-gib", 8, "--activation-gib", 0),
        ("--mesh", "data=1,expert=1"),
        ("--weights", "mxfp4"),
    ):
        found = by_command("train.jsonl", *words, "--overwrite")
        a, b = (of.entries[0].quality[64].estimates["ppl"].value for of in (found, whole))
        assert a == pytest.approx(b, rel=1e-6)


def test_the_batch_size_is_that_of_steps(by_command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A block has a row for the model and one for the keep-sets."""
    shapes, call = set(), engine.Timed.__call__

    def spy(self: Any, shape: tuple[int, ...], *arguments: Any) -> Any:
        shapes.add(shape)
        return call(self, shape, *arguments)

    monkeypatch.setattr(engine.Timed, "__call__", spy)
    by_command("train.jsonl", "--batch-size", 7)
    assert shapes == {(6, 64)}


def test_another_model_is_the_baseline(tiny_mxfp4: Path, data: Path, kept: Path, tmp_path: Path) -> None:
    pruned = gj.prune(str(tiny_mxfp4), KEPT, "some", out=tmp_path / "cut").folder
    fixed = ["--data", data / "train.jsonl", "--seq-len", 64, "--dtype", "float32"]
    command(pruned, *fixed, "--baseline", tiny_mxfp4, "--out", tmp_path / "hard")
    command(tiny_mxfp4, *fixed, "--keep-sets", kept, "--out", tmp_path / "soft")
    hard, soft = (stored.read(tmp_path / name) for name in ("hard", "soft"))
    assert hard.entries[0].experts == soft.entries[0].experts == tuple(map(len, KEPT.layers))
    assert hard.entries[0].layers_hash is None and soft.entries[0].layers_hash == KEPT.layers_hash
    for name, estimate in soft.entries[0].quality[64].estimates.items():
        assert hard.entries[0].quality[64].estimates[name].value == pytest.approx(estimate.value, abs=2e-6), name
    command(tiny_mxfp4, *fixed, "--write-baseline", tmp_path / "full.baseline", "--out", tmp_path / "alone")
    assert stored.read(tmp_path / "alone").entries == ()
    command(pruned, *fixed, "--baseline", tmp_path / "full.baseline", "--out", tmp_path / "kept")
    kept_ = stored.read(tmp_path / "kept").entries[0].quality[64].estimates
    assert kept_["ppl"].value == pytest.approx(hard.entries[0].quality[64].estimates["ppl"].value, rel=1e-6)


def test_what_a_run_leaves(tiny_mxfp4: Path, data: Path, kept: Path, tmp_path: Path) -> None:
    """Several keep-sets, one of which keeps all; lines for scripts; sums by row that are those of the summary."""
    every = dump(tmp_path / "every.json", [[*range(E)]] * L)
    fixed = ["--data", data / "train.jsonl", "--seq-len", 64, "--dtype", "float32", "--out", tmp_path / "out"]
    printed = command(
        tiny_mxfp4, *fixed, "--keep-sets", kept, "--keep-sets", every, "--replies", 2, "--max-new-tokens", 3
    )
    assert printed.count("Mean    KLD:") == printed.count("Same top p:") == 2
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "eval.json",
        "eval.md",
        "rows.parquet",
        "replies.jsonl",
    }
    some, all_ = stored.read(tmp_path / "out").entries
    assert (some.name, all_.name) == ("some", "every")
    assert all_.quality[64].estimates["kl"].value == all_.quality[64].estimates["ppl_difference"].value == 0
    table = pq.read_table(tmp_path / "out" / "rows.parquet").to_pylist()
    scored = [row for row in table if row["seq_len"] == 64 and row["model"] == "some"]
    tokens = sum(row["tokens"] for row in scored)
    assert tokens == some.quality[64].tokens
    assert sum(row["kl"] for row in scored) / tokens == pytest.approx(some.quality[64].estimates["kl"].value)
    perplexity = np.exp(sum(row["nats"] for row in scored) / tokens)
    assert perplexity == pytest.approx(some.quality[64].estimates["ppl"].value)
    replies = [row for row in table if row["seq_len"] is None]
    asked = {row["id"] for row in replies if row["model"] is None}
    assert {(row["model"], row["id"]) for row in replies} == {(m, i) for m in (None, "some", "every") for i in asked}


def test_domains_are_those_of_their_rows(tiny_mxfp4: Path, data: Path, kept: Path, tmp_path: Path) -> None:
    options = {"keep_sets": kept, "domain_column": "topic", **FIXED}
    found = gj.evaluate(str(tiny_mxfp4), str(data / "train.jsonl"), **options, out=tmp_path / "out")
    (entry,) = found.entries
    assert {*entry.by_domain} == {"x", "y", "z"}
    table = pq.read_table(tmp_path / "out" / "rows.parquet").to_pylist()
    for domain, quality in entry.by_domain.items():
        own = [row for row in table if row["domain"] == domain and row["model"] == "some"]
        tokens = sum(row["tokens"] for row in own)
        assert (quality.documents, quality.tokens) == (2, tokens)
        assert quality.estimates["kl"].value == pytest.approx(sum(row["kl"] for row in own) / tokens)
    assert "## By domain" in (tmp_path / "out" / "eval.md").read_text(encoding="utf-8")


def test_questions_without_answers_are_told_of(tiny_mxfp4: Path, data: Path, kept: Path) -> None:
    """And fewer questions than were asked for."""
    found = gj.evaluate(
        str(tiny_mxfp4), str(data / "plain.jsonl"), keep_sets=kept, **FIXED, replies=9, max_new_tokens=2
    )
    told = " ".join(found.setting.warnings)
    assert "6 of 6 rows ask something" in told and "6 of 6 questions have no final reply" in told
    assert found.setting.answers == "" and "correct" not in found.entries[0].replies.estimates


def test_rows_of_the_calibration_are_no_evaluation(
    tiny_mxfp4: Path, data: Path, tmp_path: Path, refused: Refused
) -> None:
    profile = gj.profile(str(tiny_mxfp4), ROWS[:3], max_seq_length=64, num_rows=3)
    gj.select(profile, 4).write(tmp_path / "keep.json")
    fixed = ["eval", tiny_mxfp4, "--data", data / "train.jsonl", "--keep-sets", tmp_path / "keep.json", "--seq-len", 64]
    refused(*fixed, says=("3 of 6 rows", "--exclude-calibrated"))
    refused(*fixed[:2], "--data", data / "folder" / "test.jsonl", *fixed[4:], says=("2 of 4 rows",))
    command(*fixed[1:], "--exclude-calibrated", "--out", tmp_path / "out")
    setting = stored.read(tmp_path / "out").setting
    assert (setting.rows, setting.calibration) == (3, "disjoint")
    assert any("3 rows are left out" in warning for warning in setting.warnings)
    # Where nothing says by which rows they were chosen, that is what the report says.
    dump(tmp_path / "bare.json", KEPT.layers)
    found = gj.evaluate(str(tiny_mxfp4), ROWS, keep_sets=tmp_path / "bare.json", **FIXED)
    assert found.setting.calibration == "unknown"


BAD = [
    case("nothing to compare", [], "--keep-sets", "--baseline"),
    case("too long a block", ["--baseline", "nano", "--seq-len", 20000], "--seq-len 20000", "18000"),
    case("no keep-sets there", ["--keep-sets", "gone.json"], "gone.json"),
    case("keep-sets of another model", ["--keep-sets", "other.json"], "other.json", "2 layers", "4"),
    case("keep-sets twice", ["--keep-sets", "kept.json", "--keep-sets", "kept.json"], "twice"),
    case("another tokenizer", ["--baseline", "nano"], "other tokens"),
    case("a baseline that is none", ["--baseline", "kept.json"], "kept.json", "--write-baseline"),
    case("no column of answers", ["--keep-sets", "kept.json", "--replies", 2, "--answer-column", "gone"], "'gone'"),
    case("answers without replies", ["--keep-sets", "kept.json", "--answer-column", "id"], "--replies"),
    case(
        "answers that cannot be read",
        ["--keep-sets", "kept.json", "--replies", 2, "--answer-column", "domain", "--answer-kind", "last-number"],
        "last-number",
        "a number",
    ),
    case("writing and comparing", ["--keep-sets", "kept.json", "--write-baseline", "b"], "--write-baseline"),
    case("one row", ["--keep-sets", "kept.json", "--num-rows", 1], "1 of 1 rows"),
    case("whole rows, crossed", ["--keep-sets", "kept.json", "--whole-rows", "--cross-document"], "--whole-rows"),
    case("an option of profile", ["--keep-sets", "kept.json", "--pack"], "--pack"),
    case("the same length twice", ["--keep-sets", "kept.json", "--seq-len", 64, "--seq-len", 64], "--seq-len", "twice"),
]


@pytest.mark.parametrize(("words", "says"), BAD)
def test_bad_input_gets_one_line(
    words: list[object],
    says: tuple[str, ...],
    model: Path,
    rows_jsonl: Path,
    keep_sets: Path,
    tmp_path: Path,
    refused: Refused,
) -> None:
    dump(tmp_path / "other.json", [[0, 1, 2, 3]] * 2)
    refused("eval", model, "--data", rows_jsonl, *words, says=says)


def test_an_output_that_stands_is_kept(
    tiny_mxfp4: Path, rows_jsonl: Path, keep_sets: Path, tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "mine").write_text("mine")
    refused("eval", tiny_mxfp4, "--data", rows_jsonl, "--keep-sets", keep_sets, says=("eval", "exists", "--overwrite"))


def test_plain_text_scores_nothing_and_says_so(
    tiny_mxfp4: Path, keep_sets: Path, tmp_path: Path, program: Program
) -> None:
    file = tmp_path / "plain.jsonl"
    file.write_text("".join(json.dumps({"text": f"plain text {n}"}) + "\n" for n in range(4)))
    status, error = program("eval", tiny_mxfp4, "--data", file, "--keep-sets", keep_sets, "--seq-len", 64)
    assert status == 2 and "--keep all" in error and error.count("\n") == 1
