"""Tokenised documents → batches of fixed shape: padded one document a row, or packed. Letters: see `config`."""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import jax
import numpy as np

from ..network.batch import Batch, Tokens

# Padded lengths are this times a power of two: few shapes to compile, at most half of a row wasted.
SHORTEST = 64


@dataclass(frozen=True)
class Document:
    """One tokenised row."""

    token_ids: np.ndarray
    """int32 [length]"""
    weights: np.ndarray
    """float32 [length]: what each token counts in the statistics; 0 is a token that is not kept."""
    group: int = 0
    """Whose statistics it counts in."""
    truncated: bool = False
    before: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """int32: the tokens of the row that were cut off on the left, which say what the first ones are part of."""


def padded(
    documents: Sequence[Document],
    batch_size: int,
    max_length: int,
    num_groups: int = 1,
    lengths: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Batches of one document a row, padded on the right; documents of like length share a batch.

    `lengths` are those of all batches where they are not what `padded_lengths` gives for these documents alone: there
    may be more, and longer ones. Processes that run the same steps agree on the largest.
    """
    ordered = sorted(documents, key=lambda document: _padded_length(document, max_length))
    for number, length in enumerate(padded_lengths(documents, batch_size, max_length) if lengths is None else lengths):
        rows = ordered[number * batch_size : (number + 1) * batch_size]
        yield stack([[row] for row in rows], batch_size, length, num_groups)


def padded_lengths(documents: Sequence[Document], batch_size: int, max_length: int) -> list[int]:
    """The lengths of the batches that hold these documents, one a row."""
    ordered = sorted(_padded_length(document, max_length) for document in documents)
    return [max(ordered[start : start + batch_size]) for start in range(0, len(ordered), batch_size)]


def _padded_length(document: Document, max_length: int) -> int:
    length = SHORTEST
    while length < len(document.token_ids):
        length *= 2
    return min(length, max_length)


def side_by_side(
    documents: Sequence[Document], batch_size: int, max_length: int, num_groups: int = 1
) -> Iterator[Batch]:
    """Batches of whole documents, several in a row where they fit: what `padded` gives with little padding, and in
    one shape. Rows are shared out evenly over as few batches as hold them."""
    tokens = sum(len(d.token_ids) for d in documents)
    length = min(max_length, max(1, -(-tokens // SHORTEST)) * SHORTEST)
    rows: list[list[Document]] = []
    room: list[tuple[int, int]] = []  # free tokens and number of each row that is not full, sorted
    for document in sorted(documents, key=lambda d: -len(d.token_ids)):
        if rows and not len(document.token_ids):
            break  # only such ones are left, and need no row
        # The row that it fills best.
        best = bisect_left(room, (len(document.token_ids), 0))
        free, number = room.pop(best) if best < len(room) else (length, len(rows))
        if number == len(rows):
            rows.append([])
        rows[number].append(document)
        if free > len(document.token_ids):
            insort(room, (free - len(document.token_ids), number))
    rows_each = -(-len(rows) // -(-len(rows) // batch_size))
    for start in range(0, len(rows), rows_each):
        yield stack(rows[start : start + rows_each], rows_each, length, num_groups)


def packed(
    documents: Sequence[Document],
    batch_size: int,
    length: int,
    eos_token_id: int,
    num_groups: int = 1,
    cross_document: bool = False,
) -> Iterator[Batch]:
    """Batches of the documents' stream, EOS (not kept) after each, cut into blocks of `length`.

    Attention stays inside a document, and positions restart with it, unless `cross_document`. A
    document that a cut divides goes on as a new one in the next block.
    """
    rows: list[list[Document]] = []
    row: list[Document] = []
    free = length
    for document in documents:
        rest = _with_eos(document, eos_token_id)
        while len(rest.token_ids):
            piece, rest = _split(rest, free)
            row.append(piece)
            free -= len(piece.token_ids)
            if free == 0:
                rows.append(row)
                row, free = [], length
    if row:
        rows.append(row)
    for start in range(0, len(rows), batch_size):
        yield stack(rows[start : start + batch_size], batch_size, length, num_groups, cross_document)


def _with_eos(document: Document, eos_token_id: int) -> Document:
    return Document(
        np.append(document.token_ids, np.int32(eos_token_id)),
        np.append(document.weights, np.float32(0)),
        document.group,
    )


def _split(document: Document, at: int) -> tuple[Document, Document]:
    ids, weights, group = document.token_ids, document.weights, document.group
    return Document(ids[:at], weights[:at], group), Document(ids[at:], weights[at:], group)


def stack(
    rows: Sequence[Sequence[Document]],
    batch_size: int,
    length: int,
    num_groups: int,
    cross_document: bool = False,
) -> Batch:
    """Rows of documents, side by side, as a batch of `batch_size` rows of `length` tokens."""
    shape = (batch_size, length)
    tokens = Tokens(*(np.zeros(shape, np.int32) for _ in range(3)))
    batch = Batch(tokens, np.zeros(shape, np.float32), np.zeros(shape, np.int32), num_groups)
    for b, documents in enumerate(rows):
        start = 0
        for number, document in enumerate(documents, 1):
            here = slice(start, start + len(document.token_ids))
            tokens.ids[b, here] = document.token_ids
            tokens.positions[b, here] = np.arange(len(document.token_ids)) + (start if cross_document else 0)
            tokens.segments[b, here] = 1 if cross_document else number
            batch.weights[b, here] = document.weights
            batch.groups[b, here] = document.group
            start = here.stop
    return batch


def share(batch: Batch, index: int, shares: int) -> Batch:
    """The share that one of several processes has of a batch's rows."""
    rows = batch.shape[0] // shares
    return jax.tree.map(lambda x: x[index * rows : (index + 1) * rows], batch)


def skip_first(batch: Batch, count: int) -> Batch:
    """The batch with the first `count` positions left out of the statistics, wherever positions restart."""
    return replace(batch, weights=np.where(batch.tokens.positions < count, np.float32(0), batch.weights))
