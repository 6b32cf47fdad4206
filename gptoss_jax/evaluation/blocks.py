"""Rows as blocks of equal length, each once for every variant of the model. Letters: see `config`."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import NamedTuple

import numpy as np

from ..data import batching
from ..data.batching import Document
from ..devices.hosts import Share
from ..network.batch import Batch, Tokens

ROUNDED = 64  # positions of a row that are scored: few numbers of them, so that little is compiled anew


class Scored(NamedTuple):
    """The tokens of some blocks that are scored: arrays [B, N]; where `real` is false, they only fill up."""

    at: np.ndarray
    """The position whose output expects the token, which stands behind it."""
    targets: np.ndarray
    """Its id."""
    rows: np.ndarray
    """The row of the data that it is from."""
    real: np.ndarray


@dataclass(frozen=True)
class Blocks:
    """Documents, each with EOS behind it, as one stream that is cut into blocks of `length` + 1 tokens; or whole
    documents, none of which is longer, side by side in blocks of at most as many.

    A block's first `length` tokens go through the network, and its last `length` are expected. The first token of a
    block, and that of a document, is never scored: nothing of its own stands before it.
    """

    documents: Sequence[Document]
    length: int
    eos: int
    most: int | None = None
    """The most blocks; None for all."""
    cross_document: bool = False
    whole_rows: bool = False

    @cached_property
    def whole(self) -> Batch:
        """All blocks, [B, S + 1]. The group of a token is the row that it is from."""
        numbered = [replace(document, group=row) for row, document in enumerate(self.documents)]
        if self.whole_rows:
            each = batching.side_by_side(numbered, 1, self.length + 1)
        else:
            each = batching.packed(numbered, 1, self.length + 1, self.eos, 1, self.cross_document)
        blocks = list(islice(each, self.most))
        tokens = Tokens(
            *(np.concatenate([getattr(b.tokens, n) for b in blocks]) for n in ("ids", "positions", "segments"))
        )
        weights, groups = (np.concatenate([getattr(b, name) for b in blocks]) for name in ("weights", "groups"))
        return Batch(tokens, weights, groups)

    def __len__(self) -> int:
        """How many blocks there are."""
        return len(self.whole.weights)

    @cached_property
    def scored(self) -> Scored:
        """What is scored of all blocks."""
        batch = self.whole
        segments = batch.tokens.segments
        is_scored = (batch.weights[:, 1:] > 0) & (segments[:, 1:] == segments[:, :-1])
        most = int(is_scored.sum(1).max())
        # The positions that are scored come first.
        at = np.argsort(~is_scored, axis=1, kind="stable")[:, : -(-most // ROUNDED) * ROUNDED].astype(np.int32)
        behind = at + 1
        return Scored(
            at,
            np.take_along_axis(batch.tokens.ids, behind, axis=1),
            np.take_along_axis(batch.groups, behind, axis=1),
            np.take_along_axis(is_scored, at, axis=1),
        )

    @cached_property
    def tokens(self) -> int:
        """How many tokens go through the network."""
        return int((self.whole.tokens.segments[:, :-1] > 0).sum())

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all tokens, and of which are scored."""
        tokens = self.whole.tokens
        arrays = (tokens.ids, tokens.positions, tokens.segments, self.scored.at, self.scored.real)
        return hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in arrays)).hexdigest()

    def batches(self, kept_vLE: np.ndarray | None, blocks_each: int, share: Share) -> Iterator[Batch]:
        """This process' rows of all batches: of each block a row for every variant, one after the other.

        `kept_vLE` says what experts the variants may choose; with None there is one, which may choose all."""
        variants = 1 if kept_vLE is None else len(kept_vLE)
        for first in range(0, len(self), blocks_each):
            numbers = np.arange(first, first + blocks_each)
            numbers = np.where(numbers < len(self), numbers, len(self))  # behind the last block are empty ones

            def rows(x: np.ndarray, numbers: np.ndarray = numbers) -> np.ndarray:
                padded = np.concatenate([x, np.zeros_like(x[:1])])[numbers]
                return share.own(np.repeat(padded, variants, axis=0))

            tokens = self.whole.tokens
            cut = Tokens(*(rows(x[:, :-1]) for x in (tokens.ids, tokens.positions, tokens.segments)))
            kept = None if kept_vLE is None else share.own(np.tile(kept_vLE, (blocks_each, 1, 1)))
            empty = np.zeros(cut.ids.shape, np.int32)
            yield Batch(cut, empty.astype(np.float32), empty, kept=kept, at=rows(self.scored.at))
