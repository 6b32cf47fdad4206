"""Rows of conversations: filtered, sampled, hashed."""

import hashlib
import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DataError
from .formats import Records
from .harmony import HarmonyText
from .parts import FIFTHS, part_of
from .remarks import Remarks
from .spellings import as_seen, conversation_of
from .template import Template

NAMED = 10  # of the rows that cannot be read so many are named
LONGEST = 200  # characters that each of them gets


@dataclass(frozen=True)
class Row:
    """One conversation."""

    text: str
    id: str = ""
    domain: str = ""
    literals: tuple[int, ...] = ()
    """As `HarmonyText` has them."""
    answer: str | None = None
    """The right answer, where a column has it."""

    @property
    def harmony(self) -> HarmonyText:
        """Its text, and what of it only looks like marks."""
        return HarmonyText(self.text, self.literals)


@dataclass(frozen=True)
class ColumnNames:
    """Which columns of the data are read: without `text` those that hold a conversation; `id` may be absent."""

    text: str | None = None
    domain: str | tuple[str, ...] | None = None
    """Of several the values make one domain, joined by a slash."""
    id: str = "id"
    answer: str | None = None

    @property
    def domains(self) -> tuple[str, ...]:
        """The columns of the domain."""
        return () if not self.domain else (self.domain,) if isinstance(self.domain, str) else self.domain


@dataclass(frozen=True)
class Reading:
    """How records become rows."""

    columns: ColumnNames
    template: Callable[[], Template]
    """Makes the chat template, which rows of text do without."""
    remarks: Remarks
    keep_thinking: bool = False
    skip_bad_rows: bool = False
    effort: str = "medium"
    """That of the reasoning, for conversations that state none."""


def read_rows(records: Records, reading: Reading) -> Iterator[Row]:
    """The rows of what `sources.records` reads; conversations become text by the chat template.

    DataError names the rows that cannot be read, all at once at the end; with `skip_bad_rows` they are left out, and
    remarked."""
    bad: list[str] = []
    for where, record in records:
        try:
            if isinstance(record, DataError):
                raise record
            row = _row(record, where, reading)
        except DataError as error:
            why = str(error) if error is record else f"{where}: {error}"
            if reading.skip_bad_rows:
                reading.remarks.say("left out, as they cannot be read", why)
            else:
                bad.append(why if len(bad) < NAMED else "")
        else:
            yield row
    if len(bad) == 1:
        raise DataError(bad[0])
    if bad:
        named = "; ".join(line[:LONGEST] for line in bad[:NAMED])
        raise DataError(f"{len(bad):,} rows cannot be read: mend them, or leave them out with --skip-bad-rows: {named}")


def in_part(rows: Iterable[Row], part: str, remarks: Remarks) -> Iterator[Row]:
    """The rows of a part, or of all; what is left out is remarked. DataError where none is of the part."""
    found = left = False
    for row in rows:
        if part in ("all", part_of(_hash("part", row.id, row.text))):
            found = True
            yield row
        else:
            left = True
            remarks.say(f"left out by --part {part}", row.id or row.text)
    if left and not found:
        raise DataError(f"no row is of the part {part}: give more rows, or --part all")


def is_held_out(row: Row) -> bool:
    """Whether the row is of the fifth, by another hash than that of parts, that judges what the others taught."""
    return int.from_bytes(_hash("held out", row.id, row.text), "big") % FIFTHS == 0


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


def row_hash(row: Row) -> int:
    """What tells whether two runs had the same row: the first 8 bytes of SHA-256 of "id\\ntext", as a number."""
    return int.from_bytes(_hash(row.id, row.text), "big")


def row_hashes(rows: Iterable[Row]) -> np.ndarray:
    """The hashes of rows, uint64 [rows], sorted."""
    return np.sort(np.array([row_hash(row) for row in rows], np.uint64))


def _hash(*lines: str) -> bytes:
    return hashlib.sha256("\n".join(lines).encode()).digest()[:8]


def _row(record: Mapping[str, Any], where: str, reading: Reading) -> Row:
    columns, said = reading.columns, set[str]()
    found = conversation_of(record, columns.text, (*columns.domains, columns.id, columns.answer), said.add)
    if isinstance(found, str):
        written = HarmonyText(found)
    else:
        seen = found
        if not reading.keep_thinking:
            seen = as_seen(found, False, lambda line: said.add(f"{line} (--keep-thinking keeps it)"))
        written = reading.template().write(seen, reading.effort)
    for column in (*columns.domains, columns.answer):
        if column and column not in record:
            raise DataError(f"no column {column!r}: there are {', '.join(sorted(record))}")
    domains, row_id = [_as_text(record[column]) for column in columns.domains], record.get(columns.id)
    for column, name in zip(columns.domains, domains[:-1], strict=False):
        if "/" in name:
            raise DataError(f"column {column!r} holds {name!r}: a slash would end its name early, write another sign")
    answer = _as_text(record[columns.answer]) if columns.answer else None
    row = Row(written.text, _as_text(row_id), "/".join(domains), written.literals, answer)
    for name, text in (
        ("its text", row.text),
        (f"column {columns.id!r}", row.id),
        ("its domain", row.domain),
        ("its answer", answer or ""),
    ):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(f"{name} holds half of a surrogate pair, which is no text") from None
    for remark in sorted(said):
        reading.remarks.say(remark, where)
    return row


def _as_text(value: Any) -> str:
    return "" if value is None else str(value)
