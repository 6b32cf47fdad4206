"""Rows and options that cannot be used are refused with file and line, and nothing is written."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from .bad_input import SHORT, Program, Refused, case
from .conftest import conversation

TEXT = conversation(1)
GOOD = json.dumps({"id": "r", "domain": "a", "text": TEXT})
SILENT = "<|start|>user<|message|>What is 1 plus 1?<|end|>"
MESSAGES = ("--text-column", "messages")


def parquet(**columns: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def broken_page() -> bytes:
    """Footer and header are sound."""
    whole = parquet(text=[TEXT])
    return whole[:4] + b"\xff" * 30 + whole[34:]


def messages(value: Any) -> str:
    return json.dumps({"messages": value})


# The file's name, its content, further options.
ROWS = [
    case("empty file", ("r.jsonl", ""), "no row"),
    case("blank lines", ("r.jsonl", "\n \n\n"), "no row"),
    case("cut line", ("r.jsonl", f'{GOOD}\n\n{{"text": "a'), "r.jsonl, line 3", "not valid JSON", "mend"),
    case("row is a list", ("r.jsonl", f"{GOOD}\n[1]\n"), "r.jsonl, line 2", "list"),
    case("row is text", ("r.jsonl", '"text"'), "r.jsonl, line 1", "str"),
    case("row is null", ("r.jsonl", "null"), "r.jsonl, line 1", "NoneType"),
    case("no UTF-8", ("r.jsonl", b'{"text": "\xff"}'), "r.jsonl", "not UTF-8"),
    case("UTF-16", ("r.jsonl", GOOD.encode("utf-16")), "r.jsonl", "UTF-16", "convert"),
    case("key twice", ("r.jsonl", '{"text": "a", "text": "b"}'), "r.jsonl, line 1", "'text' stands twice"),
    case("cut list", ("r.json", f"[{GOOD},"), "r.json", "not valid JSON", "line 1"),
    case("list of texts", ("r.json", '["a"]'), "r.json, record 1", "str"),
    case("CSV without header", ("r.csv", "a,b\nc,d\n"), "r.csv, line 2", "no column is known", "a, b"),
    case("CSV with too many fields", ("r.csv", "text\na,b\n"), "r.csv, line 2", "fields"),
    case("CSV with an open quote", ("r.csv", 'text\n"a\n'), "r.csv", "line 2", "not valid CSV"),
    case("no gzip", ("r.jsonl.gz", GOOD), "r.jsonl.gz", "no sound .gz file"),
    case("cut gzip", ("r.jsonl.gz", gzip.compress(GOOD.encode())[:-9]), "r.jsonl.gz", "no sound .gz file"),
    case("no Arrow", ("r.arrow", "no Arrow"), "r.arrow"),
    case("Git LFS", ("r.parquet", "version https://git-lfs.github.com/spec/v1\n"), "r.parquet", "git lfs pull"),
    case(
        "no column text",
        ("r.jsonl", '{"txt": "a", "b": "c", "id": 1}'),
        "r.jsonl, line 1",
        "b, id, txt",
        "--text-column",
    ),
    case("column not there", ("r.jsonl", GOOD, "--text-column", "prompt"), "'prompt'", "domain, id, text"),
    case("column missing later", ("r.jsonl", f'{GOOD}\n{{"id": 1}}'), "r.jsonl, line 2", "no column is known", "id"),
    case("no domain column", ("r.jsonl", GOOD, "--domain-column", "topic"), "line 1", "'topic'", "domain, id, text"),
    case("text is a number", ("r.jsonl", '{"text": 5}'), "line 1", "'text'", "int", "expected text"),
    case("text is null", ("r.jsonl", '{"text": null}'), "line 1", "no column is known", "text"),
    case("text is an object", ("r.jsonl", '{"text": {}}'), "line 1", "'text'", "dict"),
    case("no kept token", ("r.jsonl", json.dumps({"text": SILENT})), "no token is kept", "assistant says nothing"),
    case("plain text", ("r.txt", "no harmony here"), "no token is kept", "--keep all"),
    case("empty text", ("r.txt", ""), "no token is kept"),
    case("text is no UTF-8", ("r.txt", b"a\xff\xfe"), "r.txt", "not UTF-8"),
    case("no Parquet", ("r.parquet", "no Parquet"), "r.parquet", "no sound Parquet file"),
    case("empty Parquet", ("r.parquet", ""), "r.parquet", "no sound Parquet file"),
    case("cut Parquet", ("r.parquet", parquet(text=[TEXT])[:-9]), "r.parquet", "no sound Parquet file"),
    case("broken Parquet page", ("r.parquet", broken_page()), "r.parquet", "cannot be read"),
    case("Parquet without rows", ("r.parquet", parquet(text=pa.array([], pa.string()))), "no row"),
    case(
        "Parquet without text",
        ("r.parquet", parquet(txt=["a"], txt2=["b"])),
        "r.parquet, row 1",
        "txt, txt2",
        "--text-column",
    ),
    case("Parquet of numbers", ("r.parquet", parquet(text=[1.5])), "r.parquet, row 1", "float"),
    case("Parquet of bytes", ("r.parquet", parquet(text=[b"a"])), "r.parquet, row 1", "bytes"),
    case("other kind of file", ("r.tsv", "text\na"), "r.tsv", ".jsonl, .json, .parquet, .arrow, .csv, .txt", ".zst"),
    case(
        "domain not there", ("r.jsonl", GOOD, "--domain-column", "domain", "--domain", "b"), "domain b", "there are a"
    ),
    case(
        "one domain of two not there",
        ("r.jsonl", GOOD, "--domain-column", "domain", "--domain", "a", "--domain", "b"),
        "domain b",
    ),
    case("domain without column", ("r.jsonl", GOOD, "--domain", "a"), "--domain-column"),
    case("unknown role", ("r.jsonl", messages([{"role": "alien", "content": "a"}]), *MESSAGES), "line 1", "alien"),
    case("message without role", ("r.jsonl", messages([{"content": "a"}]), *MESSAGES), "line 1", "has no role"),
    case("message without content", ("r.jsonl", messages([{"role": "user"}]), *MESSAGES), "line 1", "has no content"),
    case("no messages", ("r.jsonl", messages([]), *MESSAGES), "line 1", "empty"),
    case("messages are text", ("r.jsonl", messages(["a"]), *MESSAGES), "line 1"),
    case("messages are null", ("r.jsonl", messages([None]), *MESSAGES), "line 1"),
    case("half a surrogate", ("r.jsonl", r'{"text": "\ud800"}'), "line 1"),
    case(
        "half a surrogate, sampled",
        ("r.jsonl", r'{"text": "\ud800"}', "--num-rows", "1"),
        "line 1",
    ),
    case("nested too deep", ("r.jsonl", '{"text": ' + "[" * 200_000), "line 1", "recursion"),
    case("list nested too deep", ("r.jsonl", "[" * 200_000), "record 1", "recursion"),
    case("endless number", ("r.jsonl", '{"text": ' + "9" * 5000 + "}"), "line 1"),
]


@pytest.mark.parametrize(("data", "says"), ROWS)
def test_rows(data: tuple[Any, ...], says: tuple[str, ...], tiny_mxfp4: Path, tmp_path: Path, refused: Refused) -> None:
    name, content, *options = data
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    fixed = ("--max-seq-length", 64, "--keep", "assistant", "--out", "out")
    refused("profile", tiny_mxfp4, "--data", name, *fixed, *options, says=says)


def test_no_data(tiny_mxfp4: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "empty").mkdir()
    refused("profile", tiny_mxfp4, "--data", "empty", says=("empty", ".jsonl"))
    refused("profile", tiny_mxfp4, "--data", "missing.jsonl", says=("missing.jsonl", "no such file"))
    refused("profile", tiny_mxfp4, "--data", tmp_path / "missing", says=("missing", "no such file"))
    refused("profile", tiny_mxfp4, "--data", "empty/*.jsonl", says=("empty/*.jsonl", "matches none"))


def test_nothing_for_a_path(tiny_mxfp4: Path, rows_jsonl: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "mine.jsonl").write_text(GOOD)
    refused("profile", tiny_mxfp4, "--data", "", says=("--data",))
    refused("profile", "", "--data", rows_jsonl, says=("MODEL",))


def test_template_that_fails(model: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "r.jsonl").write_text(messages([{"role": "user", "content": "a"}]))
    argv = ("profile", model, "--data", "r.jsonl", *MESSAGES)
    template = model / "chat_template.jinja"
    template.write_text("{% if %}")
    refused(*argv, says=("r.jsonl, line 1", "template"))
    template.write_text("{{ 1 / 0 }}")
    refused(*argv, says=("r.jsonl, line 1", "template"))
    template.unlink()
    refused(*argv, says=("chat_template.jinja",))


def test_template_that_fails_without_a_word(model: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "r.jsonl").write_text(messages([{"role": "user", "content": "a"}]))
    (model / "chat_template.jinja").write_text("{{ raise_exception('') }}")
    refused("profile", model, "--data", "r.jsonl", *MESSAGES, says=("r.jsonl, line 1", "template"))


PROFILE = [
    case("no such option", ["--bogus"], "--bogus", "gptoss-jax profile --help"),
    case("no batch", ["--batch-size", "0"], "--batch-size"),
    case("batch is text", ["--batch-size", "x"], "--batch-size", "'x'"),
    case("batch beyond all memory", ["--batch-size", 10**15], "--batch-size"),
    case("length 0", ["--max-seq-length", "0"], "--max-seq-length"),
    case("length above the model's", ["--max-seq-length", "18001"], "--max-seq-length", "18000"),
    case("no rows", ["--num-rows", "0"], "--num-rows"),
    case("skip negative", ["--skip-first", "-1"], "--skip-first"),
    case("skip all", ["--skip-first", "64", "--max-seq-length", "64"], "--skip-first"),
    case("crossing without packing", ["--cross-document"], "--cross-document", "--pack"),
    case("unknown engine", ["--engine", "warp"], "--engine", "auto, resident"),
    case("unknown dtype", ["--dtype", "int4"], "--dtype", "bfloat16, float32"),
    case("weights are words", ["--channel-weights", "much"], "--channel-weights", "analysis=0.5"),
    case("weights are empty", ["--channel-weights", ""], "--channel-weights"),
    case("weight is text", ["--channel-weights", "final=x"], "--channel-weights", "final=x"),
    case("weight twice equal", ["--channel-weights", "final=1=2"], "--channel-weights"),
    case("weight negative", ["--channel-weights", "final=-1"], "--channel-weights", "at least 0"),
    case("weight is no number", ["--channel-weights", "final=nan"], "--channel-weights", "at least 0"),
    case("weight is infinite", ["--channel-weights", "final=inf"], "--channel-weights", "at least 0"),
    case("weights of 0", ["--keep", "assistant", "--channel-weights", "final=0"], "no token is kept"),
    case("unknown channel", ["--channel-weights", "finall=1,final=1"], "finall"),
    case("weights where all count", ["--keep", "all", "--channel-weights", "final=1"], "--keep"),
    case("quantile above 1", ["--eaft", "--eaft-quantiles", "1.5", "0"], "--eaft-quantiles"),
    case("quantile is no number", ["--eaft", "--eaft-quantiles", "nan", "0"], "--eaft-quantiles"),
    case("two weights of three", ["--eaft", "--eaft-weights", "1", "2"], "--eaft-weights"),
    case("class weight is no number", ["--eaft", "--eaft-weights", "nan", 1, 1], "--eaft-weights"),
    case("class weight is infinite", ["--eaft", "--eaft-weights", "inf", 1, 1], "--eaft-weights"),
]


@pytest.mark.parametrize(("options", "says"), PROFILE)
def test_options(
    options: list[Any], says: tuple[str, ...], tiny_mxfp4: Path, rows_jsonl: Path, refused: Refused
) -> None:
    refused("profile", tiny_mxfp4, "--data", rows_jsonl, *SHORT, *options, says=says)


def test_no_hub_without_a_net(
    monkeypatch: pytest.MonkeyPatch, tiny_mxfp4: Path, rows_jsonl: Path, refused: Refused
) -> None:
    import datasets
    import huggingface_hub

    def no_net(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", no_net)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_net)
    refused("profile", tiny_mxfp4, "--data", "some/dataset", says=("some/dataset", "no route"))
    refused("profile", "some/model", "--data", rows_jsonl, says=("some/model", "no route"))


def test_name_that_is_no_text(tiny_mxfp4: Path, tmp_path: Path, program: Program) -> None:
    name = os.fsdecode(b"r\xff.jsonl")
    try:
        (tmp_path / name).write_text(GOOD)
    except OSError:
        pytest.skip("this file system wants names in UTF-8")
    status, _ = program("profile", tiny_mxfp4, "--data", name, "--out", "out", *SHORT)
    assert status == 0
