"""`select --pick`: candidates are made of some rows and judged by others; bounds are kept by as few experts as can."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gptoss_jax as gj
from convert.hf import Checkpoint
from gptoss_jax.config import TINY
from gptoss_jax.data.rows import Row, is_held_out, row_hash
from gptoss_jax.evaluation import job as evaluation
from gptoss_jax.evaluation.intervals import Estimate
from gptoss_jax.evaluation.sides import Request
from gptoss_jax.search import greedy
from gptoss_jax.search.pick import Trial, best, smallest
from gptoss_jax.selection.ranking import Ranking

from .bad_input import Program, Refused, case, dump
from .test_heal import ROWS, rows  # noqa: F401  (a fixture is used by name)

HELD = {row["id"] for row in ROWS if is_held_out(Row(row["text"], row["id"]))}


def line(model: Path, rows: Path, *more: object) -> list[object]:  # noqa: F811
    argv = ["select", model, "--data", rows, "--max-seq-length", 64, "--batch-size", 4, "--dtype", "float32"]
    return [*argv, "--out", "keep.json", *more]


def trial(name: str, kl: float, match: float | None = None, keep: int = 4) -> Trial:
    def of(value: float) -> Estimate:
        return Estimate(value, 0.9 * value, 1.1 * value, 0.05 * value, 0.0)

    sets = gj.KeepSets([[*range(keep)]] * TINY.num_layers)
    return Trial(name, sets, of(kl), None if match is None else of(match))


def test_the_least_divergence_is_taken() -> None:
    assert best([trial("greedy", 0.2), trial("reap", 0.19), trial("mine", 0.3)]).name == "reap"
    assert best([trial("mine", 0.2), trial("reap", 0.2)]).name == "mine"


@given(st.integers(0, 12), st.integers(0, 12))
def test_the_smallest_number_that_holds(first: int, holding: int) -> None:
    counts, tried = range(first, 13), list[int]()

    def holds(count: int) -> bool:
        tried.append(count)
        return count >= holding

    expected = next((count for count in counts if count >= holding), None)
    assert smallest(counts, holds) == expected
    assert len(tried) <= 4 and len({*tried}) == len(tried)


def test_bounds_are_kept_by_the_ends_of_intervals() -> None:
    one = trial("greedy", 0.1, 0.8)
    assert one.holds(0.111, None) and not one.holds(0.109, None)
    assert one.holds(None, 0.71) and not one.holds(None, 0.73)
    assert not one.holds(0.111, 0.73) and not trial("greedy", 0.1).holds(None, 0.1)


@pytest.mark.slow
def test_rows_that_judge_are_none_that_candidates_are_made_of(
    program: Program,
    tiny_mxfp4: Path,
    rows: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judged: list[Request] = []
    made: list[dict[str, Ranking]] = []
    evaluate, eliminate = evaluation.run, greedy.run

    def spy(request: Request, *arguments: Any, **options: Any) -> Any:
        judged.append(request)
        return evaluate(request, *arguments, **options)

    def spy_too(*arguments: Any) -> Any:
        made.append(eliminate(*arguments))
        return made[-1]

    monkeypatch.setattr(evaluation, "run", spy)
    monkeypatch.setattr(greedy, "run", spy_too)
    mine = dump(tmp_path / "mine.json", [[0, 2, 3, 5]] * 4)
    names = ["greedy", "reap", "swap", "greedy_cosine", str(mine)]
    picks = [word for name in names for word in ("--pick", name)]
    assert program(*line(tiny_mxfp4, rows, *picks, "--keep", 4))[0] == 0
    kept = gj.KeepSets.read("keep.json", TINY)
    assert kept.tried is not None and [one["name"] for one in kept.tried] == names == [*judged[0].keep_sets]
    hashes = {row["id"]: row_hash(Row(row["text"], row["id"])) for row in ROWS}
    (eliminated,) = made  # by both rules in one run
    assert [*eliminated] == ["greedy", "greedy_cosine"]
    for rule, ranking in eliminated.items():
        assert ranking.origin.criterion == rule and ranking.origin.row_hashes is not None
        assert {*ranking.origin.row_hashes.tolist()} == {hashes[name] for name in hashes.keys() - HELD}
        assert judged[0].keep_sets[rule] == ranking.keep(4)
    alone = [row for row in ROWS if row["id"] not in HELD]
    options = {"data": alone, "max_seq_length": 64, "batch_size": 4, "dtype": "float32"}
    cosine = gj.select(str(tiny_mxfp4), 4, rule="greedy_cosine", **options)
    assert cosine.layers == eliminated["greedy_cosine"].keep(4).layers
    assert judged[0].wanted is is_held_out and 0 < len(HELD) < len(ROWS)
    assert kept.origin.row_hashes is not None  # all of them: `eval` refuses the rows that judged as well
    assert kept.origin.row_hashes.tolist() == sorted(hashes.values())
    least = min(kept.tried, key=lambda one: one["kl"][0])
    assert "picked of greedy, reap, swap, greedy_cosine" in str(kept.origin.rule)
    for one in kept.tried:
        assert one["kl"][1] <= one["kl"][0] <= one["kl"][2] and one["keep"] == 4
    assert kept.origin.criterion == ("unknown" if least["name"] == str(mine) else least["name"])
    assert not Path("keep.json.progress").exists()


def test_the_card_says_what_was_tried(tiny_mxfp4: Path, tmp_path: Path) -> None:
    one = trial("greedy", 0.1, 0.8, keep=4)
    kept = replace(one.keep_sets, tried=[one.line(), trial("reap", 0.3, 0.4).line()])
    gj.prune(str(tiny_mxfp4), kept, out=tmp_path / "cut")
    card = (tmp_path / "cut" / "README.md").read_text(encoding="utf-8")
    assert "| `greedy` | 4 | 0.1 (0.09 to 0.11) | 80.0 % (72.0 to 88.0) |" in card
    assert "| `reap` | 4 | 0.3 (0.27 to 0.33) | 40.0 % (36.0 to 44.0) |" in card


BAD_TRIED: list[Any] = [
    5,
    [5],
    [{}],
    [{"name": "a", "keep": 4, "kl": [1, 2]}],
    [{"name": 1, "keep": 4, "kl": [1, 2, 3]}],
]


@pytest.mark.parametrize("tried", BAD_TRIED, ids=str)
def test_what_was_tried_is_read_back_or_refused(tried: Any, tiny_mxfp4: Path, tmp_path: Path, refused: Refused) -> None:
    kept = replace(trial("greedy", 0.1).keep_sets, tried=[trial("greedy", 0.1, 0.5).line()])
    kept.write(tmp_path / "keep.json")
    assert gj.KeepSets.read(tmp_path / "keep.json", TINY) == kept
    said = json.loads((tmp_path / "keep.json").read_text(encoding="utf-8"))
    dump(tmp_path / "keep.json", said | {"tried": tried})
    refused("prune", tiny_mxfp4, "--keep-sets", "keep.json", "--out", "cut", says=("keep.json", "'tried'"))


class Killed(BaseException):
    """Goes past everything that handles errors, as SIGKILL does."""


@pytest.mark.slow
def test_a_killed_run_goes_on(program: Program, tiny_mxfp4: Path, rows: Path, tmp_path: Path) -> None:  # noqa: F811
    picks = ("--pick", "greedy", "--pick", "reap", "--keep", 4, "--keep", 5)
    assert program(*line(tiny_mxfp4, rows, *picks))[0] == 0
    expected = [Path(f"keep-{keep}.json").read_bytes() for keep in (4, 5)]
    for keep in (4, 5):
        Path(f"keep-{keep}.json").unlink()
    real, runs = evaluation.run, list[int]()

    def run(*arguments: Any, **options: Any) -> Any:
        if len(runs) == 1:
            runs.append(0)
            raise Killed
        runs.append(0)
        return real(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch, suppress(Killed):
        patch.setattr(evaluation, "run", run)
        program(*line(tiny_mxfp4, rows, *picks))
    assert Path("keep.json.progress").exists() and not Path("keep-4.json").exists()
    assert program(*line(tiny_mxfp4, rows, *picks))[0] == 2  # without --resume
    assert program(*line(tiny_mxfp4, rows, *picks, "--resume"))[0] == 0
    assert [Path(f"keep-{keep}.json").read_bytes() for keep in (4, 5)] == expected


def kept_with(model: Path, data: Path, **options: Any) -> Any:
    asked = {"pick": ("greedy", "frequency"), "max_seq_length": 64, "batch_size": 4, "dtype": "float32"}
    return gj.select(str(model), data=str(data), **(asked | options))


@pytest.mark.newest
@pytest.mark.slow
def test_a_bound_is_kept_by_the_fewest(tiny_mxfp4: Path, rows: Path) -> None:  # noqa: F811
    """Each number is judged as with --keep; what holds the bound is its interval's upper end."""
    highs: dict[int, float] = {}
    for keep in range(TINY.top_k, TINY.num_experts):
        found = kept_with(tiny_mxfp4, rows, keep=keep)
        taken = next(one for one in found.tried if _is(found, one))
        highs[keep] = taken["kl"][2]
    bound = sorted(highs.values())[len(highs) // 2]
    found = kept_with(tiny_mxfp4, rows, max_kl=bound)
    assert len(found.layers[0]) == smallest(sorted(highs), lambda keep: highs[keep] <= bound)


def test_other_tokens_judge_otherwise(tiny_mxfp4: Path, rows: Path) -> None:  # noqa: F811
    one, other = (kept_with(tiny_mxfp4, rows, keep=4, scored=scored) for scored in ("assistant", "all"))
    assert [of["name"] for of in one.tried] == [of["name"] for of in other.tried]
    assert one.tried[0]["kl"] != other.tried[0]["kl"]


@pytest.mark.slow
def test_right_answers_stand_beside(tiny_mxfp4: Path, tmp_path: Path) -> None:
    """Of as many rows as are asked for, read in the way and from the column that are named."""
    asked = [row | {"right": str(2 * (i % 7))} for i, row in enumerate(ROWS)]
    options = {"replies": 4, "answer_column": "right", "answer_kind": "last-number", "max_new_tokens": 8}
    options |= {"pick": ("frequency",), "keep": 4, "max_seq_length": 64, "dtype": "float32"}
    (one,) = gj.select(str(tiny_mxfp4), data=asked, **options).tried
    assert one["match"][0] in (0, 0.25, 0.5, 0.75, 1) and one["match"][2] > one["match"][0] - 1e-9


def _is(found: gj.KeepSets, one: dict[str, Any]) -> bool:
    return bool(one["name"] == found.origin.criterion)


BAD: Sequence[Any] = [
    case("weights alone", ["--pick", "aimer", "--keep", 4], "--pick aimer is of the weights alone"),
    case("no such file", ["--pick", "none.json", "--keep", 4], "none.json", "no such file"),
    case("a bound without picking", ["--max-kl", 0.1, "--rule", "greedy"], "--max-kl means nothing to --rule greedy"),
    case("a bound of a profile", ["--max-kl", 0.1], "--data goes with --rule greedy, --rule greedy_cosine and --pick"),
    case("answers that nobody asks", ["--pick", "reap", "--min-match", 0.5], "--min-match needs --replies"),
    case("two ways to say how many", ["--pick", "reap", "--keep", 4, "--max-kl", 0.1], "takes one of"),
    case("a criterion", ["--pick", "reap", "--keep", 4, "--criterion", "swap"], "--criterion means nothing to --pick"),
    case("no other experts", ["--pick", "reap", "--keep", 2], "keep at least as many"),
    case("few rows", ["--pick", "reap", "--keep", 4, "--num-rows", 1], "too few to decide by"),
]


@pytest.mark.parametrize(("more", "says"), BAD)
def test_bad_input(more: list[Any], says: tuple[str, ...], refused: Refused, tiny_mxfp4: Path, rows: Path) -> None:  # noqa: F811
    refused(*line(tiny_mxfp4, rows, *more), says=says)


def test_no_number_keeps_the_bound(program: Program, tiny_mxfp4: Path, rows: Path) -> None:  # noqa: F811
    status, error = program(*line(tiny_mxfp4, rows, "--pick", "frequency", "--max-kl", 1e-30))
    assert status == 2 and "no number of experts keeps --max-kl 1e-30: with 6 the KL is" in error
    assert not Path("keep.json").exists()


def test_rows_that_keep_sets_were_chosen_by_do_not_judge_them(
    program: Program,
    tiny_mxfp4: Path,
    rows: Path,  # noqa: F811
) -> None:
    assert program(*line(tiny_mxfp4, rows, "--rule", "greedy", "--keep", 4, "--out", "mine.json"))[0] == 0
    status, error = program(*line(tiny_mxfp4, rows, "--pick", "mine.json", "--pick", "reap", "--keep", 4))
    assert status == 2 and "are among those that keep-sets were chosen by" in error


def test_files_of_other_numbers_are_no_candidates(tiny_mxfp4: Path, rows: Path, tmp_path: Path) -> None:  # noqa: F811
    mine = dump(tmp_path / "mine.json", [[0, 2, 3, 5]] * 4)
    found = kept_with(tiny_mxfp4, rows, pick=("reap", str(mine)), keep=5)
    assert [one["name"] for one in found.tried] == ["reap"]
    assert Checkpoint(tiny_mxfp4).config.num_experts == TINY.num_experts


def of_topic(topic: str, held_out: bool) -> list[dict[str, str]]:
    return [row for row in ROWS if row["topic"] == topic and (row["id"] in HELD) == held_out]


@pytest.mark.parametrize("way", [{"rule": "greedy"}, {"pick": ("greedy", "frequency")}], ids=str)
def test_what_other_domains_lose_is_shown(
    way: dict[str, Any],
    program: Program,
    tiny_mxfp4: Path,
    rows: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """As `eval` finds it on their rows that are held out; what is chosen does not depend on them."""
    words = ["--rule", "greedy"] if "rule" in way else ["--pick", "greedy", "--pick", "frequency"]
    words += ["--domain-column", "topic", "--domain", "a", "--keep", 4]
    code, told = program(*line(tiny_mxfp4, rows, *words))
    assert code == 0
    kept = gj.KeepSets.read("keep.json", TINY)
    placing = {"batch_size": 4, "dtype": "float32"}
    judging = {"seq_len": (64,), "keep": "assistant", "whole_rows": True}
    beside = gj.evaluate(str(tiny_mxfp4), of_topic("b", True), keep_sets=kept, **judging, **placing)
    kl = beside.entries[0].quality[64].estimates["kl"]
    assert kept.elsewhere == {"b": pytest.approx([kl.value, kl.low, kl.high])}
    assert f"domains that it was not chosen for, worst first: b KL {kl.value:.4g}" in told
    ours = of_topic("a", False) + of_topic("a", True)
    alone = gj.select(str(tiny_mxfp4), 4, data=ours, max_seq_length=64, **placing, **way)
    assert alone.layers == kept.layers and alone.elsewhere is None
    gj.prune(str(tiny_mxfp4), kept, out=tmp_path / "cut")
    card = (tmp_path / "cut" / "README.md").read_text(encoding="utf-8")
    assert f"| `b` | {kl.value:.4g} ({kl.low:.4g} to {kl.high:.4g}) |" in card


def test_why_it_is_not_shown_is_said(program: Program, tiny_mxfp4: Path, tmp_path: Path) -> None:
    """Where nobody speaks in the rows of others, and where fewer experts stay than a token uses."""
    mute = [{"id": f"m{i}", "topic": "mute", "text": f"{i} and {i}"} for i in range(20)]
    rows = tmp_path / "mixed.jsonl"  # noqa: F811
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS + mute), encoding="utf-8")
    words = ["--rule", "greedy", "--domain-column", "topic", "--domain", "a", "--domain", "b"]
    code, told = program(*line(tiny_mxfp4, rows, *words, "--keep", 4))
    assert code == 0 and "what other domains lose is not measured: 0 of" in told
    assert gj.KeepSets.read("keep.json", TINY).elsewhere is None
    code, told = program(*line(tiny_mxfp4, rows, *words, "--scored", "all", "--keep", 1, "--overwrite"))
    assert code == 0 and "what other domains lose by keep 1 is not measured" in told


@pytest.mark.parametrize("elsewhere", [5, [], {"a": 1}, {"a": [1, 2]}], ids=str)
def test_what_others_lose_is_read_back_or_refused(
    elsewhere: Any, tiny_mxfp4: Path, tmp_path: Path, refused: Refused
) -> None:
    kept = replace(trial("greedy", 0.1).keep_sets, elsewhere={"law": [0.2, 0.1, 0.3]})
    kept.write(tmp_path / "keep.json")
    assert gj.KeepSets.read(tmp_path / "keep.json", TINY) == kept
    said = json.loads((tmp_path / "keep.json").read_text(encoding="utf-8"))
    dump(tmp_path / "keep.json", said | {"elsewhere": elsewhere})
    refused("prune", tiny_mxfp4, "--keep-sets", "keep.json", "--out", "cut", says=("keep.json", "'elsewhere'"))
