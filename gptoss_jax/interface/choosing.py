"""The jobs that rank and choose experts, as functions with the names and defaults of the command line.

They import no JAX where they read a saliency table: a ranking takes less time than that would."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import Config
from ..errors import InputError, OptionError, ProfileError
from ..files import atomic
from ..files.paths import AnyPath, is_path, place, storage_errors
from ..run.choosing import Keeping, Ranked, Searching
from ..run.options import Writing
from ..selection import choice
from ..selection import ranking as rankings
from ..selection.coverage import domain_coverages, fewest_experts
from ..selection.criteria import CRITERIA, ELIMINATIONS, Criterion, masses, named
from ..selection.evidence import Evidence, read_evidence, stored_model
from ..selection.intervals import unsettled
from ..selection.mixes import Mix
from ..selection.origin import Origin
from ..selection.ranking import Ranking, most_protected
from ..selection.serving import serving_limits
from ..statistics.tables import SALIENCY, check_domains
from .selected import Selected, affordable, check_files, numbers, written


def rank(
    profile: Any,
    criterion: str = "reap",
    domain: Mix = None,
    seed: int = 0,
    min_count: int = 0,
    *,
    out: str | AnyPath | None = None,
    overwrite: bool = False,
    progress: Any = None,
) -> Ranking:
    """Rank the experts of each layer, best first, by a criterion over all rows of a profile, one domain or a mix.

    `profile` is an open one, its folder, or a saliency.parquet; for a criterion of the weights alone, as aimer, it is a
    model, open or by its name. A mix is {"science": 2, "law": 1}: each domain has the share that its weight says,
    whatever its number of tokens. Experts that fewer than `min_count` tokens chose stand behind all others, by falling
    reap_sum. With `out` the ranking is written to that file; `progress` makes a bar where weights are read.
    ProfileError where the criterion or a domain does not exist, or the profile lacks what is needed.

    Example:
        >>> import gptoss_jax as gj
        >>> profile = gj.profile("nano", [{"text": "2 + 2 = 4"}], keep="all", max_seq_length=64)
        >>> len(gj.rank(profile, "frequency").layers)
        6
    """
    ranked = Ranked(criterion=criterion, domain=domain, seed=seed, min_count=min_count)
    target = None if out is None else place(out)
    if target is not None:
        _check_out(target, profile, overwrite)
    declared, given_profile = named(ranked.criterion), _is_profile(profile)
    if declared.of_weights and not given_profile:
        ranking = _of_weights(profile, declared, domain, seed, target, progress)
    elif not given_profile and _is_model(profile):
        alone = ", ".join(name for name, other in CRITERIA.items() if other.of_weights)
        raise ProfileError(
            f"{getattr(profile, 'name', profile)} is a model, and {criterion!r} ranks by a profile of it: run "
            f"gptoss-jax profile first, or take a criterion of the weights alone: {alone}"
        )
    else:
        ranking = _evidence(profile, ranked.domain, False).rank(ranked.criterion, ranked.seed, ranked.min_count)
    if target is not None:
        ranking.write(target, overwrite)
    return ranking


def _of_weights(
    model: Any, criterion: Criterion, domain: Mix, seed: int, target: AnyPath | None, progress: Any
) -> Ranking:
    """The ranking by a criterion that needs the weights alone."""
    from convert.cut import silent
    from convert.scores import columns_of_weights

    from .checkpoints import checkpoint_of
    from .model import as_model

    if domain is not None:
        raise OptionError(f"--domain means nothing to {criterion.name!r}, which is of the weights alone: leave it out")
    checkpoint = checkpoint_of(as_model(model))
    if target is not None:
        atomic.check_apart(target, checkpoint.folder, or_inside=True)
    columns = columns_of_weights(checkpoint, criterion.needs, progress or silent)
    return rankings.rank(columns, criterion.name, seed, Origin(model_fingerprint=checkpoint.fingerprint()))


def _is_profile(given: Any) -> bool:
    """Whether statistics are given: an open profile, a folder with a table, or a file."""
    if not is_path(given):
        return hasattr(given, "rank")
    path = place(given)
    with storage_errors(path):
        return bool(path.is_file() or (path / SALIENCY).exists())


def _is_model(given: Any) -> bool:
    """Whether a model is given: an open one, the one that ships with the project, or a folder that is configured."""
    if not is_path(given):
        return hasattr(given, "source")
    from convert.sources import NANO

    path = place(given)
    with storage_errors(path):
        return bool((path / "config.json").exists() or str(given) == NANO)


def select(
    chosen_from: Any,
    keep: int | str | Sequence[int | str] | None = None,
    criterion: str = "reap",
    domain: Mix = None,
    seed: int = 0,
    min_count: int = 0,
    *,
    budget_gib: float | int | None = None,
    format: str = "same",
    context: int | None = None,
    rows: int | None = None,
    model: Any = None,
    coverage: float | int | None = None,
    blend: str = "weights",
    floor: Mapping[str, float | int] | None = None,
    protect_outliers: int = 0,
    max_kl: float | int | None = None,
    min_match: float | int | None = None,
    rule: str = "score",
    out: str | AnyPath | None = None,
    overwrite: bool = False,
    resume: bool = False,
    **options: Any,
) -> Any:
    """Choose the experts of each layer that stay: KeepSets, from a ranking, or from a profile as `rank` takes it.

    Args:
        chosen_from: an open profile, its folder, a saliency.parquet; or, with `keep` alone, a ranking, or a model for
            a criterion of the weights alone; with the rules "greedy" and "greedy_cosine" a model.
        keep: their number, or a per cent of the experts as "50%", of which a part of an expert is left out; a list
            gives a list of keep-sets, of which each smaller lies inside the larger.
        criterion, domain, seed, min_count: as for `rank`.
        budget_gib: in the place of `keep`, as many as fit into so many GiB in the form `format`, with the KV cache of
            `rows` rows of `context` tokens where that is given; `model` is what an older profile is of.
        coverage: in the place of `keep`, the fewest that hold this share of every layer's score.
        blend: "weights", or "maxmin" for the sets whose worst domain keeps the most.
        floor: the least share of what its own best experts would hold that each of these domains keeps.
        protect_outliers: how many experts of the whole model, with the largest activations, stay whatever they score.
        max_kl, min_match: in the place of `keep`, with `pick`, as few as keep the KL in nats a token, or the share of
            right answers, within these bounds: the ends of their intervals.
        rule: "greedy" takes the expert away, again and again, whose absence changes the layer's output least, over the
            rows of `data`; with "greedy_cosine" tokens count by how far the layer turns their stream. The numbers that
            `keep` names are sets of one such elimination.
        out: the file for the keep-sets; those of several numbers stand beside it, as keep-16.json. With these rules
            keep-ranking.json has all experts, with what their going costs.
        overwrite: replaces existing files.
        resume: goes on with the unfinished elimination beside `out`, if there is one.
        **options: with these rules those of the command `select` that name rows and devices, as data="rows.jsonl" or
            tokens="reply"; with pick=("greedy", "greedy_cosine", "reap", "mine.json") these are judged, on a fifth of
            the rows, and the best is taken.

    RankingError where there are no such sets, which says the nearest that there are.

    Example:
        >>> import gptoss_jax as gj
        >>> profile = gj.profile("nano", [{"text": "2 + 2 = 4"}], keep="all", max_seq_length=64)
        >>> [len(kept) for kept in gj.select(profile, keep=12).layers]
        [12, 12, 12, 12, 12, 12]
        >>> small, large = gj.select(profile, keep=[4, 12])
        >>> all(set(few) <= set(many) for few, many in zip(small.layers, large.layers))
        True
        >>> texts = [{"text": f"{n} + {n} = {2 * n}"} for n in range(40)]
        >>> gj.select("nano", 8, rule="greedy", data=texts, max_seq_length=64).origin.criterion
        'greedy'
    """
    ranked = Ranked(criterion=criterion, domain=domain, seed=seed, min_count=min_count)
    keeping = Keeping(keep, budget_gib, coverage, blend, floor, protect_outliers, context, rows, max_kl, min_match)
    if Searching(rule=rule).rule in ELIMINATIONS or options.get("pick"):
        from .searching import search  # with it comes JAX

        found = search(chosen_from, rule, ranked, keeping, format, out, overwrite, resume, **options)
    elif options or resume:
        named = ", ".join([*options] or ["resume"])
        raise OptionError(f"rule='score' chooses from a profile, and takes no {named}: leave it out, or take 'greedy'")
    else:
        found = choose(chosen_from, ranked, keeping, format, model, out, overwrite)
    return [one.keep_sets for one in found] if isinstance(keep, list | tuple) else found[0].keep_sets


def choose(
    chosen_from: Any,
    ranked: Ranked,
    keeping: Keeping,
    format: str = "same",
    model: Any = None,
    out: str | AnyPath | None = None,
    overwrite: bool = False,
) -> list[Selected]:
    """What `select` runs, for whoever wants to see what each choice costs."""
    format = Writing(format=format).format
    if keeping.bounds:
        flag = "--max-kl" if keeping.max_kl is not None else "--min-match"
        raise OptionError(f"{flag} goes with --pick: it is of what candidates do when the model runs")
    if keeping.budget_gib is None and (format != "same" or model is not None):
        raise OptionError("--format and --model go with --budget-gib: they say what a checkpoint takes")
    if isinstance(chosen_from, Ranking):
        return _of_ranking(chosen_from, ranked, keeping, out, overwrite)
    if CRITERIA[ranked.criterion].of_weights:
        ranking = rank(chosen_from, ranked.criterion, ranked.domain)
        return _of_ranking(ranking, Ranked(), keeping, out, overwrite)
    for option, value in (("--coverage", keeping.coverage), ("--floor", keeping.floor)):
        if value is not None:
            choice.check_mass(ranked.criterion, option)
    if keeping.blend == "maxmin":
        choice.check_mass(ranked.criterion, "--blend maxmin")
        if isinstance(ranked.domain, Mapping) and len({*ranked.domain.values()}) > 1:
            raise OptionError("--blend maxmin finds the weights of domains: name them without any")
    if out is not None and is_path(chosen_from):
        atomic.check_apart(place(out), place(chosen_from))
    evidence = _evidence(chosen_from, ranked.domain, True)
    check_domains(keeping.floor or (), evidence.by_domain)
    ranking = evidence.rank(ranked.criterion, ranked.seed, ranked.min_count)
    case = _Case(evidence, ranking, choice.outliers(evidence, keeping.protect_outliers), ranked, keeping)
    counts, why = _counts(case, format, model)
    if out is not None:
        check_files(counts, place(out), overwrite)

    def selected(found: choice.Found) -> Selected:
        num_kept = len(found.keep_sets.layers[0])
        lost = domain_coverages(evidence.by_domain, found.keep_sets, ranked.criterion)
        told = (*why, *found.remarks, *_settled(case, num_kept), *serving_limits(num_kept, evidence.top_k))
        return Selected(found.keep_sets, lost, told)

    found = [selected(one) for one in _found(case, sorted(counts, reverse=True))]
    return written(found, counts, out, overwrite)


@dataclass(frozen=True)
class _Case:
    """What is chosen from, and what for."""

    evidence: Evidence
    ranking: Ranking
    protected: choice.Protected
    ranked: Ranked
    keeping: Keeping


def _settled(case: _Case, num_kept: int) -> list[str]:
    """Whose side of the cut may be chance, where a cut through scores is what decides."""
    by_fold = case.evidence.by_fold
    if case.keeping.blend == "maxmin" or case.keeping.floor is not None or case.ranked.criterion == "random":
        return []
    if by_fold is None:
        return ["the profile keeps no folds of its rows: how settled the choice is stays unknown"]
    open_ = unsettled(by_fold, num_kept, case.ranked.criterion, case.ranked.seed)
    shown = "; ".join(f"layer {layer}: {', '.join(map(str, some))}" for layer, some in enumerate(open_) if some)
    count = sum(map(len, open_))
    of = f"{count} of {sum(map(len, case.ranking.layers))} experts"
    return [f"{of} might be on the other side of the cut by other rows: {shown}"] if count else []


def _found(case: _Case, counts: Sequence[int]) -> Iterable[choice.Found]:
    """The keep-sets of so many experts a layer, the largest first."""
    asked = case.evidence, case.ranked.criterion, counts, case.protected
    if case.keeping.blend == "maxmin":
        return choice.maxmin(*asked)
    if case.keeping.floor is not None:
        return choice.floors(*asked, case.keeping.floor)
    return [choice.Found(case.ranking.keep(count, case.protected)) for count in counts]


def _counts(case: _Case, format: str, model: Any) -> tuple[list[int], tuple[str, ...]]:
    """How many experts a layer stay, and why so many."""
    keeping, E = case.keeping, len(case.ranking.layers[0])
    if keeping.budget_gib is not None:
        return _affordable(case, format, model)
    if keeping.coverage is not None:
        mass_LE = masses(case.evidence.columns, case.ranked.criterion)
        fewest = fewest_experts(case.ranking.order(case.protected), mass_LE, keeping.coverage)
        fewest = max(fewest, most_protected(case.protected)[1])
        mass = f"{keeping.coverage:g} of every layer's {CRITERIA[case.ranked.criterion].mass}"
        return [fewest], (f"{fewest} experts are the fewest that hold {mass}",)
    return numbers(keeping.keep, E), ()


def _affordable(case: _Case, format: str, model: Any) -> tuple[list[int], tuple[str, ...]]:
    """The most experts that the budget has room for in the model that was profiled."""
    shape = len(case.ranking.layers), len(case.ranking.layers[0])
    config, quantized = stored_model(case.evidence.info) if model is None else _sizes_of(model)
    if (config.num_layers, config.num_experts) != shape:
        raise ProfileError(
            f"--model has {config.num_layers} layers of {config.num_experts} experts, the profile {shape[0]} of "
            f"{shape[1]}: name the model that was profiled"
        )
    return affordable(case.keeping, config, quantized, format)


def _sizes_of(model: Any) -> tuple[Config, bool]:
    from .model import as_model  # with it comes JAX, without which a choice is made

    source = as_model(model).source
    return source.config, source.quantized


def _of_ranking(
    ranking: Ranking, ranked: Ranked, keeping: Keeping, out: str | AnyPath | None, overwrite: bool
) -> list[Selected]:
    """The best of a ranking that is made already."""
    if keeping.keep is None or (ranked, keeping) != (Ranked(), Keeping(keep=keeping.keep)):
        by = CRITERIA.get(ranking.origin.criterion or "")
        what = f"{by.name!r} gives a ranking" if by and by.of_weights else "a ranking is given"
        raise InputError(f"{what}, which says nothing more than an order: give keep alone, or a profile")
    counts = numbers(keeping.keep, len(ranking.layers[0]))
    if out is not None:
        check_files(counts, place(out), overwrite)
    found = [Selected(ranking.keep(count), {}, tuple(serving_limits(count, None))) for count in counts]
    return written(found, counts, out, overwrite)


def _check_out(out: AnyPath, profile: Any, overwrite: bool) -> None:
    """OutputError where a file cannot be written, or would replace what is read."""
    atomic.check_free(out, overwrite)
    if is_path(profile):
        atomic.check_apart(out, place(profile))


def _evidence(profile: Any, domain: Mix, whole: bool) -> Evidence:
    if is_path(profile):
        return read_evidence(place(profile), domain, whole)
    found = getattr(profile, "evidence", None)
    if found is None:
        raise InputError(f"a profile is {type(profile).__name__}: give an open one, its folder or a saliency.parquet")
    evidence: Evidence = found(domain)
    return evidence
