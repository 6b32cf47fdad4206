"""Rows in portions, until more of them no longer change which experts would be kept. Letters: see `config`.

Each portion doubles the rows, so that what stays the same has stood as many new rows as there were before; of portions
of one size the last ones would change little by their size alone.
"""

from collections.abc import Callable, Iterator
from typing import Any

from ..data.dataset import Dataset
from ..errors import OptionError
from ..selection.ranking import number_kept, rank
from ..statistics.store import Sums
from ..statistics.tables import columns
from .artifacts import Measured, peak_rss_bytes
from .engine import Clock, Engine, Unit
from .measure import check_computed, one_pass
from .progress import Progress, State
from .steps import Asked

FLAG = "--until-stable"
CRITERION = "reap"
FIRST = 16  # the first portion is this part of the rows
SAME = 2  # so many times in a row the keep-set has to stay what it was


def number(keep: int | str | None, num_experts: int) -> int | None:
    """How many experts of a layer are to be kept, where that is asked; OptionError where it is none, or all."""
    if keep is None:
        return None
    found = number_kept(keep, num_experts, FLAG)
    if not 0 < found < num_experts:
        raise OptionError(f"{FLAG} {keep}: the model has {num_experts} experts a layer: keep 1 to {num_experts - 1}")
    return found


def ends(num_rows: int) -> list[int]:
    """Where the portions end: at 1/16, 1/8, 1/4, 1/2 of the rows, and at their end."""
    parts = [FIRST >> power for power in range(FIRST.bit_length())]
    return sorted({-(-num_rows // part) for part in parts})


def measure(
    engine: Engine,
    dataset: Dataset,
    progress: Progress,
    state: State,
    advance: Callable[[Unit], Any],
    keep: int,
    swap: bool = False,
) -> tuple[Sums, Measured, Dataset]:
    """Sum the statistics of one portion after the other, from `state` on, until the `keep` best experts of all layers
    are the same ones as after the portion before, twice in a row.

    As `measure.measure`; the rows that were used are given too. `state.curve` says how the keep-set changed.
    """
    engine.clock = Clock(state.seconds, state.compile_seconds)
    for part in _parts(dataset, state):
        one_pass(engine, part.batches(), progress, state, advance, Asked(swap=swap))
        _note(state, part, keep)
        if is_stable(state.curve):
            break
    assert state.statistics is not None, "a dataset has kept tokens, and so batches"
    used, groups = dataset.part(0, state.curve[-1]["rows"]), dataset.groups
    check_computed(state.statistics, used.total_tokens)
    sums = Sums(state.statistics, {}, groups.domains, used.row_hashes, groups.folds)
    return sums, Measured(used.total_tokens, 1, state.seconds, state.compile_seconds, peak_rss_bytes()), used


def is_stable(curve: list[dict[str, Any]]) -> bool:
    """Whether the keep-set was the same at each of the last comparisons."""
    return len(curve) > SAME and all(point["changed"] == 0 for point in curve[-SAME:])


def figures(curve: list[dict[str, Any]], keep: int, num_rows: int) -> dict[str, Any]:
    """What profile.json and the report say of it; `num_rows` there were."""
    stayed = "stayed the same twice" if is_stable(curve) else "went on changing"
    rows = f"{curve[-1]['rows']:,} of {num_rows:,} rows were taken"
    said = f"the {keep} experts of each layer that {CRITERION} would keep {stayed}: {rows}"
    return {"said": said, "keep": keep, "stable": is_stable(curve), "rows_given": num_rows, "curve": curve}


def _parts(dataset: Dataset, state: State) -> Iterator[Dataset]:
    """The portions that are not finished, each made when the one before it is."""
    stops = ends(len(dataset.rows))
    for begin, end in list(zip([0, *stops], stops, strict=False))[len(state.curve) :]:
        yield dataset.part(begin, end)


def _note(state: State, part: Dataset, keep: int) -> None:
    """A portion is finished: a point of the curve, and what comes after it begins with its first unit."""
    assert state.statistics is not None, "each portion has rows, and so batches"
    total = state.statistics.total()
    kept_tokens = int(total.tokens[0])
    # Without a kept token there is nothing to choose by.
    kept = [sorted(experts[:keep]) for experts in rank(columns(total, {}), CRITERION).layers] if kept_tokens else []
    new = sum(len({*now} - {*before}) for now, before in zip(kept, state.kept, strict=False))
    before = state.curve[-1] if state.curve else {"rows": 0, "tokens": 0}
    point = {
        "rows": before["rows"] + len(part.rows),
        "tokens": before["tokens"] + part.total_tokens,
        "kept_tokens": kept_tokens,
        "changed": new / (keep * len(kept)) if state.kept else None,
    }
    state.curve, state.kept, state.units = [*state.curve, point], kept, 0
