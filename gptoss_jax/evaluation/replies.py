"""What generated replies say: loops, variety, ends, harmony, answers; and two models' replies to the same rows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np

from ..data.answers import ANSWER_KINDS
from ..errors import DataError
from .intervals import DRAWS, TAILS, Estimate, Quantity, clusters, estimates

LOOP_SPAN = 20  # tokens
LOOP_TIMES = 4
NGRAM = 4

COLUMNS: dict[str, tuple[str, bool]] = {
    "correct": ("exact match", True),
    "loops": ("loops", True),
    "ended": ("ends naturally", True),
    "harmony": ("valid harmony", True),
    "distinct_4": ("distinct-4", False),
}
"""What of each reply a mean is taken, with its label, and whether it is a share of replies."""


@dataclass(frozen=True)
class Judged:
    """What is counted of one reply."""

    loops: bool
    distinct_4: float
    """Different 4-grams by all 4-grams; 1 where there is none."""
    ended: bool
    harmony: bool
    """Whether it reaches a final channel."""
    length: int
    """Tokens."""
    correct: bool | None = None
    """None where the row has no answer."""


def judge(
    token_ids: Sequence[int],
    parts: Sequence[tuple[str, str]],
    ended: bool,
    answer: Any = None,
    kind: str = "exact",
) -> Judged:
    """Judge a reply by its tokens, its channels with their contents, and whether it ended by itself.

    `answer` is what `data.answers.read_answers` reads of the row, None where it has none. A reply without a final
    channel answers nothing."""
    final = next((content for channel, content in reversed(parts) if channel == "final"), None)
    said = None if final is None else ANSWER_KINDS[kind].of_reply(final)
    correct = None if answer is None else said is not None and bool(said == answer)
    return Judged(loops(token_ids), distinct(token_ids), ended, final is not None, len(token_ids), correct)


def loops(token_ids: Sequence[int]) -> bool:
    """Whether a span of LOOP_SPAN tokens or more stands LOOP_TIMES times or more in a reply, without overlap.

    A longer span that does so begins with one of LOOP_SPAN tokens that does: those alone are looked at, each place
    once."""
    free_from: dict[tuple[int, ...], int] = {}  # of each span: where its next place may begin
    times: dict[tuple[int, ...], int] = {}
    for at in range(len(token_ids) - LOOP_SPAN + 1):
        span = tuple(token_ids[at : at + LOOP_SPAN])
        if at < free_from.get(span, 0):
            continue
        # The first free place is always taken: no other choice leaves more room.
        free_from[span], times[span] = at + LOOP_SPAN, times.get(span, 0) + 1
        if times[span] == LOOP_TIMES:
            return True
    return False


def distinct(token_ids: Sequence[int]) -> float:
    """Different 4-grams of a reply by all of them; 1 where there is none."""
    grams = [tuple(token_ids[at : at + NGRAM]) for at in range(len(token_ids) - NGRAM + 1)]
    return len({*grams}) / len(grams) if grams else 1.0


@dataclass(frozen=True)
class RepliesCompared:
    """A model's replies beside the baseline's to the same rows, by the names of COLUMNS.

    "correct" is absent where rows have no answers."""

    rows: int
    estimates: Mapping[str, Estimate]
    """The model's own means."""
    differences: Mapping[str, Estimate]
    """The model's less the baseline's, paired by row."""
    median_length: float


def compare_replies(
    baseline: Sequence[Judged], other: Sequence[Judged], draws: int = DRAWS, seed: int = 0
) -> RepliesCompared:
    """`other` beside `baseline`, a reply a row in the same order. DataError where there are fewer than two rows."""
    if len(baseline) != len(other):
        raise DataError(f"{len(other)} replies stand beside {len(baseline)} of the baseline: ask both the same rows")
    names = [name for name in COLUMNS if all(getattr(reply, name) is not None for reply in (*baseline, *other))]
    base_RK, other_RK = (
        np.array([[getattr(reply, name) for name in names] for reply in of], np.float64) for of in (baseline, other)
    )
    columns = [*other_RK.T, *(other_RK - base_RK).T]
    rows = clusters(np.arange(len(other)), columns)
    found = estimates(rows, [_mean_of(at) for at in range(len(columns))], draws, seed, studentised=False)
    means, differences = dict(zip(names, found, strict=False)), dict(zip(names, found[len(names) :], strict=True))
    for name in names:
        if COLUMNS[name][1]:
            means[name], differences[name] = wilson(means[name], len(other)), widened(differences[name], len(other))
    return RepliesCompared(len(other), means, differences, float(np.median([reply.length for reply in other])))


def _mean_of(column: int) -> Quantity:
    return lambda means: means[..., column]


def wilson(share: Estimate, rows: int) -> Estimate:
    """A share with Wilson's interval, which holds for few rows and near 0 and 1, where draws do not."""
    z = NormalDist().inv_cdf(TAILS[1])
    middle, n = (share.value + z**2 / (2 * rows)) / (1 + z**2 / rows), rows
    half = z * math.sqrt(share.value * (1 - share.value) / n + (z / (2 * n)) ** 2) / (1 + z**2 / n)
    # Rounding must not leave a share of 0 or 1 outside.
    low, high = min(share.value, middle - half), max(share.value, middle + half)
    return replace(share, low=low, high=high).within(0.0, 1.0)


def widened(difference: Estimate, rows: int) -> Estimate:
    """A difference of shares. Where no row differs, no draw does, and would say that none ever will: but what never
    occurred in n rows may have the probability 1 − 0.025^(1/n)."""
    if difference.error:
        return difference
    unseen = 1 - TAILS[0] ** (1 / rows)
    return replace(difference, low=difference.value - unseen, high=difference.value + unseen).within(-1.0, 1.0)
