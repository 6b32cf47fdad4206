"""What the tests of bad input share: rows of tables, and broken checkpoints. The fixtures are in conftest."""

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

INDEX = "model.safetensors.index.json"
RANKING = [[6, 5, 4, 3, 2, 1, 0]] * 4
BLOCKS = ("--seq-len", "64", "--blocks", "20")  # for `eval`, likewise
SHORT = ("--max-seq-length", "64", "--num-rows", "4")  # one shape to compile, and a small one

Program = Callable[..., tuple[int, str]]
Refused = Callable[..., str]


def without_told(error: str) -> str:
    """Standard error without the line that commands that run a model say before their first step."""
    return re.sub(
        r"^gptoss-jax: [\d,]+ (rows: |rows are learnt, |questions, of which ).*\n", "", error, flags=re.MULTILINE
    )


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: the bytes of files and links' targets, None for folders."""
    return {
        str(p.relative_to(folder)): str(p.readlink()).encode()
        if p.is_symlink()
        else p.read_bytes()
        if p.is_file()
        else None
        for p in folder.rglob("*")
    }


def table(layers: int = 4, experts: int = 7) -> dict[str, Any]:
    """A saliency table's columns."""
    layer, expert = np.divmod(np.arange(layers * experts), experts)
    numbers = np.linspace(1, 2, layers * experts)
    sums = dict.fromkeys(("gate_sum", "norm_sum", "gate_norm_sum", "gate_norm_sq_sum"), numbers)
    return {"layer": layer, "expert": expert, "count": expert + 1} | sums


def case(name: str, what: Any, *says: str) -> Any:
    """A row of a table: bad input, and what the message about it says."""
    return pytest.param(what, says, id=name)


def dump(file: Path, value: Any) -> Path:
    """Write JSON."""
    file.write_text(json.dumps(value), encoding="utf-8")
    return file


def edit(file: Path, **changes: Any) -> None:
    """Set keys of a JSON object; ... removes one."""
    raw = json.loads(file.read_text(encoding="utf-8")) | changes
    dump(file, {key: value for key, value in raw.items() if value is not ...})


def shard_of(model: Path, name: str) -> Path:
    """The shard that holds a tensor."""
    return model / json.loads((model / INDEX).read_text(encoding="utf-8"))["weight_map"][name]


def read_shard(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and tensors of a shard."""
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_shard(file: Path, header: Any, tensors: bytes) -> None:
    """A shard with any header at all."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + tensors)


def edit_entry(model: Path, name: str, **changes: Any) -> None:
    """Set fields of a tensor's entry in the header of its shard."""
    file = shard_of(model, name)
    header, tensors = read_shard(file)
    header[name] |= changes
    write_shard(file, header, tensors)


def poke(model: Path, name: str, index: tuple[int, ...], value: float) -> None:
    """Set one value (or row of values) of a BF16 tensor in place."""
    file = shard_of(model, name)
    header, tensors = read_shard(file)
    entry = header[name]
    begin, end = entry["data_offsets"]
    array = np.frombuffer(tensors[begin:end], ml_dtypes.bfloat16).reshape(entry["shape"]).copy()
    array[index] = value
    write_shard(file, header, tensors[:begin] + array.tobytes() + tensors[end:])
