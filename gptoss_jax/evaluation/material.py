"""The rows of an evaluation, none of which served calibration. Letters: see `config`."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ..data import tokens
from ..data.batching import Document
from ..data.groups import Groups, domains_of
from ..data.remarks import Remarks
from ..data.rows import Row, row_hash
from ..errors import DataError, OptionError, TokenizerError
from ..network.source import Source
from ..run import reading
from ..selection.keep_sets import KeepSets
from .baseline import StoredBaseline
from .blocks import Blocks
from .sides import Request, Sides


class Material(NamedTuple):
    """What is scored."""

    rows: list[Row]
    domains: list[str]
    tokenizer: Any
    blocks: dict[int, Blocks]
    """The blocks of each length."""
    remarks: list[str]
    """What a user should know of the rows."""
    is_disjoint: bool
    """Whether none of the rows is one that the keep-sets were chosen by; false where that is unknown."""


def material(request: Request, sides: Sides) -> Material:
    """Read and tokenise. DataError where rows served calibration, or nothing is scored."""
    data, judging, source = request.data, request.judging, sides.variants.source
    if too_long := [length for length in judging.seq_len if length > source.config.max_position]:
        raise OptionError(f"--seq-len {too_long[0]} is above the model's context of {source.config.max_position}")
    tokenizer, remarks, known = reading.tokenizer_of(source), Remarks(), _calibration(request.keep_sets)
    apart = _Apart(frozenset() if known is None else frozenset(known.tolist()))
    checks = [*([request.wanted] if request.wanted else []), *([apart.wanted] if judging.exclude_calibrated else [])]

    def wanted(row: Row) -> bool:
        return all(may_be_taken(row) for may_be_taken in checks)

    rows, lines = reading.read(data, tokenizer, remarks, judging.answer_column, wanted), remarks.lines()
    if apart.left_out:
        lines.append(f"{apart.left_out:,} rows are left out: keep-sets were chosen by them")
    apart.check(rows)
    domains = domains_of(rows, data.domain_column)
    if isinstance(sides.baseline, Source) and not isinstance(sides.baseline, StoredBaseline):
        _check_alike(rows, domains, tokenizer, source, sides.baseline)
    encode = partial(_encode, rows, domains, tokenizer, source, judging.keep)
    if judging.whole_rows:
        # The first token of a row is expected of nothing.
        blocks = {
            n: Blocks(encode(n + 1, data.truncate), n, 0, judging.blocks, whole_rows=True) for n in judging.seq_len
        }
    else:
        eos, documents = reading.eos_of(tokenizer, source.config, "eval, which packs rows into blocks,"), encode()
        blocks = {n: Blocks(documents, n, eos, judging.blocks, judging.cross_document) for n in judging.seq_len}
    for length, some in blocks.items():
        scored = np.unique(some.scored.rows[some.scored.real])
        if len(scored) < 2:
            raise DataError(
                f"{len(scored)} of {len(rows):,} rows have a scored token in blocks of {length}: give more rows "
                "or --blocks, or --keep all where nobody speaks in them"
            )
    return Material(rows, domains, tokenizer, blocks, lines, known is not None)


def _calibration(keep_sets: Mapping[str, KeepSets]) -> np.ndarray | None:
    """The hashes of all rows that keep-sets were chosen by; None where some do not say, or there are none."""
    said = [kept.origin.row_hashes for kept in keep_sets.values() if kept.origin.criterion not in DATA_FREE]
    if not keep_sets or any(hashes is None for hashes in said):
        return None
    return np.unique(np.concatenate([np.zeros(0, np.uint64), *said]))


DATA_FREE = ("random", "aimer")


class _Apart:
    """Tells rows that served calibration by their hashes, and counts them."""

    def __init__(self, hashes: frozenset[int]):
        self.hashes, self.left_out = hashes, 0

    def wanted(self, row: Row) -> bool:
        """Whether the row served no calibration."""
        is_known = row_hash(row) in self.hashes
        self.left_out += is_known
        return not is_known

    def check(self, rows: Sequence[Row]) -> None:
        """DataError where one of the rows served calibration."""
        if count := sum(row_hash(row) in self.hashes for row in rows):
            raise DataError(
                f"{count:,} of {len(rows):,} rows are among those that keep-sets were chosen by: leave them out with "
                "--exclude-calibrated, or give other rows"
            )


def _encode(
    rows: Sequence[Row],
    domains: Sequence[str],
    tokenizer: Any,
    source: Source,
    keep: Any,
    longest: int | None = None,
    truncate: str = "left",
) -> list[Document]:
    vocab_size = source.config.vocab_size
    return tokens.encode(rows, tokenizer, Groups(domains), vocab_size, longest, truncate, keep)


def _check_alike(rows: Sequence[Row], domains: Sequence[str], tokenizer: Any, source: Source, baseline: Source) -> None:
    """TokenizerError where the baseline's tokens are others."""
    documents = _encode(rows, domains, tokenizer, source, "all")
    theirs = _encode(rows, domains, reading.tokenizer_of(baseline), baseline, "all")
    is_alike = all(np.array_equal(d.token_ids, t.token_ids) for d, t in zip(documents, theirs, strict=True))
    if not is_alike or source.config.vocab_size != baseline.config.vocab_size:
        raise TokenizerError(
            f"{source.folder} and {baseline.folder} make other tokens of the same text: give models with one tokenizer"
        )
