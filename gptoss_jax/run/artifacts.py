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
import pyarrow.parquet as pq

from ..report.markdown import profile_report, thin_evidence
from ..select import ranking as select
from ..statistics.store import Sums, write_sums
from ..statistics.sums import STATISTICS, Statistics
from ..statistics.tables import (
    SALIENCY,
    SALIENCY_BY_DOMAIN,
    USAGE,
    USAGE_BY_DOMAIN,
    columns,
    saliency_table,
    usage_table,
    with_domain,
)

INFO = "profile.json"


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
    pq.write_table(saliency_table(table), folder / SALIENCY, compression="zstd")
    pq.write_table(usage_table(total), folder / USAGE, compression="zstd")
    if by_domain:
        saliency = {
            name: saliency_table(columns(s, None if eaft is None else eaft[:, domains.index(name)]))
            for name, s in by_domain.items()
        }
        usage = {name: usage_table(s) for name, s in by_domain.items()}
        pq.write_table(with_domain(saliency), folder / SALIENCY_BY_DOMAIN, compression="zstd")
        pq.write_table(with_domain(usage), folder / USAGE_BY_DOMAIN, compression="zstd")
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


def _write_json(path: Path, value: Any, indent: int | None = None) -> None:
    path.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8")
