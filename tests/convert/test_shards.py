"""Shards as this program writes and reads them, against the safetensors library."""

import hashlib
import json
import os
import struct
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert import shards
from convert.shards import DTYPES, INDEX, SINGLE, Planned, find_tensors, write_shards
from gptoss_jax.errors import CheckpointError
from gptoss_jax.files.atomic import let_go
from tests.oracle import needs_torch

SHAPES = {
    "a": ("BF16", (6, 4)),
    "b": ("F32", (3,)),
    "c_blocks": ("U8", (5, 2, 3, 16)),
    "c_scales": ("U8", (5, 2, 3)),
    "d": ("F16", (2, 2)),
    "e": ("BF16", (31, 7)),
    "f": ("U8", (1,)),
}
GROUPS = [["a"], ["b"], ["c_blocks", "c_scales"], ["d"], ["e"], ["f"]]


def values(name: str) -> np.ndarray:
    dtype, shape = SHAPES[name]
    rng = np.random.default_rng(ord(name[0]))
    return rng.integers(0, 100, shape).astype(DTYPES[dtype])


def planned(name: str) -> Planned:
    """A tensor in uneven pieces: its first row, then the rest."""
    array = values(name)

    def pieces() -> Iterator[np.ndarray]:
        yield array[:1]
        yield array[1:]

    return Planned(name, *SHAPES[name], pieces)


def write(folder: Path, max_shard_bytes: int = 10**9) -> Path:
    folder.mkdir(exist_ok=True)
    write_shards(folder, [[planned(name) for name in group] for group in GROUPS], max_shard_bytes)
    return folder


def header(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


def read_by_library(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """dtype, shape and bytes of every tensor, as the safetensors library gives them."""
    torch = needs_torch()
    from safetensors import safe_open

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (no mapping)
                tensor, dtype = shard.get_tensor(name), shard.get_slice(name).get_dtype()
                assert name not in found
                found[name] = (dtype, tuple(tensor.shape), tensor.view(torch.uint8).numpy().tobytes())
    return found


def read_by_us(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (t.dtype, t.shape, t.read().tobytes()) for name, t in find_tensors(folder).items()}


@pytest.mark.parametrize("max_shard_bytes", [1, 100, 10**9])
def test_the_library_reads_what_was_written(tmp_path: Path, max_shard_bytes: int) -> None:
    found = read_by_library(write(tmp_path / "out", max_shard_bytes))
    assert found == {name: (*SHAPES[name], values(name).tobytes()) for name in SHAPES}


@pytest.mark.parametrize("max_shard_bytes", [1, 100, 10**9])
def test_we_read_what_was_written(tmp_path: Path, max_shard_bytes: int) -> None:
    found = read_by_us(write(tmp_path / "out", max_shard_bytes))
    assert found == {name: (*SHAPES[name], values(name).tobytes()) for name in SHAPES}


def test_part_of_a_matrix_reads_as_a_slice_of_it(tmp_path: Path) -> None:
    stored = find_tensors(write(tmp_path / "out"))["e"]
    np.testing.assert_array_equal(stored.read(3, 5, (2, 6)), values("e")[3:8, 2:6])


def test_a_checkpoint_reads_as_the_library_reads_it(tiny_mxfp4: Path) -> None:
    assert read_by_us(tiny_mxfp4) == read_by_library(tiny_mxfp4)


def test_one_file_without_index_reads(tmp_path: Path) -> None:
    torch = needs_torch()
    from safetensors.torch import save_file

    tensors = {"x": torch.arange(12, dtype=torch.bfloat16).reshape(4, 3), "y": torch.arange(5, dtype=torch.uint8)}
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    assert read_by_us(tmp_path) == read_by_library(tmp_path)
    assert set(find_tensors(tmp_path)) == {"x", "y"}


def test_the_index_names_each_tensor_once_in_its_shard(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", max_shard_bytes=100)
    twice: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice.extend(name for name in names if names.count(name) > 1)
        return dict(pairs)

    index = json.loads((folder / INDEX).read_text(), object_pairs_hook=unique)
    assert not twice
    held = {name: file.name for file in folder.glob("*.safetensors") for name in header(file) if name[0] != "_"}
    assert index["weight_map"] == held
    assert set(held) == set(SHAPES)


def test_total_size_counts_the_bytes_of_tensors(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", max_shard_bytes=100)
    index = json.loads((folder / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in read_by_library(folder).values())


def test_shards_are_named_by_number_and_total(tmp_path: Path) -> None:
    names = sorted(p.name for p in write(tmp_path / "out", max_shard_bytes=1).glob("*.safetensors"))
    assert names == [f"model-{i:05d}-of-00006.safetensors" for i in range(1, 7)]


def test_blocks_stand_directly_before_their_scales(tmp_path: Path, tiny_mxfp4: Path) -> None:
    for folder in (write(tmp_path / "out", max_shard_bytes=1), tiny_mxfp4):
        num_blocks = 0
        for file in folder.glob("*.safetensors"):
            entries = header(file)
            entries.pop("__metadata__")
            names = sorted(entries, key=lambda name: entries[name]["data_offsets"][0])
            assert names == list(entries)  # the order of the header is the order of the bytes
            followers = dict(pairwise(names))
            blocks = [name for name in names if name.endswith("_blocks")]
            assert all(followers[name] == name.replace("_blocks", "_scales") for name in blocks)
            num_blocks += len(blocks)
        assert num_blocks


def test_metadata_says_pt(tmp_path: Path) -> None:
    for file in write(tmp_path / "out", max_shard_bytes=100).glob("*.safetensors"):
        assert header(file)["__metadata__"] == {"format": "pt"}


@pytest.mark.parametrize("max_shard_bytes", [434, 600, 1000])
def test_shards_respect_their_limit(tmp_path: Path, max_shard_bytes: int) -> None:
    """434 bytes are the largest tensor; a group of blocks and scales larger than the limit stands alone."""
    sizes = []
    for file in write(tmp_path / "out", max_shard_bytes).glob("*.safetensors"):
        entries = header(file)
        entries.pop("__metadata__")
        size = max(entry["data_offsets"][1] for entry in entries.values())
        assert size <= max_shard_bytes or list(entries) == ["c_blocks", "c_scales"]
        sizes.append(size)
    assert len(sizes) > 1


def test_tensors_start_at_a_multiple_of_8(tmp_path: Path, tiny_bf16: Path) -> None:
    for folder in (write(tmp_path / "out", max_shard_bytes=100), tiny_bf16):
        for file in folder.glob("*.safetensors"):
            assert struct.unpack("<Q", file.read_bytes()[:8])[0] % 8 == 0


@pytest.mark.parametrize("name", SHAPES)
def test_row_ranges_are_slices(tmp_path: Path, name: str) -> None:
    stored = find_tensors(write(tmp_path / "out", max_shard_bytes=100))[name]
    rows, whole = stored.shape[0], values(name)
    for first in range(rows):
        assert np.array_equal(stored.read(first), whole[first:])
        for count in range(rows - first + 1):
            part = stored.read(first, count)
            assert part.shape == (count, *stored.shape[1:])
            assert np.array_equal(part, whole[first : first + count])


def test_digests_are_those_of_the_files(tmp_path: Path) -> None:
    digests = write_shards(tmp_path, [[planned(name) for name in group] for group in GROUPS], 100)
    files = tmp_path.glob("*.safetensors")
    assert digests == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    assert len(digests) > 1


def long(pieces: Callable[[], Iterator[np.ndarray]], rows: int) -> list[list[Planned]]:
    return [[Planned("long", "U8", (rows, 3), pieces)]]


def test_letting_go_on_the_way_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = 0

    def counted(descriptor: int) -> None:
        nonlocal times
        times += 1
        let_go(descriptor)

    monkeypatch.setattr(shards, "let_go", counted)
    monkeypatch.setattr(shards, "HELD_BYTES", 30)
    rows = np.random.default_rng(0).integers(0, 256, (100, 3), np.uint8)
    write_shards(tmp_path, long(lambda: (rows[i : i + 1] for i in range(100)), 100), 10**9)
    assert find_tensors(tmp_path)["long"].read().tobytes() == rows.tobytes()
    assert times == 300 // 30


def test_few_pieces_are_in_memory_at_a_time(tmp_path: Path) -> None:
    made, written, most = 0, 0, 0

    def pieces() -> Iterator[np.ndarray]:
        nonlocal made, most
        for _ in range(100):
            made += 1
            most = max(most, made - written)
            yield np.zeros((1, 3), np.uint8)

    def progress(nbytes: int) -> None:
        nonlocal written
        written += nbytes // 3

    write_shards(tmp_path, long(pieces, 100), 10**9, progress)
    assert (made, written) == (100, 100)
    assert most <= shards.AHEAD + 1  # and the one that is written


def test_an_error_in_a_piece_is_what_is_raised(tmp_path: Path) -> None:
    def pieces() -> Iterator[np.ndarray]:
        yield np.zeros((1, 3), np.uint8)
        raise CheckpointError("the second")

    with pytest.raises(CheckpointError, match="the second"):
        write_shards(tmp_path, long(pieces, 9), 10**9)


@pytest.mark.parametrize("at_once", [1, 2, 4])
@pytest.mark.parametrize("max_shard_bytes", [1, 100, 10**9])
def test_shards_do_not_depend_on_how_many_are_written_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int, max_shard_bytes: int
) -> None:
    monkeypatch.setattr(shards, "AT_ONCE", 3)
    expected = {file.name: file.read_bytes() for file in write(tmp_path / "three", max_shard_bytes).iterdir()}
    monkeypatch.setattr(shards, "AT_ONCE", at_once)
    assert {file.name: file.read_bytes() for file in write(tmp_path / "out", max_shard_bytes).iterdir()} == expected


def test_an_error_in_one_shard_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread makes further pieces, and no file is open."""
    made = 0

    def endless() -> Iterator[np.ndarray]:
        nonlocal made
        while True:
            made += 1
            yield np.zeros((1, 3), np.uint8)

    def failing() -> Iterator[np.ndarray]:
        for _ in range(10):
            yield np.zeros((1, 3), np.uint8)
        raise CheckpointError("the eleventh")

    monkeypatch.setattr(shards, "AT_ONCE", 2)
    groups = [[Planned(name, "U8", (10**6, 3), p)] for name, p in (("a", endless), ("b", failing))]
    with pytest.raises(CheckpointError, match="the eleventh"):
        write_shards(tmp_path, groups, 1)
    assert made <= 11 + shards.AHEAD
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]


def touched(file: Path) -> None:
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))


def grown(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b"x")


def shrunk(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


@pytest.mark.parametrize("change", [touched, grown, shrunk, Path.unlink])
def test_a_file_that_changes_after_its_header_was_read(tmp_path: Path, change: Callable[[Path], None]) -> None:
    stored = find_tensors(write(tmp_path / "out"))["a"]
    stored.read()
    change(stored.file)
    with pytest.raises(CheckpointError, match=rf"{stored.file.name}: (changed while|cannot be read)"):
        stored.read()


def test_a_file_that_ends_early(tmp_path: Path) -> None:
    stored = find_tensors(write(tmp_path / "out"))["f"]
    os.truncate(stored.file, stored.offset)
    with pytest.raises(CheckpointError, match="ended inside f"):
        stored.read()


def test_a_remote_file_that_changes_its_size(tmp_path: Path) -> None:
    from upath import UPath

    (file,) = write(tmp_path / "out").glob("*.safetensors")
    remote = UPath("memory://changing/model.safetensors")
    remote.parent.mkdir(parents=True)
    remote.write_bytes(file.read_bytes())
    try:
        stored = find_tensors(remote.parent)["a"]
        assert np.array_equal(stored.read(), values("a"))
        remote.write_bytes(file.read_bytes() + b"x")
        with pytest.raises(CheckpointError, match="changed while it was read"):
            stored.read()
    finally:
        remote.fs.rm("/changing", recursive=True)


def test_progress_sums_to_the_bytes_written(tmp_path: Path) -> None:
    written: list[int] = []
    write_shards(tmp_path, [[planned(name) for name in group] for group in GROUPS], 100, written.append)
    assert sum(written) == sum(planned(name).nbytes for name in SHAPES)
