"""What a profile leaves in its folder: tables, ranking, report, and the sums that others can add to.

Letters: see `config`.
"""

import json
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
import safetensors.numpy

from . import select
from .errors import ProfileError, reason
from .report.markdown import profile_report, thin_evidence
from .saliency import GATE_BINS, INTEGERS, SHAPES, STATISTICS, Statistics, means
from .storage import AnyPath

INFO = "profile.json"
# Columns of saliency.parquet, in their order; further ones follow the means.
SUMS = ("gate_sum", "norm_sum", "gate_norm_sum")
FURTHER = ("gate_norm_sq_sum", "norm_sq_sum", "norm_max", "activation_max")

# Names in statistics.safetensors beside those of `Statistics`.
EAFT = "eaft_gate_norm_sum"
ROW_HASHES = "row_hashes"
DTYPES = {"F64": "<f8", "I64": "<i8", "U64": "<u8"}
# Above these no number of a run lies: usage.parquet has counts in float64, which holds integers to 2**53, and
# sums are of so many steps' at most, each a float32. Below them sums of profiles cannot overflow.
LARGEST_COUNT = 1 << 53
LARGEST_SUM = float(np.finfo(np.float32).max) * LARGEST_COUNT


@dataclass(frozen=True)
class Measured:
    """What a run over all batches gave."""

    statistics: Statistics
    """[L, G, …], on the host."""
    eaft_gate_norm_sum: np.ndarray | None
    """[L, G, E] Σ w_t·g·n with the weights of EAFT, if asked for."""
    total_tokens: int
    seconds: float
    """Of the forward steps alone."""
    compile_seconds: float
    peak_rss_bytes: int
    """The most memory that the process held."""

    @property
    def tokens_per_s(self) -> float:
        """Of all forward passes: with EAFT each token takes two."""
        return self.total_tokens * (1 if self.eaft_gate_norm_sum is None else 2) / self.seconds


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


def columns(statistics: Statistics, eaft_LE: np.ndarray | None = None) -> select.Columns:
    """The columns of a saliency table beside layer and expert, in order, each [L, E]."""
    sums = {name: getattr(statistics, name) for name in ("count", *SUMS)}
    eaft = {} if eaft_LE is None else {EAFT: eaft_LE}
    return {**sums, **means(statistics), **{name: getattr(statistics, name) for name in FURTHER}, **eaft}


def write(
    folder: Path, measured: Measured, domains: Sequence[str], row_hashes: np.ndarray, info: dict[str, Any]
) -> None:
    """Write all artifacts into `folder`. `domains` are the G names; `info`, completed, becomes profile.json."""
    total = measured.statistics.total()
    eaft = measured.eaft_gate_norm_sum
    table = columns(total, None if eaft is None else eaft.sum(1))
    # Rows without a domain count in the total alone.
    by_domain = {name: measured.statistics.domain(g) for g, name in enumerate(domains) if name}
    info = _completed(info, measured, total, by_domain, thin_evidence(table))
    pq.write_table(_saliency_table(table), folder / select.SALIENCY, compression="zstd")
    pq.write_table(_usage_table(total), folder / select.USAGE, compression="zstd")
    if by_domain:
        saliency = {
            name: _saliency_table(columns(s, None if eaft is None else eaft[:, domains.index(name)]))
            for name, s in by_domain.items()
        }
        usage = {name: _usage_table(s) for name, s in by_domain.items()}
        pq.write_table(_with_domain(saliency), folder / select.SALIENCY_BY_DOMAIN, compression="zstd")
        pq.write_table(_with_domain(usage), folder / select.USAGE_BY_DOMAIN, compression="zstd")
    write_sums(folder / STATISTICS, Sums(measured.statistics, eaft, domains, row_hashes))
    _write_json(folder / select.RANKING, select.rank(table))
    _write_json(folder / INFO, info, indent=2)
    report = profile_report(info, table, total, by_domain)
    # A file's name may hold bytes that are no text.
    (folder / "report.md").write_text(report, encoding="utf-8", errors="backslashreplace")


def _completed(
    info: dict[str, Any], measured: Measured, total: Statistics, by_domain: dict[str, Statistics], thin: list[str]
) -> dict[str, Any]:
    """profile.json: what was asked, and what was measured."""
    L, E = total.count.shape
    return {
        **info,
        "num_layers": L,
        "num_experts": E,
        "top_k": total.gate_rank_sum.shape[-1],
        "total_tokens": measured.total_tokens,
        "kept_tokens": int(total.tokens[0]),
        "kept_tokens_by_domain": {name: int(s.tokens[0]) for name, s in by_domain.items()},
        "router_entropy_sum": total.router_entropy_sum.tolist(),
        "gate_rank_sum": total.gate_rank_sum.tolist(),
        "seconds": measured.seconds,
        "compile_seconds": measured.compile_seconds,
        "tokens_per_s": measured.tokens_per_s,
        "peak_rss_bytes": measured.peak_rss_bytes,
        "warnings": [
            *info["warnings"],
            *(f"domain {name} has no kept token" for name, s in by_domain.items() if not s.tokens.any()),
            *thin,
        ],
    }


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


def peak_rss_bytes() -> int:
    """The most memory that this process has held."""
    status = Path("/proc/self/status")
    if status.exists():
        # ru_maxrss would begin with the peak of the process that started this one.
        return next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if "VmHWM" in line)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def data_warnings(num_rows: int, truncated: int, empty: int) -> list[str]:
    """What a reader of the statistics should know of the rows."""
    warnings = []
    if truncated:
        warnings.append(f"{truncated:,} of {num_rows:,} rows are longer than the limit and were truncated")
    if empty:
        warnings.append(f"{empty:,} of {num_rows:,} rows have no kept token")
    return warnings


def _saliency_table(table: select.Columns) -> pa.Table:
    L, E = table["count"].shape
    layers, experts = np.divmod(np.arange(L * E), E)
    return pa.table({"layer": layers, "expert": experts} | {name: c.reshape(-1) for name, c in table.items()})


def _with_domain(tables: dict[str, pa.Table]) -> pa.Table:
    """The tables of all domains as one, the domain in the first column."""
    return pa.concat_tables(
        table.add_column(0, "domain", pa.array([name] * len(table), pa.string())) for name, table in tables.items()
    )


def _usage_table(total: Statistics) -> pa.Table:
    """Long form, the schema of the published usage profiles; pairs i < j, and zeros left out of both
    co-activation and histogram, whose bin stands in expert_i."""
    rows: list[tuple[str, int, int | None, int | None, float]] = []
    for layer, count_E in enumerate(total.count):
        tokens = max(1, int(total.tokens[layer]))
        ranks = total.gate_rank_sum[layer] / tokens
        rows += [("usage_count", layer, e, None, float(n)) for e, n in enumerate(count_E)]
        pairs = np.argwhere(np.triu(total.coactivation[layer], 1))
        rows += [("coact_count", layer, i, j, float(total.coactivation[layer, i, j])) for i, j in pairs.tolist()]
        rows.append(("selected_prob_mean", layer, None, None, float(ranks.mean())))
        rows += [(f"selected_prob_top{r}_mean", layer, None, None, float(gate)) for r, gate in enumerate(ranks[:2], 1)]
        histogram = total.gate_histogram[layer]
        rows += [("selected_prob_hist", layer, b, None, float(histogram[b])) for b in range(GATE_BINS) if histogram[b]]
    kinds, layers, first, second, values = zip(*rows, strict=True)
    return pa.table(
        {
            "kind": pa.array(kinds, pa.string()),
            "layer": pa.array(layers, pa.int64()),
            "expert_i": pa.array(first, pa.int64()),
            "expert_j": pa.array(second, pa.int64()),
            "value": pa.array(values, pa.float64()),
        }
    )


def _write_json(path: Path, value: Any, indent: int | None = None) -> None:
    path.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8")
