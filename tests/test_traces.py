"""Traces: written and read as NumPy arrays, by pyarrow and by `datasets`; and what is none."""

import json
from dataclasses import fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from upath import UPath

from gptoss_jax.config import TINY
from gptoss_jax.errors import TokenizerError, TraceError
from gptoss_jax.files import atomic
from gptoss_jax.routing import traces
from gptoss_jax.routing.segments import SEGMENTS
from gptoss_jax.routing.tables import About, Routed, table_of, tokenizer_hash
from gptoss_jax.routing.traces import TRACE, Trace, Writer

ABOUT = About(TINY.num_layers, TINY.top_k, TINY.num_experts, "f" * 64, "a" * 64)


def routed(prompt_id: str, n: int, m: int, about: About = ABOUT, seed: int = 0) -> Routed:
    """A prompt of random numbers."""
    rng = np.random.default_rng(seed)
    shape = (m, about.num_layers, about.top_k)
    return Routed(
        prompt_id,
        rng.integers(0, 300, n).astype(np.int32),
        np.arange(n, dtype=np.int32),
        rng.integers(0, len(SEGMENTS), n).astype(np.uint8),
        np.arange(n) >= n // 2,
        rng.integers(0, about.num_experts, shape).astype(np.int32),
        rng.random(shape, np.float32),
    )


PROMPTS = [routed("a", 9, 9, seed=1), routed("b", 5, 4, seed=2), routed("c", 1, 0, seed=3), routed("ü", 30, 29, seed=4)]


def write(folder: Any, prompts: list[Routed] = PROMPTS, about: About = ABOUT, **info: Any) -> Any:
    with atomic.new_folder(folder, last=TRACE) as partial:
        writer = Writer(partial, about)
        for prompt in prompts:
            writer.add(prompt)
        writer.finish(info)
    return folder


def assert_same(found: Routed, expected: Routed) -> None:
    for field in fields(Routed):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        if field.name == "gates":
            assert ours.dtype == np.float16
            theirs = theirs.astype(np.float16)
        np.testing.assert_array_equal(ours, theirs, err_msg=field.name)


@pytest.mark.parametrize("part_tokens", [1, 12, 1 << 20])
@pytest.mark.parametrize("experts", [7, 256, 257])
def test_what_is_written_is_read(
    part_tokens: int, experts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any number of parts, and with numbers of experts that take one byte or two."""
    monkeypatch.setattr(traces, "PART_TOKENS", part_tokens)
    about = About(4, 3, experts, "f" * 64, "a" * 64)
    prompts = [routed(p.prompt_id, len(p), len(p.experts), about, n) for n, p in enumerate(PROMPTS)]
    trace = Trace.open(write(tmp_path / "trace", prompts, about, model="nano"))
    assert len([*tmp_path.glob("trace/part-*")]) == {1: 4, 12: 3}.get(part_tokens, 1)
    assert trace.prompts == ["a", "b", "c", "ü"] and len(trace) == 4 and trace.about == about
    assert (trace.info["tokens"], trace.info["model"]) == (45, "nano")
    for found, expected in zip(trace, prompts, strict=True):
        assert_same(found, expected)
        assert_same(trace[expected.prompt_id], expected)
        assert found.experts.dtype == (np.uint8 if experts <= 256 else np.uint16)


def test_columns_are_those_of_the_schema(tmp_path: Path) -> None:
    """As pyarrow reads them: a row a token, lists layer by layer, null where there was no step."""
    table = pq.read_table(write(tmp_path / "trace") / "part-00000.parquet")
    types = {name: str(table.schema.field(name).type) for name in table.column_names}
    assert types == {
        "prompt_id": "string",
        "position": "int32",
        "token_id": "int32",
        "segment": "dictionary<values=string, indices=int8, ordered=0>",
        "generated": "bool",
        "experts": "fixed_size_list<element: uint8>[12]",
        "gates": "fixed_size_list<element: halffloat>[12]",
    }
    about = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert about == {
        "version": "1",
        "num_layers": "4",
        "top_k": "3",
        "num_experts": "7",
        "model_fingerprint": "f" * 64,
        "tokenizer_hash": "a" * 64,
    }
    rows = iter(table.to_pylist())
    for prompt in PROMPTS:
        for t, row in zip(range(len(prompt)), rows, strict=False):
            has = t < len(prompt.experts)
            assert row == {
                "prompt_id": prompt.prompt_id,
                "position": t,
                "token_id": prompt.token_ids[t],
                "segment": SEGMENTS[prompt.segments[t]],
                "generated": prompt.generated[t],
                "experts": [e for layer in prompt.experts[t] for e in layer] if has else None,
                "gates": [g for layer in prompt.gates[t].astype(np.float16) for g in layer] if has else None,
            }
    assert next(rows, None) is None


@pytest.mark.slow
def test_datasets_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(traces, "PART_TOKENS", 12)
    files = str(write(tmp_path / "trace") / "part-*.parquet")
    found = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    table = table_of(PROMPTS, ABOUT)
    assert len(found) == 45
    for name in table.column_names:
        assert found[name][:] == table[name].to_pylist(), name


def test_of_nothing(tmp_path: Path) -> None:
    assert table_of([], ABOUT).num_rows == 0
    assert [*Trace.open(write(tmp_path / "trace", []))] == []


def test_gates_lose_what_is_said_of_them() -> None:
    gates = np.float32(np.geomspace(1e-9, 1, 10_000))
    lost = np.abs(gates.astype(np.float16) - gates)
    assert (lost[gates >= 6.2e-5] / gates[gates >= 6.2e-5]).max() <= 1 / 2048
    assert lost[gates < 6.2e-5].max() <= 3e-8


def test_in_a_remote_storage() -> None:
    folder = UPath("memory://traces/a")
    try:
        write(folder)
        for found, expected in zip(Trace.open(str(folder)), PROMPTS, strict=True):
            assert_same(found, expected)
    finally:
        folder.fs.rm("/traces", recursive=True)


def test_equal_prompts_give_equal_bytes(tmp_path: Path) -> None:
    one, two = (write(tmp_path / name) for name in "ab")
    assert {f.name: f.read_bytes() for f in one.iterdir()} == {f.name: f.read_bytes() for f in two.iterdir()}


# What is no trace.


def refused(folder: Path, *says: str) -> None:
    """Reading all of it gives one line."""
    with pytest.raises(TraceError) as error:
        [*Trace.open(folder)]
    assert (
        "\n" not in str(error.value) and [word for word in (str(folder), *says) if word not in str(error.value)] == []
    )


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return write(tmp_path / "trace")


def edit(folder: Path, **changes: Any) -> None:
    file = folder / TRACE
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_no_trace(tmp_path: Path, trace: Path) -> None:
    refused(tmp_path, "no finished trace", TRACE)
    refused(tmp_path / "absent", "no finished trace")
    refused(trace / TRACE, "no finished trace")


def test_half_a_trace(trace: Path) -> None:
    part = trace / "part-00000.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    refused(trace, part.name, "trace again")
    part.unlink()
    refused(trace, part.name)
    (trace / TRACE).unlink()
    refused(trace, "no finished trace")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"version": 2}, "is of version 2, this program reads version 1"),
        ({"kind": "eval"}, "is no trace"),
        ({"top_k": "3"}, "its top_k is '3'"),
        ({"tokens": -1}, "its tokens is -1"),
        ({"parts": [{"file": "part-00000.parquet"}]}, "part's prompts"),
        ({"parts": [3]}, "part's file"),
        ({"parts": [{"file": "../part-00000.parquet", "prompts": 4, "tokens": 45}]}, "../part"),
        ({"parts": [{"file": "part-00000.parquet", "prompts": 3, "tokens": 45}]}, "4 prompts of 45 tokens"),
        ({"num_experts": 8}, "metadata"),
        ({"num_experts": 257}, "columns"),
    ],
)
def test_another_trace_json(changes: dict[str, Any], says: str, trace: Path) -> None:
    edit(trace, **changes)
    refused(trace, says)


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff", b"[" * 100_000])
def test_any_bytes_are_no_trace_json(data: bytes, trace: Path) -> None:
    (trace / TRACE).write_bytes(data)
    refused(trace, TRACE)


def test_columns_that_contradict_one_another(trace: Path) -> None:
    part = trace / "part-00000.parquet"
    table = pq.read_table(part)
    for name, column, says in [
        ("gates", table["gates"].take(np.arange(45)[::-1]), "experts and no gates"),
        ("experts", table["experts"].combine_chunks(), "chose expert"),
    ]:
        if name == "experts":
            values = np.full((45, 12), 9, np.uint8)
            column = type(column).from_arrays(values.ravel(), type=column.type, mask=column.is_null())
        changed = table.set_column(table.column_names.index(name), table.schema.field(name), column)
        pq.write_table(changed, part)
        refused(trace, says)


def test_an_unknown_prompt(trace: Path) -> None:
    with pytest.raises(TraceError, match="no prompt 'z'"):
        Trace.open(trace)["z"]


def test_another_model(trace: Path) -> None:
    opened = Trace.open(trace)
    opened.check(TINY, "f" * 64)
    with pytest.raises(TraceError, match="another model"):
        opened.check(TINY, "e" * 64)
    with pytest.raises(TraceError, match="num_experts is 7, this one's is 8"):
        opened.check(replace(TINY, num_experts=8), "f" * 64)


def test_the_hash_of_a_tokenizer(tiny_mxfp4: Path, tmp_path: Path) -> None:
    assert tokenizer_hash(tiny_mxfp4) == sha256((tiny_mxfp4 / "tokenizer.json").read_bytes()).hexdigest()
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: no such file"):
        tokenizer_hash(tmp_path)
