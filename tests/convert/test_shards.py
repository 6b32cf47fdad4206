"""Shards as this program writes and reads them, against the safetensors library."""

import json
import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.shards import DTYPES, INDEX, SINGLE, Planned, find_tensors, write_shards

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
    import torch
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


def test_a_checkpoint_reads_as_the_library_reads_it(tiny_mxfp4: Path) -> None:
    assert read_by_us(tiny_mxfp4) == read_by_library(tiny_mxfp4)


def test_one_file_without_index_reads(tmp_path: Path) -> None:
    import torch
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


def test_progress_sums_to_the_bytes_written(tmp_path: Path) -> None:
    written: list[int] = []
    write_shards(tmp_path, [[planned(name) for name in group] for group in GROUPS], 100, written.append)
    assert sum(written) == sum(planned(name).nbytes for name in SHAPES)
