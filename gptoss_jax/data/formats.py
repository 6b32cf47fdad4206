"""What people's files look like: records of columns, from local files, folders and hub datasets.

A format is a function from a file to its records, in the table at the end. The command line reads this module when it
starts, so large packages are imported only where a format needs them.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..config import HUB_ID
from ..errors import DataError, reason
from ..files.paths import AnyPath, place

Records = Iterator[tuple[str, Mapping[str, Any]]]
"""Where each record stands, and its columns."""


def records(source: Any, split: str) -> Records:
    """Where each record stands, and its columns: of a file, of all files of a folder in order of name, of a hub dataset
    (streamed), or of a list of such records.

    JSONL and Parquet hold one record a line; a text file is one. DataError names file and line of what cannot be read.
    """
    if not isinstance(source, str | Path):
        yield from ((f"record {number}", record) for number, record in enumerate(source, 1))
        return
    source = str(source)
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


def _file_records(file: AnyPath) -> Records:
    if file.suffix not in FORMATS:
        raise DataError(f"{file}: unknown kind of file: give {', '.join(SUFFIXES)} or a folder of these")
    try:
        yield from FORMATS[file.suffix](file)
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from None


def _jsonl_records(file: AnyPath) -> Records:
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


def _parquet_records(file: AnyPath) -> Records:
    import pyarrow as pa
    import pyarrow.parquet as pq

    start = 0
    try:
        for batch in pq.ParquetFile(file.open("rb")).iter_batches(batch_size=1024):
            yield from ((f"{file}, row {i}", given(r)) for i, r in enumerate(batch.to_pylist(), start + 1))
            start += batch.num_rows
    except pa.ArrowException as error:
        raise DataError(f"{file}: not a Parquet file ({reason(error)})") from None


def given(record: Mapping[str, Any]) -> dict[str, Any]:
    """A table's record without what its values hold for the sake of others: tables give every message all fields that
    any has, and every call all arguments."""
    return {name: _given(value) for name, value in record.items()}


def _given(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _given(x) for name, x in value.items() if x is not None}
    return [_given(x) for x in value] if isinstance(value, list) else value


def _text_record(file: AnyPath) -> Records:
    # The name may hold bytes that are no text.
    name = os.fsencode(file.stem).decode("utf-8", "backslashreplace")
    yield str(file), {"text": file.read_text(encoding="utf-8"), "id": name}


def _hub_records(name: str, split: str) -> Records:
    import datasets  # slow to import, and needed for hub ids only

    try:
        for number, record in enumerate(datasets.load_dataset(name, split=split, streaming=True), 1):
            yield f"{name} split {split}, row {number}", given(record)
    # The library raises anything from ValueError to connection errors of several packages.
    except Exception as error:
        raise DataError(f"{name}: no local file, and the hub dataset cannot be read: {reason(error)}") from error


FORMATS: dict[str, Callable[[AnyPath], Records]] = {
    ".jsonl": _jsonl_records,
    ".parquet": _parquet_records,
    ".txt": _text_record,
}
SUFFIXES = tuple(FORMATS)
