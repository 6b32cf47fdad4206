"""statistics.safetensors: all sums of a profile, to which others can be added. Letters: see `config`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from ..errors import ProfileError, reason
from ..files.paths import AnyPath
from ..statistics.sums import GATE_BINS, INTEGERS, SHAPES, Statistics

# Names in statistics.safetensors beside those of `Statistics`.
EAFT = "eaft_gate_norm_sum"
ROW_HASHES = "row_hashes"
DTYPES = {"F64": "<f8", "I64": "<i8", "U64": "<u8"}
# Above these no number of a run lies: usage.parquet has counts in float64, which holds integers to 2**53, and
# sums are of so many steps' at most, each a float32. Below them sums of profiles cannot overflow.
LARGEST_COUNT = 1 << 53
LARGEST_SUM = float(np.finfo(np.float32).max) * LARGEST_COUNT


@dataclass(frozen=True)
class Sums:
    """What statistics.safetensors holds: all that is needed to add other rows, or to see that some are the same."""

    statistics: Statistics
    """[L, G, …], on the host."""
    eaft_gate_norm_sum: np.ndarray | None
    """[L, G, E], as in `Measured`."""
    domains: Sequence[str]
    """The G names; rows without a domain are of one whose name is empty."""
    row_hashes: np.ndarray
    """uint64 [rows], as `rows.row_hashes` gives them."""


def write_sums(file: Path, sums: Sums) -> None:
    """Write statistics.safetensors; equal sums give equal bytes."""
    tensors = {**vars(sums.statistics), ROW_HASHES: sums.row_hashes}
    if sums.eaft_gate_norm_sum is not None:
        tensors[EAFT] = sums.eaft_gate_norm_sum
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    # One key alone: several would come in any order.
    safetensors.numpy.save_file(contiguous, file, {"domains": json.dumps(list(sums.domains))})


def read_sums(file: AnyPath) -> Sums:
    """Read statistics.safetensors; ProfileError where it is not as `write_sums` leaves it."""
    try:
        data = file.read_bytes()
        tensors = {name: _array(**tensor) for name, tensor in safetensors.deserialize(data)}
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        domains = json.loads((header.get("__metadata__") or {}).get("domains", "null"))
        _check_sums(tensors, domains)
    except (safetensors.SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ProfileError(f"{file}: not the sums of a profile ({reason(error)}): profile its rows again") from None
    statistics = Statistics(**{name: tensors[name] for name in SHAPES})
    return Sums(statistics, tensors.get(EAFT), domains, tensors[ROW_HASHES])


def _array(data: Any, dtype: str, shape: list[int]) -> np.ndarray:
    if dtype not in DTYPES:
        raise ValueError(f"a tensor is {dtype}, all are of {', '.join(DTYPES)}")
    return np.frombuffer(data, DTYPES[dtype]).reshape(shape)


def _check_sums(tensors: dict[str, np.ndarray], domains: Any) -> None:
    """ValueError where a tensor is missing or unknown, of wrong dtype or shape, or holds an impossible number."""
    if unlike := ({*tensors} ^ {*SHAPES, ROW_HASHES}) - {EAFT}:
        raise ValueError(f"the tensor {min(unlike)!r} is missing or unknown")
    if not isinstance(domains, list) or not all(isinstance(name, str) for name in domains):
        raise ValueError("its metadata lists no domains")
    if len(set(domains)) < len(domains):
        raise ValueError("it names a domain twice")
    "".join(domains).encode()  # half of a surrogate pair is no text, and a ValueError
    sizes = {"G": len(domains), "b": GATE_BINS}
    for name, letters in {**SHAPES, ROW_HASHES: "r", **({EAFT: "LGE"} if EAFT in tensors else {})}.items():
        tensor = tensors[name]
        expected = np.uint64 if name == ROW_HASHES else np.int64 if name in INTEGERS else np.float64
        like = len(letters) == tensor.ndim and tensor.dtype == expected and tensor.size
        if not like or any(sizes.setdefault(x, n) != n for x, n in zip(letters, tensor.shape, strict=True)):
            raise ValueError(f"{name!r} is {tensor.dtype} {list(tensor.shape)}, which does not fit the others")
        if name == ROW_HASHES:
            continue  # any 64 bits are a hash
        largest = LARGEST_COUNT if name in INTEGERS else LARGEST_SUM
        # Classes of EAFT may have negative weights. A NaN is neither above nor below.
        if not ((tensor >= (-largest if name == EAFT else 0)) & (tensor <= largest)).all():
            raise ValueError(f"{name!r} holds a number that no run gives")
