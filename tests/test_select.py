"""Criteria against their formulas in plain loops, rankings of real tables, and files of rankings."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax.cli.prune import CRITERIA as OFFERED
from gptoss_jax.config import GPT_OSS_20B, TINY
from gptoss_jax.errors import ProfileError, RankingError
from gptoss_jax.select.criteria import CRITERIA
from gptoss_jax.select.keep_sets import keep_best, read_keep_sets
from gptoss_jax.select.ranking import rank, read_ranking
from gptoss_jax.statistics.eaft import EaftOptions, class_weights, cuts
from gptoss_jax.statistics.tables import Columns, read_columns

# Spec: what stays in each criterion, for one expert's row of the table.
FORMULAS = {
    "reap": lambda x: x["gate_norm_sum"] / x["count"],
    "reap_sum": lambda x: x["gate_norm_sum"],
    "frequency": lambda x: x["count"],
    "gate": lambda x: x["gate_sum"],
    "ean_sum": lambda x: x["norm_sum"],
    "ean_mean": lambda x: x["norm_sum"] / x["count"],
    "reap_l2": lambda x: math.sqrt(x["gate_norm_sq_sum"] / x["count"]),
    "eaft_reap": lambda x: x["eaft_gate_norm_sum"],
}
SUMS = ("gate_sum", "norm_sum", "gate_norm_sum", "gate_norm_sq_sum")
TOPICS = ("all", "health_or_medicine", "instruction_following", "law", "math", "safety", "science", "unsafety")


@st.composite
def tables(draw: st.DrawFn) -> Columns:
    """Columns in which ties and experts that were never chosen are common."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 9)))

    def column(values: st.SearchStrategy[Any], dtype: type) -> np.ndarray:
        size = math.prod(shape)
        return np.array(draw(st.lists(values, min_size=size, max_size=size)), dtype).reshape(shape)

    count = column(st.integers(0, 3), np.int64)
    sums = {name: column(st.integers(0, 4), np.float64) * (count > 0) for name in SUMS}
    return {"count": count, **sums, "eaft_gate_norm_sum": column(st.integers(-3, 3), np.float64) * (count > 0)}


def rank_by_hand(columns: Columns, criterion: str) -> list[list[int]]:
    ranking = []
    for layer in range(len(columns["count"])):
        chosen, never = [], []
        for expert in range(columns["count"].shape[1]):
            row = {name: column[layer, expert].item() for name, column in columns.items()}
            if row["count"] == 0:
                never.append(expert)
            else:
                chosen.append((-FORMULAS[criterion](row), expert))
        ranking.append([expert for _, expert in sorted(chosen)] + never)
    return ranking


def some_columns(count: list[list[int]], **more: list[list[float]]) -> Columns:
    return {"count": np.array(count, np.int64)} | {name: np.array(x, np.float64) for name, x in more.items()}


# Criteria


@pytest.mark.parametrize("criterion", FORMULAS)
@given(columns=tables())
@settings(deadline=None, max_examples=50)
def test_a_criterion_ranks_by_its_formula(criterion: str, columns: Columns) -> None:
    assert rank(columns, criterion) == rank_by_hand(columns, criterion)


def test_every_criterion_has_a_formula() -> None:
    assert set(CRITERIA) == {*FORMULAS, "random"}


def test_ties_go_to_the_lower_id() -> None:
    columns = some_columns([[2, 1, 2, 1]], gate_norm_sum=[[4, 3, 6, 2]])
    assert rank(columns) == [[1, 2, 0, 3]]


def test_experts_never_chosen_come_last_even_after_negative_scores() -> None:
    columns = some_columns([[0, 1, 0, 1]], eaft_gate_norm_sum=[[0, -5, 0, -4]])
    assert rank(columns, "eaft_reap") == [[3, 1, 0, 2]]


@given(tables(), st.integers(0, 2**32))
def test_random_is_seeded_and_leaves_experts_never_chosen_last(columns: Columns, seed: int) -> None:
    ranking = rank(columns, "random", seed)
    assert ranking == rank(columns, "random", seed)
    for count, experts in zip(columns["count"], ranking, strict=True):
        assert sorted(experts) == list(range(len(experts)))
        assert [count[expert] == 0 for expert in experts] == sorted(count == 0)


def test_random_leaves_experts_never_chosen_in_order_of_id() -> None:
    columns = some_columns([[1, 1] + [0] * 30])
    assert rank(columns, "random", 0)[0][2:] == list(range(2, 32))


def test_another_seed_gives_another_random_ranking() -> None:
    columns = some_columns([[1] * 32] * 4)
    rankings = [rank(columns, "random", seed) for seed in range(5)]
    assert all(a != b for i, a in enumerate(rankings) for b in rankings[:i])
    assert len({tuple(experts) for experts in rankings[0]}) == 4


def test_a_criterion_without_its_column_says_what_to_do() -> None:
    with pytest.raises(ProfileError, match=r"eaft_gate_norm_sum.*profile again with --eaft"):
        rank(some_columns([[1, 2]]), "eaft_reap")


# Weights of EAFT


def quantile_by_hand(values: list[float], q: float) -> float:
    values = sorted(values)
    at = (len(values) - 1) * q
    below = math.floor(at)
    above = min(below + 1, len(values) - 1)
    return values[below] + (at - below) * (values[above] - values[below])


@st.composite
def token_scores(draw: st.DrawFn) -> list[tuple[float, float]]:
    """(probability, entropy) with many ties."""
    eighths = st.integers(0, 8).map(lambda n: n / 8)
    return draw(st.lists(st.tuples(eighths, eighths), min_size=1, max_size=60))


def weights_by_hand(scores: list[tuple[float, float]], options: EaftOptions) -> list[float]:
    scored = [(p, h) for p, h in scores if not math.isnan(p)]
    if not scored:
        return [0.0] * len(scores)
    cut_p = quantile_by_hand([p for p, _ in scored], options.probability_quantile)
    cut_h = quantile_by_hand([h for _, h in scored], options.entropy_quantile)
    weights = []
    for p, h in scores:
        if math.isnan(p):
            weights.append(0.0)
        elif h > cut_h:
            weights.append(options.other)
        else:
            weights.append(options.right if p >= cut_p else options.wrong)
    return weights


@given(token_scores(), st.data())
def test_eaft_weighs_tokens_by_their_class(scores: list[tuple[float, float]], data: st.DataObject) -> None:
    unscored = data.draw(st.sets(st.integers(0, len(scores) - 1)))
    scores = [(math.nan, math.nan) if i in unscored else score for i, score in enumerate(scores)]
    # Dyadic, so that the quantile of the formula is the quantile to the last bit.
    options = data.draw(st.sampled_from([EaftOptions(0.25, 0.5), EaftOptions(0.5, 0.125, 3.0, -1.5, 0.5)]))
    probability, entropy = np.array(scores).T
    weights = class_weights(probability, entropy, cuts(probability, entropy, options), options)
    assert weights.tolist() == weights_by_hand(scores, options)


@pytest.mark.parametrize("num_unscored", [0, 5])
def test_eaft_cuts_at_the_fifteenth_percentile(num_unscored: int) -> None:
    rng = np.random.default_rng(0)
    probability, entropy = rng.random((2, 400))
    probability[:num_unscored] = entropy[:num_unscored] = math.nan
    weights = class_weights(probability, entropy, cuts(probability, entropy, EaftOptions()), EaftOptions())
    scores = list(zip(probability.tolist(), entropy.tolist(), strict=True))
    assert weights.tolist() == weights_by_hand(scores, EaftOptions(0.15, 0.15, 1.0, -2.0, 0.25))
    assert set(weights.tolist()) == {1.0, -2.0, 0.25} | ({0.0} if num_unscored else set())


def test_eaft_gives_no_weight_where_no_token_is_scored() -> None:
    nothing = np.full(3, math.nan)
    assert class_weights(nothing, nothing, cuts(nothing, nothing, EaftOptions()), EaftOptions()).tolist() == [0, 0, 0]


# Real tables


def test_the_real_saliency_table_gives_the_published_ranking(shared: Path) -> None:
    """The published ranking orders experts that were never chosen by chance; here they go by id."""
    columns = read_columns(shared / "data" / "seed1" / "20b_reap_saliency.parquet")
    published = json.loads((shared / "data" / "seed1" / "20b_reap_saliency_ranking_by_layer.json").read_text())
    never = [np.flatnonzero(count == 0).tolist() for count in columns["count"]]
    assert sum(len(experts) for experts in never) == 20
    for mine, theirs, last in zip(rank(columns), published, never, strict=True):
        chosen = len(mine) - len(last)
        assert mine[:chosen] == theirs[:chosen]
        assert mine[chosen:] == last == sorted(theirs[chosen:])


def test_the_real_usage_counts_give_the_published_ranking_by_frequency(shared: Path) -> None:
    usage = pq.read_table(shared / "data" / "seed1" / "20b_expert_usage.parquet").to_pylist()
    count = np.zeros((24, 32), np.int64)
    for row in usage:
        if row["kind"] == "usage_count":
            count[row["layer"], row["expert_i"]] = int(row["value"])
    published = json.loads((shared / "data" / "seed1" / "20b_expert_ranking_by_layer.json").read_text())
    assert rank({"count": count}, "frequency") == published


@pytest.mark.parametrize("topic", TOPICS)
def test_a_real_topical_ranking_gives_keep_sets(shared: Path, topic: str) -> None:
    file = shared / "data" / "fingerprint" / "topical_analytics" / f"{topic}.json"
    ranking = read_ranking(file, GPT_OSS_20B)
    raw = json.loads(file.read_text(encoding="utf-8"))
    assert ranking == [raw[f"layer_{layer}"] for layer in range(24)]
    keep_sets = keep_best(ranking, 12, GPT_OSS_20B)
    assert [len(kept) for kept in keep_sets] == [12] * 24
    assert keep_sets == [sorted(set(experts[:12])) for experts in ranking]


# Files


def write_json(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


RANKING = [[3, 0, 6, 1, 2, 4, 5], [5, 2, 4, 0, 6, 3, 1], [0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0]]
KEPT = [experts[:4] for experts in RANKING]


def test_the_command_line_offers_every_criterion() -> None:
    """It lists them itself, to answer --help without loading what computes them."""
    assert list(CRITERIA) == OFFERED


def test_both_forms_of_a_ranking_are_read(tmp_path: Path) -> None:
    backwards = {f"layer_{i}": RANKING[i] for i in (3, 2, 1, 0)}
    assert read_ranking(write_json(tmp_path / "list.json", RANKING), TINY) == RANKING
    assert read_ranking(write_json(tmp_path / "object.json", backwards), TINY) == RANKING


def test_keep_sets_are_read_from_lists_and_from_keep(tmp_path: Path) -> None:
    expected = [sorted(experts) for experts in KEPT]
    for value in (KEPT, {"keep": KEPT, "reason": "a test"}):
        assert read_keep_sets(write_json(tmp_path / "keep.json", value), TINY) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (RANKING[:3], "has 3 layers, the model has 4"),
        ([*RANKING[:3], [7]], "layer 3 names expert 7, the model has experts 0 to 6"),
        ([*RANKING[:3], [1, 2, 1]], "layer 3 names expert 1 twice"),
        ([*RANKING[:3], [True]], "layer 3 names expert True"),
        ([*RANKING[:3], [6, 5, 3, 2, 1, 0]], "layer 3 lacks expert 4"),
        ({f"layer_{i + 1}": RANKING[i] for i in range(4)}, "expected the keys layer_0 … layer_3"),
        ([0, 1, 2, 3], "expected a list for each layer"),
    ],
)
def test_a_ranking_that_does_not_fit_the_model_is_refused(tmp_path: Path, value: object, message: str) -> None:
    with pytest.raises(RankingError, match=message):
        read_ranking(write_json(tmp_path / "ranking.json", value), TINY)


def test_keep_sets_of_unequal_size_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RankingError, match="layers keep 4, 4, 4, 1 experts"):
        read_keep_sets(write_json(tmp_path / "keep.json", [*KEPT[:3], [1]]), TINY)


@pytest.mark.parametrize("keep", [-1, 0, 8])
def test_more_experts_than_there_are_cannot_be_kept(keep: int) -> None:
    with pytest.raises(RankingError):
        keep_best(RANKING, keep, TINY)


def test_columns_come_back_as_they_were_written(tmp_path: Path) -> None:
    layers, experts = np.divmod(np.arange(6), 3)
    table = pa.table({"layer": layers, "expert": experts, "count": np.arange(6), "gate_sum": np.arange(6) / 4})
    pq.write_table(table, tmp_path / "saliency.parquet")
    for profile in (tmp_path, tmp_path / "saliency.parquet"):
        columns = read_columns(profile)
        assert columns["count"].tolist() == [[0, 1, 2], [3, 4, 5]] and set(columns) == {"count", "gate_sum"}
    pq.write_table(table.take([1, 0, 2, 3, 4, 5]), tmp_path / "saliency.parquet")
    with pytest.raises(ProfileError, match="not every expert of every layer, in order"):
        read_columns(tmp_path)
