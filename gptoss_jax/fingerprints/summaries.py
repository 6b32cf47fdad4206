"""Summaries: how often the answers of a group chose each expert, while they thought and while they answered.

Letters: see `config`; G are summaries, or what belongs to each of them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

SEGMENTS = ("think", "answer")


class Group(NamedTuple):
    """Answers of one kind. `repetition` says whether they repeat themselves."""

    benchmark: str
    category: str
    finished: bool
    repetition: bool

    @property
    def name(self) -> str:
        """The benchmark's category, as domains name it."""
        return f"{self.benchmark}/{self.category}"


@dataclass(frozen=True)
class Summary:
    """One segment of the answers of a group.

    Args:
        group: The group.
        segment: One of SEGMENTS.
        sample_count: How many answers of the group have the segment.
        tokens: How many tokens the segment has, the mean over answers.
        count_frequency_LE: Of the segment's tokens the share that chose the expert, the mean over answers.
        prob_density_LE: The sum of the expert's gates over the segment's tokens, the mean over answers.
        count_LE: How many tokens of all answers chose the expert; None where means alone are known.
        gate_sum_LE: The sum of their gates; None where means alone are known.
    """

    group: Group
    segment: str
    sample_count: int
    tokens: float
    count_frequency_LE: Float[np.ndarray, "L E"]
    prob_density_LE: Float[np.ndarray, "L E"]
    count_LE: Int[np.ndarray, "L E"] | None = None
    gate_sum_LE: Float[np.ndarray, "L E"] | None = None


def sample_count(summaries: Iterable[Summary]) -> int:
    """How many answers summaries are of: of a group some may have had no thoughts, others no answer."""
    most: dict[Group, int] = {}
    for one in summaries:
        most[one.group] = max(most.get(one.group, 0), one.sample_count)
    return sum(most.values())


# The columns of summaries.parquet: first those that say of what a row is.
OF_SUMMARY = {
    "benchmark": pa.string(),
    "category": pa.string(),
    "finished": pa.bool_(),
    "repetition": pa.bool_(),
    "segment": pa.string(),
    "sample_count": pa.int64(),
    "tokens": pa.float64(),
}
OF_EXPERT = {
    "layer": pa.int32(),
    "expert": pa.int32(),
    "count_frequency": pa.float64(),
    "prob_density": pa.float64(),
    "count": pa.int64(),
    "gate_sum": pa.float64(),
}
SCHEMA = pa.schema({**OF_SUMMARY, **OF_EXPERT})
MEANS, SUMS = ("count_frequency", "prob_density"), ("count", "gate_sum")


def to_table(summaries: Sequence[Summary]) -> pa.Table:
    """summaries.parquet: a row for each expert of each layer of each summary."""
    L, E = summaries[0].count_frequency_LE.shape
    heads = [(*one.group, one.segment, one.sample_count, one.tokens) for one in summaries]
    columns = {
        name: pa.DictionaryArray.from_arrays(
            np.repeat(np.arange(len(heads), dtype=np.int32), L * E), pa.array(values, kind)
        ).cast(kind)
        for (name, kind), values in zip(OF_SUMMARY.items(), zip(*heads, strict=True), strict=True)
    }
    layers, experts = np.divmod(np.arange(L * E), E)
    columns |= {"layer": np.tile(layers, len(heads)), "expert": np.tile(experts, len(heads))}
    for name in (*MEANS, *SUMS):
        columns[name] = pa.concat_arrays(_flat(getattr(one, f"{name}_LE"), OF_EXPERT[name], L * E) for one in summaries)
    return pa.table(columns).cast(SCHEMA)


def _flat(values: np.ndarray | None, kind: pa.DataType, size: int) -> pa.Array:
    return pa.nulls(size, kind) if values is None else pa.array(values.reshape(-1), kind)


def of_table(table: pa.Table) -> list[Summary]:
    """The summaries of such a table; ValueError says where its rows are not every expert of every summary's layers."""
    if missing := [name for name in SCHEMA.names if name not in table.column_names]:
        raise ValueError(f"it lacks the column {missing[0]!r}")
    table = table.select(SCHEMA.names).cast(SCHEMA)
    layers, experts = (table[name].to_numpy() for name in ("layer", "expert"))
    L, E = (int(values.max(initial=-1)) + 1 for values in (layers, experts))
    of_layers, of_experts = np.divmod(np.arange(L * E), max(1, E)) if len(table) >= L * E else (layers[:0],) * 2
    G = len(table) // max(1, L * E)
    if (
        not G
        or not np.array_equal(layers, np.tile(of_layers, G))
        or not np.array_equal(experts, np.tile(of_experts, G))
    ):
        raise ValueError("its rows are not every expert of every layer of each summary, in order")
    means = {name: _means(table[name], name).reshape(G, L, E) for name in MEANS}
    heads = table.select([*OF_SUMMARY]).take(np.arange(G) * L * E).to_pylist()
    summaries = []
    for g, head in enumerate(heads):
        sums = [_sums(table[name].slice(g * L * E, L * E), name, (L, E)) for name in SUMS]
        _check(head, g)
        group = Group(*(head[name] for name in Group._fields))
        of_group = [head[name] for name in ("segment", "sample_count", "tokens")]
        summaries.append(Summary(group, *of_group, *(means[name][g] for name in MEANS), *sums))
    return summaries


def _check(head: dict[str, Any], number: int) -> None:
    sizes = [head["sample_count"], head["tokens"]]
    if None in head.values() or head["segment"] not in SEGMENTS or not all(0 < size < np.inf for size in sizes):
        raise ValueError(f"summary {number + 1} says {head}")


def _means(column: pa.ChunkedArray, name: str) -> np.ndarray:
    values = column.to_numpy()
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError(f"column {name!r} holds what is no share")
    return values


def _sums(column: pa.ChunkedArray, name: str, shape: tuple[int, int]) -> np.ndarray | None:
    if column.null_count == len(column):
        return None
    values = column.to_numpy()
    if column.null_count or not np.isfinite(values).all() or (values < 0).any():
        raise ValueError(f"column {name!r} is neither whole nor null in a summary")
    return values.reshape(shape)


def categories(summaries: Iterable[Summary]) -> list[str]:
    """The names benchmark/category that there are, in order."""
    return sorted({one.group.name for one in summaries})
