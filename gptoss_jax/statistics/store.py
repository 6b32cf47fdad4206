"""The store of a profile, statistics.safetensors: all sums, to which others can be added. Letters: see `config`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from ..errors import ProfileError, reason
from ..files.paths import AnyPath, storage_errors
from .counted import ROW_HASHES
from .sums import DECLARED, GATE_BINS, Statistic, Statistics
from .weightings import WEIGHTINGS, column

# The first one has no number, and its domains as a text of metadata. A new statistic makes the next version.
FOLDS_SINCE = 3  # in older ones each domain is one group
VERSION = max(FOLDS_SINCE, *(statistic.since for statistic in DECLARED.values()))
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
    weighted: Mapping[str, np.ndarray]
    """[L, G, E] Σ w_t·g·n by the name of the weighting that gives w_t."""
    domains: Sequence[str]
    """Their names; rows without a domain are of one whose name is empty."""
    row_hashes: np.ndarray
    """uint64 [rows], as `rows.row_hashes` gives them."""
    folds: int = 1
    """In how many folds the rows of each domain are: the G groups are the folds of the first domain, then those of the
    second, … 1 in a profile of a version that kept none."""

    def by_domain(self) -> dict[str, tuple[Statistics, dict[str, np.ndarray]]]:
        """The statistics [L, …] and the weighted sums [L, E] of each domain that has a name."""
        statistics = self.statistics.joined(self.folds)
        weighted = {weighting: self._apart(sums).sum(2) for weighting, sums in self.weighted.items()}
        return {
            name: (statistics.group(d), {weighting: sums[:, d] for weighting, sums in weighted.items()})
            for d, name in enumerate(self.domains)
            if name
        }

    def by_fold(self, domain: str | None = None) -> dict[str, np.ndarray]:
        """The columns that add, [L, folds, E], of all rows or of one domain: counts, sums and weighted sums, by the
        names that they have in the saliency table."""
        found = {name: getattr(self.statistics, name) for name, s in DECLARED.items() if s.by_expert and not s.largest}
        found |= {column(weighting): sums for weighting, sums in self.weighted.items()}
        apart = {name: self._apart(sums) for name, sums in found.items() if sums is not None}
        if domain is None:
            return {name: sums.sum(1) for name, sums in apart.items()}
        return {name: sums[:, self.domains.index(domain)] for name, sums in apart.items()}

    def _apart(self, sums: np.ndarray) -> np.ndarray:
        """[L, G, …] → [L, domains, folds, …]."""
        return sums.reshape(len(sums), len(self.domains), self.folds, *sums.shape[2:])

    def total(self) -> tuple[Statistics, dict[str, np.ndarray]]:
        """The statistics [L, …] and the weighted sums [L, E] of all rows."""
        return self.statistics.total(), {weighting: sums.sum(1) for weighting, sums in self.weighted.items()}


def write_sums(file: Path, sums: Sums) -> None:
    """Write statistics.safetensors; equal sums give equal bytes."""
    tensors = sums.statistics.arrays()
    tensors |= {column(weighting): x for weighting, x in sums.weighted.items()} | {ROW_HASHES: sums.row_hashes}
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    # One key alone: several would come in any order.
    about = {"version": VERSION, "domains": list(sums.domains), "folds": sums.folds}
    # The library's own files are for their owner alone to read, whatever the umask is.
    file.write_bytes(safetensors.numpy.save(contiguous, {"store": json.dumps(about)}))


def read_sums(file: AnyPath) -> Sums:
    """Read statistics.safetensors of this or an older version; ProfileError where it is not as `write_sums` leaves it.

    Statistics that a store of an older version does not have yet are None, as those that its run was not asked for.
    """
    try:
        with storage_errors(file):
            data = file.read_bytes()
        return parse_sums(data)
    except (safetensors.SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ProfileError(f"{file}: not the sums of a profile ({reason(error)}): profile its rows again") from None


def parse_sums(data: bytes) -> Sums:
    """The content of statistics.safetensors; ValueError or SafetensorError where it is none."""
    tensors = {name: _array(**tensor) for name, tensor in safetensors.deserialize(data)}
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    version, domains, folds = _about(header.get("__metadata__") or {})
    _check_sums(tensors, domains, folds, version)
    statistics = Statistics(**{name: tensors.get(name) for name in DECLARED})
    weighted = {name: tensors[column(name)] for name in WEIGHTINGS if column(name) in tensors}
    return Sums(statistics, weighted, domains, tensors[ROW_HASHES], folds)


def _about(metadata: dict[str, str]) -> tuple[int, Any, Any]:
    """The store's version, and what it says of domains and folds."""
    about = json.loads(metadata.get("store", "{}"))
    if not isinstance(about, dict):
        raise ValueError("its metadata is no object")
    if not about:
        return 1, json.loads(metadata.get("domains", "null")), 1
    version = about.get("version")
    if not isinstance(version, int) or not 1 < version <= VERSION:
        raise ValueError(f"its version is {version!r}, this program reads versions up to {VERSION}")
    return version, about.get("domains"), about.get("folds") if version >= FOLDS_SINCE else 1


def _array(data: Any, dtype: str, shape: list[int]) -> np.ndarray:
    if dtype not in DTYPES:
        raise ValueError(f"a tensor is {dtype}, all are of {', '.join(DTYPES)}")
    return np.frombuffer(data, DTYPES[dtype]).reshape(shape)


def _check_sums(tensors: dict[str, np.ndarray], domains: Any, folds: Any, version: int) -> None:
    """ValueError where a tensor is missing or unknown, of wrong dtype or shape, or holds an impossible number."""
    weighted = {column(name): Statistic("G E") for name in WEIGHTINGS if column(name) in tensors}
    known = {name: statistic for name, statistic in DECLARED.items() if statistic.since <= version}
    needed = {name for name, statistic in known.items() if not statistic.asked or name in tensors}
    if unlike := ({*tensors} ^ {*needed, ROW_HASHES}) - {*weighted}:
        raise ValueError(f"the tensor {min(unlike)!r} is missing or unknown")
    if not isinstance(domains, list) or not all(isinstance(name, str) for name in domains):
        raise ValueError("its metadata lists no domains")
    if len(set(domains)) < len(domains):
        raise ValueError("it names a domain twice")
    "".join(domains).encode()  # half of a surrogate pair is no text, and a ValueError
    if not isinstance(folds, int) or isinstance(folds, bool) or folds < 1:
        raise ValueError(f"its metadata has {folds!r} in the place of a number of folds")
    sizes = {"G": len(domains) * folds, "b": GATE_BINS}
    for name, statistic in {**{name: DECLARED[name] for name in DECLARED if name in needed}, **weighted}.items():
        tensor, largest = tensors[name], LARGEST_COUNT if statistic.integer else LARGEST_SUM
        _check_like(name, tensor, f"L {statistic.axes}", np.int64 if statistic.integer else np.float64, sizes)
        # Weightings may be negative. A NaN is neither above nor below.
        if not ((tensor >= (-largest if name in weighted else 0)) & (tensor <= largest)).all():
            raise ValueError(f"{name!r} holds a number that no run gives")
    _check_like(ROW_HASHES, tensors[ROW_HASHES], "r", np.uint64, sizes)  # any 64 bits are a hash
    if sizes["J"] not in (1, len(domains)):
        raise ValueError("'coactivation' is neither of each domain nor of all together")


def _check_like(name: str, tensor: np.ndarray, axes: str, dtype: Any, sizes: dict[str, int]) -> None:
    """ValueError where a tensor has not the dtype, or not the sizes that others gave to its letters."""
    letters = axes.split()
    like = len(letters) == tensor.ndim and tensor.dtype == dtype and tensor.size
    if not like or any(sizes.setdefault(x, n) != n for x, n in zip(letters, tensor.shape, strict=True)):
        raise ValueError(f"{name!r} is {tensor.dtype} {list(tensor.shape)}, which does not fit the others")
