"""What people's files look like: bytes of each format become records of columns.

A format is a function from an open file to its records, in the table at the end. The command line reads this module
when it starts, so large packages are imported only where a format needs them.
"""

import csv
import json
import math
import os
import re
import sys
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import PurePath
from typing import Any, TypeAlias

from ..errors import DataError, plain, reason

Binary: TypeAlias = Any
"""A file that is open for its bytes: of this machine, of a storage, in memory, or what unpacks another one."""
Record = Mapping[str, Any]
Records = Iterator[tuple[str, Record | DataError]]
"""Where each record stands, and its columns; or in their place why this one cannot be read while others can."""

NAME = 4096  # characters of a path that messages show: those that the longest one has
LFS = b"version https://git-lfs"
DAMAGE = ("EOFError", "error", "LZMAError")  # what gzip and bz2, zlib and lzma raise beside errors of files


def form_of(name: str) -> tuple[str, str]:
    """The suffixes of a file's name that say its format and how it is compressed: `.jsonl`, `.gz` of a.jsonl.gz. Both
    are empty where it is of no kind that is read."""
    path = PurePath(name.lower())
    packing = path.suffix if path.suffix in PACKINGS else ""
    form = PurePath(path.stem).suffix if packing else path.suffix
    return (form, packing) if form in (PACKED if packing else FORMATS) else ("", "")


def parse(file: Binary, name: str) -> Records:
    """The records of an open file of this name, which says its format.

    DataError where the file as a whole cannot be read, or no more of it; it stands in place of a record that cannot be.
    """
    form, packing = form_of(name)
    shown = plain(name, NAME)
    if not form:
        raise DataError(f"{shown}: unknown kind of file: give {KINDS}")
    stem = PurePath(name).name[: -len(form + packing)]
    # A file's name may hold bytes that are no text.
    stem = os.fsencode(stem).decode("utf-8", "backslashreplace")
    try:
        head = file.read(len(LFS))
        file.seek(0)
        if head == LFS:
            raise DataError("is what Git LFS puts in the place of a file: fetch the file itself with `git lfs pull`")
        if packing and not head:
            raise DataError(f"no sound {packing} file: it is empty")  # which not all ways of compression find
        stream = BufferedReader(PACKINGS[packing](file), 1 << 20) if packing else file
        for place, record in FORMATS[form](stream, stem):
            where = f"{shown}, {place}" if place else shown
            yield where, DataError(f"{where}: {record}") if isinstance(record, DataError) else record
    except DataError as error:
        raise DataError(f"{shown}: {error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{shown}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        what = f"no sound {packing} file" if packing else "cannot be read"
        raise DataError(f"{shown}: {what}: {plain(error.strerror or reason(error))}") from None
    except Exception as error:
        if not packing or type(error).__name__ not in DAMAGE:
            raise
        raise DataError(f"{shown}: no sound {packing} file: {plain(reason(error))}") from None


# Text


def _checked(head: bytes) -> bytes:
    """What a text file begins with, less a byte-order mark; DataError where it is no UTF-8 text at all."""
    encoding = json.detect_encoding(head[:4])  # by byte-order marks and null bytes
    if not encoding.startswith("utf-8"):
        raise DataError(f"is {encoding[:6].upper()} text: convert it to UTF-8")
    return head.removeprefix(BOM_UTF8)


def _lines(file: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a file, which end at LF alone."""
    for number, line in enumerate(file):
        yield line if number else _checked(line)


def _text_record(file: Binary, name: str) -> Records:
    text = _checked(file.read()).decode("utf-8")
    yield "", {"text": text.replace("\r\n", "\n"), "id": name}


# JSON


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {plain(repr(key), 80)} stands twice in an object")
    return made


# NaN is how pandas writes a value that is missing.
CONSTANTS = {"NaN": None, "Infinity": math.inf, "-Infinity": -math.inf}
DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=CONSTANTS.__getitem__)
BLANK = re.compile(r"[ \t\r\n]*")


def _json_records(file: Binary, _: str) -> Records:
    """Objects, one a line; or all in one list, whatever the file's suffix says."""
    first = True
    for number, whole in enumerate(_lines(file), 1):
        # Files that were put one behind the other have byte-order marks inside too.
        line = whole.removeprefix(BOM_UTF8).strip(b" \t\r\n")
        if not line:
            continue
        if first and line.startswith(b"["):
            yield from _json_list((whole[whole.index(b"[") :] + file.read()).decode("utf-8"), number)
            return
        if first and line == b"{":
            raise DataError("holds an object over several lines: give objects in a list, or one a line")
        first = False
        yield f"line {number}", _json_line(line)


def _json_line(line: bytes) -> Record | DataError:
    try:
        return _as_record(DECODER.decode(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        why = f"not UTF-8 text ({error.reason} at byte {error.start} of the line)"
    except json.JSONDecodeError as error:
        why = f"not valid JSON ({error.msg.removesuffix(' at')} at character {error.colno})"
    except (ValueError, RecursionError) as error:
        why = f"not valid JSON ({reason(error).partition(';')[0]})"
    return DataError(f"{why}: mend or remove the line")


def _json_list(text: str, line: int) -> Records:
    """The objects of a list that begins in this line of the file; `text` begins with its bracket."""

    def skip(at: int) -> int:
        return BLANK.match(text, at).end()  # type: ignore[union-attr]

    number, at = 0, skip(1)
    try:
        while number or not text.startswith("]", at):
            number += 1
            record, end = DECODER.raw_decode(text, at)
            yield f"record {number}", _as_record(record)
            at = skip(end)
            if not text.startswith(",", at):
                break
            at = skip(at + 1)
        if not text.startswith("]", at):
            raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
        if skip(at + 1) < len(text):
            raise json.JSONDecodeError("Something stands behind the list", text, skip(at + 1))
    except json.JSONDecodeError as error:
        place = f"line {line - 1 + error.lineno}, character {error.colno}"
        raise DataError(f"not valid JSON ({error.msg.removesuffix(' at')} at {place})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"record {number} is not valid JSON ({reason(error).partition(';')[0]})") from None


def _as_record(value: Any) -> Record | DataError:
    return value if isinstance(value, dict) else DataError(f"expected a JSON object, found {type(value).__name__}")


# Tables


def _csv_records(file: Binary, _: str) -> Records:
    """Rows below a line of column names; each has as many fields."""
    csv.field_size_limit(sys.maxsize)  # 131,072 characters unless one says so; conversations have more
    rows = csv.reader((line.decode("utf-8") for line in _lines(file)), strict=True)
    names: list[str] = []
    line = 0
    try:
        for row in rows:
            place, line = f"line {line + 1}", rows.line_num
            if not row:
                continue
            if not names:
                names = _distinct(row)
            elif len(row) == len(names):
                yield place, dict(zip(names, row, strict=True))
            else:
                yield place, DataError(f"fields of the row: {len(row)}, columns: {len(names)}: mend or remove the row")
    except csv.Error as error:
        raise DataError(f"line {line + 1}: not valid CSV ({plain(str(error).partition(' - ')[0])})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"line {line + 1}: not UTF-8 text ({error.reason})") from None


def _distinct(names: list[str]) -> list[str]:
    """Names of columns; those that a spreadsheet leaves empty may be several."""
    name, count = Counter(filter(None, names)).most_common(1)[0] if any(names) else ("", 0)
    if count > 1:
        raise DataError(f"two columns have the name {plain(repr(name), 80)}: rename one")
    return names


def _parquet_records(file: Binary, _: str) -> Records:
    import pyarrow.parquet as pq

    with _table("Parquet"):
        # In this thread alone: one of PyArrow's that reads from Python aborts a program that ends meanwhile.
        table = pq.ParquetFile(file, pre_buffer=False)
        yield from _columnar(table.schema_arrow.names, table.iter_batches(batch_size=1024, use_threads=False))


def _arrow_records(file: Binary, _: str) -> Records:
    """Record batches in a row, or as a file with an index of them."""
    import pyarrow as pa

    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    with _table("Arrow"):
        reader = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader
        yield from _columnar(reader.schema.names, batches)


def _columnar(names: list[str], batches: Iterable[Any]) -> Records:
    _distinct(names)
    start = 0
    for batch in batches:
        batch.validate(full=True)  # what a damaged file holds could point anywhere in memory
        yield from ((f"row {i}", given(record)) for i, record in enumerate(batch.to_pylist(), start + 1))
        start += batch.num_rows


@contextmanager
def _table(form: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except pa.ArrowException as error:
        raise DataError(f"no sound {form} file ({plain(reason(error))})") from None
    except (ValueError, OverflowError) as error:
        raise DataError(f"holds a value that cannot be read ({plain(reason(error))})") from None


def given(record: Mapping[str, Any]) -> dict[str, Any]:
    """A table's record without what its values hold for the sake of others: tables give every message all fields that
    any has, and every call all arguments."""
    return {name: _given(value) for name, value in record.items()}


def _given(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _given(x) for name, x in value.items() if x is not None}
    return [_given(x) for x in value] if isinstance(value, list) else value


# Compression


def _gz(file: Binary) -> Any:
    import gzip

    return gzip.open(file)


def _bz2(file: Binary) -> Any:
    import bz2

    return bz2.open(file)


def _xz(file: Binary) -> Any:
    import lzma

    return lzma.open(file)


def _zst(file: Binary) -> Any:
    import pyarrow as pa

    return pa.CompressedInputStream(file, "zstd")


FORMATS: dict[str, Callable[[Binary, str], Records]] = {
    ".jsonl": _json_records,
    ".json": _json_records,
    ".parquet": _parquet_records,
    ".arrow": _arrow_records,
    ".csv": _csv_records,
    ".txt": _text_record,
}
SUFFIXES = tuple(FORMATS)
PACKINGS: dict[str, Callable[[Binary], Any]] = {".gz": _gz, ".bz2": _bz2, ".xz": _xz, ".zst": _zst}
PACKED = (".jsonl", ".json", ".csv", ".txt")  # the others compress what they hold themselves
KINDS = f"{', '.join(SUFFIXES)} ({', '.join(PACKED)} also with {', '.join(PACKINGS)} behind)"
