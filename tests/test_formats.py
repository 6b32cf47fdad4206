"""Formats of data: what bytes of each become, what is refused by name, and that nothing else is ever raised."""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptoss_jax.data.formats import FORMATS, PACKED, PACKINGS, SUFFIXES, form_of, parse
from gptoss_jax.errors import DataError

BOM = "\ufeff".encode()
PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}
RECORDS = [{"text": "Grüße\u2028\x85 a\nb", "id": "1"}, {"text": 'he said "hi", once\n', "id": ""}]


def read(data: bytes, name: str) -> list[Any]:
    """Records, and errors as their texts."""
    return [str(r) if isinstance(r, DataError) else r for _, r in parse(io.BytesIO(data), name)]


def places(data: bytes, name: str) -> list[str]:
    return [where for where, _ in parse(io.BytesIO(data), name)]


def refusal(data: bytes, name: str) -> str:
    with pytest.raises(DataError) as caught:
        read(data, name)
    return str(caught.value)


def as_jsonl(records: list[Any], end: str = "\n") -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + end for record in records).encode()


def as_csv(records: list[Any], end: str = "\n") -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, records[0], lineterminator=end)
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue().encode()


def as_parquet(records: list[Any]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(records), sink)
    return sink.getvalue().to_pybytes()


def as_arrow(records: list[Any], is_file: bool, compression: str | None = None) -> bytes:
    sink, table = pa.BufferOutputStream(), pa.Table.from_pylist(records)
    new = pa.ipc.new_file if is_file else pa.ipc.new_stream
    with new(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        for batch in table.to_batches(max_chunksize=1):
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


WRITTEN: dict[str, list[bytes]] = {
    ".jsonl": [as_jsonl(RECORDS), as_jsonl(RECORDS, "\r\n"), BOM + as_jsonl(RECORDS), as_jsonl(RECORDS).rstrip()],
    ".json": [
        json.dumps(RECORDS).encode(),
        BOM + json.dumps(RECORDS, indent=2, ensure_ascii=False).replace("\n", "\r\n").encode(),
        b"\n \r\n " + json.dumps(RECORDS, indent="\t").encode() + b"\n\n",
        as_jsonl(RECORDS),  # to_json of pandas and `datasets` write lines under any name
    ],
    ".csv": [as_csv(RECORDS), as_csv(RECORDS, "\r\n"), BOM + as_csv(RECORDS), as_csv(RECORDS).rstrip(b"\n")],
    ".parquet": [as_parquet(RECORDS)],
    ".arrow": [as_arrow(RECORDS, True), as_arrow(RECORDS, False), as_arrow(RECORDS, True, "zstd")],
}


def test_every_form_is_tried() -> None:
    assert {*WRITTEN, ".txt"} == {*SUFFIXES} == {*FORMATS}
    assert {*PACK} == {*PACKINGS}


@pytest.mark.parametrize("form", WRITTEN)
def test_each_form_gives_the_records_that_were_written(form: str) -> None:
    for data in WRITTEN[form]:
        assert read(data, "rows" + form) == RECORDS
        assert read(data, "ROWS" + form.upper()) == RECORDS


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("form", PACKED)
def test_text_forms_may_be_compressed(form: str, packing: str) -> None:
    if form == ".txt":
        assert read(PACK[packing](BOM + "Grüße\r\n".encode()), "a.b.txt" + packing) == [
            {"text": "Grüße\n", "id": "a.b"}
        ]
        return
    for data in WRITTEN[form]:
        assert read(PACK[packing](data), f"rows{form}{packing}") == RECORDS


@pytest.mark.parametrize("packing", PACK)
def test_parts_compressed_one_behind_the_other_are_one_file(packing: str) -> None:
    half = PACK[packing](as_jsonl(RECORDS))
    assert read(half + half, "rows.jsonl" + packing) == 2 * RECORDS


@pytest.mark.parametrize("packing", PACK)
def test_a_damaged_compressed_file_is_one_line(packing: str) -> None:
    whole = PACK[packing](as_jsonl(RECORDS) * 50)
    for broken in (b"", b"no such file", whole[:-4], whole[: len(whole) // 2], whole[:7], bytes(len(whole))):
        assert f"rows.jsonl{packing}: no sound {packing} file" in refusal(broken, "rows.jsonl" + packing)


@pytest.mark.parametrize("packing", ["", *PACK])
def test_a_fault_of_the_program_is_called_no_damage(packing: str) -> None:
    file = io.BytesIO()
    file.close()
    with pytest.raises(ValueError, match="closed file"):
        list(parse(file, "rows.jsonl" + packing))


@pytest.mark.parametrize(
    "name", ["rows", "rows.md", "rows.gz", "rows.parquet.gz", "rows.arrow.zst", ".jsonl", "a.jsonl~"]
)
def test_other_names_are_of_no_kind_that_is_read(name: str) -> None:
    assert form_of(name) == ("", "")
    assert "unknown kind of file" in refusal(b"{}", name)
    assert all(suffix in refusal(b"{}", name) for suffix in (*SUFFIXES, *PACKINGS))


# Encodings


@pytest.mark.parametrize("form", PACKED)
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_unicode_is_refused_by_its_name(form: str, encoding: str) -> None:
    data = '{"text": "a"}\ntext\nb'.encode(encoding)
    assert refusal(data, "rows" + form) == f"rows{form}: is {encoding[:6].upper()} text: convert it to UTF-8"


def test_bytes_that_are_no_text_are_named_by_their_place() -> None:
    assert "rows.txt: not UTF-8 text (invalid start byte at byte 1)" in refusal(b"a\xff", "rows.txt")
    assert "rows.csv: line 3: not UTF-8" in refusal(b"text\na\n\xff\n", "rows.csv")
    assert "rows.json: not UTF-8" in refusal(b'[{"a": "\xff"}]', "rows.json")
    first, second = read(b'{"a": "\xff"}\n{"a": 1}\n', "rows.jsonl")
    assert first.startswith("rows.jsonl, line 1: not UTF-8 text (invalid start byte at byte 7")
    assert second == {"a": 1}


def test_a_pointer_of_git_lfs_is_no_data() -> None:
    for form in SUFFIXES:
        assert "git lfs pull" in refusal(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "r" + form)


@given(st.text(max_size=40))
def test_a_text_file_is_its_text_with_plain_line_ends(text: str) -> None:
    if json.detect_encoding(text.encode()[:4]) == "utf-8":
        assert read(text.encode(), "a.txt") == [{"text": text.replace("\r\n", "\n"), "id": "a"}]


# JSON

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
objects = st.dictionaries(
    st.text(max_size=3),
    st.recursive(scalars, lambda x: st.lists(x) | st.dictionaries(st.text(max_size=3), x), max_leaves=5),
)


@given(st.lists(objects, max_size=4), st.sampled_from(["\n", "\r\n", "\n\n \t\n"]))
def test_any_objects_are_read_one_a_line(records: list[Any], end: str) -> None:
    assert read(as_jsonl(records, end), "r.jsonl") == records


@given(st.lists(objects, max_size=4), st.sampled_from([None, 1, "\t"]), st.booleans())
def test_any_objects_are_read_in_a_list(records: list[Any], indent: Any, ascii: bool) -> None:
    data = json.dumps(records, indent=indent, ensure_ascii=ascii).encode()
    assert read(data, "r.json") == read(data, "r.jsonl") == records


def test_lines_end_at_line_feeds_alone_and_are_counted() -> None:
    data = '{"a": "\u2028\u2029\x85"}\n\r\n\n{"a": 2}\r\n{"a": \n\ufeff{"a": 4}'.encode()
    assert places(data, "r.jsonl") == [f"r.jsonl, line {n}" for n in (1, 4, 5, 6)]
    rows = read(data, "r.jsonl")
    assert rows[:2] == [{"a": "\u2028\u2029\x85"}, {"a": 2}]
    assert rows[2] == "r.jsonl, line 5: not valid JSON (Expecting value at character 6): mend or remove the line"
    assert rows[3] == {"a": 4}  # of a file that was put behind another


def test_a_carriage_return_alone_ends_no_line() -> None:
    (error,) = read(b'{"a": 1}\r{"a": 2}', "r.jsonl")
    assert "line 1: not valid JSON (Extra data" in error


def test_numbers_of_any_size_stay_what_they_are() -> None:
    assert read(b'{"a": 123456789012345678901234567890, "b": -0.0, "c": 1e400}', "r.jsonl") == [
        {"a": 123456789012345678901234567890, "b": 0.0, "c": float("inf")}
    ]


def test_not_a_number_is_a_value_that_is_missing() -> None:
    assert read(b'{"domain": NaN, "a": [Infinity, -Infinity]}', "r.jsonl") == [
        {"domain": None, "a": [float("inf"), float("-inf")]}
    ]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"text": "a", "text": "b"}', "key 'text' stands twice"),
        (b'{"m": [{"role": "user", "role": "assistant"}]}', "key 'role' stands twice"),
        (b"[1]", "expected a JSON object, found list"),
        (b'"text"', "found str"),
        (b"null", "found NoneType"),
        (b'{"a": ' + b"[" * 100_000, "recursion"),
        (b'{"a": ' + b"9" * 5000 + b"}", "limit (4300 digits)"),
        (b'{"a": 1} {"a": 2}', "Extra data at character 10"),
        (b'{"a": "' + b"x" * 10**6, "not valid JSON"),
        (b'{"' + b"k" * 10**6 + b'": 1, "' + b"k" * 10**6 + b'": 1}', "stands twice"),
    ],
)
def test_a_line_that_is_no_record_leaves_the_others(line: bytes, says: str) -> None:
    first, error, last = read(b'{"a": 1}\n' + line + b'\n{"a": 2}', "r.jsonl")
    assert (first, last) == ({"a": 1}, {"a": 2})
    assert error.startswith("r.jsonl, line 2: ") and says in error and len(error) < 300


@pytest.mark.parametrize("line", [b"3", b'"text"', b"null"])
def test_a_first_line_that_is_no_record_leaves_the_others_too(line: bytes) -> None:
    error, last = read(line + b'\n{"a": 2}', "r.jsonl")
    assert error.startswith("r.jsonl, line 1: expected a JSON object") and last == {"a": 2}


def test_what_is_no_object_in_a_list_leaves_the_others() -> None:
    data = b'[{"a": 1},\n 3, "text", {"a": 2}]'
    assert read(data, "r.json") == [
        {"a": 1},
        "r.json, record 2: expected a JSON object, found int",
        "r.json, record 3: expected a JSON object, found str",
        {"a": 2},
    ]
    assert places(data, "r.json") == [f"r.json, record {n}" for n in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b'[{"a": 1},]', "Expecting value at line 1, character 11"),
        (b'[{"a": 1}', "Expecting ',' or ']' at line 1, character 10"),
        (b'\n[{"a": 1}\n {"a": 2}]', "Expecting ',' or ']' at line 3, character 2"),
        (b'[{"a": 1}]\n{"a": 2}', "Something stands behind the list at line 2, character 1"),
        (b"[" * 100_000, "recursion"),
        (b'[{"a": 1, "a": 2}]', "record 1 is not valid JSON (key 'a' stands twice"),
        (b'{\n  "a": 1\n}\n', "over several lines"),
    ],
)
def test_a_list_that_breaks_off_is_named_by_its_place(data: bytes, says: str) -> None:
    assert says in refusal(data, "r.json")


@pytest.mark.parametrize("data", [b"", b"\n \r\n", b"[]", b" [ \n ] "])
def test_no_record_at_all_is_none(data: bytes) -> None:
    assert read(data, "r.json") == []


# CSV

cells = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=6)
# csv itself writes a row of one empty cell as a quoted one, which is no blank line.


@given(st.lists(st.tuples(cells, cells), max_size=5), st.sampled_from(["\n", "\r\n"]))
def test_any_cells_are_read(rows: list[tuple[str, str]], end: str) -> None:
    records = [{"text": text, "id": key} for text, key in rows]
    assert read(as_csv([{"text": "text", "id": "id"}, *records], end), "r.csv")[1:] == records


def test_long_cells_are_read() -> None:
    assert read(b'text\n"' + b"x" * 200_000 + b'"\n', "r.csv") == [{"text": "x" * 200_000}]


def test_rows_are_named_by_the_line_where_they_begin() -> None:
    assert places(b'text,id\r\n"a\nb\r\nc",1\r\n\r\nd,2\r\n', "r.csv") == ["r.csv, line 2", "r.csv, line 6"]


def test_a_row_with_other_fields_than_the_columns_leaves_the_others() -> None:
    assert read(b"text,id\na\nb,c,d\ne,f\n", "r.csv") == [
        "r.csv, line 2: fields of the row: 1, columns: 2: mend or remove the row",
        "r.csv, line 3: fields of the row: 3, columns: 2: mend or remove the row",
        {"text": "e", "id": "f"},
    ]


def test_columns_without_a_name_may_be_several() -> None:
    assert read(b",text,,\n0,a,,\n", "r.csv") == [{"": "", "text": "a"}]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b'text\n"a\nb', "line 2: not valid CSV (unexpected end of data)"),
        (b'text\na\n"b"c\n', "line 3: not valid CSV"),
        (b"text\ra\r", "line 1: not valid CSV (new-line character seen in unquoted field)"),
        (b"text,id,text\na,1,b\n", "two columns have the name 'text'"),
    ],
)
def test_what_is_no_csv_is_named_by_its_line(data: bytes, says: str) -> None:
    assert says in refusal(data, "r.csv")


# Tables


def test_tables_keep_their_types() -> None:
    records = [
        {"text": "a", "n": 1, "messages": [{"role": "user", "content": None}]},
        {"text": None, "n": 2, "messages": []},
    ]
    for data, form in ((as_parquet(records), ".parquet"), (as_arrow(records, False), ".arrow")):
        # What is null within a value is there for the sake of other rows.
        assert read(data, "r" + form) == [{**records[0], "messages": [{"role": "user"}]}, records[1]]
        assert places(data, "r" + form) == [f"r{form}, row 1", f"r{form}, row 2"]


def test_two_columns_of_one_name_are_refused() -> None:
    table = pa.table([["a"], ["b"]], names=["text", "text"])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    assert "two columns have the name 'text'" in refusal(sink.getvalue().to_pybytes(), "r.arrow")


def test_a_table_whose_text_is_no_text_is_refused() -> None:
    wrong = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, pa.schema([("text", pa.string())])) as writer:
        writer.write_batch(pa.record_batch([wrong], names=["text"]))
    assert "UTF8" in refusal(sink.getvalue().to_pybytes(), "r.arrow")


@pytest.mark.parametrize("form", [".parquet", ".arrow"])
def test_a_cut_table_is_one_line(form: str) -> None:
    for whole in WRITTEN[form]:
        for broken in (b"", b"none", whole[: len(whole) // 2], whole[: len(whole) // 4]):
            assert refusal(broken, "r" + form).startswith(f"r{form}: ")


# Anything at all


def check(data: bytes, name: str) -> None:
    try:
        for where, record in parse(io.BytesIO(data), name):
            assert where.startswith(name) and isinstance(record, dict | DataError)
    except DataError as error:
        assert str(error).startswith(name) and len(str(error)) < 1000


NAMES = [*("r" + form for form in SUFFIXES), *(f"r{form}{packing}" for form in PACKED for packing in PACKINGS)]


@given(st.sampled_from(NAMES), st.binary(max_size=200))
def test_no_bytes_raise_anything_else(name: str, data: bytes) -> None:
    check(data, name)
    packing = form_of(name)[1]
    if packing:
        check(PACK[packing](data), name)


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=300)
@given(st.data())
def test_no_damage_raises_anything_else(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(sorted(WRITTEN)))
    packing = data.draw(st.sampled_from(["", *PACK])) if form in PACKED else ""
    whole = data.draw(st.sampled_from(WRITTEN[form]))
    broken = bytearray(PACK[packing](whole) if packing else whole)
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    check(bytes(broken[: data.draw(st.integers(0, len(broken)))]), f"r{form}{packing}")
