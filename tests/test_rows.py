"""Rows: every form of file, the chat template, domains, samples and hashes."""

import hashlib
import json
import random
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import tokenizers
from gptoss_jax.data import batching, tokens
from gptoss_jax.data.groups import Groups
from gptoss_jax.data.remarks import Remarks
from gptoss_jax.data.rows import ColumnNames, Reading, Row, prompts_hash, read_rows, sample
from gptoss_jax.data.sources import records
from gptoss_jax.data.template import Template
from gptoss_jax.errors import DataError

MESSAGES = [
    [{"role": "user", "content": "Grüße"}, {"role": "assistant", "content": "Hi", "thinking": "Easy."}],
    [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}],
]
DATED_TEMPLATE = (
    '<|start|>system<|message|>{{ strftime_now("%Y-%m-%d") }}<|end|>'
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
)

some_rows = st.lists(
    st.builds(Row, st.text(max_size=8), st.text(max_size=3), st.sampled_from("abc")),
    min_size=1,
    max_size=20,
    # Rows of one id, text and domain cannot be told apart; of one id and text, see the test of ties.
    unique_by=lambda row: (row.id, row.text),
)
seeds = st.integers(0, 2**63)
TEXT = ColumnNames()


def no_template() -> Template:
    raise AssertionError("these rows hold text")


def read(source: object, columns: ColumnNames = TEXT, tokenizer: Any = None, split: str = "train") -> list[Row]:
    template = no_template if tokenizer is None else lambda: Template(tokenizer)
    return list(read_rows(records(str(source), split, None, Remarks()), Reading(columns, template, Remarks())))


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_parquet(path: Path, records: list[Any]) -> Path:
    pq.write_table(pa.Table.from_pylist(records), path)
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizers.write_small(folder, 300)
    return tokens.load_tokenizer(folder)


# Files


def test_jsonl_gives_a_row_a_line_and_passes_over_blank_lines(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a\u2028é", "id": 7}\n\n{"id": null, "text": "b\\nc", "more": 1}\n', encoding="utf-8")
    assert read(file) == [Row("a\u2028é", "7"), Row("b\nc", "")]


def test_parquet_gives_the_rows_of_all_its_batches_in_order(tmp_path: Path) -> None:
    records = [{"body": f"text {i}", "key": i, "subject": "xy"[i % 2]} for i in range(2500)]
    rows = read(write_parquet(tmp_path / "rows.parquet", records), ColumnNames("body", "subject", "key"))
    assert rows == [Row(r["body"], str(r["key"]), r["subject"]) for r in records]


def test_a_text_file_is_one_row_named_after_it(tmp_path: Path) -> None:
    file = tmp_path / "story.txt"
    file.write_text("first line\nsecond — line\n", encoding="utf-8")
    assert read(file) == [Row("first line\nsecond — line\n", "story")]


def test_a_folder_gives_its_files_in_order_of_name(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "c.txt").write_text("third", encoding="utf-8")
    write_jsonl(tmp_path / "b.jsonl", [{"text": "second"}])
    write_parquet(tmp_path / "d" / "a.parquet", [{"text": "fourth"}, {"text": "fifth"}])
    write_parquet(tmp_path / "a.parquet", [{"text": "first"}])
    (tmp_path / "README.md").write_text("not data", encoding="utf-8")
    assert [row.text for row in read(tmp_path)] == ["first", "second", "third", "fourth", "fifth"]


def test_rows_without_id_or_domain_have_empty_ones(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": "b", "domain": None}])
    assert read(file) == [Row("a", "", ""), Row("b", "", "")]
    with pytest.raises(DataError, match="line 1: no column 'domain'"):
        read(file, ColumnNames(domain="domain"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', "line 2: not valid JSON"),
        (b'{"text": "a"}\n["b"]\n', "line 2: expected a JSON object, found list"),
        (b'{"text": "a"}\n{"id": "b"}\n', "line 2: no column is known to hold its text"),
        (b'{"text": 3}\n', "line 1: column 'text' holds int"),
        (b'{"text": "\xff"}\n', "not UTF-8"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(file)


def test_half_a_character_is_an_error_that_names_the_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n{"text": "\\ud83d"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="line 2"):
        read(file)


# Messages


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_messages_are_rendered_by_the_chat_template(tmp_path: Path, tokenizer: Any, write: Any) -> None:
    suffix = {write_jsonl: "jsonl", write_parquet: "parquet"}[write]
    file = write(tmp_path / f"rows.{suffix}", [{"messages": messages} for messages in MESSAGES])
    system = "<|start|>system<|message|>You are a small model.\nReasoning: medium<|end|><|start|>user<|message|>"
    texts = [row.text for row in read(file, ColumnNames("messages"), tokenizer)]
    assert texts == [
        f"{system}Grüße<|end|><|start|>assistant<|channel|>analysis<|message|>Easy.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Hi<|return|>",
        f"{system}1 + 1?<|end|><|start|>assistant<|channel|>final<|message|>2<|return|>",
    ]


def test_calls_from_parquet_are_those_from_jsonl(tmp_path: Path, tokenizer: Any) -> None:
    """A table gives every message all fields, and every call all arguments."""
    calls = [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {"b": "x"}}]
    said = [[MESSAGES[0][0], {"role": "assistant", "tool_calls": [call]}] for call in calls]
    found = [{"messages": messages} for messages in said]
    files = write_jsonl(tmp_path / "rows.jsonl", found), write_parquet(tmp_path / "rows.parquet", found)
    jsonl, parquet = (read(file, tokenizer=tokenizer) for file in files)
    ends = ['functions.f<|channel|>commentary json<|message|>{"a": 1}<|call|>']
    ends += ['functions.g<|channel|>commentary json<|message|>{"b": "x"}<|call|>']
    assert all(row.text.endswith(end) for row, end in zip(jsonl, ends, strict=True))
    assert parquet == jsonl


def test_null_arguments_of_jsonl_stay(tmp_path: Path, tokenizer: Any) -> None:
    call = {"name": "f", "arguments": {"a": None}}
    messages = [MESSAGES[0][0], {"role": "assistant", "tool_calls": [call]}]
    (row,) = read(write_jsonl(tmp_path / "rows.jsonl", [{"messages": messages}]), tokenizer=tokenizer)
    assert row.text.endswith('<|message|>{"a": null}<|call|>')


def test_the_date_in_a_conversation_is_fixed(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", DATED_TEMPLATE)
    (row,) = read(write_jsonl(tmp_path / "rows.jsonl", [{"messages": MESSAGES[1]}]), tokenizer=tokenizer)
    assert row.text.startswith("<|start|>system<|message|>2025-08-05<|end|><|start|>user<|message|>1 + 1?<|end|>")


@pytest.mark.parametrize("template", ['{{ raise_exception("") }}', "{{ 1 / 0 }}", "{% if %}"])
def test_a_template_that_fails_is_an_error(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(DataError, match="line 1: the chat template refuses"):
        read(write_jsonl(tmp_path / "rows.jsonl", [{"messages": MESSAGES[0]}]), tokenizer=tokenizer)


def bad_rows(file: Path, skip_bad_rows: bool) -> tuple[list[Row], list[str]]:
    remarks = Remarks()
    reading = Reading(TEXT, no_template, remarks, skip_bad_rows=skip_bad_rows)
    return list(read_rows(records(str(file), "train", None, remarks), reading)), remarks.lines()


def test_rows_that_cannot_be_read_are_named_at_once_or_left_out(tmp_path: Path) -> None:
    lines = [{"text": f"{n}"} if n % 3 else {"text": n} for n in range(60)]
    file = write_jsonl(tmp_path / "rows.jsonl", lines)
    with pytest.raises(DataError) as refused:
        bad_rows(file, skip_bad_rows=False)
    said = str(refused.value)
    assert said.startswith("20 rows cannot be read") and "--skip-bad-rows" in said
    assert [n for n in range(1, 61) if f"line {n}: column 'text' holds int" in said] == list(range(1, 31, 3))
    rows, said = bad_rows(file, skip_bad_rows=True)
    assert [row.text for row in rows] == [f"{n}" for n in range(60) if n % 3]
    assert len(said) == 1 and "20 rows" in said[0] and "line 1" in said[0]


# Hub datasets


def test_a_hub_id_is_streamed_with_its_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    records = {split: [{"text": f"{split} {i}", "id": i} for i in range(3)] for split in ("train", "held_out")}
    files = {split: str(write_jsonl(tmp_path / f"{split}.jsonl", rows)) for split, rows in records.items()}
    load, asked = datasets.load_dataset, []

    def local(name: str, subset: str | None, **options: Any) -> Any:
        asked.append((name, subset, options))
        return load("json", data_files=files, cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", local)
    rows = read("some-owner/some.name", split="held_out")
    assert rows == [Row(f"held_out {i}", str(i)) for i in range(3)]
    assert asked == [("some-owner/some.name", None, {"split": "held_out", "streaming": True})]


def test_a_hub_dataset_that_cannot_be_read_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"^owner/name: .* cannot be read: no route$"):
        read("owner/name")


def test_a_local_folder_goes_before_a_hub_dataset_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    write_jsonl(tmp_path / "owner" / "name" / "rows.jsonl", [{"text": "local"}])
    monkeypatch.chdir(tmp_path)
    assert read("owner/name") == [Row("local")]


@pytest.mark.parametrize("source", ["absent.jsonl", "owner/absent.parquet", "no/such/folder"])
def test_a_missing_file_is_not_looked_for_on_the_hub(source: str) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        read(source)


# Domains and samples


@given(some_rows, st.sets(st.sampled_from("abc"), min_size=1))
def test_domains_filter_rows(rows: list[Row], domains: set[str]) -> None:
    expected = [row for row in rows if row.domain in domains]
    if domains <= {row.domain for row in rows}:
        assert Counter(sample(rows, tuple(domains), None, 0)) == Counter(expected)
    else:
        with pytest.raises(DataError, match="no row is of domain"):
            sample(rows, tuple(domains), None, 0)


@given(some_rows, seeds)
def test_without_domains_and_number_all_rows_stay_in_the_order_of_a_sample(rows: list[Row], seed: int) -> None:
    assert sample(rows + rows, (), None, seed) == sample(rows + rows, (), 2 * len(rows), seed)
    assert Counter(sample(rows + rows, (), None, seed)) == Counter(rows + rows)


def test_no_row_at_all_is_an_error() -> None:
    with pytest.raises(DataError, match="holds no row"):
        sample([], (), 3, 0)


@given(some_rows, st.integers(1, 25), seeds)
def test_a_sample_is_the_rows_with_the_smallest_hashes(rows: list[Row], number: int, seed: int) -> None:
    def key(row: Row) -> int:
        digest = hashlib.sha256("\n".join([str(seed), row.id, row.text]).encode("utf-8")).digest()
        return struct.unpack(">Q", digest[:8])[0]

    assert sample(rows, (), number, seed) == sorted(rows, key=key)[:number]


@given(
    some_rows.flatmap(lambda rows: st.tuples(st.just(rows), st.permutations(rows))),
    st.none() | st.integers(1, 20),
    seeds,
)
def test_no_sample_and_no_hash_depends_on_the_order_of_rows(
    orders: tuple[list[Row], list[Row]], number: int | None, seed: int
) -> None:
    one, other = (sample(rows, (), number, seed) for rows in orders)
    assert one == other
    assert prompts_hash(one) == prompts_hash(other)


def test_packed_blocks_do_not_depend_on_the_order_of_rows_or_the_files_that_hold_them(
    tmp_path: Path, tokenizer: Any
) -> None:
    records = [{"text": f"{'word ' * (i % 7)}{i}", "id": str(i), "kind": "ab"[i % 2]} for i in range(40)]
    random.Random(0).shuffle(records)
    (tmp_path / "parts").mkdir()
    write_parquet(tmp_path / "parts" / "a.parquet", records[30:])
    write_jsonl(tmp_path / "parts" / "b.jsonl", records[:11])
    (tmp_path / "parts" / "c.json").write_text(json.dumps(records[11:30]), encoding="utf-8")
    whole = write_jsonl(tmp_path / "whole.jsonl", sorted(records, key=lambda record: int(record["id"])))

    def blocks(data: Path, number: int | None) -> list[Any]:
        rows = sample(read(data, ColumnNames(domain="kind")), (), number, 0)
        documents = tokens.encode(rows, tokenizer, Groups(["a", "b"]), 300, None, keep="all")
        batches = batching.packed(documents, 2, 16, eos_token_id=1, num_groups=2)
        return [prompts_hash(rows), *(leaf for batch in batches for leaf in jax.tree.leaves(batch))]

    for number in (None, 25):
        one, other = blocks(whole, number), blocks(tmp_path / "parts", number)
        assert len(one) == len(other) > 10 and one[0] == other[0]
        for mine, theirs in zip(one[1:], other[1:], strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_a_sample_looks_beyond_the_first_four_bytes_of_a_hash() -> None:
    """With seed 0 these two begin with 4aeeeb5f, then 74 and 37."""
    rows = [Row("154413"), Row("105972")]
    assert sample(rows, (), 1, 0) == sample(rows[::-1], (), 1, 0)


@given(some_rows, seeds)
def test_a_smaller_sample_is_the_beginning_of_a_larger_one(rows: list[Row], seed: int) -> None:
    assert sample(rows, (), len(rows), seed)[:3] == sample(rows, (), 3, seed)


@given(some_rows, st.integers(1, 5), seeds)
def test_other_domains_do_not_change_a_sample(rows: list[Row], number: int, seed: int) -> None:
    alone = [row for row in rows if row.domain == rows[0].domain]
    assert sample(rows, (rows[0].domain,), number, seed) == sample(alone, (), number, seed)


@pytest.mark.parametrize(
    "rows", [[Row("text", "id", "a"), Row("text", "id", "b")], [Row("b\nc", "a", "d"), Row("c", "a\nb", "d")]]
)
def test_a_sample_of_rows_with_equal_hashes_does_not_depend_on_their_order(rows: list[Row]) -> None:
    for number in (1, None):
        assert sample(rows, (), number, 0) == sample(rows[::-1], (), number, 0)


# The prompts hash


@given(some_rows)
def test_the_prompts_hash_is_over_ids_then_texts(rows: list[Row]) -> None:
    lines = "\n".join([row.id for row in rows]) + "\n" + "\n".join([row.text for row in rows])
    assert prompts_hash(iter(rows)) == hashlib.sha256(lines.encode("utf-8")).hexdigest()


def test_the_prompts_hash_of_rows_without_ids_counts_them_as_empty(tmp_path: Path) -> None:
    rows = read(write_jsonl(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": "b", "id": None}]))
    assert prompts_hash(rows) == hashlib.sha256(b"\n\na\nb").hexdigest()
