"""Rows of conversations: filtered, sampled, hashed."""

import hashlib
import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DataError
from .remarks import Remarks
from .sources import records

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


def read_rows(
    source: Any,
    split: str,
    columns: ColumnNames,
    render: Render,
    subset: str | None = None,
    remarks: Remarks | None = None,
) -> Iterator[Row]:
    """The rows of what `sources.records` reads. Where the text column holds lists of messages, `render` makes the text.

    What is left out is told to `remarks`. DataError names file and line of a row that cannot be read.
    """
    for where, record in records(source, split, subset, remarks or Remarks()):
        if isinstance(record, DataError):
            raise record
        yield _row(record, where, columns, render)


def sample(rows: Iterable[Row], domains: tuple[str, ...], num_rows: int | None, seed: int) -> list[Row]:
    """Rows of `domains` (all if empty), or a sample of `num_rows`, in one order, whatever the order in which they come.

    They stand in order of the first 8 bytes of SHA-256 of "seed\\nid\\ntext", and a sample is the first of them.
    """
    seen: set[str] = set()

    def chosen() -> Iterator[Row]:
        for row in rows:
            seen.add(row.domain)
            if not domains or row.domain in domains:
                yield row

    def key(row: Row) -> tuple[bytes, str, str, str]:
        # Bytes compare as the big-endian number that they are. What follows decides where hashes are equal.
        return _hash(str(seed), row.id, row.text), row.domain, row.id, row.text

    kept = sorted(chosen(), key=key) if num_rows is None else heapq.nsmallest(num_rows, chosen(), key=key)
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
