"""The rows of a healing: those that are learnt, and those by which it is decided what that was worth.

A fifth of the rows, by their hashes, is held out. Where domains are named, the fifth of the other domains shows what is
lost elsewhere. Letters: see `config`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np

from ..data import batching, tokens
from ..data.batching import Document
from ..data.groups import Groups
from ..data.remarks import Remarks
from ..data.rows import Row, is_held_out
from ..errors import DataError, OptionError
from ..network.batch import Batch
from ..network.source import Source
from ..run.options import Data
from ..run.reading import read, tokenizer_of
from ..selection.keep_sets import are_kept
from .loss import Loss

FEWEST = 2  # rows that are held out: an interval needs as many
STEP_TOKENS = 2048  # of a step, where nobody says how many rows it takes


@dataclass(frozen=True)
class Rows:
    """What is learnt and what is looked at, in batches that say which experts may be chosen."""

    learnt: list[Row]
    batches: list[Batch]
    """Those that are learnt: all of one shape, several in a row of a batch where they fit."""
    held: list[Row]
    held_batches: list[Batch]
    """Those that are held out, one in a row of a batch; each token's group is the number of its row."""
    tokens: int
    """Tokens that are learnt."""
    remarks: list[str]

    @property
    def domains(self) -> list[str]:
        """Of the rows that are held out."""
        return [row.domain for row in self.held]


def make_rows(
    data: Data, keep: str, source: Source, kept: Sequence[Sequence[int]], batch_size: int | None, multiple: int
) -> Rows:
    """Read, part and tokenise. Batches have `batch_size` rows, or as many as make a step, in multiples of `multiple`.

    DataError where nothing is learnt, or too little is held out.
    """
    if data.max_seq_length > source.config.max_position:
        raise OptionError(f"--max-seq-length is above the model's context of {source.config.max_position}")
    if data.pack or data.until_stable is not None:
        raise OptionError("heal lays rows side by side, and takes all: leave out --pack and --until-stable")
    tokenizer, remarks = tokenizer_of(source), Remarks()
    every = read(replace(data, domain=()), tokenizer, remarks)
    if absent := {*data.domain} - {row.domain for row in every}:
        raise DataError(f"no row is of domain {min(absent)}: there are {', '.join(sorted({r.domain for r in every}))}")
    learnt = [row for row in every if not is_held_out(row) and (not data.domain or row.domain in data.domain)]
    held = [row for row in every if is_held_out(row)]
    length = data.max_seq_length

    def encode(rows: Sequence[Row]) -> list[Document]:
        documents = tokens.encode(
            [replace(row, domain="") for row in rows],
            tokenizer,
            Groups([""]),
            source.config.vocab_size,
            length,
            data.truncate,
            keep,  # type: ignore[arg-type]
        )
        return [replace(document, group=number) for number, document in enumerate(documents)]

    fitting, looked_at = encode(learnt), encode(held)
    _check(data, held, fitting, looked_at)
    size = -(-(batch_size or max(1, STEP_TOKENS // length)) // multiple) * multiple
    kept_LE = are_kept(kept, source.config.num_experts)
    side_by_side = [_filled(batch, size) for batch in batching.side_by_side(fitting, size, length)]
    one_each = batching.padded(looked_at, size, length)
    return Rows(
        learnt,
        [_with(batch, kept_LE) for batch in side_by_side],
        held,
        [_with(batch, kept_LE) for batch in one_each],
        int(sum((document.weights != 0).sum() for document in fitting)),
        remarks.lines(),
    )


def by_row(loss: Loss, batches: Sequence[Batch], rows: int) -> Loss:
    """The losses in the order of the rows, of which batches hold one in a row of theirs, each token with its number as
    its group: batches have them by length, and padding behind."""
    number = np.concatenate([batch.groups[:, 0] for batch in batches])
    is_row = np.concatenate([(batch.tokens.segments > 0).any(1) for batch in batches])
    kl, weight = np.zeros(rows), np.zeros(rows)
    kl[number[is_row]], weight[number[is_row]] = loss.kl[is_row], loss.weight[is_row]
    return Loss(kl, weight)


def _check(data: Data, held: Sequence[Row], fitting: Sequence[Document], looked_at: Sequence[Document]) -> None:
    def counts(document: Document) -> bool:
        return bool((document.weights != 0).any())

    ours = [not data.domain or row.domain in data.domain for row in held]
    decide = sum(own and counts(document) for own, document in zip(ours, looked_at, strict=True))
    if not any(map(counts, fitting)) or decide < FEWEST:
        raise DataError(
            f"{sum(map(counts, fitting))} rows with tokens to learn, and {decide} held out to decide by: give more "
            "rows, of which a fifth is held out, or --tokens all where nobody speaks in them"
        )


def _filled(batch: Batch, rows: int) -> Batch:
    """The batch with as many rows; further ones are padding."""
    return jax.tree.map(lambda x: np.pad(x, ((0, rows - len(x)), *((0, 0),) * (x.ndim - 1))), batch)


def _with(batch: Batch, kept_LE: np.ndarray) -> Batch:
    return replace(batch, kept=np.broadcast_to(kept_LE, (batch.shape[0], *kept_LE.shape)))
