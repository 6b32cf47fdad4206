"""Rows as batches: read, tokenised and laid out once, and given anew at each pass. Letters: see `config`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ..devices import hosts
from ..errors import DataError
from ..network.batch import Batch, Tokens
from . import batching
from .batching import Document
from .groups import Groups
from .harmony import START
from .rows import Row, row_hashes


@dataclass(frozen=True)
class Layout:
    """How documents become batches."""

    kind: Literal["padded", "side by side", "packed"]
    batch_size: int
    length: int
    """The most tokens that a row of a batch has."""
    eos: int = 0
    """What stands behind each packed document."""
    cross_document: bool = False
    skip_first: int = 0


class Dataset:
    """One process' share of the rows, in batches. All processes make theirs at the same place of their work: then they
    agree on the lengths of batches and add up their counts, and never speak of the data again."""

    def __init__(
        self,
        rows: Sequence[Row],
        documents: Sequence[Document],
        groups: Groups,
        layout: Layout,
        share: hosts.Share,
        remarks: Sequence[str] = (),
    ):
        """`documents` are those of `rows` that are this process' share; packed, of all rows. `remarks` are lines that a
        user should read, about rows that were not taken as they stood.

        """
        self.rows, self.documents, self.groups = rows, documents, groups
        self.layout, self.share, self.remarks = layout, share, remarks
        self.row_hashes = row_hashes(rows)
        lengths = batching.padded_lengths(documents, self._own_size, layout.length) if layout.kind == "padded" else []
        self.lengths = hosts.agree_lengths(lengths)
        # Processes that feed the same rows count them once; packed, each has all documents.
        counts_rows = share.leads and (layout.kind != "packed" or hosts.is_first())
        whole = documents if counts_rows else []
        own = [0, 0, sum(d.truncated for d in whole), sum(not (d.weights > 0).any() for d in whole)]
        for batch in self.batches() if share.leads else ():
            own[0] += batch.tokens.count
            own[1] += int((batch.weights != 0).sum())
        self.total_tokens, self.kept, self.truncated, self.empty = np.sum(hosts.exchange(own), axis=0).tolist()

    def check_kept(self) -> None:
        """DataError where no token of any process is kept."""
        if not self.kept:
            raise DataError(_why_nothing_is_kept(self.rows))

    def part(self, begin: int, end: int) -> "Dataset":
        """The dataset of some of its rows, in their order. All processes make it at the same place of their work."""
        whole, share = self.layout.kind == "packed", self.share
        own = range(len(self.rows))[slice(None) if whole else slice(share.number, None, share.of)]
        documents = [document for row, document in zip(own, self.documents, strict=True) if begin <= row < end]
        return Dataset(self.rows[begin:end], documents, self.groups, self.layout, share, self.remarks)

    @property
    def _own_size(self) -> int:
        """Rows of this process in each batch."""
        return self.layout.batch_size // self.share.of

    @property
    def tokens_of_process(self) -> int:
        """Tokens that this process feeds in one pass, for a bar."""
        packed = self.layout.kind == "packed"
        tokens = sum(len(d.token_ids) + packed for d in self.documents)
        return tokens // self.share.of if packed else tokens

    def batches(self) -> Iterator[Batch]:
        """The batches, the same ones each time."""
        return self._laid_out(self.documents)

    def numbered(self) -> Iterator[Tokens]:
        """The tokens of each batch with numbers in the place of ids: all documents' tokens are counted one after the
        other, packed the EOS behind each with them. For a process that has all documents."""
        packed, first, seen = self.layout.kind == "packed", 0, 0
        documents = []
        for document in self.documents:
            stop = first + len(document.token_ids)
            documents.append(replace(document, token_ids=np.arange(first, stop, dtype=np.int32)))
            first = stop
        for batch in self._laid_out(documents):
            numbers, real = batch.tokens.ids, batch.tokens.segments > 0
            if packed:  # all stand in the order in which they are counted
                numbers = np.where(real, seen + np.cumsum(real).reshape(real.shape) - 1, 0).astype(np.int32)
                seen += int(real.sum())
            yield replace(batch.tokens, ids=numbers)

    def _laid_out(self, documents: Sequence[Document]) -> Iterator[Batch]:
        layout, groups = self.layout, len(self.groups)
        batches: Iterator[Batch]
        if layout.kind == "packed":
            whole = batching.packed(
                documents, layout.batch_size, layout.length, layout.eos, groups, layout.cross_document
            )
            batches = (batching.share(batch, self.share.number, self.share.of) for batch in whole)
        elif layout.kind == "side by side":
            batches = batching.side_by_side(documents, layout.batch_size, layout.length, groups)
        else:
            batches = batching.padded(documents, self._own_size, layout.length, groups, self.lengths)
        for batch in batches:
            yield replace(batching.skip_first(batch, layout.skip_first), joint=self.groups.joint)


def _why_nothing_is_kept(rows: Sequence[Row]) -> str:
    """What to say where no token is kept: what helps, and nothing else."""
    if not any(row.text for row in rows):
        return "no token is kept: all rows are empty"
    if not any(START in row.text for row in rows):
        return (
            "no token is kept: rows hold plain text, and nobody speaks in it: use --keep all to count every token, or "
            "name the column with conversations by --text-column"
        )
    return (
        "no token is kept: the assistant says nothing within --max-seq-length, behind the positions of --skip-first "
        "and in a channel that --channel-weights counts"
    )
