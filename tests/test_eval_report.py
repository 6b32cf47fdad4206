"""The summary of an evaluation: its JSON comes back equal, its report says what it holds, its errors name the place."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptoss_jax.errors import EvaluationError, StatisticsError
from gptoss_jax.evaluation import stored
from gptoss_jax.evaluation.card import card_quality
from gptoss_jax.evaluation.intervals import Estimate, holm
from gptoss_jax.evaluation.markdown import eval_report, interval
from gptoss_jax.evaluation.quality import compare
from gptoss_jax.evaluation.summary import Summary
from gptoss_jax.selection.keep_sets import KeepSets
from tests.simulated import KEPT, logits, scored_tokens, summary


@pytest.fixture(scope="module")
def full() -> Summary:
    return summary(rows=40, seq_lens=(1024, 2048), answers="last-number", command="gptoss-jax eval nano")


def test_entries_are_comparisons_by_sequence_length(full: Summary) -> None:
    assert [entry.name for entry in full.entries] == [*KEPT]
    for seq_len in (1024, 2048):
        tokens = scored_tokens(logits(seq_len))
        for entry in full.entries:
            expected = compare(tokens.documents, tokens.baseline, tokens.others[entry.name], draws=200)
            assert entry.quality[seq_len] == expected
        assert full.baseline.quality[seq_len].estimates["kl"] == Estimate(0.0, 0.0, 0.0, 0.0, 1.0)
    assert [entry.is_control for entry in full.entries] == [False, True, False]
    assert full.of(KEPT["best"].layers_hash) is full.entries[0] and full.of("other") is None
    assert full.controls(full.entries[0]) == [full.entries[1]] and full.controls(full.entries[2]) == []


def test_p_values_are_corrected_over_the_keep_sets(full: Summary) -> None:
    for of, names in full.entries[0].corrected.items():
        assert {*names} == {*full.entries[0].differences[of]}
        for name in names:
            raw = [entry.differences[of][name].p_value for entry in full.entries]
            assert [entry.corrected[of][name] for entry in full.entries] == holm(raw)
    assert {*full.entries[0].corrected} == {"1024", "2048", "replies"}


def test_json_comes_back_equal(full: Summary, tmp_path: Path) -> None:
    (tmp_path / stored.EVAL).write_text(stored.to_json(full), encoding="utf-8")
    assert stored.read(tmp_path) == stored.read(tmp_path / stored.EVAL) == full
    plain = summary(calibration="unknown", warnings=("some rows are long",))
    assert stored.parse(stored.to_json(plain).encode(), "here") == plain


def test_an_evaluation_of_before_says_nothing_of_answers(full: Summary) -> None:
    raw = json.loads(stored.to_json(full))
    for entry in (raw["baseline"], *raw["entries"]):
        assert entry["origin"].pop("answers_hash") is None
    assert stored.parse(json.dumps(raw).encode(), "here") == full


def test_the_file_says_what_its_docstring_says(full: Summary) -> None:
    raw = json.loads(stored.to_json(full))
    assert [*raw] == ["kind", "version", "setting", "baseline", "entries"] and raw["kind"] == "eval"
    entry = raw["entries"][0]
    assert entry["layers_hash"] == KEPT["best"].layers_hash and entry["experts"] == [4] * 4
    assert entry["origin"]["criterion"] == "reap"
    assert {*entry["quality"]} == {"1024", "2048"} and entry["replies"]["rows"] == 40
    assert entry["gate"]["passed"] == all(check["passed"] for check in entry["gate"]["checks"])
    for name in entry:
        assert re.search(rf"\b{name}\b", stored.__doc__ or ""), name
    for name in {*entry["quality"]["1024"], *entry["replies"], *entry["gate"]["checks"][0]}:
        assert re.search(rf"\b{name}\b", stored.__doc__ or ""), name


def test_the_hash_of_keep_sets_is_that_of_their_json() -> None:
    import hashlib

    made = KeepSets([[3, 1], [0, 2]])
    assert made.layers_hash == hashlib.sha256(b"[[1, 3], [0, 2]]").hexdigest()
    assert made.layers_hash == replace(made, origin=KEPT["best"].origin).layers_hash


def test_what_is_not_finite_is_not_written() -> None:
    broken = summary()
    worst = {1024: replace(broken.entries[1].quality[1024], js2d=float("inf"))}
    broken = replace(broken, entries=(broken.entries[0], replace(broken.entries[1], quality=worst)))
    with pytest.raises(StatisticsError, match=r"^drawn: "):
        stored.to_json(broken)


def without(*path: str) -> Callable[[Any], None]:
    def edit(raw: Any) -> None:
        for key in path[:-1]:
            raw = raw[int(key) if isinstance(raw, list) else key]
        del raw[path[-1]]

    return edit


def set_to(value: Any, *path: str) -> Callable[[Any], None]:
    def edit(raw: Any) -> None:
        for key in path[:-1]:
            raw = raw[int(key) if isinstance(raw, list) else key]
        raw[path[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (set_to("profile", "kind"), "is no evaluation"),
        (set_to(2, "version"), "version 2"),
        (without("setting"), "lacks setting"),
        (without("setting", "rows"), "lacks setting.rows"),
        (set_to("9", "setting", "rows"), "setting.rows is '9', expected a whole number"),
        (set_to(10**400, "entries", "0", "quality", "1024", "js2d"), "expected a finite number"),
        (set_to(True, "setting", "rows"), "setting.rows is True"),
        (set_to("seen", "setting", "calibration"), "expected one of disjoint, unknown"),
        (set_to(["seen"], "setting", "calibration"), "expected one of disjoint, unknown"),
        (set_to({}, "entries"), "entries is {}, expected a list"),
        (set_to(3, "entries", "0", "name"), "entries[0].name is 3, expected a text"),
        (set_to([], "entries", "0", "quality"), "expected an object"),
        (set_to("0", "entries", "0", "replies"), "entries[0].replies"),
        (set_to(float("nan"), "entries", "0", "quality", "1024", "js2d"), "expected a finite number"),
        (without("entries", "0", "quality", "1024", "estimates", "ppl", "low"), "estimates.ppl.low"),
        (without("entries", "1", "quality", "1024", "estimates", "kl"), "drawn lacks the estimate kl"),
        (set_to({"x": 1}, "setting", "blocks"), "setting.blocks is 'x', expected whole numbers as names"),
        (set_to({"512": 1}, "setting", "blocks"), "other sequence lengths"),
    ],
)
def test_a_damaged_file_is_refused_by_the_place(edit: Callable[[Any], None], says: str) -> None:
    raw = json.loads(stored.to_json(summary()))
    edit(raw)
    with pytest.raises(EvaluationError) as caught:
        stored.parse(json.dumps(raw).encode(), "eval.json")
    assert str(caught.value).startswith("eval.json: ") and says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[]", b"[" * 100_000, b"null"])
def test_what_is_no_evaluation_is_refused(data: bytes) -> None:
    with pytest.raises(EvaluationError):
        stored.parse(data, "eval.json")


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="cannot be read"):
        stored.read(tmp_path / "no.json")
    with pytest.raises(EvaluationError, match="cannot be read"):
        stored.read(tmp_path)


# The report


def rows_of(text: str, heading: str) -> dict[str, list[str]]:
    """The table of a section: first cell → the others."""
    section = text.split(f"## {heading}")[1].split("\n## ")[0]
    lines = [
        [cell.strip() for cell in line.strip("| ").split(" | ")] for line in section.splitlines() if line[:2] == "| "
    ]
    return {cells[0]: cells[1:] for cells in lines}


def test_the_report_has_all_keep_sets_with_intervals(full: Summary) -> None:
    text = eval_report(full)
    for seq_len, label in ((1024, "1,024"), (2048, "2,048")):
        found = rows_of(text, f"Against the baseline, sequence length {label}")
        assert {"best", "drawn (control)", "more"} <= {*found}
        for entry in full.entries:
            cells = found[entry.name + (" (control)" if entry.is_control else "")]
            estimates = entry.quality[seq_len].estimates
            assert cells[0] == str(entry.experts[0])
            assert interval(estimates["ppl"]) in cells and interval(estimates["agreement"], percent=True) in cells
    gates = rows_of(text, "Near-lossless gate")
    assert gates["more"][0].endswith("of 0.25: yes") and gates["drawn (control)"][0].endswith("of 0.25: **no**")
    assert [gates[name][-1] for name in ("best", "drawn (control)", "more")] == ["**no**"] * 3  # JS2D, with few tokens
    assert "last-number" in text and "gptoss-jax eval nano" in text and "disjoint" not in text
    assert "none is among these rows" in text and "12 blocks" in text


def test_every_line_of_a_table_has_as_many_cells(full: Summary) -> None:
    widths = [
        {len(re.split(r"(?<!\\)\|", line)) for line in block.splitlines()}
        for block in eval_report(full).split("\n\n")
        if block.startswith("|")
    ]
    assert len(widths) == 2 * 3 + 3 and all(len(width) == 1 for width in widths)


def test_numbers_in_cells() -> None:
    assert interval(Estimate(2.80512, 2.6, 3.01, 0.1, 0.0)) == "2.805 (2.6 to 3.01)"
    assert (
        interval(Estimate(0.12345, -0.2, 0.3, 0.1, 0.0), percent=True, signed=True) == "+12.35 % (-20.00 to +30.00 %)"
    )
    assert interval(Estimate(0.0, 0.0, 0.0, 0.0, 1.0), signed=True) == "0"


def test_cautions_are_of_what_was_done(full: Summary) -> None:
    text = eval_report(full)
    assert re.search(
        r"Replies are to 40 questions, fewer than 100: the interval of the difference in .* is up to", text
    )
    assert "documents, fewer than 100: the interval of the difference in ΔPPL" in text
    assert "19,200 bins: with 600 tokens" in text
    assert "nothing shows what choosing gained" not in text and "the sequence length" not in text.split("careful")[1]
    alone = summary(calibration="unknown", warnings=("some rows are long",))
    alone = replace(alone, entries=(alone.entries[0],))
    text = eval_report(alone)
    assert "nothing shows what choosing gained" in text and "asks for the sequence length 2,048 too" in text
    assert "flatter" in text and "- some rows are long" in text and "Replies" not in text


def test_names_cannot_leave_their_cells() -> None:
    odd = summary(data="a`b\nc", model="x|y\n# z")
    odd = replace(odd, entries=(replace(odd.entries[0], name="a|b\n| c"),))
    text = eval_report(odd)
    assert "\n# z" not in text and "a\\|b \\| c" in text and "`a b c`" in text
    assert "a\\|b \\| c" in card_quality(odd, odd.entries[0])


def test_a_card_says_the_keep_sets_the_baseline_and_the_control(full: Summary) -> None:
    text = card_quality(full, full.entries[0])
    assert "drawn (control)" in text and "| more" not in text and text.startswith("## Quality\n")
    assert interval(full.entries[0].quality[2048].estimates["ppl"]) in text
    assert interval(full.baseline.quality[1024].estimates["ppl"]) in text
    assert "`rows.jsonl`" in text and "Replies to 40 rows" in text
