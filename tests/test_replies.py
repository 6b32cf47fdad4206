"""Loops, variety and answers of replies, against brute force, and two models' replies paired by row."""

import numpy as np
import pytest

from gptoss_jax.errors import DataError
from gptoss_jax.evaluation.replies import Judged, compare_replies, distinct, judge, loops
from tests.simulated import replies


def loops_by_brute_force(token_ids: list[int]) -> bool:
    """Every span of 20 tokens or more, at every place, counted without overlap."""
    n = len(token_ids)
    for length in range(20, n // 4 + 1):
        for first in range(n - 4 * length + 1):
            span, times, at = token_ids[first : first + length], 0, first
            while at <= n - length:
                found = token_ids[at : at + length] == span
                times, at = times + found, at + (length if found else 1)
            if times >= 4:
                return True
    return False


@pytest.mark.parametrize("seed", range(40))
def test_loops_are_those_of_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    span = [*rng.integers(0, 3, rng.integers(1, 30))]
    pieces = []
    for _ in range(rng.integers(2, 9)):
        pieces += span * int(rng.integers(1, 4)) + [*rng.integers(0, 50, rng.integers(0, 4))]
    token_ids = [int(token) for token in pieces[:260]]
    assert loops(token_ids) == loops_by_brute_force(token_ids)


def test_the_limits_of_a_loop() -> None:
    span = [*range(20)]
    assert loops(span * 4) and loops([100, *span * 4, 100])
    assert not loops((span * 4)[:-1]) and not loops(span * 3)


def test_a_span_may_be_short_of_tokens_and_places_do_not_overlap() -> None:
    assert loops([7] * 80) and not loops([7] * 79)
    assert loops([1, 2, 3] * 28) and not loops([1, 2, 3] * 26)
    apart = [*range(20)]
    assert loops([x for n in range(4) for x in [*apart, 100 + n]])
    assert not loops([]) and not loops([*range(1000)])


def test_a_long_reply_takes_little_time() -> None:
    assert not loops([int(x) for x in np.random.default_rng(0).integers(0, 200_000, 131_072)])


def test_distinct_4() -> None:
    assert distinct([1, 2, 3, 4, 5]) == 1 and distinct([1] * 7) == 0.25 and distinct([1, 2, 3]) == 1
    token_ids = [int(x) for x in np.random.default_rng(1).integers(0, 3, 200)]
    grams = {(a, b, c, d) for a, b, c, d in zip(*(token_ids[i:] for i in range(4)), strict=False)}
    assert distinct(token_ids) == len(grams) / 197


FINAL = [("analysis", "3 + 4, so 8?"), ("final", "It is 7.")]


@pytest.mark.parametrize(
    ("parts", "kind", "answer", "harmony", "correct"),
    [
        (FINAL, "exact", "It is 7.", True, True),
        (FINAL, "exact", "7", True, False),
        (FINAL[:1], "exact", "3 + 4, so 8?", False, False),
        ([], "exact", "x", False, False),
        ([], "exact", None, False, None),
        ([("final", "no"), ("final", " yes ")], "exact", "yes", True, True),
        ([("final", "")], "exact", None, True, None),
    ],
)
def test_a_reply_is_judged_by_its_final_channel(
    parts: list[tuple[str, str]], kind: str, answer: str | None, harmony: bool, correct: bool | None
) -> None:
    assert judge([1, 2, 3, 4, 5], parts, True, answer, kind) == Judged(False, 1.0, True, harmony, 5, correct)


def test_shares_are_means_and_differences_are_paired() -> None:
    base, other = replies(1, 60), replies(2, 60, right=0.5)
    found = compare_replies(base, other, draws=200)
    for name in ("correct", "loops", "ended", "harmony", "distinct_4"):
        first, second = (np.array([float(getattr(reply, name)) for reply in of]) for of in (base, other))
        assert found.estimates[name].value == pytest.approx(second.mean())
        difference = found.differences[name]
        assert difference.value == pytest.approx((second - first).mean())
        assert difference.error == pytest.approx((second - first).std(ddof=1) / np.sqrt(60))
        assert -1 <= difference.low <= difference.value <= difference.high <= 1
    assert found.median_length == np.median([reply.length for reply in other]) and found.rows == 60
    assert found.differences["correct"].p_value < 0.01 < found.differences["ended"].p_value


def test_rows_without_answers_have_no_exact_match() -> None:
    without = [Judged(**vars(reply) | {"correct": None}) for reply in replies(3, 9)]
    found = compare_replies(without, without, draws=20)
    assert "correct" not in found.estimates and "correct" not in found.differences and "loops" in found.estimates


def test_what_never_occurred_is_not_said_to_be_impossible() -> None:
    never = [Judged(False, 1.0, True, True, 9) for _ in range(50)]
    found = compare_replies(never, never, draws=50)
    unseen = 1 - 0.025 ** (1 / 50)
    own, difference = found.estimates["loops"], found.differences["loops"]
    z = 1.959964
    assert (own.low, own.value, own.high) == (0, 0, pytest.approx(z**2 / (50 + z**2))) and 0.07 < unseen < 0.072
    assert (difference.low, difference.high, difference.p_value) == (pytest.approx(-unseen), pytest.approx(unseen), 1)
    assert found.estimates["ended"].high == 1 and found.estimates["ended"].low == pytest.approx(50 / (50 + z**2))


def test_replies_to_other_rows_are_refused() -> None:
    with pytest.raises(DataError, match="8 replies stand beside 9"):
        compare_replies(replies(1, 9), replies(2, 8))
