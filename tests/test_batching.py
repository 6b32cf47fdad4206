"""Batches: every token once, in its place; packed blocks against a stream that is cut by hand."""

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoss_jax.data.batching import SHORTEST, Document, packed, padded, share, side_by_side, skip_first
from gptoss_jax.network.batch import Batch

EOS = 99
MAX_LENGTH = 150

Placed = tuple[int, float, int, int, int]
"""Token, weight, domain, position and segment."""


@st.composite
def one_document(draw: st.DrawFn) -> Document:
    length = draw(st.one_of(st.integers(0, 12), st.sampled_from([63, 64, 65, 127, 128, 129, MAX_LENGTH])))
    # Other ids than padding's 0 and EOS, and weights that tell neighbours apart.
    ids = draw(st.integers(1, 40)) + np.arange(length, dtype=np.int32) % 50
    weights = (np.arange(length) + draw(st.integers(0, 3))) % 4 / np.float32(2)
    return Document(ids.astype(np.int32), weights.astype(np.float32), draw(st.integers(0, 2)))


documents = st.lists(one_document(), min_size=1, max_size=8)
batch_sizes = st.integers(1, 4)
lengths = st.sampled_from([1, 2, 3, 7, 64, 100])


def rows(batches: list[Batch]) -> Iterator[list[Placed]]:
    """The tokens of every row of all batches, padding left out."""
    for batch in batches:
        arrays = (batch.tokens.ids, batch.weights, batch.groups, batch.tokens.positions, batch.tokens.segments)
        for row in zip(*(np.asarray(x).tolist() for x in arrays), strict=True):
            yield [token for token in zip(*row, strict=True) if token[4] > 0]


def assert_padding_is_empty_and_on_the_right(batches: list[Batch]) -> None:
    for batch in batches:
        padding = batch.tokens.segments == 0
        assert (np.diff(padding.astype(int), axis=1) >= 0).all()
        for array in (batch.tokens.ids, batch.weights, batch.groups, batch.tokens.positions):
            assert (array[padding] == 0).all()


def packed_by_hand(documents: list[Document], length: int, cross_document: bool) -> list[list[Placed]]:
    """The stream of all documents, EOS after each, cut into blocks."""
    stream = []
    for number, document in enumerate(documents):
        for token, weight in zip(document.token_ids.tolist(), document.weights.tolist(), strict=True):
            stream.append((token, weight, document.group, number))
        stream.append((EOS, 0.0, document.group, number))
    blocks = []
    for start in range(0, len(stream), length):
        block = stream[start : start + length]
        numbers = [number for *_, number in block]
        placed = []
        for i, (token, weight, domain, number) in enumerate(block):
            if cross_document:
                placed.append((token, weight, domain, i, 1))
            else:
                placed.append((token, weight, domain, i - numbers.index(number), len(set(numbers[: i + 1]))))
        blocks.append(placed)
    return blocks


@given(documents, batch_sizes)
def test_padded_batches_hold_every_document_once(documents: list[Document], batch_size: int) -> None:
    expected = [
        [(t, w, d.group, i, 1) for i, (t, w) in enumerate(zip(d.token_ids.tolist(), d.weights.tolist(), strict=True))]
        for d in documents
    ]
    got = rows(list(padded(documents, batch_size, MAX_LENGTH, 3)))
    assert sorted(row for row in got if row) == sorted(row for row in expected if row)


@given(documents, batch_sizes)
def test_padded_batches_have_few_shapes_and_waste_little(documents: list[Document], batch_size: int) -> None:
    batches = list(padded(documents, batch_size, MAX_LENGTH, 3))
    assert len(batches) == -(-len(documents) // batch_size)
    assert_padding_is_empty_and_on_the_right(batches)
    for batch in batches:
        longest = int((batch.tokens.segments > 0).sum(1).max())
        assert batch.shape in {(batch_size, length) for length in (64, 128, MAX_LENGTH)}
        assert batch.shape[1] < 2 * max(longest, SHORTEST)
        assert batch.num_groups == 3


@given(documents, batch_sizes)
def test_padded_batches_come_in_order_of_length(documents: list[Document], batch_size: int) -> None:
    """So that documents of like length share a batch."""
    widths = [batch.shape[1] for batch in padded(documents, batch_size, MAX_LENGTH)]
    assert widths == sorted(widths)


def test_padded_batches_are_never_longer_than_the_limit() -> None:
    document = Document(np.ones(10, np.int32), np.ones(10, np.float32))
    (batch,) = padded([document], batch_size=2, max_length=10)
    assert batch.shape == (2, 10) and batch.tokens.count == 10


@given(documents, batch_sizes)
def test_side_by_side_every_document_is_whole_and_once(documents: list[Document], batch_size: int) -> None:
    batches = list(side_by_side(documents, batch_size, MAX_LENGTH, 3))
    assert_padding_is_empty_and_on_the_right(batches)
    got = []
    for row in rows(batches):
        for segment in sorted({token[4] for token in row}):
            got.append([token[:4] for token in row if token[4] == segment])
    expected = [
        [(t, w, d.group, i) for i, (t, w) in enumerate(zip(d.token_ids.tolist(), d.weights.tolist(), strict=True))]
        for d in documents
    ]
    assert sorted(got) == sorted(document for document in expected if document)


def test_side_by_side_holds_as_many_rows_as_documents_need() -> None:
    """Each fills a row; above 256 equal numbers are different objects in Python."""
    ids = np.ones(SHORTEST, np.int32)
    whole = [Document(ids * n, np.ones(SHORTEST, np.float32)) for n in range(1, 301)]
    batches = list(side_by_side(whole, 100, SHORTEST))
    assert sorted(int(row[0][0]) for row in rows(batches)) == [*range(1, 301)]


@given(documents, batch_sizes)
def test_side_by_side_is_one_shape_and_wastes_little(documents: list[Document], batch_size: int) -> None:
    batches = list(side_by_side(documents, batch_size, MAX_LENGTH, 3))
    (shape,) = {batch.shape for batch in batches}
    tokens = sum(len(document.token_ids) for document in documents)
    used = [len(row) for row in rows(batches) if row]
    assert shape[0] <= batch_size and shape[1] <= MAX_LENGTH and shape[1] - max(1, tokens) < SHORTEST
    # No two rows would fit into one, no batch could be spared, and rows without tokens are fewer than batches.
    assert all(a + b > shape[1] for a, b in combinations(used, 2))
    assert len(batches) == -(-max(1, len(used)) // batch_size)
    assert sum(len(batch.tokens.ids) for batch in batches) - max(1, len(used)) < len(batches)


@given(documents, batch_sizes, lengths, st.booleans())
def test_packed_blocks_are_the_stream_of_documents_cut(
    documents: list[Document], batch_size: int, length: int, cross_document: bool
) -> None:
    batches = list(packed(documents, batch_size, length, EOS, 3, cross_document))
    assert all(batch.shape == (batch_size, length) and batch.num_groups == 3 for batch in batches)
    assert_padding_is_empty_and_on_the_right(batches)
    blocks = packed_by_hand(documents, length, cross_document)
    assert [row for row in rows(batches) if row] == blocks
    assert len(batches) == -(-len(blocks) // batch_size)


def test_segments_and_positions_restart_in_each_block() -> None:
    texts = [[1, 2, 3], [4, 5], [6, 7, 8]]
    documents = [Document(np.array(ids, np.int32), np.ones(len(ids), np.float32)) for ids in texts]
    (batch,) = packed(documents, batch_size=3, length=5, eos_token_id=EOS)
    assert batch.tokens.ids.tolist() == [[1, 2, 3, EOS, 4], [5, EOS, 6, 7, 8], [EOS, 0, 0, 0, 0]]
    assert batch.tokens.segments.tolist() == [[1, 1, 1, 1, 2], [1, 1, 2, 2, 2], [1, 0, 0, 0, 0]]
    assert batch.tokens.positions.tolist() == [[0, 1, 2, 3, 0], [0, 1, 0, 1, 2], [0, 0, 0, 0, 0]]
    assert batch.weights.tolist() == [[1, 1, 1, 0, 1], [1, 0, 1, 1, 1], [0, 0, 0, 0, 0]]


def test_across_documents_a_block_is_one_segment() -> None:
    documents = [Document(np.full(2, i, np.int32), np.ones(2, np.float32)) for i in (1, 2)]
    (batch,) = packed(documents, batch_size=1, length=8, eos_token_id=EOS, cross_document=True)
    assert batch.tokens.segments.tolist() == [[1, 1, 1, 1, 1, 1, 0, 0]]
    assert batch.tokens.positions.tolist() == [[0, 1, 2, 3, 4, 5, 0, 0]]


@given(documents, batch_sizes, lengths, st.booleans())
def test_tokens_are_counted_without_padding(
    documents: list[Document], batch_size: int, length: int, cross_document: bool
) -> None:
    tokens = sum(len(document.token_ids) for document in documents)
    blocks = packed(documents, batch_size, length, EOS, cross_document=cross_document)
    assert sum(batch.tokens.count for batch in blocks) == tokens + len(documents)
    assert sum(batch.tokens.count for batch in padded(documents, batch_size, MAX_LENGTH)) == tokens


@pytest.mark.parametrize("shares", [1, 2, 3, 6])
def test_shares_are_as_many_rows_each_and_the_batch_together(shares: int) -> None:
    ids = [np.full(n, n, np.int32) for n in range(1, 7)]
    (batch,) = padded([Document(x, x.astype(np.float32)) for x in ids], 6, MAX_LENGTH)
    parts = [share(batch, index, shares) for index in range(shares)]
    assert {part.shape for part in parts} == {(6 // shares, SHORTEST)}
    np.testing.assert_array_equal(np.concatenate([part.tokens.ids for part in parts]), batch.tokens.ids)
    np.testing.assert_array_equal(np.concatenate([part.weights for part in parts]), batch.weights)


@given(documents, st.integers(0, 70))
def test_skip_first_takes_the_weight_where_positions_begin_and_nothing_else(
    documents: list[Document], count: int
) -> None:
    """In a packed row each document begins at position 0, and has an attention sink of its own there."""
    for batch in [*padded(documents, 2, MAX_LENGTH), *packed(documents, 2, 16, eos_token_id=0)]:
        skipped = skip_first(batch, count)
        for row, (weights, positions) in enumerate(zip(batch.weights, batch.tokens.positions, strict=True)):
            expected = [0 if p < count else w for p, w in zip(positions, weights, strict=True)]
            assert skipped.weights[row].tolist() == expected
        assert skipped.tokens is batch.tokens and skipped.groups is batch.groups
