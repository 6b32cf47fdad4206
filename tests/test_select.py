"""Criteria against their formulas in plain loops, rankings of real tables, and files of rankings."""

import hashlib
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax.cli.rank import rank as rank_command
from gptoss_jax.config import GPT_OSS_20B, TINY
from gptoss_jax.errors import OutputError, ProfileError, RankingError, UserError
from gptoss_jax.selection.criteria import CRITERIA, scores
from gptoss_jax.selection.keep_sets import KeepSets
from gptoss_jax.selection.origin import UNKNOWN, Origin, profile_origin
from gptoss_jax.selection.ranking import Ranking, number_kept, rank
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
    "swap": lambda x: x["swap_sum"],
    "aimer": lambda x: -x["aimer"],
}
NEEDED = sorted({column for criterion in CRITERIA.values() for column in criterion.needs})
WEIGHTED = {"eaft_gate_norm_sum"}  # with weights that may be negative
TOPICS = ("all", "health_or_medicine", "instruction_following", "law", "math", "safety", "science", "unsafety")


@st.composite
def tables(draw: st.DrawFn) -> Columns:
    """Columns in which ties and experts that were never chosen are common."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 9)))

    def column(values: st.SearchStrategy[Any], dtype: type) -> np.ndarray:
        size = math.prod(shape)
        return np.array(draw(st.lists(values, min_size=size, max_size=size)), dtype).reshape(shape)

    count = column(st.integers(0, 3), np.int64)
    least = {name: -4 if name in WEIGHTED else 0 for name in NEEDED}
    sums = {name: column(st.integers(least[name], 4), np.float64) * (count > 0) for name in NEEDED}
    return {"count": count, **sums}


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
    assert rank(columns, criterion).layers == rank_by_hand(columns, criterion)


def test_every_criterion_has_a_formula() -> None:
    assert set(CRITERIA) == {*FORMULAS, "random"}


def test_ties_go_to_the_lower_id() -> None:
    columns = some_columns([[2, 1, 2, 1]], gate_norm_sum=[[4, 3, 6, 2]])
    assert rank(columns).layers == [[1, 2, 0, 3]]


def test_experts_never_chosen_come_last_even_after_negative_scores() -> None:
    columns = some_columns([[0, 1, 0, 1]], eaft_gate_norm_sum=[[0, -5, 0, -4]])
    assert rank(columns, "eaft_reap").layers == [[3, 1, 0, 2]]


@given(tables(), st.integers(0, 2**32))
def test_random_is_seeded_and_leaves_experts_never_chosen_last(columns: Columns, seed: int) -> None:
    ranking = rank(columns, "random", seed).layers
    assert ranking == rank(columns, "random", seed).layers
    for count, experts in zip(columns["count"], ranking, strict=True):
        assert sorted(experts) == list(range(len(experts)))
        assert [count[expert] == 0 for expert in experts] == sorted(count == 0)


def test_random_leaves_experts_never_chosen_in_order_of_id() -> None:
    columns = some_columns([[1, 1] + [0] * 30])
    assert rank(columns, "random", 0).layers[0][2:] == list(range(2, 32))


def test_another_seed_gives_another_random_ranking() -> None:
    columns = some_columns([[1] * 32] * 4)
    rankings = [rank(columns, "random", seed).layers for seed in range(5)]
    assert all(a != b for i, a in enumerate(rankings) for b in rankings[:i])
    assert len({tuple(experts) for experts in rankings[0]}) == 4


def every_column() -> Columns:
    """A table with every column that any criterion needs, each of other numbers; all experts were chosen."""
    rng = np.random.default_rng(0)
    return {"count": rng.integers(1, 50, (3, 8))} | {name: rng.exponential(size=(3, 8)) for name in NEEDED}


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name != "random"])
def test_experts_in_another_order_have_the_same_scores(criterion: str) -> None:
    columns, order = every_column(), np.random.default_rng(1).permutation(8)
    expected = scores(columns, criterion, 0)
    assert len(np.unique(expected)) > 3
    shuffled = {name: column[:, order] for name, column in columns.items()}
    np.testing.assert_array_equal(scores(shuffled, criterion, 0), expected[:, order])


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_criterion_needs_the_columns_that_it_declares_and_no_others(criterion: str) -> None:
    columns, declared = every_column(), CRITERIA[criterion]
    expected = rank(columns, criterion)
    for name in declared.needs:
        fewer = {other: column for other, column in columns.items() if other != name}
        with pytest.raises(ProfileError, match=f"{criterion}.*{name}.*{declared.hint}"):
            rank(fewer, criterion)
        with pytest.raises(KeyError, match=name):
            declared.score(fewer, 0)
    assert rank({name: columns[name] for name in ("count", *declared.needs)}, criterion) == expected


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_command_line_offers_and_explains_every_criterion(criterion: str) -> None:
    (option,) = (option for option in rank_command.params if option.name == "criterion")
    assert option.type.declared.accepts(criterion) and not option.type.declared.accepts("best")
    assert f"\n{criterion}: {CRITERIA[criterion].help}" in option.help


def test_a_criterion_without_its_column_says_what_to_do() -> None:
    with pytest.raises(ProfileError, match=r"eaft_gate_norm_sum.*profile again with --eaft"):
        rank(some_columns([[1, 2]]), "eaft_reap")


def test_an_unknown_criterion_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(UserError, match=r"no criterion 'best'.*reap, reap_sum"):
        rank(some_columns([[1, 2]]), "best")


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
    scored = [(p, h) for p, h in scores if p >= 0]
    if not scored:
        return [0.0] * len(scores)
    cut_p = quantile_by_hand([p for p, _ in scored], options.probability_quantile)
    cut_h = quantile_by_hand([h for _, h in scored], options.entropy_quantile)
    weights = []
    for p, h in scores:
        if not p >= 0:
            weights.append(0.0)
        elif h > cut_h:
            weights.append(options.other)
        else:
            weights.append(options.right if p >= cut_p else options.wrong)
    return weights


@given(token_scores(), st.data())
def test_eaft_weighs_tokens_by_their_class(scores: list[tuple[float, float]], data: st.DataObject) -> None:
    unscored = data.draw(st.sets(st.integers(0, len(scores) - 1)))
    nothing = data.draw(st.sampled_from([math.nan, -1.0]))
    scores = [(nothing, nothing) if i in unscored else score for i, score in enumerate(scores)]
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
    for nothing in (np.full(3, math.nan), np.full(3, -1.0)):
        weights = class_weights(nothing, nothing, cuts(nothing, nothing, EaftOptions()), EaftOptions())
        assert weights.tolist() == [0, 0, 0]


# Real tables


def test_the_real_saliency_table_gives_the_published_ranking(shared: Path) -> None:
    """The published ranking orders experts that were never chosen by chance; here they go by id."""
    columns = read_columns(shared / "data" / "seed1" / "20b_reap_saliency.parquet")
    published = json.loads((shared / "data" / "seed1" / "20b_reap_saliency_ranking_by_layer.json").read_text())
    never = [np.flatnonzero(count == 0).tolist() for count in columns["count"]]
    assert sum(len(experts) for experts in never) == 20
    for mine, theirs, last in zip(rank(columns).layers, published, never, strict=True):
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
    assert rank({"count": count}, "frequency").layers == published


@pytest.mark.parametrize("topic", TOPICS)
def test_a_real_topical_ranking_gives_keep_sets(shared: Path, topic: str) -> None:
    file = shared / "data" / "fingerprint" / "topical_analytics" / f"{topic}.json"
    ranking = Ranking.read(file, GPT_OSS_20B)
    raw = json.loads(file.read_text(encoding="utf-8"))
    assert ranking == Ranking([raw[f"layer_{layer}"] for layer in range(24)], UNKNOWN)
    keep_sets = ranking.keep(12).layers
    assert [len(kept) for kept in keep_sets] == [12] * 24
    assert keep_sets == [sorted(set(experts[:12])) for experts in ranking.layers]


# Files


def write_json(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


RANKING = [[3, 0, 6, 1, 2, 4, 5], [5, 2, 4, 0, 6, 3, 1], [0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0]]
KEPT = [experts[:4] for experts in RANKING]


def test_both_forms_of_a_ranking_are_read(tmp_path: Path) -> None:
    backwards = {f"layer_{i}": RANKING[i] for i in (3, 2, 1, 0)}
    for value in (RANKING, backwards):
        assert Ranking.read(write_json(tmp_path / "ranking.json", value), TINY) == Ranking(RANKING, UNKNOWN)


def test_keep_sets_are_read_from_lists_and_from_keep(tmp_path: Path) -> None:
    expected = [sorted(experts) for experts in KEPT]
    for value in (KEPT, {"keep": KEPT, "reason": "a test"}):
        assert KeepSets.read(write_json(tmp_path / "keep.json", value), TINY) == KeepSets(expected, UNKNOWN)


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
        Ranking.read(write_json(tmp_path / "ranking.json", value), TINY)


def test_keep_sets_may_differ_in_size(tmp_path: Path) -> None:
    """A checkpoint cannot hold them, and whoever writes one refuses them; a mask can."""
    keep_sets = KeepSets.read(write_json(tmp_path / "keep.json", [*KEPT[:3], [1]]), TINY)
    assert [len(kept) for kept in keep_sets.layers] == [4, 4, 4, 1]
    with pytest.raises(RankingError, match=r"keeping 1 experts is below the 3.*--lower-top-k"):
        keep_sets.check_active(TINY, lower_top_k=False)
    keep_sets.check_active(TINY, lower_top_k=True)


@pytest.mark.parametrize("keep", [-1, 0, 8])
def test_more_experts_than_there_are_cannot_be_kept(keep: int) -> None:
    with pytest.raises(RankingError):
        Ranking(RANKING).keep(keep)


def test_a_table_is_read_without_jax(tmp_path: Path) -> None:
    table = pa.table({"layer": [0], "expert": [0], "count": [7]})
    pq.write_table(table, tmp_path / "saliency.parquet")
    code = (
        "import sys, pathlib, gptoss_jax.statistics.tables as tables; "
        "print(tables.read_columns(pathlib.Path(sys.argv[1]))['count'], 'jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout == "[[7]] False\n"


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


# Origin


FULL = Origin("reap", {"law": 0.25, "science": 0.75}, "falling score", 3, "a hash", "a fingerprint")
COUNTS = [[9, 8, 7, 6, 5, 4, 0]] * 4
REASONS = [["the best", *[None] * 6]] * 4


def the_file(**changes: Any) -> dict[str, Any]:
    """The object in a ranking's file, as the format has it."""
    return {
        "kind": "ranking",
        "version": 1,
        "layers": RANKING,
        "criterion": "reap",
        "domains": {"law": 0.25, "science": 0.75},
        "rule": "falling score",
        "seed": 3,
        "profile_hash": "a hash",
        "model_fingerprint": "a fingerprint",
        "counts": COUNTS,
        "reasons": REASONS,
    } | changes


def test_a_ranking_is_written_as_one_line_in_the_stated_form(tmp_path: Path) -> None:
    ranking = Ranking(RANKING, replace(FULL, domains={"science": 0.75, "law": 0.25}), COUNTS, REASONS)
    ranking.write(tmp_path / "ranking.json")
    assert (tmp_path / "ranking.json").read_text(encoding="utf-8") == json.dumps(the_file()) + "\n"
    with pytest.raises(OutputError, match="--overwrite"):
        ranking.write(tmp_path / "ranking.json")


origins = st.builds(
    Origin,
    st.none() | st.text(),
    st.none() | st.dictionaries(st.text(), st.floats(0, 1e300)),
    st.none() | st.text(),
    st.none() | st.integers(0),
    st.none() | st.text(),
    st.none() | st.text(),
)


@given(origins, st.sampled_from([None, COUNTS]), st.sampled_from([None, REASONS]))
def test_what_is_written_is_read(origin: Origin, counts: Any, reasons: Any) -> None:
    for made in (Ranking(RANKING, origin, counts, reasons), KeepSets(RANKING, origin, counts, reasons)):
        assert type(made).parse(made.to_json().encode(), TINY, "a file") == made


@pytest.mark.parametrize("name", ["criterion", "domains", "rule", "seed", "profile_hash", "model_fingerprint"])
@pytest.mark.parametrize("said", [False, True])
def test_what_a_file_does_not_say_is_unknown(tmp_path: Path, name: str, said: bool) -> None:
    value = the_file(**{name: None})
    if not said:
        del value[name]
    ranking = Ranking.read(write_json(tmp_path / "science.json", value), TINY)
    assert ranking == Ranking(RANKING, replace(FULL, **{name: None}), COUNTS, REASONS)


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), st.lists), st.data())
def test_any_value_anywhere_is_read_or_refused(value: Any, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([*the_file()]))
    text = json.dumps(the_file(**{name: value}))
    try:
        ranking = Ranking.parse(text.encode(), TINY, "a file")
    except RankingError as error:
        assert str(error).startswith("a file: ") and "\n" not in str(error)
    else:
        assert ranking.layers == RANKING


@given(st.binary() | st.text().map(str.encode))
def test_any_bytes_are_refused_in_one_line(data: bytes) -> None:
    with pytest.raises(RankingError, match=r"\Aa file: .*\Z"):
        KeepSets.parse(data, TINY, "a file")


def test_keep_sets_have_the_rankings_origin_and_a_reason_for_each_expert() -> None:
    kept = Ranking(RANKING, FULL, COUNTS).keep(3)
    assert kept.origin == replace(FULL, rule="best 3")
    assert kept.layers == [[0, 3, 6], [2, 4, 5], [0, 1, 2], [4, 5, 6]]
    assert kept.counts == [[8, 9, 7], [8, 7, 9], [9, 8, 7], [7, 8, 9]]
    assert kept.reasons[0] == ["place 2 of 7 by reap", "place 1 of 7 by reap", "place 3 of 7 by reap"]
    unknown = Ranking(RANKING).keep(3)
    assert unknown.origin == Origin(rule="best 3") and unknown.counts is None
    assert unknown.reasons[0] == ["place 2 of 7", "place 1 of 7", "place 3 of 7"]


def test_a_ranking_says_what_made_it_and_on_how_many_tokens() -> None:
    columns = some_columns([[2, 0, 5, 4]], gate_norm_sum=[[9, 0, 5, 8]])
    ranking = rank(columns, "reap_sum", 7, Origin(domains={"law": 1.0}, profile_hash="a hash"))
    assert ranking.origin == Origin("reap_sum", {"law": 1.0}, "falling score", 7, "a hash", None)
    assert (ranking.layers, ranking.counts) == ([[0, 3, 2, 1]], [[2, 4, 5, 0]])


def test_a_profile_names_domain_table_and_model(tmp_path: Path) -> None:
    table, info = tmp_path / "saliency.parquet", tmp_path / "profile.json"
    table.write_bytes(b"a table")
    digest = hashlib.sha256(b"a table").hexdigest()
    alone = Origin(domains={}, profile_hash=digest)
    assert profile_origin(table) == profile_origin(tmp_path) == alone
    write_json(info, {"model_fingerprint": "f"})
    assert profile_origin(tmp_path) == replace(alone, model_fingerprint="f")
    assert profile_origin(tmp_path, "law") == replace(alone, domains={"law": 1.0}, model_fingerprint="f")
    assert profile_origin(table) == alone
    for unknown in ({}, [], {"model_fingerprint": 5}):
        write_json(info, unknown)
        assert profile_origin(tmp_path) == alone
    info.write_text("{")
    with pytest.raises(ProfileError, match=r"profile\.json: not a JSON file"):
        profile_origin(tmp_path)


@pytest.mark.parametrize(
    ("origin", "says"),
    [
        (UNKNOWN, "of unknown origin"),
        (Origin(rule="best 4", seed=3), "of unknown origin"),
        (Origin("reap", {}), "by `reap` over all rows of the profile"),
        (Origin("reap", {"science": 1.0}), "by `reap` over the profile's domain `science`"),
        (FULL, "by `reap` over the profile's domains `law` (weight 0.25), `science` (weight 0.75)"),
        (Origin("reap"), "by `reap` over unknown data"),
        (Origin(domains={"law": 1.0}), "by an unknown criterion over the profile's domain `law`"),
        (Origin("a`b\n\x1b\ud800c", {}), "by `a b   c` over all rows of the profile"),
    ],
)
def test_an_origin_in_words_says_what_is_known(origin: Origin, says: str) -> None:
    assert str(origin) == says


@pytest.mark.parametrize(
    ("keep", "num_experts", "kept"),
    [("50%", 32, 16), ("37.5%", 32, 12), ("30%", 32, 9), ("33.333333%", 3, 0), ("100%", 7, 7), ("0.1%", 4000, 4)],
)
def test_a_per_cent_of_the_experts_is_a_whole_number_of_them(keep: str, num_experts: int, kept: int) -> None:
    assert number_kept(keep, num_experts) == kept
    assert number_kept(num_experts, 7) == num_experts


@pytest.mark.parametrize("keep", ["", "%", "50", "50 %", "-5%", "1e1%", "1000%", "5.%", "½%", "nan%"])
def test_what_is_no_per_cent_is_refused(keep: str) -> None:
    with pytest.raises(RankingError, match=r"^--keep is .+: give a whole number of experts, or a per cent of them"):
        Ranking([[0, 1, 2, 3]]).keep(keep)


def test_a_ranking_keeps_a_per_cent() -> None:
    kept = Ranking([[3, 1, 0, 2], [0, 1, 2, 3]]).keep("50%")
    assert kept.layers == [[1, 3], [0, 1]] and kept.origin.rule == "best 2"
