"""What was measured of each row, as a table: to pair models with one another, by whatever one likes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ..data.rows import Row
from .replies import Judged
from .scored import Scored, ScoredTokens

ROWS = "rows.parquet"
SCHEMA = pa.schema(
    [
        ("model", pa.string()),  # null for the baseline
        ("seq_len", pa.int64()),  # null for replies
        ("row", pa.int64()),
        ("id", pa.string()),
        ("domain", pa.string()),
        ("tokens", pa.int64()),  # scored ones; of a reply all
        ("nats", pa.float64()),  # sums over the scored tokens
        ("kl", pa.float64()),
        ("agreement", pa.int64()),
        ("p", pa.float64()),
        ("correct", pa.bool_()),
        ("loops", pa.bool_()),
        ("ended", pa.bool_()),
        ("harmony", pa.bool_()),
        ("distinct_4", pa.float64()),
    ]
)


def by_row(
    rows: Sequence[Row],
    tokens: Mapping[int, ScoredTokens],
    asked: Sequence[int],
    replies: Mapping[str | None, Sequence[Judged]],
) -> pa.Table:
    """A row of the table for each row of the data, model and length of blocks, and for each reply.

    `asked` are the numbers of the rows that were answered; the baseline is the model None."""
    found: list[dict[str, Any]] = []
    for length, scored in tokens.items():
        for name, model in ((None, scored.baseline), *scored.others.items()):
            found += ({"model": name, "seq_len": length, **sums} for sums in _sums(scored, model))
    for name, said in replies.items():
        for number, reply in zip(asked, said, strict=True):
            judged = {key: value for key, value in vars(reply).items() if key != "length"}
            found.append({"model": name, "row": number, "tokens": reply.length, **judged})
    for entry in found:
        row = rows[entry["row"]]
        entry.update(id=row.id, domain=row.domain)
    return pa.Table.from_pylist(found, SCHEMA)


def _sums(scored: ScoredTokens, model: Scored) -> Iterator[dict[str, Any]]:
    """Sums over the scored tokens of each row."""
    numbers, of = np.unique(scored.documents, return_inverse=True)
    agrees = (model.best == scored.baseline.best).astype(np.float64)
    columns = {"nats": model.nats, "kl": model.kl, "agreement": agrees, "p": np.exp(-model.nats)}
    sums = {name: np.bincount(of, weights=column) for name, column in columns.items()}
    tokens = np.bincount(of)
    for at, number in enumerate(numbers.tolist()):
        own = {name: float(column[at]) for name, column in sums.items()}
        yield {"row": number, "tokens": int(tokens[at]), **own, "agreement": int(own["agreement"])}
