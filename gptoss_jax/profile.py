"""The job `profile`: documents through the model, statistics summed, artifacts written. Letters: see `config`."""

import json
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from . import hosts, select
from .batching import Batch, Document
from .eaft import EaftOptions, class_weights, cuts
from .errors import DataError, MeshError, StatisticsError
from .forward import Mapped, Profiled, Step, profile_step, scored_profile_step
from .model import GptOss
from .report.markdown import profile_report, thin_evidence
from .saliency import GATE_BINS, Statistics, means
from .topologies import does_not_fit

INFO = "profile.json"
# Columns of saliency.parquet, in their order; further ones follow the means.
SUMS = ("gate_sum", "norm_sum", "gate_norm_sum")
FURTHER = ("gate_norm_sq_sum", "norm_sq_sum", "norm_max", "activation_max")


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

    @property
    def tokens_per_s(self) -> float:
        """Of all forward passes: with EAFT each token takes two."""
        return self.total_tokens * (1 if self.eaft_gate_norm_sum is None else 2) / self.seconds


class _Timed:
    """A mapped step, compiled once a shape, with the time of compiling kept apart."""

    def __init__(self, mapped: Mapped, model: GptOss):
        self.mapped, self.model = mapped, model
        self.compiled: dict[tuple[int, ...], Any] = {}
        self.seconds = self.compile_seconds = 0.0

    def __call__(self, batch: Batch) -> Profiled:
        start = time.perf_counter()
        placed = jax.tree.map(self.mapped.put, batch)
        shape = batch.token_ids.shape
        if shape not in self.compiled:
            with _room_for(shape):
                self.compiled[shape] = self.mapped.step.lower(self.model, placed).compile()
        ready = time.perf_counter()
        result = jax.block_until_ready(self.compiled[shape](self.model, placed))
        self.compile_seconds += ready - start
        self.seconds += time.perf_counter() - ready
        return hosts.gather(result)


@contextmanager
def _room_for(shape: tuple[int, ...]) -> Iterator[None]:
    """MeshError where the compiler finds that a step does not fit into a device's memory."""
    try:
        yield
    except Exception as error:
        if not (amounts := does_not_fit(error)):
            raise
        needed, available = (amount / (1 << 30) for amount in amounts)
        raise MeshError(
            f"a step of {shape[0]} × {shape[1]} tokens needs {needed:.2f} GiB of {available:.2f} on each device, "
            f"{needed - available:.2f} too much: take a smaller --batch-size, a larger expert in --mesh, or --weights "
            "mxfp4; gptoss-jax plan finds what fits"
        ) from error


def check_kept(batches: Iterable[Batch]) -> None:
    """DataError where no token of any batch counts."""
    if not any(hosts.exchange(sum(int((batch.weights != 0).sum()) for batch in batches))):
        raise DataError(
            "no token is kept: no row holds harmony text by the assistant within the limits; "
            "check --text-column and --skip-first, or use --keep all to count every token"
        )


def run(
    model: GptOss,
    mapping: Callable[[Step], Mapped],
    make_batches: Callable[[], Iterable[Batch]],
    share: hosts.Share,
    progress: Callable[[int], Any],
    eaft: EaftOptions | None = None,
) -> Measured:
    """Sum the statistics of all batches, each step mapped over devices by `mapping`.

    `progress` gets the tokens of each batch. Processes of one run have batches of their own `share` of the
    rows, and all return the same. With `eaft` the batches pass twice: its weights rest on quantiles over all
    tokens. StatisticsError where a statistic is NaN or infinite.
    """
    step = _Timed(mapping(scored_profile_step if eaft else profile_step), model)
    statistics: Statistics | None = None
    scores: list[np.ndarray] = []
    own_tokens = 0
    for batch in make_batches():
        result = step(batch)
        if result.scores is not None:
            kept = batch.weights != 0
            own = [share.own(np.asarray(x), step.mapped.data_size)[kept] for x in result.scores]
            scores.append(np.stack(own, axis=-1))
        own_tokens += batch.num_tokens
        step_statistics = result.statistics.to_host()
        step_statistics.check_finite()
        statistics = step_statistics if statistics is None else statistics.merge(step_statistics)
        progress(batch.num_tokens)
    assert statistics is not None, "check_kept finds that there are batches"
    total_tokens = sum(hosts.exchange(own_tokens if share.leads else 0))
    check_computed(statistics, total_tokens)
    timed, weighted = [step], None
    if eaft:
        timed.append(_Timed(mapping(profile_step), model))
        weights = _class_weights(np.concatenate(scores), eaft, share)
        weighted = _weighted_pass(timed[1], make_batches(), weights, progress)
    return Measured(
        statistics,
        weighted,
        total_tokens,
        seconds=sum(t.seconds for t in timed),
        compile_seconds=sum(t.compile_seconds for t in timed),
    )


def _class_weights(own: np.ndarray, eaft: EaftOptions, share: hosts.Share) -> np.ndarray:
    """The weights of this process' kept tokens, from their scores [n, 2]; the cuts are of all processes'."""
    every = np.concatenate(hosts.gather_rows(own if share.leads else own[:0]))
    if np.isnan(every).any():
        raise StatisticsError("the logits became NaN: check model.norm and lm_head in the checkpoint")
    return class_weights(own[:, 0], own[:, 1], cuts(every[:, 0], every[:, 1], eaft), eaft)


def check_computed(statistics: Statistics, total_tokens: int) -> None:
    """Every expert that a token chose has run, in every layer: no capacity limit, nothing dropped."""
    computed_L = statistics.computed.sum(1)
    expected = total_tokens * statistics.gate_rank_sum.shape[-1]
    assert (computed_L == expected).all(), f"{computed_L.tolist()} pairs were computed, {expected} were chosen"


def _weighted_pass(
    step: _Timed, batches: Iterable[Batch], weights: np.ndarray, progress: Callable[[int], Any]
) -> np.ndarray:
    """Σ w·g·n, float64 [L, G, E], with one weight for each kept token in the order of the batches."""
    total: Any = 0.0
    start = 0
    for batch in batches:
        kept = batch.weights != 0
        stop = start + int(kept.sum())
        weighted = np.array(batch.weights)
        weighted[kept] *= weights[start:stop]
        start = stop
        statistics = step(replace(batch, weights=weighted)).statistics.to_host()
        statistics.check_finite()
        total = total + statistics.gate_norm_sum
        progress(batch.num_tokens)
    return total


def columns(statistics: Statistics, eaft_LE: np.ndarray | None = None) -> select.Columns:
    """The columns of a saliency table beside layer and expert, in order, each [L, E]."""
    sums = {name: getattr(statistics, name) for name in ("count", *SUMS)}
    eaft = {} if eaft_LE is None else {"eaft_gate_norm_sum": eaft_LE}
    return {**sums, **means(statistics), **{name: getattr(statistics, name) for name in FURTHER}, **eaft}


def write(folder: Path, measured: Measured, domains: Sequence[str], info: dict[str, Any]) -> None:
    """Write all artifacts into `folder`. `domains` are the G names; `info`, completed, becomes profile.json."""
    total = measured.statistics.total()
    eaft = measured.eaft_gate_norm_sum
    table = columns(total, None if eaft is None else eaft.sum(1))
    # Rows without domains are of one, whose name is empty and whose statistics are the total.
    by_domain = {name: measured.statistics.domain(g) for g, name in enumerate(domains) if name}
    L, E = total.count.shape
    info = {
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
        "peak_rss_bytes": peak_rss_bytes(),
        "warnings": [
            *info["warnings"],
            *(f"domain {name} has no kept token" for name, s in by_domain.items() if not s.tokens.any()),
            *thin_evidence(table),
        ],
    }
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
    _write_json(folder / select.RANKING, select.rank(table))
    _write_json(folder / INFO, info, indent=2)
    report = profile_report(info, table, total, by_domain)
    # A file's name may hold bytes that are no text.
    (folder / "report.md").write_text(report, encoding="utf-8", errors="backslashreplace")


def peak_rss_bytes() -> int:
    """The most memory that this process has held."""
    status = Path("/proc/self/status")
    if status.exists():
        # ru_maxrss would begin with the peak of the process that started this one.
        return next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if "VmHWM" in line)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def count_rows(documents: Sequence[Document]) -> tuple[int, int]:
    """Rows that were truncated, and rows without a kept token, of all processes."""
    own = [sum(d.truncated for d in documents), sum(not (d.weights > 0).any() for d in documents)]
    truncated, empty = np.sum(hosts.exchange(own), axis=0).tolist()
    return truncated, empty


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
