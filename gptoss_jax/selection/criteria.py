"""What experts are ranked by. Letters: see `config`.

A criterion is declared once, in the table below; names, help, the check of columns and its error follow from there.
To add one, declare it there, and write its formula into the table of tests/test_select.py. The command line reads this
module when it starts, so NumPy is imported only where a criterion needs it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ProfileError, UserError

Score = Callable[[Mapping[str, Any], int], Any]
"""From the columns of a saliency table and a seed to the scores, all arrays [L, E]."""


@dataclass(frozen=True)
class Criterion:
    """A score of experts: those with a higher one stay.

    Args:
        name: What the command line and files call it.
        score: The score. It may read `count` and the columns in `needs`, and no others.
        needs: Columns that it reads beside `count`, which every table has.
        help: What it is, in a few words.
        hint: What to do where a profile lacks one of these columns.
        mass: The criterion of which experts hold shares, where a share is asked for: a sum itself, reap_sum for a mean,
            since means do not add up. Empty where scores may be negative or are drawn.
        of_weights: Whether its columns are of a model's weights alone, `convert.scores.COLUMNS`, and not a profile's.
    """

    name: str
    score: Score
    needs: tuple[str, ...]
    help: str
    hint: str = "profile again"
    mass: str = "reap_sum"
    of_weights: bool = False


def _sum(column: str) -> Score:
    return lambda columns, _: columns[column]


def _mean(column: str) -> Score:
    # Those of a mix of domains may be counts below 1.
    return lambda columns, _: columns[column] / (columns["count"] + (columns["count"] == 0))


def _root_mean(column: str) -> Score:
    return lambda columns, _: _mean(column)(columns, 0) ** 0.5


def _random(columns: Mapping[str, Any], seed: int) -> Any:
    import numpy as np

    return np.random.default_rng(seed).random(columns["count"].shape)


_DECLARED = (
    Criterion("reap", _mean("gate_norm_sum"), ("gate_norm_sum",), "mean of g·n over the tokens that chose the expert"),
    Criterion("reap_sum", _sum("gate_norm_sum"), ("gate_norm_sum",), "sum of g·n"),
    Criterion("frequency", _sum("count"), (), "how many tokens chose the expert", mass="frequency"),
    Criterion("gate", _sum("gate_sum"), ("gate_sum",), "sum of g", mass="gate"),
    Criterion("ean_sum", _sum("norm_sum"), ("norm_sum",), "sum of n", mass="ean_sum"),
    Criterion("ean_mean", _mean("norm_sum"), ("norm_sum",), "mean of n"),
    Criterion("reap_l2", _root_mean("gate_norm_sq_sum"), ("gate_norm_sq_sum",), "root of the mean of (g·n)²"),
    Criterion(
        "eaft_reap",
        _sum("eaft_gate_norm_sum"),
        ("eaft_gate_norm_sum",),
        "sum of w·g·n, of a profile with --eaft",
        "profile again with --eaft",
        mass="",
    ),
    Criterion(
        "swap",
        _sum("swap_sum"),
        ("swap_sum",),
        "sum of ‖Δ‖²/‖h‖², of a profile with --swap; over the kept tokens it is their mean, with 0 for others' tokens",
        "profile again with --swap",
        mass="swap",
    ),
    Criterion(
        "aimer",
        lambda columns, _: -columns["aimer"],
        ("aimer",),
        "less the mean of |weights| over their root mean square (arXiv:2603.18492), of a MODEL in the place of PROFILE",
        "it is of the weights alone: give the model in the place of the profile",
        mass="",
        of_weights=True,
    ),
    Criterion("random", _random, (), "drawn with --seed, for comparison", mass=""),
)
# The criteria of rankings that follow from `greedy.eliminate`, which have no profile: what its tokens count.
GREEDY, GREEDY_COSINE = "greedy", "greedy_cosine"
ELIMINATIONS = {
    GREEDY: "of each layer again and again the expert goes whose absence changes the layer's output least, relative to "
    "the residual stream behind it",
    GREEDY_COSINE: "the same, and a token counts by how far the layer turns its stream: 1 − the cosine of the stream "
    "before and behind it",
}
CRITERIA = {criterion.name: criterion for criterion in _DECLARED}
LETTERS = (
    "g is the gate of a chosen expert, n the norm of its output, w the weight that EAFT gives the token, Δ the change "
    "of the layer's output where the expert is dropped and the next best one enters, h the residual stream behind it."
)


def named(criterion: str) -> Criterion:
    """The criterion of that name; UserError where there is none."""
    if criterion not in CRITERIA:
        raise UserError(f"there is no criterion {criterion!r}: take one of {', '.join(CRITERIA)}")
    return CRITERIA[criterion]


def scores(columns: Mapping[str, Any], criterion: str, seed: int) -> Any:
    """The scores [L, E] of a saliency table's columns, each [L, E], by the criterion of that name.

    UserError where there is no such criterion, ProfileError where the table lacks a column that it needs.
    """
    declared = named(criterion)
    if missing := [column for column in declared.needs if column not in columns]:
        raise ProfileError(
            f"criterion {criterion!r} needs the column {missing[0]!r}, which this profile lacks: {declared.hint}"
        )
    return declared.score(columns, seed)


def masses(columns: Mapping[str, Any], criterion: str) -> Any:
    """What each expert holds [L, E], of which it has a share, by a criterion that has a mass."""
    return scores(columns, CRITERIA[criterion].mass, 0)
