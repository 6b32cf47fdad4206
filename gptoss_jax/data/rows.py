"""Rows of conversations: from local files, folders and hub datasets; filtered, sampled, hashed."""

import hashlib
import heapq
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..config import HUB_ID
from ..errors import DataError, reason
from ..files.paths import AnyPath, place

SUFFIXES = (".jsonl", ".parquet", ".txt")

Render = Callable[[list[Any]], str]
"""Turns a `messages` list into harmony text: the chat template."""


@dataclass(frozen=True)
class Row:
    """One conversation."""

    text: str
    id: str = ""
    domain: str = ""


@dataclass(frozen=True)
class ColumnNames:
    """Which columns of the data are read; `id` may be absent."""

    text: str = "text"
    domain: str | None = None
    id: str = "id"


def read_rows(source: str, split: str, columns: ColumnNames, render: Render) -> Iterator[Row]:
    """Rows of a file, of all files of a folder in order of name, or of a hub dataset (streamed).

    JSONL and Parquet hold one row a line; a text file is one row. Where the text column holds lists of
    messages, `render` makes the text. DataError names file and line of a row that cannot be read.
    """
    for where, record in _records(source, split):
        yield _row(record, where, columns, render)


def sample(rows: Iterable[Row], domains: tuple[str, ...], num_rows: int | None, seed: int) -> list[Row]:
    """Rows of `domains` (all if empty); with `num_rows`, a sample that does not depend on their order.

    The sample is the `num_rows` rows with the smallest first 8 bytes of SHA-256 of "seed\\nid\\ntext",
    smallest first.
    """
    seen: set[str] = set()

    def chosen() -> Iterator[Row]:
        for row in rows:
            seen.add(row.domain)
            if not domains or row.domain in domains:
                yield row

    def key(row: Row) -> tuple[bytes, str]:
        # Bytes compare as the big-endian number that they are; rows that differ by domain alone tie.
        return _hash(str(seed), row.id, row.text), row.domain

    kept = list(chosen()) if num_rows is None else heapq.nsmallest(num_rows, chosen(), key=key)
    if not seen:
        raise DataError("the data holds no row")
    absent = set(domains) - seen
    if absent:
        raise DataError(f"no row is of domain {', '.join(sorted(absent))}: there are {', '.join(sorted(seen)[:20])}")
    return kept


def prompts_hash(rows: Iterable[Row]) -> str:
    """SHA-256 over ids and texts, one a line."""
    rows = list(rows)
    ids, texts = "\n".join(r.id for r in rows), "\n".join(r.text for r in rows)
    return hashlib.sha256(f"{ids}\n{texts}".encode()).hexdigest()


def row_hashes(rows: Iterable[Row]) -> np.ndarray:
    """What tells whether two runs had the same row: for each the first 8 bytes of SHA-256 of "id\\ntext",
    uint64 [rows], sorted."""
    hashes = b"".join(_hash(row.id, row.text) for row in rows)
    return np.sort(np.frombuffer(hashes, ">u8").astype(np.uint64))


def _hash(*lines: str) -> bytes:
    return hashlib.sha256("\n".join(lines).encode()).digest()[:8]


def _records(source: str, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not source:
        raise DataError("--data is empty: name a file, a folder or a hub id")
    path = place(source)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not files:
            raise DataError(f"{path}: holds no {', '.join(SUFFIXES)} file")
        for file in files:
            yield from _file_records(file)
    elif path.exists():
        yield from _file_records(path)
    elif HUB_ID.fullmatch(source) and not source.endswith(SUFFIXES):
        yield from _hub_records(source, split)
    else:
        raise DataError(f"{path}: no such file or folder, and no hub id of the form owner/name")


def _file_records(file: AnyPath) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        if file.suffix == ".jsonl":
            yield from _jsonl_records(file)
        elif file.suffix == ".parquet":
            start = 0
            for batch in pq.ParquetFile(file.open("rb")).iter_batches(batch_size=1024):
                yield from ((f"{file}, row {i}", r) for i, r in enumerate(batch.to_pylist(), start + 1))
                start += batch.num_rows
        elif file.suffix == ".txt":
            # The name may hold bytes that are no text.
            name = os.fsencode(file.stem).decode("utf-8", "backslashreplace")
            yield str(file), {"text": file.read_text(encoding="utf-8"), "id": name}
        else:
            raise DataError(f"{file}: unknown kind of file: give {', '.join(SUFFIXES)} or a folder of these")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except pa.ArrowException as error:
        raise DataError(f"{file}: not a Parquet file ({reason(error)})") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from None


def _jsonl_records(file: AnyPath) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not valid JSON ({reason(error)}): mend or remove the line") from None
            if not isinstance(record, dict):
                raise DataError(f"{where}: expected a JSON object, found {type(record).__name__}")
            yield where, record


def _hub_records(name: str, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import datasets  # slow to import, and needed for hub ids only

    try:
        for number, record in enumerate(datasets.load_dataset(name, split=split, streaming=True), 1):
            yield f"{name} split {split}, row {number}", record
    # The library raises anything from ValueError to connection errors of several packages.
    except Exception as error:
        raise DataError(f"{name}: no local file, and the hub dataset cannot be read: {reason(error)}") from error


def _row(record: Mapping[str, Any], where: str, columns: ColumnNames, render: Render) -> Row:
    def column(name: str) -> Any:
        if name not in record:
            raise DataError(f"{where}: no column {name!r}: there are {', '.join(sorted(record))}")
        return record[name]

    value = column(columns.text)
    if isinstance(value, list):
        try:
            value = render(value)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
    if not isinstance(value, str):
        raise DataError(
            f"{where}: column {columns.text!r} holds {type(value).__name__}, expected text or a list of messages"
        )
    domain = column(columns.domain) if columns.domain else ""
    row_id = record.get(columns.id)
    row = Row(value, "" if row_id is None else str(row_id), "" if domain is None else str(domain))
    for name, text in ((columns.text, row.text), (columns.id, row.id), (columns.domain, row.domain)):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(f"{where}: column {name!r} holds half of a surrogate pair, which is no text") from None
    return row
