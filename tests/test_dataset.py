"""Datasets: the same batches each time, counts that are kept, and one exchange between processes."""

import hashlib
from collections.abc import Iterator
from typing import Any, Literal, get_args

import jax
import numpy as np
import pytest

from gptoss_jax.data.batching import Document
from gptoss_jax.data.dataset import Dataset, Layout
from gptoss_jax.data.groups import FOLDS, MAX_DOMAINS, MAX_GROUPS, MAX_JOINT, Groups, domains_of, folds_of
from gptoss_jax.data.rows import Row
from gptoss_jax.devices import hosts
from gptoss_jax.errors import DataError

Kind = Literal["padded", "side by side", "packed"]
KINDS = get_args(Kind)
ALONE = hosts.Share(0, 1, True, (0,), 1)
DOMAINS = ["a", "b", "c"]
GROUPS = Groups(DOMAINS)


def documents() -> list[Document]:
    """Nine of lengths 5 to 77, of whose tokens two thirds are kept; one has none, one was truncated."""
    rng = np.random.default_rng(0)
    made = []
    for n in range(9):
        length = 5 + 9 * n
        weights = np.float32(rng.random(length) < 0.7) * (n != 4)
        made.append(Document(rng.integers(1, 99, length).astype(np.int32), weights, n % 3, truncated=n == 7))
    return made


def make(kind: Kind, **layout: Any) -> Dataset:
    rows = [Row(str(n), str(n), DOMAINS[n % 3]) for n in range(9)]
    return Dataset(rows, documents(), GROUPS, Layout(kind, 4, 80, eos=0, **layout), ALONE)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_the_same_each_time(kind: Kind) -> None:
    data = make(kind, skip_first=1)
    first, again = list(data.batches()), list(data.batches())
    assert len(first) == len(again) > 0
    for one, other in zip(first, again, strict=True):
        for mine, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_those_of_the_batches(kind: Kind) -> None:
    data = make(kind, skip_first=2)
    batches = list(data.batches())
    assert data.total_tokens == sum(batch.tokens.count for batch in batches)
    assert data.kept == sum(int((batch.weights != 0).sum()) for batch in batches)
    assert (data.truncated, data.empty) == (1, 1)
    ends = 9 if kind == "packed" else 0
    assert data.total_tokens == data.tokens_of_process == sum(5 + 9 * n for n in range(9)) + ends


@pytest.mark.parametrize("kind", KINDS)
def test_processes_speak_once(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it is made: lengths are agreed on, and counts added. Batches can then be taken without a word."""
    said: list[Any] = []
    real = hosts.exchange
    monkeypatch.setattr(hosts, "exchange", lambda value: said.append(value) or real(value))
    data = make(kind)
    made = len(said)
    for _ in range(3):
        assert list(data.batches())
    assert made == len(said) == 2


def test_lengths_of_others_make_further_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another process has more rows, and longer ones, this one's batches are as many, and as long."""
    real = hosts.exchange
    monkeypatch.setattr(
        hosts, "exchange", lambda value: [*real(value), [128, 256, 256, 512] if len(value) == 3 else [0] * 4]
    )
    batches = list(make("padded").batches())
    assert [batch.shape[1] for batch in batches] == [128, 256, 256, 512]
    assert batches[3].tokens.count == 0


def test_no_token_is_kept() -> None:
    none = [Document(d.token_ids, np.zeros_like(d.weights), d.group) for d in documents()]
    with pytest.raises(DataError, match="no token is kept"):
        Dataset([Row("")], none, GROUPS, Layout("padded", 4, 80), ALONE).check_kept()


def rows_of(count: int) -> Iterator[Row]:
    return (Row("text", str(n), f"domain {n}") for n in range(count))


def test_too_many_domains() -> None:
    assert len(domains_of(list(rows_of(MAX_DOMAINS)), "kind")) == MAX_DOMAINS
    with pytest.raises(DataError, match=f"column 'kind' holds {MAX_DOMAINS + 1} domains, at most {MAX_DOMAINS}"):
        domains_of(list(rows_of(MAX_DOMAINS + 1)), "kind")


def test_co_activations_of_many_domains_are_counted_together() -> None:
    for count, joint in ((MAX_JOINT, MAX_JOINT), (MAX_JOINT + 1, 1)):
        domains = [f"domain {n}" for n in range(count)]
        groups = Groups(domains, folds_of(count))
        (batch,) = Dataset(list(rows_of(2)), documents()[:2], groups, Layout("padded", 2, 80), ALONE).batches()
        assert (batch.num_groups, batch.num_joint) == (count * folds_of(count), joint)


def test_the_group_of_a_row_is_its_domain_and_the_fold_of_its_hash() -> None:
    """Whatever other rows there are, and in whichever order."""
    rows = [Row(f"text {n}", str(n % 7), DOMAINS[n % 3]) for n in range(60)]
    groups = Groups(DOMAINS, FOLDS).of(rows)
    for row, group in zip(rows, groups, strict=True):
        digest = hashlib.sha256(f"{row.id}\n{row.text}".encode()).digest()
        assert group == DOMAINS.index(row.domain) * FOLDS + int.from_bytes(digest[:8], "big") % FOLDS
    assert {group % FOLDS for group in groups} == {*range(FOLDS)}
    assert Groups(DOMAINS, FOLDS).of(rows[40:20:-1]) == groups[40:20:-1]
    # Fewer folds are those of more, added.
    assert Groups(DOMAINS, 5).of(rows) == [group // FOLDS * 5 + group % FOLDS % 5 for group in groups]


def test_many_domains_have_fewer_folds() -> None:
    found = [folds_of(count) for count in range(1, MAX_DOMAINS + 1)]
    assert all(count * folds <= MAX_GROUPS for count, folds in enumerate(found, 1))
    assert [found.count(folds) for folds in (FOLDS, 5, 2, 1)] == [102, 204 - 102, 512 - 204, 1024 - 512]
    assert all(FOLDS % folds == 0 for folds in found)


def test_co_activations_are_of_domains() -> None:
    assert Groups(DOMAINS, 2).joint == (0, 0, 1, 1, 2, 2)
    assert Groups(DOMAINS).joint == ()
