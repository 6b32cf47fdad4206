"""The job `select --pick`: of several keep-sets those are taken with which the model's expectations move least, on rows
that nothing was fitted on.

A fifth of the rows, by their hashes, judges; the others are what candidates are made of. Every candidate passes the
model as a soft prune, all of them together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..data.remarks import Remarks
from ..data.rows import Row, is_held_out, row_hashes
from ..errors import DataError, OptionError, RankingError
from ..evaluation import job as evaluation
from ..evaluation import stored
from ..evaluation.intervals import Estimate
from ..evaluation.sides import Request as Judged
from ..evaluation.summary import Summary
from ..files.paths import AnyPath
from ..network.source import Source
from ..run import job as profiling
from ..run.choosing import Searching
from ..run.judging import Judging
from ..run.options import Counting, Data, Placing, by_flag
from ..run.profile import Profile
from ..run.progress import Progress
from ..run.reading import read, tokenizer_of
from ..selection.criteria import CRITERIA, ELIMINATIONS
from ..selection.keep_sets import KeepSets
from ..selection.mixes import Mix
from ..selection.origin import rows_as_text
from ..selection.ranking import Ranking
from . import greedy

FEWEST = 2  # rows that judge: an interval needs as many
LONGEST = 1024  # tokens of the blocks that are judged by


@dataclass(frozen=True)
class Request:
    """What is asked of the job."""

    model: str
    data: Data
    searching: Searching
    judging: Judging
    placing: Placing
    domain: Mix = None
    seed: int = 0

    def by_flag(self) -> dict[str, Any]:
        """All options by the names that users know."""
        data = self.data.data if isinstance(self.data.data, str) else "records given in Python"
        given = by_flag(replace(self.data, data=data), self.judging, self.placing)
        asked = {"--pick": list(self.searching.pick), "--tokens": self.searching.tokens, "--domain": self.domain}
        return {**given, **asked, "--seed": self.seed}

    def __post_init__(self) -> None:
        for name in self.searching.pick:
            if name in CRITERIA and CRITERIA[name].of_weights:
                raise OptionError(f"--pick {name} is of the weights alone: select its keep-sets, and name their file")


@dataclass(frozen=True)
class Trial:
    """A candidate, as it was judged."""

    name: str
    keep_sets: KeepSets
    kl: Estimate
    """Of the whole model from it, in nats a token."""
    match: Estimate | None
    """The share of questions that it answers right, where rows have answers."""

    @property
    def keep(self) -> int:
        """The experts of each layer that it keeps."""
        return len(self.keep_sets.layers[0])

    def holds(self, max_kl: float | int | None, min_match: float | int | None) -> bool:
        """Whether the ends of its intervals keep the bounds."""
        is_near = max_kl is None or self.kl.high <= max_kl
        return is_near and (min_match is None or (self.match is not None and self.match.low >= min_match))

    def line(self) -> dict[str, Any]:
        """What keep.json says of it."""
        said: dict[str, Any] = {"name": self.name, "keep": self.keep}
        for quantity, of in (("kl", self.kl), ("match", self.match)):
            if of is not None:
                said[quantity] = [of.value, of.low, of.high]
        return said


def fitted(row: Row) -> bool:
    """Whether candidates are made of the row."""
    return not is_held_out(row)


def files_of(request: Request, source: Source) -> dict[str, KeepSets]:
    """The keep-sets that are files, by their names. RankingError where one cannot be used."""
    files = [name for name in request.searching.pick if name not in ELIMINATIONS and name not in CRITERIA]
    return {name: KeepSets.read(name, source.config) for name in files}


class Candidates:
    """Rankings and keep-sets by their names; each ranking is made once, and kept in the folder of the work."""

    def __init__(self, request: Request, source: Source, work: AnyPath, tell: Callable[[str], Any]):
        self.request, self.source, self.work, self.tell = request, source, work, tell
        self.rankings: dict[str, Ranking] = {}
        self.files = files_of(request, source)
        for name in request.searching.pick:
            if name in ELIMINATIONS:
                self.rankings[name] = self._eliminated(name)
            elif name in CRITERIA:
                self.rankings[name] = self._profile().rank(name, request.domain, request.seed)

    def of(self, count: int) -> dict[str, KeepSets]:
        """Those that keep so many experts of each layer."""
        found = {name: ranking.keep(count) for name, ranking in self.rankings.items()}
        sizes = {name: {*map(len, sets.layers)} for name, sets in self.files.items()}
        return found | {name: sets for name, sets in self.files.items() if sizes[name] == {count}}

    def _eliminated(self, rule: str) -> Ranking:
        """By the rule, and by all others that are asked for: the model runs once."""
        request = self.request
        rules = tuple(name for name in ELIMINATIONS if name in request.searching.pick)
        files = {name: self.work / f"{name}.json" for name in rules}
        if not all(file.exists() for file in files.values()):
            of = request.model, request.data, Counting(keep=request.searching.tokens), request.placing
            kept = Progress(self.work / "eliminations")
            asked = greedy.Request(*of, rules, request.domain, wanted=fitted)
            for name, ranking in greedy.run(asked, self.source, kept, kept.exists(), self.tell).items():
                ranking.write(files[name], overwrite=True)
            kept.remove()
        return Ranking.read(files[rule], self.source.config)

    def _profile(self) -> Profile:
        names, folder = self.request.searching.pick, self.work / "profile"
        counting = Counting(keep=self.request.searching.tokens, swap="swap" in names, eaft="eaft_reap" in names)
        asked = profiling.Request(self.request.model, self.request.data, counting, self.request.placing, wanted=fitted)
        found = profiling.run(asked, lambda _: self.source, folder, resume=True, tell=self.tell).profile
        assert found is not None, "this is one process"
        return found


def judge(
    candidates: Mapping[str, KeepSets], request: Request, source: Source, folder: AnyPath, tell: Callable[[str], Any]
) -> list[Trial]:
    """What each does on the rows that nothing was fitted on. RankingError where there is no candidate."""
    if not candidates:
        raise RankingError("no candidate keeps so many experts: name a rule or a criterion with --pick, or other files")
    asked = Judged(request.model, candidates, request.data, request.judging, request.placing, wanted=is_held_out)
    summary = evaluated(asked, source, folder, tell)
    trials = []
    for entry in summary.entries:
        kl = next(iter(entry.quality.values())).estimates["kl"]
        match = None if entry.replies is None else entry.replies.estimates.get("correct")
        trials.append(Trial(entry.name, candidates[entry.name], kl, match))
    return trials


def evaluated(asked: Judged, source: Source, folder: AnyPath, tell: Callable[[str], Any]) -> Summary:
    """What an evaluation found, from the folder where the run that goes on has finished it."""
    if folder.exists():
        return stored.read(folder)
    return evaluation.run(asked, lambda _: source, folder, resume=True, tell=tell).summary


def best(trials: Sequence[Trial]) -> Trial:
    """The one with the least divergence; of equal ones the first that was named."""
    return min(trials, key=lambda trial: trial.kl.value)


def picked(trial: Trial, tried: Sequence[Trial], decided_by: np.ndarray) -> KeepSets:
    """Its keep-sets, which say what was tried, and by which rows, given by their hashes, all of it was decided."""
    known = [one.keep_sets.origin.row_hashes for one in tried]
    rows = np.unique(np.concatenate([decided_by, *(hashes for hashes in known if hashes is not None)]))
    origin = trial.keep_sets.origin
    rule = f"{origin.rule}, picked of {', '.join(dict.fromkeys(one.name for one in tried))} by KL"
    origin = replace(origin, rule=rule, calibration_rows=rows_as_text(rows))
    return replace(trial.keep_sets, origin=origin, tried=[one.line() for one in tried])


def rows_of(request: Request, source: Source) -> np.ndarray:
    """The hashes of all rows, those that are fitted and those that judge, uint64 [rows], sorted. DataError where one of
    both has too few."""
    rows = read(request.data, tokenizer_of(source), Remarks())
    judging = sum(map(is_held_out, rows))
    if judging < FEWEST or judging == len(rows):
        raise DataError(
            f"{len(rows) - judging} rows make candidates and {judging} judge them, too few to decide by: give more "
            "rows, of which a fifth judges"
        )
    return row_hashes(rows)


def beyond(held: Mapping[int, Trial], max_kl: float | int | None, min_match: float | int | None) -> str:
    """What to say where no number of experts keeps a bound: the nearest that was found."""
    most = held[max(held)]
    match = "" if most.match is None else f", and of the answers {most.match.low:.3f} to {most.match.high:.3f} right"
    asked = {"--max-kl": max_kl, "--min-match": min_match}
    bounds = [f"{flag} {bound:g}" for flag, bound in asked.items() if bound is not None]
    return (
        f"no number of experts keeps {' and '.join(bounds)}: with {most.keep} the KL is {most.kl.low:.4g} to "
        f"{most.kl.high:.4g}{match}: allow more, or give more rows, by which intervals become narrower"
    )


def smallest(counts: Sequence[int], holds: Callable[[int], bool]) -> int | None:
    """The smallest of the ascending numbers that holds, where all above one that holds do; None where none does."""
    low, high = 0, len(counts)
    while low < high:
        middle = (low + high) // 2
        if holds(counts[middle]):
            high = middle
        else:
            low = middle + 1
    return counts[low] if low < len(counts) else None
