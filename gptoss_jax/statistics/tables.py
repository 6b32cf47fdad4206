"""The tables of a profile: saliency by expert, and usage. Letters: see `config`."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from ..errors import ProfileError, reason
from ..files.parquet import read_parquet
from ..files.paths import AnyPath, storage_errors
from .weightings import column

if TYPE_CHECKING:  # with the sums comes JAX, without which a table is read
    from .sums import Statistics

Columns = dict[str, np.ndarray]
"""The columns of a saliency table, each [L, E]."""


SALIENCY = "saliency.parquet"
SALIENCY_BY_DOMAIN = "saliency_by_domain.parquet"
USAGE = "usage.parquet"
USAGE_BY_DOMAIN = "usage_by_domain.parquet"


def columns(statistics: "Statistics", weighted: Mapping[str, np.ndarray]) -> Columns:
    """The columns of a saliency table beside layer and expert, in order, from statistics and weighted sums [L, …].

    First the count and what has a mean, then the means, then the rest; without those that an older store lacks.
    """
    from .sums import DECLARED

    by_expert = {name: s for name, s in DECLARED.items() if s.by_expert and getattr(statistics, name) is not None}
    first = [name for name, s in by_expert.items() if s.mean or name == "count"]
    further = [name for name in by_expert if name not in first]
    sums, more = ({name: getattr(statistics, name) for name in names} for names in (first, further))
    return {**sums, **statistics.means(), **more, **{column(name): sums for name, sums in weighted.items()}}


def saliency_table(table: Columns) -> pa.Table:
    """saliency.parquet: a row for each expert of each layer."""
    L, E = table["count"].shape
    layers, experts = np.divmod(np.arange(L * E), E)
    return pa.table({"layer": layers, "expert": experts} | {name: c.reshape(-1) for name, c in table.items()})


def with_domain(tables: dict[str, pa.Table]) -> pa.Table:
    """The tables of all domains as one, the domain in the first column."""
    return pa.concat_tables(
        table.add_column(0, "domain", pa.array([name] * len(table), pa.string())) for name, table in tables.items()
    )


def usage_table(total: "Statistics") -> pa.Table:
    """Long form, the schema of the published usage profiles; pairs i < j, and zeros left out of both
    co-activation and histogram, whose bin stands in expert_i. Co-activations that are not kept apart are left out."""
    from .sums import GATE_BINS

    rows: list[tuple[str, int, int | None, int | None, float]] = []
    for layer, count_E in enumerate(total.count):
        tokens = max(1, int(total.tokens[layer]))
        ranks = total.gate_rank_sum[layer] / tokens
        rows += [("usage_count", layer, e, None, float(n)) for e, n in enumerate(count_E)]
        if total.coactivation is not None:
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


def read_columns(profile: AnyPath, domain: str | None = None) -> Columns:
    """The saliency table of a profile's folder, or of a Parquet file; of one domain if given."""
    with storage_errors(profile):
        file = _file(profile, SALIENCY if domain is None else SALIENCY_BY_DOMAIN)
        if not file.exists():
            what = "was made without --domain-column" if profile.is_dir() and domain is not None else "is no profile"
            raise ProfileError(f"{file}: no such file: {profile} {what}")
        if domain is not None:
            by_domain = _read(_table(file), file, by_domain=True)
            check_domains([domain], by_domain, f"{file}: ")
            return by_domain[domain]
        found = _read(_table(file), file)[""]
    if not found["count"].any():
        raise ProfileError(f"{file}: no token was kept: nothing to rank")
    return found


def read_by_domain(profile: AnyPath) -> dict[str, Columns]:
    """The saliency table of every domain of a profile's folder, or of a Parquet file; empty where it has none."""
    with storage_errors(profile):
        file = _file(profile, SALIENCY_BY_DOMAIN)
        table = _table(file) if file.exists() else None
        return {} if table is None or "domain" not in table.column_names else _read(table, file, by_domain=True)


def check_domains(names: Iterable[str], by_domain: Mapping[str, Columns], where: str = "") -> None:
    """ProfileError, which begins with `where`, at a domain that is not there or has no kept token."""
    for name in names:
        if name not in by_domain:
            known = f"there are {', '.join(by_domain)}" if by_domain else "its rows have none"
            raise ProfileError(f"{where}no domain {name!r}: {known}")
        if not by_domain[name]["count"].any():
            raise ProfileError(f"{where}no token of domain {name!r} was kept: nothing to rank")


def _file(profile: AnyPath, name: str) -> AnyPath:
    return profile / name if profile.is_dir() else profile


def _table(file: AnyPath) -> pa.Table:
    try:
        return read_parquet(file.read_bytes())
    except (OSError, pa.ArrowException) as error:
        raise ProfileError(f"{file}: not a saliency table: {reason(error)}") from None


def _read(table: pa.Table, file: AnyPath, by_domain: bool = False) -> dict[str, Columns]:
    """The columns by domain, in order of name; of all rows under an empty name."""
    try:
        flat = {name: table[name].to_numpy() for name in table.column_names if name != "domain"}
        for name, values in flat.items():
            if not np.issubdtype(values.dtype, np.number) or not np.isfinite(values).all():
                raise ValueError(f"column {name!r} holds what is no number")
        if not by_domain:
            return {"": _columns(flat)}
        domains = np.array([str(name) for name in table["domain"].to_pylist()], object)
        names, numbers = np.unique(domains, return_inverse=True)
        # The rows of a domain stand in one place and keep their order.
        order = np.argsort(numbers, kind="stable")
        ends = np.searchsorted(numbers[order], np.arange(len(names)), "right")
        parts = {name: np.split(values[order], ends[:-1]) for name, values in flat.items()}
        return {str(n): _columns({name: part[i] for name, part in parts.items()}) for i, n in enumerate(names)}
    except (ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise ProfileError(f"{file}: not a saliency table: {reason(error)}") from None


def _columns(flat: dict[str, np.ndarray]) -> Columns:
    layers, experts = flat.pop("layer"), flat.pop("expert")
    E = int(experts.max(initial=-1)) + 1
    if not E or any(not np.array_equal(x, y) for x, y in zip((layers, experts), _grid(len(layers), E), strict=True)):
        raise ValueError("its rows are not every expert of every layer, in order")
    if (flat["count"] < 0).any():
        raise ValueError("a count is negative")
    return {name: values.reshape(-1, E) for name, values in flat.items()}


def _grid(rows: int, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Layer and expert of each row, layer-major; unequal to any table's where the last layer is not whole."""
    if rows % num_experts:
        return np.empty(0), np.empty(0)
    return np.divmod(np.arange(rows), num_experts)
