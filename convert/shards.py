"""Safetensors shards: reading byte ranges of tensors, writing tensors as a stream.

A safetensors file is the length of its header (8 bytes, little endian), the header (JSON: dtype,
shape and byte range of each tensor), and the tensors. `safetensors.numpy` has no bfloat16 and loads
whole tensors; here any run of rows is read, so that no more than a few experts need be in memory.
"""

import hashlib
import json
import math
import os
import struct
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from gptoss_jax.errors import CheckpointError, reason, refusal
from gptoss_jax.files.atomic import let_go
from gptoss_jax.files.paths import WEIGHT_SUFFIXES, AnyPath, storage_errors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ORBAX = "orbax"  # the folder that an Orbax checkpoint has in the place of shards
DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
# What JSON of another form, or none, raises on the way to names and numbers.
UNSOUND = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
UNUSABLE = "no usable index", "download it again"  # what is wrong, and how to mend it
UNSOUND_HEADER = "its header is not sound", "download it again"
AT_ONCE = min(4, os.cpu_count() or 1)  # shards being written: SHA-256 takes the bytes of each in their order
AHEAD = 2  # pieces of a shard that wait between two threads, so that neither stops at once when the other does
# Of a shard, what the page cache is given before it is asked to let go. To find memory for whole files takes longer
# than to write them where the cache is full or the machine virtual, and pushes out what other programs read.
HELD_BYTES = 16 << 20
LENGTH_BYTES = 8  # of the header's length, with which a file begins
MAX_HEADER = 100_000_000  # the limit of the safetensors library


class Rows(Protocol):
    """A tensor of the Hugging Face form whose rows can be read: `Stored`, or one that is made from another form."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int: ...

    def read(self, first: int = 0, count: int | None = None) -> np.ndarray:
        """Rows [first, first + count) of the first axis; all of them without arguments."""
        ...


@dataclass(frozen=True)
class Entry:
    """What a header says of one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Where its first byte stands in the file."""
    nbytes: int


@dataclass(frozen=True)
class Stored(Entry):
    """Where one tensor lies."""

    file: AnyPath
    version: tuple[int, ...]
    """The file's, when its header was read."""

    def read(self, first: int = 0, count: int | None = None, columns: tuple[int, int] | None = None) -> np.ndarray:
        """Rows [first, first + count) of the first axis; all of them without arguments.

        Of a matrix, `columns` reads from the first to before the second one alone.
        """
        count = self.shape[0] - first if count is None else count
        assert first >= 0 and first + count <= self.shape[0], (self.name, first, count)
        row_bytes = self.nbytes // self.shape[0]
        start = self.offset + first * row_bytes
        if columns is None:
            array = np.empty((count, *self.shape[1:]), DTYPES[self.dtype])
            self._fill(array, [start])
            return array
        left, right = columns
        array = np.empty((count, right - left), DTYPES[self.dtype])
        start += left * array.itemsize
        self._fill(array, range(start, start + count * row_bytes, row_bytes))
        return array

    def pick(self, rows: Sequence[int]) -> np.ndarray:
        """Single rows of the first axis, in the order asked for."""
        array = np.empty((len(rows), *self.shape[1:]), DTYPES[self.dtype])
        self._fill(array, [self.offset + row * (self.nbytes // self.shape[0]) for row in rows])
        return array

    def _fill(self, array: np.ndarray, starts: Sequence[int]) -> None:
        """Fill the array with as many bytes from each of `starts`."""
        parts = array.reshape(len(starts), -1).view(np.uint8)
        try:
            file: Any  # fsspec's files have readinto too
            with storage_errors(self.file), self.file.open("rb") as file:
                for start, part in zip(starts, parts, strict=True):
                    file.seek(start)
                    if file.readinto(part.data) != part.nbytes:
                        raise CheckpointError(f"{self.file}: ended inside {self.name}: it changed while it was read")
                if _version(file) != self.version:
                    raise CheckpointError(f"{self.file}: changed while it was read: try again when it is complete")
        except OSError as error:
            raise CheckpointError(f"{self.file}: cannot be read: {refusal(error)}") from error


def find_tensors(folder: AnyPath) -> dict[str, Stored]:
    """Every tensor of a checkpoint folder; CheckpointError where files can be read in two ways, or do not agree."""
    weight_map = read_index(folder / INDEX) if (folder / INDEX).exists() else None
    shards = [SINGLE] if weight_map is None else sorted(set(weight_map.values()))
    _check_files(folder, shards, weight_map is not None)
    found: dict[str, Stored] = {}
    for tensor in (t for shard in shards for t in read_header(folder / shard)):
        if tensor.name in found:
            raise CheckpointError(f"{tensor.file}: holds {tensor.name}, which {found[tensor.name].file.name} holds too")
        found[tensor.name] = tensor
    if weight_map is None:
        return found
    for name, shard in weight_map.items():
        if name not in found or found[name].file.name != shard:
            raise CheckpointError(f"{folder / shard}: the index says that {name} is here, and it is not")
    for name, tensor in found.items():
        if name not in weight_map:
            raise CheckpointError(f"{tensor.file}: holds {name}, which the index does not name")
    return found


def _check_files(folder: AnyPath, shards: Sequence[str], indexed: bool) -> None:
    """CheckpointError where a shard is missing, or weights lie beside them that another program would take."""
    weights = sorted(file.name for file in folder.iterdir() if file.suffix in WEIGHT_SUFFIXES)
    files = [name for name in weights if name.endswith(".safetensors")]
    extra = [name for name in files if name not in shards]
    apart = "remove the weights that are not meant, or move them out of the folder"
    if not indexed and SINGLE not in files:
        if files:
            raise CheckpointError(f"{folder}: holds {files[0]} and no {INDEX}: copy that too")
        what = f"holds {weights[0]}: save the model as safetensors" if weights else "not a checkpoint's folder"
        raise CheckpointError(f"{folder}: holds neither {INDEX} nor {SINGLE}: {what}")
    if not indexed and extra:
        takes = f"transformers takes {SINGLE} alone, vLLM both"
        raise CheckpointError(f"{folder / extra[0]}: lies beside {SINGLE}: {takes}: {apart}")
    if SINGLE in files and [*shards] != [SINGLE]:
        takes = "transformers takes this file, vLLM the shards"
        raise CheckpointError(f"{folder / SINGLE}: lies beside the shards of {INDEX}: {takes}: {apart}")
    for shard in shards:
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder / shard}: the index names this shard, but it is missing: download it")
    if extra:
        raise CheckpointError(f"{folder / extra[0]}: weights that {INDEX} does not name: remove them, or mend {INDEX}")


def read_index(file: AnyPath) -> dict[str, str]:
    """The shard of each tensor, by the index; CheckpointError where it is not sound."""
    with sound(str(file), *UNUSABLE), storage_errors(file):
        return parse_index(file.read_bytes(), str(file))


def parse_index(data: bytes, where: str = INDEX) -> dict[str, str]:
    """The same from the file's bytes."""
    with sound(where, *UNUSABLE):
        weight_map: dict[str, str] = json.loads(data)["weight_map"]
        for name, shard in weight_map.items():
            if type(shard) is not str or os.path.basename(shard) != shard or shard in ("", ".", ".."):
                raise ValueError("a shard's name is no plain file name")
            if not (name + shard).isprintable():  # errors that name it have one line
                raise ValueError(f"{name + shard!r}: a name with control characters")
        return weight_map


def read_header(file: AnyPath) -> list[Stored]:
    """The tensors of one shard; CheckpointError where the file is truncated or its header is not sound."""
    stream: Any
    with sound(str(file), *UNSOUND_HEADER), storage_errors(file), file.open("rb") as stream:
        version = _version(stream)
        stream.seek(0)
        start = stream.read(LENGTH_BYTES)
        start += stream.read(min(int.from_bytes(start, "little"), MAX_HEADER))
    return [Stored(**vars(entry), file=file, version=version) for entry in parse_header(start, version[0], str(file))]


def parse_header(data: bytes, size: int, where: str = SINGLE) -> list[Entry]:
    """The same from the first bytes of a file of `size` bytes, which hold at least its header."""
    length = int.from_bytes(data[:LENGTH_BYTES], "little")
    base = LENGTH_BYTES + length
    if size < LENGTH_BYTES or length > MAX_HEADER or base > size:
        raise CheckpointError(f"{where}: {size} bytes, too short for its header: truncated, download it again")
    with sound(where, *UNSOUND_HEADER):
        header = json.loads(data[LENGTH_BYTES:base])
        header.pop("__metadata__", None)
        entries = [_entry(base, name, entry) for name, entry in header.items()]
    entries.sort(key=lambda entry: entry.offset)
    _check_ranges(entries, base, size, where)
    return entries


def _entry(base: int, name: str, raw: dict[str, Any]) -> Entry:
    begin, end = raw["data_offsets"]
    dtype, shape = raw["dtype"], tuple(raw["shape"])
    if not all(type(n) is int and n >= 0 for n in (begin, end, *shape)):
        raise ValueError(f"{name}: offsets and shape must be whole numbers")
    if type(dtype) is not str or not (name + dtype).isprintable():  # errors that name it have one line
        raise ValueError(f"{name!r}: name and dtype must be words, and dtype is {dtype!r}")
    known = DTYPES.get(dtype)
    if begin > end or (known is not None and end - begin != math.prod(shape) * known.itemsize):
        raise ValueError(f"{name}: {end - begin} bytes do not fit {dtype} {list(shape)}")
    return Entry(name, dtype, shape, base + begin, end - begin)


def _check_ranges(entries: Sequence[Entry], base: int, size: int, where: str) -> None:
    """CheckpointError where tensors, sorted by their place, do not lie from `base` to `size` without a gap."""
    if entries and entries[0].offset != base:
        raise CheckpointError(f"{where}: a gap before {entries[0].name}: download it again")
    end = max((entry.offset + entry.nbytes for entry in entries), default=base)
    if end != size:
        what = "truncated" if end > size else "bytes behind the last tensor"
        raise CheckpointError(f"{where}: its header describes {end} bytes, it has {size}: {what}, download it again")
    for before, after in pairwise(entries):
        if before.offset + before.nbytes != after.offset:
            raise CheckpointError(f"{where}: {before.name} and {after.name} overlap or leave a gap: download it again")


@contextmanager
def sound(where: str, what: str, mend: str) -> Iterator[None]:
    """CheckpointError for whatever reading and parsing raises where a file is not what it should be."""
    try:
        yield
    except UNSOUND as error:
        raise CheckpointError(f"{where}: {what} ({reason(error)}): {mend}") from None


def _version(stream: Any) -> tuple[int, ...]:
    """What changes when a file is written to: its size and time. Remote files tell their size alone for nothing."""
    try:
        status = os.fstat(stream.fileno())
    except OSError:  # fsspec's files have no descriptor
        return (stream.seek(0, os.SEEK_END),)
    return status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: its bytes come in pieces, so that the whole need not be in memory."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * DTYPES[self.dtype].itemsize


def write_shards(
    folder: Path,
    groups: Sequence[Sequence[Planned]],
    max_shard_bytes: int,
    progress: Callable[[int], Any] = lambda nbytes: None,
) -> dict[str, str]:
    """Write shards and their index; returns the SHA-256 of each shard. A group's tensors stay together, in their order.

    A shard is closed before the group that would take it past `max_shard_bytes`; a group larger than
    that has a shard of its own. `progress` gets the bytes of each piece written.
    """
    shards: list[list[Planned]] = [[]]
    for group in groups:
        if shards[-1] and sum(t.nbytes for t in (*shards[-1], *group)) > max_shard_bytes:
            shards.append([])
        shards[-1].extend(group)
    named = {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": tensors for number, tensors in enumerate(shards, 1)
    }
    digests = {name: hashlib.sha256() for name in named}
    _in_turns((_write_shard(folder / name, named[name], digests[name]) for name in named), progress)
    weight_map = {t.name: name for name, tensors in named.items() for t in tensors}
    total_size = sum(t.nbytes for tensors in shards for t in tensors)
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _in_turns(writers: Iterator[Generator[int]], progress: Callable[[int], Any]) -> None:
    """Run all to their ends, some at a time and those in turns: an error or a signal in this thread ends all."""
    active = deque(islice(writers, AT_ONCE))
    try:
        while active:
            written = next(active[0], None)
            if written is None:
                active.popleft()
                active.extend(islice(writers, 1))
            else:
                active.rotate(-1)
                progress(written)
    finally:
        for writer in active:
            writer.close()


def _write_shard(path: Path, tensors: Sequence[Planned], digest: Any) -> Generator[int]:
    """Write and hash a file; yields the bytes of each piece. One thread makes pieces, another hashes them."""
    header, pieces = _header(tensors), _bytes_of(tensors)
    with open(path, "wb") as file, ThreadPoolExecutor(1) as maker, ThreadPoolExecutor(1) as hasher:
        file.write(header)
        coming = deque(maker.submit(next, pieces, None) for _ in range(AHEAD))
        hashed = deque([hasher.submit(digest.update, header)])
        held = 0
        while (piece := coming.popleft().result()) is not None:
            coming.append(maker.submit(next, pieces, None))
            file.write(piece)
            hashed.append(hasher.submit(digest.update, piece))
            if len(hashed) > AHEAD:
                hashed.popleft().result()
            held += piece.nbytes
            if held >= HELD_BYTES:
                let_go(file.fileno())
                held = 0
            yield piece.nbytes


def _header(tensors: Sequence[Planned]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for t in tensors:
        end = offset + t.nbytes
        header[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors start at a multiple of 8, as the format asks
    return struct.pack("<Q", len(encoded)) + encoded


def _bytes_of(tensors: Sequence[Planned]) -> Iterator[memoryview]:
    for t in tensors:
        made = 0
        for piece in t.pieces():
            assert piece.dtype == DTYPES[t.dtype], (t.name, piece.dtype)
            data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
            made += data.nbytes
            yield data
        assert made == t.nbytes, (t.name, made, t.nbytes)
