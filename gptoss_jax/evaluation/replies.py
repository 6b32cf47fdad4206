"""What generated replies say: loops, variety, ends, harmony, answers; and two models' replies to the same rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..data.answers import ANSWER_KINDS
from ..errors import DataError
from .intervals import DRAWS, LEVEL, Estimate, clusters, estimates

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
    means, differences = {}, {}
    for name in names:
        first, second = (np.array([getattr(reply, name) for reply in of], float) for of in (baseline, other))
        found = estimates(
            clusters(np.arange(len(first)), [second, second - first]),
            [lambda m: m[..., 0], lambda m: m[..., 1]],
            draws,
            seed,
        )
        if COLUMNS[name][1]:
            found = [_widened(estimate, len(first)) for estimate in found]
            means[name] = replace(found[0], low=max(0.0, found[0].low), high=min(1.0, found[0].high))
        else:
            means[name] = found[0]
        differences[name] = found[1]
    return RepliesCompared(len(other), means, differences, float(np.median([reply.length for reply in other])))


def _widened(estimate: Estimate, rows: int) -> Estimate:
    """An estimate of a share that all rows agree on: draws of such rows agree too, and would say that it is certain.

    What never occurred in n rows may have the probability 1 − 0.025^(1/n)."""
    if estimate.error:
        return estimate
    unseen = 1 - ((1 - LEVEL) / 2) ** (1 / rows)
    return replace(estimate, low=max(-1.0, estimate.value - unseen), high=min(1.0, estimate.value + unseen))
