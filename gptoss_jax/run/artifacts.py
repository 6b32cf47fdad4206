"""What a profile leaves in its folder: tables, ranking, report, and the sums that others can add to.

Letters: see `config`.
"""

import json
import resource
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import __version__
from ..data.groups import FOLDS, MAX_GROUPS, MAX_JOINT, folds_of
from ..files.parquet import write_parquet
from ..reports.markdown import profile_report, thin_evidence
from ..reports.pictures import pictures
from ..selection import ranking as select
from ..selection.origin import INFO
from ..statistics.counted import STORE
from ..statistics.store import Sums, write_sums
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


@dataclass(frozen=True)
class Measured:
    """What a run over all batches took."""

    total_tokens: int
    passes: int
    """Through the model: with EAFT each token takes two."""
    seconds: float
    """The time of the forward steps alone."""
    compile_seconds: float
    peak_rss_bytes: int
    """The most memory that the process held."""

    @property
    def tokens_per_s(self) -> float:
        """The rate over all passes."""
        return self.total_tokens * self.passes / self.seconds


def write(folder: Path, info: dict[str, Any], sums: Sums) -> None:
    """Write all artifacts of a profile into `folder`; `info` becomes profile.json."""
    total, weighted = sums.total()
    table, by_domain = columns(total, weighted), sums.by_domain()
    write_parquet(folder / SALIENCY, saliency_table(table))
    write_parquet(folder / USAGE, usage_table(total))
    if by_domain:
        saliency = {name: saliency_table(columns(*of)) for name, of in by_domain.items()}
        usage = {name: usage_table(statistics) for name, (statistics, _) in by_domain.items()}
        write_parquet(folder / SALIENCY_BY_DOMAIN, with_domain(saliency))
        write_parquet(folder / USAGE_BY_DOMAIN, with_domain(usage))
    write_sums(folder / STORE, sums)
    _write_json(folder / select.RANKING, select.rank(table).layers)
    _write_json(folder / INFO, info, indent=2)
    for name, picture in pictures(table).items():
        (folder / name).write_text(picture, encoding="utf-8")
    of_domains = {name: statistics for name, (statistics, _) in by_domain.items()}
    report = profile_report(info, table, total, of_domains, sums.by_fold())
    # A file's name may hold bytes that are no text.
    (folder / "report.md").write_text(report, encoding="utf-8", errors="backslashreplace")


def completed(info: dict[str, Any], sums: Sums, measured: Measured) -> dict[str, Any]:
    """profile.json: what was asked, and what was measured. Rows without a domain count in the total alone."""
    total, weighted = sums.total()
    by_domain = {name: statistics for name, (statistics, _) in sums.by_domain().items()}
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
            *_joint(sums),
            *_fewer_folds(sums),
            *thin_evidence(columns(total, weighted)),
        ],
    }


def _joint(sums: Sums) -> list[str]:
    """What a reader should know where co-activations are not kept by domain."""
    if sums.statistics.coactivation.shape[1] == len(sums.domains):
        return []
    return [f"co-activations are kept for all {len(sums.domains):,} domains together: more than {MAX_JOINT} domains"]


def _fewer_folds(sums: Sums) -> list[str]:
    """What a reader should know where many domains leave room for fewer folds."""
    domains = len(sums.domains)
    if not sums.folds == folds_of(domains) < FOLDS:
        return []
    instead = f"in {sums.folds} folds" if sums.folds > 1 else "in no folds, so that scores have no intervals"
    return [f"the rows of each of the {domains:,} domains are {instead}: {FOLDS} of each would be over {MAX_GROUPS}"]


def versions() -> dict[str, str]:
    """The versions of the packages that decide what a run computes."""
    packages = ("jax", "flax", "transformers", "tokenizers", "datasets", "numpy")
    return {"gptoss-jax": __version__, **{name: version(name) for name in packages}}


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
