"""Intervals by the jackknife: against formulas, tables and simulated truths."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gptoss_jax.cli import cli
from gptoss_jax.errors import ProfileError, RankingError
from gptoss_jax.run.profile import Profile
from gptoss_jax.selection.criteria import CRITERIA
from gptoss_jax.selection.intervals import intervals, student, unsettled
from gptoss_jax.selection.ranking import rank

from .made_up import E, Finished, L, some_sums

FOLDS = 10


@pytest.mark.parametrize("degrees", range(1, 14))
@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.999])
def test_quantiles_are_those_of_scipy(level: float, degrees: int) -> None:
    assert student(level, degrees) == pytest.approx(stats.t.ppf((1 + level) / 2, degrees), rel=1e-9)


def by_hand(columns: dict[str, np.ndarray], criterion: str) -> tuple[np.ndarray, np.ndarray]:
    """Score and half an interval of each expert, one after the other: each fold left out, and the rest brought to the
    size of the whole."""
    layers, folds, experts = columns["count"].shape
    score, half = np.zeros((2, layers, experts))
    for layer in range(layers):
        pairs = columns["count"][layer].sum()
        replicates = []
        for left_out in range(folds):
            rest = [fold for fold in range(folds) if fold != left_out]
            share = columns["count"][layer, rest].sum() / pairs
            one = {name: sum(x[layer, fold] for fold in rest) / share for name, x in columns.items()}
            replicates.append(CRITERIA[criterion].score(one, 0))
        score[layer] = CRITERIA[criterion].score({name: x[layer].sum(0) for name, x in columns.items()}, 0)
        for expert in range(experts):
            values = [float(replicate[expert]) for replicate in replicates]
            mean = sum(values) / folds
            squares = sum((value - mean) ** 2 for value in values)
            half[layer, expert] = stats.t.ppf(0.975, folds - 1) * math.sqrt((folds - 1) / folds * squares)
    return score, half


@pytest.mark.parametrize("criterion", [c.name for c in CRITERIA.values() if c.name != "random" and not c.of_weights])
def test_intervals_equal_a_loop(criterion: str) -> None:
    columns = some_sums(3, [""], range(4), eaft=True, swap=True, folds=FOLDS).by_fold()
    score, half = by_hand(columns, criterion)
    found = intervals(columns, criterion)
    np.testing.assert_allclose(found.score, score)
    np.testing.assert_allclose(found.low, score - half)
    np.testing.assert_allclose(found.high, score + half)


def simulated(cases: int, rows: int, seed: int) -> dict[str, np.ndarray]:
    """By case, fold and expert: counts of tokens, and sums of values whose mean is 1, 2, … over an expert's tokens.

    Rows are of very different lengths, prefer some experts, and have values of their own; all three are skewed. Folds
    are drawn row by row, so that they are uneven.
    """
    rng, experts = np.random.default_rng(seed), 4
    count, mass = np.zeros((2, cases, FOLDS, experts))
    for case in range(cases):
        folds = rng.integers(0, FOLDS, rows)
        tokens = np.ceil(rng.lognormal(3, 0.7, rows))
        chosen = rng.poisson(tokens[:, None] * rng.dirichlet(np.full(experts, 2.0), rows))
        np.add.at(count[case], folds, chosen)
        np.add.at(mass[case], folds, chosen * rng.exponential(np.arange(1, experts + 1), (rows, experts)))
    return {"count": count.astype(np.int64), "gate_norm_sum": mass}


CASES = 500


@pytest.fixture(scope="module")
def cases() -> dict[str, np.ndarray]:
    return simulated(CASES, rows=400, seed=0)


@pytest.mark.parametrize("criterion", ["reap", "frequency", "reap_sum"])
def test_intervals_cover_the_truth(criterion: str, cases: dict[str, np.ndarray]) -> None:
    """In 92 to 98 of a hundred cases, at 95 %; sums are those of so many tokens as there were."""
    found = intervals(cases, criterion)
    means, tokens = np.arange(1.0, 5.0), cases["count"].sum((1, 2))[:, None] / 4
    truth = {"reap": means, "frequency": tokens, "reap_sum": tokens * means}[criterion]
    assert 0.92 < ((found.low <= truth) & (truth <= found.high)).mean() < 0.98


def test_what_is_settled_is_on_the_right_side(cases: dict[str, np.ndarray]) -> None:
    """The means are 1, 2, 3 and 4, so that the last two stay. Of intervals at 95 % some 2.5 % lie above."""
    open_experts = unsettled(cases, 2)
    best = [experts[:2] for experts in rank({name: x.sum(1) for name, x in cases.items()}).layers]
    wrong = sum(
        (e in kept) != (e > 1) and e not in some
        for kept, some in zip(best, open_experts, strict=True)
        for e in range(4)
    )
    assert wrong <= 0.025 * CASES * 4
    share_open = np.mean([len(some) for some in open_experts]) / 4
    assert 0.05 < share_open < 0.95


# What is not settled.


def columns_of(count: Any, mass: Any) -> dict[str, np.ndarray]:
    """Of one layer, from [folds, E]."""
    return {"count": np.array([count]), "gate_norm_sum": np.array([mass], float)}


def even(values: list[float], scatter: float) -> dict[str, np.ndarray]:
    """Means that are about these in each of ten folds of 100 tokens an expert, up and down in turn."""
    turns = np.where(np.arange(FOLDS)[:, None] % 2, scatter, -scatter) * np.where(np.arange(len(values)) % 2, 1, -1)
    return columns_of(np.full((FOLDS, len(values)), 100), 100 * (np.array(values) + turns))


def test_experts_far_from_the_cut_are_settled_and_those_at_it_are_not() -> None:
    columns = even([9.0, 5.1, 4.9, 1.0, 8.0], scatter=0.5)
    assert unsettled(columns, 3) == [[1, 2]]
    assert unsettled(columns, 1) == [[]]  # the first two rise and fall together
    assert unsettled(columns, 4) == [[]]
    assert unsettled(even([9.0, 5.1, 4.9, 1.0, 8.0], scatter=0.01), 3) == [[]]


def test_all_experts_that_stay_are_settled() -> None:
    assert unsettled(even([3.0, 2.0, 1.0], scatter=5), 3) == [[]]


def test_an_expert_of_one_token_is_not_settled_and_leaves_the_others_alone() -> None:
    """But for the one with whom it might change places."""
    columns = even([9.0, 7.0, 3.0, 1.0, 0.0], scatter=0.1)
    columns["count"][0, :, 4], columns["gate_norm_sum"][0, :, 4] = 0, 0
    columns["count"][0, 2, 4], columns["gate_norm_sum"][0, 2, 4] = 1, 5.0
    assert unsettled(columns, 1) == [[4]]
    assert unsettled(columns, 2) == [[1, 4]]


@pytest.mark.parametrize("sign", [1, -1])
def test_experts_never_chosen_are_settled_below_a_cut_and_open_among_themselves(sign: int) -> None:
    """Also where scores are below 0, as EAFT's may be."""
    columns = even([9.0, 7.0, 3.0, 0.0, 0.0], scatter=0.1)
    columns["count"][0, :, 3:] = 0
    columns["gate_norm_sum"][0, :, 3:] = 0
    if sign < 0:
        columns["gate_norm_sum"] = columns["gate_norm_sum"] - 20 * columns["count"]
    assert unsettled(columns, 2) == [[]]
    if sign > 0:
        assert unsettled(columns, 4) == [[3, 4]]
    found = intervals(columns)
    assert (
        (found.score[0, 3:] == 0).all() and (found.low[0, 3:] == -np.inf).all() and np.isfinite(found.high[0, :3]).all()
    )


def test_rows_of_one_fold_settle_nothing() -> None:
    columns = columns_of([[9, 9, 9], [0, 0, 0]], [[9, 2, 1], [0, 0, 0]])
    assert unsettled(columns, 1) == [[0, 1, 2]]
    assert (intervals(columns).high == np.inf).all()


@given(st.integers(0, 2**31), st.permutations(range(FOLDS)), st.integers(1, E))
def test_folds_have_no_order_and_empty_ones_do_not_count(seed: int, order: list[int], keep: int) -> None:
    columns = some_sums(seed, [""], range(4), folds=FOLDS).by_fold()
    one = intervals(columns)
    for other in (
        {name: x[:, order] for name, x in columns.items()},
        {name: np.concatenate([x, np.zeros_like(x)], axis=1) for name, x in columns.items()},
    ):
        np.testing.assert_allclose(intervals(other).high, one.high)
        assert unsettled(other, keep) == unsettled(columns, keep)


def test_a_drawn_score_does_not_vary_with_the_rows() -> None:
    columns = some_sums(1, [""], range(4), folds=FOLDS).by_fold()
    found = intervals(columns, "random", 3)
    np.testing.assert_allclose(found.low, found.high)
    np.testing.assert_array_equal(found.score, CRITERIA["random"].score({"count": np.zeros((L, E))}, 3))


def test_a_missing_column_is_named() -> None:
    columns = some_sums(1, [""], range(4), folds=FOLDS).by_fold()
    with pytest.raises(ProfileError, match=r"needs the column 'eaft_gate_norm_sum'.*--eaft"):
        intervals(columns, "eaft_reap")


# Of a profile.


def test_a_profile_has_intervals_of_all_rows_and_of_a_domain(finished: Finished) -> None:
    profile = Profile.open(finished("a", 1, "xy", folds=FOLDS))
    for domain in (None, "y"):
        expected = intervals(profile.sums.by_fold(domain), "gate")
        np.testing.assert_array_equal(profile.intervals("gate", domain), expected)
        np.testing.assert_allclose(profile.intervals("reap", domain).score, profile.columns(domain)["saliency_mean"])
        assert profile.unsettled("40%", "gate", domain) == unsettled(profile.sums.by_fold(domain), 2, "gate")
    assert profile.unsettled(2) == unsettled(profile.sums.by_fold(), 2)
    with pytest.raises(ProfileError, match="no domain 'z': there are x, y"):
        profile.intervals(domain="z")
    with pytest.raises(RankingError, match="--keep is 'half'"):
        profile.unsettled("half")


def test_a_profile_without_folds_says_so(finished: Finished) -> None:
    folder = finished("a", 1)
    for call in (lambda p: p.intervals(), lambda p: p.unsettled(2)):
        with pytest.raises(ProfileError, match=r"a: keeps no folds of its rows.*profile its rows again"):
            call(Profile.open(folder))
    assert "not settled" not in (folder / "report.md").read_text()


def test_the_report_counts_them_by_layer_and_lists_them_for_half(finished: Finished) -> None:
    folder = finished("a", 1, folds=FOLDS)
    text = (folder / "report.md").read_text()
    section = text.split("## Experts that are not settled\n")[1].split("\n## ")[0]
    by_fold = Profile.open(folder).sums.by_fold()
    found = {keep: unsettled(by_fold, keep) for keep in (1, 2, 3)}
    assert "| layer | keep 1 | keep 2 | keep 3 |" in section
    for layer in range(L):
        counts = " | ".join(str(len(found[keep][layer])) for keep in (1, 2, 3))
        assert f"\n| {layer} | {counts} |\n" in section
        assert f"\n- layer_{layer}: {found[2][layer]}" in section
    assert "Where 2 stay:" in section and "10 folds" in section


# Few tokens.


def test_experts_of_few_tokens_stand_behind() -> None:
    columns = {
        "count": np.array([[50, 2, 0, 40, 3, 10]]),
        "gate_norm_sum": np.array([[100.0, 90.0, 0.0, 120.0, 99.0, 10.0]]),
    }
    assert rank(columns).layers == [[1, 4, 3, 0, 5, 2]]
    ranking = rank(columns, min_count=10)
    assert ranking.layers == [[3, 0, 5, 4, 1, 2]] and ranking.counts == [[40, 50, 10, 3, 2, 0]]
    rule = ", behind them those of fewer than 10 tokens by falling reap_sum"
    assert ranking.origin.rule == f"falling score{rule}" and ranking.keep(2).origin.rule == f"best 2{rule}"
    assert rank(columns, min_count=51).layers == rank(columns, "reap_sum").layers
    assert rank(columns, "random", 1, min_count=1).layers == rank(columns, "random", 1).layers


def test_the_command_counts_them(finished: Finished, tmp_path: Path) -> None:
    folder = finished("a", 1)
    counts = Profile.open(folder).columns()["count"]
    least = int(np.median(counts))
    argv = ["rank", str(folder), "--min-count", str(least), "--out", str(tmp_path / "ranking.json")]
    said = CliRunner().invoke(cli, argv, catch_exceptions=False).output
    thin = int((counts < least).sum())
    assert thin and f"{E} experts, {thin} of them behind for want of {least} tokens" in said
    written = json.loads((tmp_path / "ranking.json").read_text())
    assert written["layers"] == Profile.open(folder).rank(min_count=least).layers
    assert f"fewer than {least} tokens" in written["rule"]
