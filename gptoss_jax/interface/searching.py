"""Keep-sets that are found by running the model, for `select`: with them comes JAX."""

import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..devices import hosts
from ..errors import OptionError, RankingError
from ..evaluation.intervals import Estimate
from ..files import atomic
from ..files.paths import AnyPath, is_path, place
from ..network.source import Source
from ..run import job as runs
from ..run.choosing import OF_DATA, OF_JUDGING, OF_PLACING, Keeping, Ranked, Searching
from ..run.job import join
from ..run.judging import Judging
from ..run.options import Counting, Data, Options, Placing, declared_options, flag_of, taken
from ..run.progress import Progress
from ..search import elsewhere, greedy
from ..search import pick as picking
from ..search.pick import LONGEST
from ..selection.criteria import ELIMINATIONS, GREEDY_COSINE
from ..selection.keep_sets import KeepSets, Lost
from ..selection.mixes import weights_of
from ..selection.ranking import Ranking
from ..selection.serving import serving_limits
from .model import Model, as_model
from .selected import Selected, affordable, check_files, numbers, written

WORK, WORKED = "pick", "work"  # what says that a run has begun, and the folder of its candidates
ELSEWHERE = "elsewhere"  # the folder of what other domains lose
NAMED = 20  # domains that are told of


def search(
    model: Any,
    rule: str,
    ranked: Ranked,
    keeping: Keeping,
    format: str = "same",
    out: str | AnyPath | None = None,
    overwrite: bool = False,
    resume: bool = False,
    tell: Callable[[str], Any] = lambda line: None,
    **options: Any,
) -> list[Selected]:
    """What `select` runs with a rule of `ELIMINATIONS`, or with the option `pick`; `tell` is given what a user should
    know before each step."""
    asked = (model, ranked, keeping, format, out, overwrite, resume, tell)
    if not options.get("pick"):
        return _eliminate(rule, *asked, **options)
    if rule in ELIMINATIONS:
        raise OptionError(f"--rule {rule} goes without --pick: name it as a candidate, --pick {rule}")
    return _pick(*asked, **options)


def _eliminate(
    rule: str,
    model: Any,
    ranked: Ranked,
    keeping: Keeping,
    format: str,
    out: str | AnyPath | None,
    overwrite: bool,
    resume: bool,
    tell: Callable[[str], Any],
    **options: Any,
) -> list[Selected]:
    opened = as_model(model)
    _refuse(ranked, {"domain", "seed"}, f"--rule {rule}")
    _refuse(keeping, {"keep", "budget_gib", "context", "rows", "blend"}, f"--rule {rule}")
    data, searching, placing = _asked(opened, model, ranked, options)
    counting = Counting(keep=searching.tokens)
    request = greedy.Request(opened.name, data, counting, placing, (rule,), ranked.domain, keeping.blend)
    counts, why = _counts(opened, keeping, format)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "keep.json" if out is None else place(out)
        join(request.placing, {"MODEL": opened.name, "--out": str(target), **request.by_flag()})
        kept = Progress(target)
        if hosts.is_first():
            overwrite = kept.may_replace(overwrite, resume)
            check_files(counts, target, overwrite)
            atomic.check_free(_of_all(target), overwrite)
        ranking = greedy.run(request, opened.source, kept, resume, tell)[rule]
        found = [_selected(ranking, count, why, opened.config.top_k) for count in counts]
        found = _judged_elsewhere(found, request, searching.scored, opened.source, kept, tell)
        with hosts.first_alone():
            if hosts.is_first():
                ranking.write(_of_all(target), overwrite)
                found = written(found, counts, target, overwrite)
                kept.remove()
    return found


def _pick(
    model: Any,
    ranked: Ranked,
    keeping: Keeping,
    format: str,
    out: str | AnyPath | None,
    overwrite: bool,
    resume: bool,
    tell: Callable[[str], Any],
    **options: Any,
) -> list[Selected]:
    opened = as_model(model)
    _refuse(ranked, {"domain", "seed"}, "--pick")
    _refuse(keeping, {"keep", "budget_gib", "context", "rows", "max_kl", "min_match"}, "--pick")
    data, searching, placing = _asked(opened, model, ranked, options, OF_JUDGING)
    if placing.coordinator:
        raise OptionError("--pick is one process: leave out --coordinator")
    judging = _by_whole_rows(data, searching.scored, options)
    if keeping.min_match is not None and not judging.replies:
        raise OptionError("--min-match needs --replies: say how many rows are answered")
    request = picking.Request(opened.name, data, searching, judging, placing, ranked.domain, ranked.seed)
    counts, why = _counts(opened, keeping, format)
    if counts and min(counts) < opened.config.top_k:
        raise RankingError(
            f"--keep {min(counts)}: each token uses {opened.config.top_k} experts, and candidates run as soft prunes: "
            "keep at least as many"
        )
    picking.files_of(request, opened.source)
    rows = picking.rows_of(request, opened.source)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "keep.json" if out is None else place(out)
        kept = Progress(target)
        overwrite = kept.may_replace(overwrite, resume)
        check_files(counts or [0], target, overwrite)
        kept.begin({**request.by_flag(), "the model's fingerprint": opened.source.fingerprint()}, resume)
        kept.write(WORK, b"what candidates are made of, and how they were judged")
        with runs.keeping(kept):
            found = _picked(request, keeping, counts, why, opened, rows, kept, tell)
            found = _judged_elsewhere(found, request, searching.scored, opened.source, kept, tell)
        found = written(found, [len(one.keep_sets.layers[0]) for one in found], target, overwrite)
        kept.remove()
    return found


def _picked(
    request: picking.Request,
    keeping: Keeping,
    counts: list[int],
    why: tuple[str, ...],
    model: Model,
    rows: np.ndarray,
    kept: Progress,
    tell: Callable[[str], Any],
) -> list[Selected]:
    """The best candidate of each number; of the fewest that keep a bound, where one is given."""
    work, source, tried = kept.folder / WORKED, model.source, list[picking.Trial]()
    candidates = picking.Candidates(request, source, work, tell)

    def best(count: int) -> picking.Trial:
        trials = picking.judge(candidates.of(count), request, source, work / f"eval-{count}", tell)
        tried.extend(trials)
        return picking.best(trials)

    if keeping.bounds:
        held: dict[int, picking.Trial] = {}

        def holds(count: int) -> bool:
            held[count] = best(count)
            return held[count].holds(keeping.max_kl, keeping.min_match)

        fewest = picking.smallest(range(model.config.top_k, model.config.num_experts), holds)
        if fewest is None:
            raise RankingError(picking.beyond(held, keeping.max_kl, keeping.min_match))
        chosen = {fewest: held[fewest]}
    else:
        chosen = {count: best(count) for count in counts}
    return [_worth(picking.picked(one, tried, rows), one, why, model.config.top_k) for one in chosen.values()]


def _judged_elsewhere(
    found: list[Selected],
    request: greedy.Request | picking.Request,
    scored: str,
    source: Source,
    kept: Progress,
    tell: Callable[[str], Any],
) -> list[Selected]:
    """With what domains lose that --domain does not name, where rows of others are there."""
    if not request.data.domain:
        return found
    if request.placing.coordinator:
        tell("what other domains lose is measured by one process: run eval on their rows")
        return found
    names = [f"keep {len(one.keep_sets.layers[0])}" for one in found]
    judging = _by_whole_rows(request.data, scored)
    asked = elsewhere.Request(request.model, request.data, judging, request.placing)
    sets = {name: one.keep_sets for name, one in zip(names, found, strict=True)}
    with runs.keeping(kept):
        lost = elsewhere.lost(sets, asked, source, kept.folder / ELSEWHERE, tell)
    return [_with_lost(one, lost.get(name)) for name, one in zip(names, found, strict=True)]


def _by_whole_rows(data: Data, scored: str, more: Mapping[str, Any] | None = None) -> Judging:
    """How keep-sets are judged: where a block cuts a row, the KL of its reply says nothing of the model at work."""
    length = min(LONGEST, data.max_seq_length)
    return taken(Judging, {"seq_len": (length,), "keep": scored, "whole_rows": True, **(more or {})})


def _with_lost(one: Selected, lost: Lost | None) -> Selected:
    if not lost:
        return one
    worst = sorted(lost, key=lambda domain: -lost[domain][0])
    said = ", ".join(f"{domain} KL {lost[domain][0]:.4g}" for domain in worst[:NAMED])
    further = f" and {len(worst) - NAMED:,} that lose less" if len(worst) > NAMED else ""
    remark = f"domains that it was not chosen for, worst first: {said}{further}"
    return replace(one, keep_sets=replace(one.keep_sets, elsewhere=lost), remarks=(*one.remarks, remark))


def _worth(keep_sets: KeepSets, trial: picking.Trial, why: tuple[str, ...], top_k: int) -> Selected:
    match = "" if trial.match is None else f", right answers {_shown(trial.match)}"
    told = f"{trial.name} was picked: KL {_shown(trial.kl)}{match}"
    return Selected(keep_sets, {}, (*why, *serving_limits(trial.keep, top_k), told))


def _shown(of: Estimate) -> str:
    return f"{of.value:.4g} ({of.low:.4g} to {of.high:.4g})"


def _counts(model: Model, keeping: Keeping, format: str) -> tuple[list[int], tuple[str, ...]]:
    """How many experts are to stay, and why so many; none where a bound decides."""
    if keeping.bounds:
        return [], ()
    if keeping.budget_gib is not None:
        return affordable(keeping, model.config, model.source.quantized, format)
    return numbers(keeping.keep, model.config.num_experts), ()


def _asked(
    opened: Model, model: Any, ranked: Ranked, options: dict[str, Any], more: Collection[str] = ()
) -> tuple[Data, Searching, Placing]:
    """What is taken out of the options of a search, of which it may have `more`. OptionError where one is unknown."""
    own = [name for name in declared_options(Searching) if name != "rule"]
    known = [*own, *OF_DATA, *OF_PLACING, *more]
    if unknown := sorted({*options} - {*known}):
        raise OptionError(f"there is no option {unknown[0]!r} of a search: there are {', '.join(known)}")
    searching = taken(Searching, options)
    if is_path(searching.data) and not str(searching.data):
        raise OptionError("a search runs MODEL over rows: name them with --data")
    rows = str(searching.data) if is_path(searching.data) else searching.data
    asked = {"data": rows, "domain": tuple(weights_of(ranked.domain)), "seed": ranked.seed}
    data = taken(Data, asked | {name: options.pop(name) for name in OF_DATA if name in options})
    of_model = {"dtype": opened.dtype, "weights": opened.weights} if isinstance(model, Model) else {}
    return data, searching, taken(Placing, of_model | {n: options.pop(n) for n in OF_PLACING if n in options})


def _refuse(given: Options, known: Collection[str], rule: str) -> None:
    for field in fields(given):
        if field.name not in known and getattr(given, field.name) != field.default:
            raise OptionError(f"{flag_of(type(given), field.name)} means nothing to {rule}: leave it out")


def _selected(ranking: Ranking, count: int, why: tuple[str, ...], top_k: int) -> Selected:
    kept = ranking.keep(count)
    assert ranking.losses is not None, "they are what the ranking follows from"
    lost = np.array([losses[count] if count < len(losses) else 0 for losses in ranking.losses])
    worst = int(lost.argmax())
    turned = ", times how far the layer turns it," if ranking.origin.criterion == GREEDY_COSINE else ""
    told = f"layers' outputs move by {lost.mean():.4g} of the stream's square{turned} in the mean, most in layer "
    return Selected(kept, {}, (*why, *serving_limits(count, top_k), f"{told}{worst}: {lost[worst]:.4g}"))


def _of_all(target: AnyPath) -> AnyPath:
    """The file for the ranking: with it every other number of experts is chosen too."""
    return target.with_name(f"{target.stem}-ranking{target.suffix}")
