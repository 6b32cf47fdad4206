"""`profile --trace`: what each token chose, against transformers in float32, and against the profile beside it."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gptoss_jax as gj
from gptoss_jax.data import tokens
from gptoss_jax.data.harmony import HarmonyText
from gptoss_jax.data.rows import Row, row_hash
from gptoss_jax.routing.segments import OTHER, of_row
from gptoss_jax.run import tracing
from tests import oracle

from .bad_input import Refused, case, dump
from .conftest import conversation
from .devices import seen
from .test_interrupted import PROGRAM, words
from .test_options_reach import differences

IDS = ["long", "twice", "twice", "", "twice#2", "long@20", "empty"]


def row(number: int) -> dict[str, str]:
    return {"id": IDS[number], "text": "" if IDS[number] == "empty" else conversation(number)}


ROWS = [row(number) for number in range(len(IDS))]
TINY_WINDOW = 9


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def traced(tiny_mxfp4: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """A profile with its trace; each set of options runs once."""
    done: dict[str, Any] = {}

    def run(**options: Any) -> tuple[gj.Profile, gj.Trace]:
        if (key := repr(options)) not in done:
            folder = tmp_path_factory.mktemp("traced") / "trace"
            profile = gj.profile(str(tiny_mxfp4), str(data), dtype="float32", trace=folder, **options)
            done[key] = profile, gj.Trace.open(folder)
        return done[key]

    return run


RESIDENT, STREAMED = {"engine": "resident"}, {"engine": "streamed"}
PADDED = {
    "resident": RESIDENT | {"batch_size": 3},
    "truncated": RESIDENT | {"max_seq_length": 40},
    "truncated on the right": RESIDENT | {"max_seq_length": 40, "truncate": "right"},
    "streamed": STREAMED | {"batch_size": 1},
    "streamed, truncated": STREAMED | {"max_seq_length": 40},
}
PACKED = {
    "packed": RESIDENT | {"pack": True, "max_seq_length": 50},
    "packed, streamed": STREAMED | {"pack": True, "max_seq_length": 50, "batch_size": 2},
}
MORE = {
    "eaft": RESIDENT | {"eaft": True},
    "eaft, streamed": STREAMED | {"eaft": True, "batch_size": 1, "max_seq_length": 64},
    "swap": STREAMED | {"swap": True},
    "until stable": RESIDENT | {"until_stable": 6, "batch_size": 2},
    "until stable, streamed": STREAMED | {"until_stable": 6, "batch_size": 2, "max_seq_length": 64},
    "until stable, packed": RESIDENT | {"until_stable": 6, "pack": True, "max_seq_length": 50},
    "cross-document": RESIDENT | {"pack": True, "cross_document": True, "max_seq_length": 50},
}
WAYS = PADDED | PACKED | MORE


@pytest.mark.slow
@pytest.mark.parametrize("way", [*PADDED, *PACKED])
def test_routing_equals_transformers(way: str, traced: Callable[..., Any], tiny_mxfp4: Path) -> None:
    """Of every token, in a forward of the prompt alone, which is longer than the window of sliding layers."""
    _, trace = traced(**WAYS[way])
    network = oracle.load(tiny_mxfp4)
    assert max(len(prompt) for prompt in trace) > 4 * TINY_WINDOW
    for prompt in trace:
        reference = oracle.forward(network, prompt.token_ids)
        np.testing.assert_array_equal(prompt.experts, np.stack(reference.experts, axis=1))
        np.testing.assert_allclose(prompt.gates, np.stack(reference.gates, axis=1), rtol=1 / 2000, atol=1e-6)
        assert not prompt.generated.any()


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_trace_adds_up_to_its_profile(way: str, traced: Callable[..., Any]) -> None:
    """Every token that the network saw is there once: counts and gates of experts are those of the profile, where all
    tokens count. An EOS does not count."""
    profile, trace = traced(**WAYS[way])
    shape = (trace.about.num_layers, trace.about.num_experts)
    count, gates = np.zeros(shape, np.int64), np.zeros(shape)
    layers = np.arange(trace.about.num_layers)[:, None]
    eos = 2 if "pack" in WAYS[way] else None
    for prompt in trace:
        for number, t in zip(prompt.token_ids, range(len(prompt)), strict=True):
            if number != eos or prompt.segments[t] != OTHER or not ends_a_document(prompt, t, trace):
                np.add.at(count, (layers, prompt.experts[t]), 1)
                np.add.at(gates, (layers, prompt.experts[t]), prompt.gates[t])
    columns = profile.columns()
    np.testing.assert_array_equal(count, columns["count"])
    np.testing.assert_allclose(gates, columns["gate_sum"], rtol=1e-3, atol=1e-3)
    assert trace.info["tokens"] == sum(map(len, trace)) == profile.info["total_tokens"]
    assert trace.info["prompts"] == len({*trace.prompts}) == len(trace)


def ends_a_document(prompt: Any, t: int, trace: gj.Trace) -> bool:
    """Whether this is the EOS behind a packed document: the last token of a piece that no other goes on from."""
    if t != len(prompt) - 1:
        return False
    name, _, first = prompt.prompt_id.rpartition("@")
    name, first = (name, int(first)) if name and prompt.prompt_id not in IDS else (prompt.prompt_id, 0)
    return f"{name}@{first + len(prompt)}" not in {*trace.prompts} - {*IDS}


@pytest.mark.slow
@pytest.mark.parametrize("way", PADDED)
def test_tokens_are_those_of_the_rows(way: str, traced: Callable[..., Any], tiny_mxfp4: Path) -> None:
    """With the segments that they have in the whole row, whatever was cut off before them."""
    options = WAYS[way]
    _, trace = traced(**options)
    tokenizer, most = tokens.load_tokenizer(tiny_mxfp4), options.get("max_seq_length", 2048)
    is_right = options.get("truncate") == "right"
    part = slice(most) if is_right else slice(-most, None)
    names = {name or f"{row_hash(Row(**ROWS[3])):016x}" for name in IDS} - {"empty"}
    # Two rows share a name, which a third one has with the number that the second would get.
    assert {*trace.prompts} == names | {"twice#2#2"} or {*trace.prompts} == names | {"twice#3"}
    texts = {trace_id: [row["text"] for row in ROWS if row["id"] == trace_id] for trace_id in IDS}
    for prompt in trace:
        ids = [tokens.token_ids(HarmonyText(row["text"]), tokenizer, 320) for row in ROWS if row["text"]]
        (whole,) = (x for x in ids if np.array_equal(x[part], prompt.token_ids))
        # What comes behind a cut on the right says nothing of what stands before it.
        segments = of_row(whole[part], tokenizer) if is_right else of_row(whole, tokenizer)[part]
        np.testing.assert_array_equal(prompt.segments, segments)
        np.testing.assert_array_equal(prompt.positions, np.arange(len(prompt)))
        known = texts.get(prompt.prompt_id, [])
        assert len(known) != 1 or np.array_equal(tokens.token_ids(HarmonyText(known[0]), tokenizer, 320), whole)


@pytest.mark.slow
@pytest.mark.parametrize("way", [*PACKED, "cross-document"])
def test_pieces_of_a_packed_row_make_it_up(way: str, traced: Callable[..., Any], tiny_mxfp4: Path) -> None:
    """With an EOS behind each row, in blocks of a length."""
    _, trace = traced(**WAYS[way])
    tokenizer = tokens.load_tokenizer(tiny_mxfp4)
    stream = np.concatenate([prompt.token_ids for prompt in trace])
    segments = np.concatenate([prompt.segments for prompt in trace])
    expected_ids, expected_segments = [], []
    rows = [tokens.token_ids(HarmonyText(row["text"]), tokenizer, 320) for row in ROWS]
    at = 0
    while at < len(stream):
        whole = next((x for x in rows if len(x) and np.array_equal(x, stream[at : at + len(x)])), np.zeros(0, np.int32))
        expected_ids += [*whole, tokenizer.eos_token_id]
        expected_segments += [*of_row(whole, tokenizer), OTHER]
        at += len(whole) + 1
    np.testing.assert_array_equal(stream, expected_ids)
    np.testing.assert_array_equal(segments, expected_segments)
    place = 0
    for prompt in trace:
        start = place % 50 if way == "cross-document" else 0
        np.testing.assert_array_equal(prompt.positions, start + np.arange(len(prompt)))
        assert place % 50 + len(prompt) <= 50
        place += len(prompt)


@pytest.mark.slow
def test_a_piece_is_named_by_where_it_begins(traced: Callable[..., Any]) -> None:
    """And never as a row is."""
    _, trace = traced(**WAYS["packed"])
    pieces = [name for name in trace.prompts if "@" in name and name not in IDS]
    assert pieces and "long@20" in trace.prompts
    for name in pieces:
        row, _, first = name.rpartition("@")
        at = trace.prompts.index(name)
        before = trace[trace.prompts[at - 1]]
        begun = 0 if before.prompt_id == row else int(before.prompt_id.removeprefix(f"{row}@"))
        assert begun + len(before) == int(first)


@pytest.mark.slow
def test_the_profile_is_the_one_without_a_trace(traced: Callable[..., Any], tiny_mxfp4: Path, data: Path) -> None:
    for options in (WAYS["resident"], WAYS["streamed"]):
        profile, _ = traced(**options)
        assert differences(profile, gj.profile(str(tiny_mxfp4), str(data), dtype="float32", **options)) == []


@pytest.mark.slow
@pytest.mark.parametrize("way", [("--mesh", "data=2,expert=1"), ("--map", "pmap")], ids=["mesh", "pmap"])
def test_over_two_devices(
    way: tuple[str, ...], traced: Callable[..., Any], tiny_mxfp4: Path, data: Path, tmp_path: Path
) -> None:
    argv = ["profile", tiny_mxfp4, "--data", data, "--dtype", "float32", *way]
    argv += ["--out", tmp_path / "out", "--trace", tmp_path / "trace"]
    subprocess.run([*PROGRAM, *words(argv)], check=True, env=os.environ | seen(2), capture_output=True)
    (_, expected), ours = traced(**WAYS["resident"]), gj.Trace.open(tmp_path / "trace")
    assert {*ours.prompts} == {*expected.prompts}
    for prompt in ours:
        np.testing.assert_array_equal(prompt.token_ids, expected[prompt.prompt_id].token_ids)
        np.testing.assert_array_equal(prompt.experts, expected[prompt.prompt_id].experts)


def test_names_of_rows_are_unique() -> None:
    rows = [Row("x", "a"), Row("y", "a"), Row("x"), Row("x"), Row("z", "a#2"), Row("z", "a")]
    hashed = f"{row_hash(Row('x')):016x}"
    assert tracing.prompt_ids(rows) == ["a", "a#2", hashed, f"{hashed}#2", "a#2#2", "a#3"]
    assert tracing.prompt_ids([Row("x", "a")] * 20_000)[-1] == "a#20000"  # in no time


# What is refused.


def argv_of(model: Path, rows: Path, *more: Any) -> list[Any]:
    return ["profile", model, "--data", rows, "--max-seq-length", 64, "--num-rows", 4, "--out", "out", *more]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        case("a trace that stands", ["--trace", "there"], "there: exists already: give another --trace"),
        case("a file", ["--trace", "file"], "file: exists already"),
        case("the output", ["--trace", "out"], "out: --out out is there too: give another --trace"),
        case("inside the output", ["--trace", "out/trace"], "--out out is there too"),
        case("around the output", ["--trace", "a", "--out", "a/b"], "--out a/b is there too"),
        case("in the progress", ["--trace", "out.progress/a"], "is there too"),
        case("inside the model", ["--trace", "model/trace"], "model/trace: is where the input", "another --trace"),
        case("over the model", ["--trace", "model", "--overwrite"], "is where the input", "another --trace"),
        case(
            "several processes",
            ["--trace", "t", "--coordinator", "localhost:1", "--num-processes", 1, "--process-id", 0],
            "--trace does not go with --coordinator",
        ),
        case("an empty name", ["--trace", ""], "--trace an empty text is no path"),
    ],
)
def test_what_cannot_be_is_one_line(
    more: list[Any], says: tuple[str, ...], model: Path, rows_jsonl: Path, refused: Refused, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    dump(tmp_path / "file", {})
    refused(*argv_of(model, rows_jsonl), *more, says=says)
