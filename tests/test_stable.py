"""Rows in portions, until the experts to keep stay the same: against runs over each of these numbers of rows."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gptoss_jax as gj
from gptoss_jax.config import TINY
from gptoss_jax.run.progress import State
from gptoss_jax.run.stable import _note, ends, is_stable
from gptoss_jax.selection.ranking import rank
from gptoss_jax.statistics.tables import columns

from .bad_input import Refused
from .conftest import conversation
from .made_up import E, some_sums
from .test_dataset import make
from .test_profile import run_profile

ROWS = 40
OPTIONS = {"keep": "assistant", "domain_column": "domain", "dtype": "float32", "max_seq_length": 2048, "batch_size": 4}


def test_portions_double_the_rows() -> None:
    assert ends(1600) == [100, 200, 400, 800, 1600]
    assert ends(40) == [3, 5, 10, 20, 40]
    assert [ends(n) for n in (1, 2, 3)] == [[1], [1, 2], [1, 2, 3]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"id": f"r{i}", "domain": "ab"[i % 2], "text": conversation(i % 13)} for i in range(ROWS)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def first(tiny_mxfp4: Path, data: Path) -> Callable[[int], gj.Profile]:
    """The profile of so many rows, which are a sample of them; each is made once."""
    made: dict[int, gj.Profile] = {}

    def profile(rows: int) -> gj.Profile:
        if rows not in made:
            made[rows] = gj.profile(str(tiny_mxfp4), str(data), **OPTIONS, num_rows=rows)
        return made[rows]

    return profile


WAYS = {"resident": (), "streamed": ("--engine", "streamed"), "packed": ("--pack",)}


@pytest.mark.slow
@pytest.mark.parametrize("keep", [2, 6])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_rows_are_taken_until_the_keep_set_stays(
    way: tuple[str, ...], keep: int, tiny_mxfp4: Path, data: Path, tmp_path: Path, first: Callable[[int], gj.Profile]
) -> None:
    argv = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    ours = gj.Profile.open(run_profile(tiny_mxfp4, data, tmp_path / "out", *argv, *way, "--until-stable", str(keep)))
    curve, before, same = [], None, 0
    for rows in ends(ROWS):
        expected = first(rows)
        kept = [{*experts[:keep]} for experts in expected.rank().layers]
        shares = [len(now - then) / keep for now, then in zip(kept, before or kept, strict=True)]
        changed = None if before is None else float(np.mean(shares))
        curve.append((rows, expected.info["kept_tokens"], None if changed is None else pytest.approx(changed)))
        before, same = kept, same + 1 if changed == 0 else 0
        if same == 2:
            break
    found = ours.info["until_stable"]
    assert [(point["rows"], point["kept_tokens"], point["changed"]) for point in found["curve"]] == curve
    assert (found["stable"], found["keep"], found["rows_given"]) == (same == 2, keep, ROWS)
    for name in ("rows", "prompts_hash", "kept_tokens", "kept_tokens_by_domain", "truncated_rows"):
        assert ours.info[name] == expected.info[name], name
    assert ours.info["total_tokens"] == found["curve"][-1]["tokens"]
    np.testing.assert_array_equal(ours.sums.row_hashes, expected.sums.row_hashes)
    of_ours, of_expected = ours.sums.by_fold("a"), expected.sums.by_fold("a")
    if "--pack" in way:  # at other places of a block near ties of the router may fall otherwise
        np.testing.assert_allclose(of_ours["count"], of_expected["count"], rtol=0, atol=2)
    else:
        for name, column in of_expected.items():
            np.testing.assert_allclose(of_ours[name], column, rtol=1e-5, err_msg=name)
    report = (tmp_path / "out" / "report.md").read_text()
    assert f"- Rows: {rows:,} |" in report and f"{rows} of {ROWS} rows were taken." in report
    assert f"\n| {rows} | {found['curve'][-1]['tokens']:,} | " in report


def test_portions_without_a_kept_token_are_not_compared() -> None:
    """Of nothing the keep-set would be the first experts, and the same ones each time."""
    sums = some_sums(1, [""], range(4))
    nothing = sums.statistics.map(lambda x, _: np.zeros_like(x))
    state, part = State(units=7), make("padded").part(4, 5)
    for statistics in (nothing, nothing, sums.statistics, sums.statistics):
        state.statistics = statistics
        _note(state, part, 2)
    assert [point["changed"] for point in state.curve] == [None, None, None, 0]
    assert not is_stable(state.curve) and state.units == 0
    assert [point["rows"] for point in state.curve] == [1, 2, 3, 4]
    assert state.kept == [sorted(experts[:2]) for experts in rank(columns(*sums.total())).layers]
    other = replace(sums.statistics, gate_norm_sum=1 / sums.statistics.gate_norm_sum)
    state.statistics = other
    before = state.kept
    _note(state, part, 2)
    new = sum(len({*now} - {*then}) for now, then in zip(state.kept, before, strict=True))
    assert state.curve[-1]["changed"] == new / (2 * len(before)) and E > 2


REFUSED: dict[str, tuple[list[Any], list[str]]] = {
    "all experts": (["--until-stable", TINY.num_experts], ["--until-stable 7", "7 experts", "keep 1 to 6"]),
    "none": (["--until-stable", "1%"], ["--until-stable 1%", "keep 1 to 6"]),
    "no number": (["--until-stable", "x%"], ["--until-stable is 'x%'", "50%"]),
    "with EAFT": (["--until-stable", 3, "--eaft"], ["--until-stable does not go with --eaft"]),
}


@pytest.mark.parametrize(("options", "says"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_one_line(
    options: list[Any], says: list[str], tiny_mxfp4: Path, rows_jsonl: Path, refused: Refused
) -> None:
    refused("profile", tiny_mxfp4, "--data", rows_jsonl, "--out", "out", *options, says=says)
