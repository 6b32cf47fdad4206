"""Fingerprints, as functions with the names and defaults of the command line.

But for `record` they import no JAX: tables are read, and no model runs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import InputError, OptionError
from ..files import atomic
from ..files.paths import AnyPath, is_path, place
from ..fingerprints import ranking as rankings
from ..fingerprints import specificity as specificities
from ..fingerprints.domains import Domains, domains_of, of_domain, of_patterns
from ..fingerprints.folder import ANSWERS, CARD, INFO, SUMMARIES, Activations
from ..fingerprints.importing import activations
from ..fingerprints.published import Published, read_published
from ..fingerprints.ranking import Way
from ..fingerprints.specificity import Specificity
from ..fingerprints.summaries import categories
from ..fingerprints.usage import are_counted, chosen
from ..run.fingerprinting import ANSWERED, RECORDED, Asked, Used
from ..run.options import SIDE_BY_SIDE, Answering, Data, Placing, Sampling, declared_options, taken
from ..selection.keep_sets import KeepSets
from ..selection.origin import Origin
from ..selection.ranking import FALLING, Ranking

KEEP_FILE = "keep.json"


def record(
    model: Any,
    data: Any,
    domains: Domains | None = None,
    *,
    out: str | AnyPath,
    overwrite: bool = False,
    resume: bool = False,
    **options: Any,
) -> Activations:
    """Have a model answer questions, and make an activation dataset of what its tokens choose.

    Args:
        model: an open model, or the name of one.
        data: a path or hub id as --data takes it, or a list of records: conversations, or a column with what a user
            says, with a benchmark and a category.
        domains: which categories belong to which domain, or a file that says so.
        out: the folder for the dataset.
        overwrite: replaces an existing folder, at the end.
        resume: goes on with the unfinished run beside `out`, if there is one.
        **options: those of the command `fingerprint record`, as benchmark="quiz" or max_new_tokens=64.

    DataError where a row asks nothing, has no benchmark or category, or leaves no room for a reply.

    Example:
        >>> import gptoss_jax as gj
        >>> rows = [{"text": "What is 12 + 7?", "category": "sums"}, {"text": "What is 9 - 4?", "category": "sums"}]
        >>> recorded = gj.fingerprint.record("nano", rows, benchmark="quiz", out="recorded", max_new_tokens=40)
        >>> recorded.summaries[0].count_frequency_LE.shape, len(recorded.answers)
        ((6, 16), 2)
    """
    from ..fingerprints import recording
    from .model import Model, as_model

    opened = as_model(model)
    if isinstance(model, Model):
        options = {"dtype": opened.dtype, "weights": opened.weights} | options
    request = recording.Request(
        opened.name,
        taken(Data, {"data": str(data) if is_path(data) else data, **_of(options, RECORDED)}),
        taken(Asked, _of(options, declared_options(Asked))),
        taken(Answering, _of(options, ANSWERED)),
        taken(Sampling, _of(options, declared_options(Sampling))),
        taken(Placing, _of(options, SIDE_BY_SIDE)),
        None if domains is None else domains_of(domains),
        f"gptoss_jax.fingerprint.record({opened.name!r}, ...)",
    )
    if options:
        raise OptionError(f"there is no option {min(options)!r} of fingerprint record")
    return recording.record(request, lambda _: opened.source, place(out), overwrite, resume)


def _of(options: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Some options, taken out of all."""
    return {name: options.pop(name) for name in names if name in options}


def import_published(
    source: Any, domains: Domains | None = None, *, out: str | AnyPath | None = None, overwrite: bool = False
) -> Activations:
    """Make an activation dataset of published summaries and examples, in a folder or a tar archive, or in several.

    With `domains` it knows which categories belong to which domain. With `out` it is written to that folder.
    FingerprintError names the file and the place in it that is wrong.

    Example:
        >>> import gptoss_jax as gj, json, pathlib
        >>> published = pathlib.Path("data/quiz/law/True_False.json")
        >>> published.parent.mkdir(parents=True)
        >>> layer = {str(e): {"count_frequency": f, "prob_density": f / 2} for e, f in [(5, 0.9), (3, 0.4)]}
        >>> summary = {"sample_count": 2, "num_think_tokens": 30.5, "think_expert_analytics": {"layer_0": layer}}
        >>> _ = published.write_text(json.dumps(summary))
        >>> dataset = gj.fingerprint.import_published("data", {"law": ["quiz/law"]}, out="activations")
        >>> dataset.info["samples"], dataset.summaries[0].count_frequency_LE.shape
        (2, (1, 6))
    """
    given = [source] if is_path(source) else source
    if not isinstance(given, list | tuple) or not given or not all(map(is_path, given)):
        raise InputError(f"a source is {type(source).__name__}: give a folder or a tar archive, or a list of these")
    sources = [place(one) for one in given]
    target = None if out is None else place(out)
    if target is not None:
        atomic.check_free(target, overwrite)
        atomic.check_apart(target, *sources)
    known = None if domains is None else domains_of(domains)
    published = Published()
    for one in sources:
        read_published(one, published)
    made = activations(published, ", ".join(map(str, sources)), known)
    if target is not None:
        made.save(target, overwrite)
    return made


def rank(
    dataset: Any,
    domain: str | None = None,
    *,
    category: Sequence[str] = (),
    segment: str = "both",
    weight: str = "sample",
    by: str = "frequency",
    mode: str = "pure",
    reverse: bool = False,
    keep: int | str | None = None,
    domains: Domains | None = None,
    out: str | AnyPath | None = None,
    overwrite: bool = False,
) -> Ranking:
    """Rank the experts of each layer by how much the answers of a domain, of some categories, or all answers use them.

    Args:
        dataset: an activation dataset, open or its folder.
        domain: one of the dataset's domains, or of `domains`, which take their place.
        category: in the place of a domain, categories as "BENCHMARK/CATEGORY", in which * stands for any text.
        segment: "think", "answer" or "both".
        weight: "sample" where each answer has the same say, "token" where each token has it.
        by: "frequency", or "specificity": how many times as much as all answers do.
        mode: "pure", or "interleaved" with the ranking of all answers by frequency.
        reverse: the other way round; experts that nobody chose stay last.
        keep: with `out`, also writes keep.json beside it, with so many of each layer.
        domains: a file of domains, or the categories of each.
        out: the file for the ranking.
        overwrite: replaces existing files.

    FingerprintError where a domain or a category is not there, or tokens are to be weighted and are not counted.

    Example:
        >>> import gptoss_jax as gj, json, pathlib
        >>> for category, often in [("law", 5), ("math", 3)]:
        ...     file = pathlib.Path("quizzes/quiz", category, "True_False.json")
        ...     file.parent.mkdir(parents=True)
        ...     layer = {str(e): {"count_frequency": 0.9 - abs(e - often) / 9, "prob_density": 0.2} for e in range(6)}
        ...     summary = {"sample_count": 2, "num_think_tokens": 30.5, "think_expert_analytics": {"layer_0": layer}}
        ...     _ = file.write_text(json.dumps(summary))
        >>> dataset = gj.fingerprint.import_published("quizzes", {"law": ["quiz/law"]})
        >>> gj.fingerprint.rank(dataset, "law").layers
        [[5, 4, 3, 2, 1, 0]]
        >>> gj.fingerprint.rank(dataset, category=["*/math"], by="specificity").layers
        [[0, 1, 2, 3, 4, 5]]
    """
    used = Used(domain, tuple(category), segment, weight, by, mode, reverse, keep)
    return compare(dataset, used, domains, out, overwrite).ranking


def specificity(
    dataset: Any,
    domain: str | None = None,
    *,
    category: Sequence[str] = (),
    segment: str = "both",
    weight: str = "sample",
    domains: Domains | None = None,
) -> Specificity:
    """How many times as much as all answers those of a domain, or of some categories, use each expert.

    The arguments are those of `rank`. The ratios come with shares and with intervals, all arrays [L, E].

    Example:
        >>> import gptoss_jax as gj, json, pathlib
        >>> for category, often in [("law", 0.5), ("math", 0.1)]:
        ...     file = pathlib.Path("two/quiz", category, "True_False.json")
        ...     file.parent.mkdir(parents=True)
        ...     layer = {"0": {"count_frequency": often, "prob_density": 0.2}}
        ...     layer["1"] = {"count_frequency": 1 - often, "prob_density": 0.2}
        ...     summary = {"sample_count": 2, "num_think_tokens": 30.5, "think_expert_analytics": {"layer_0": layer}}
        ...     _ = file.write_text(json.dumps(summary))
        >>> found = gj.fingerprint.specificity(gj.fingerprint.import_published("two"), category=["quiz/law"])
        >>> print(found.ratio.round(2))
        [[1.67 0.71]]
    """
    used = Used(domain, tuple(category), segment, weight, "specificity")
    found = compare(dataset, used, domains).specificity
    assert found is not None
    return found


@dataclass(frozen=True)
class Compared:
    """A ranking, and what it rests on."""

    ranking: Ranking
    specificity: Specificity | None
    """Of the domain; None where all answers are ranked, or not all are counted."""
    remarks: tuple[str, ...]
    """Lines that a user should read."""
    keep_sets: KeepSets | None = None
    keep_file: AnyPath | None = None


def compare(
    dataset: Any, used: Used, domains: Domains | None = None, out: str | AnyPath | None = None, overwrite: bool = False
) -> Compared:
    """What `rank` runs, for whoever wants to see what the ranking rests on."""
    if used.keep is not None and out is None:
        raise InputError("keep is for the file keep.json beside out: name out, or take rank(...).keep(number)")
    target = None if out is None else place(out)
    files = [] if target is None else [target, *([target.with_name(KEEP_FILE)] if used.keep is not None else [])]
    for file in files:
        atomic.check_free(file, overwrite)
        if is_path(dataset):
            folder = place(dataset)
            atomic.check_apart(file, folder, *(folder / name for name in (SUMMARIES, ANSWERS, INFO, CARD)))
    if len(files) > 1:
        atomic.check_apart(files[1], files[0])
    compared = _compared(dataset, used, domains)
    if used.keep is not None:
        compared = replace(compared, keep_sets=compared.ranking.keep(used.keep), keep_file=files[1])
    for file, made in zip(files, [compared.ranking, compared.keep_sets], strict=False):
        assert made is not None
        made.write(file, overwrite)
    return compared


def _compared(given: Any, used: Used, domains: Domains | None) -> Compared:
    dataset = _opened(given)
    known = dataset.domains if domains is None else domains_of(domains)
    there = categories(dataset.summaries)
    every = chosen(dataset.summaries, there, used.segment)
    name, names, remarks = None, there, []
    if used.domain is not None:
        name, names = used.domain, of_domain(used.domain, known, there)
        if len(names) < len({*known[name]}):
            remarks = [f"of the {len({*known[name]})} categories of domain {name!r} the dataset has {len(names)}"]
    elif used.category:
        name, names = ", ".join(used.category), of_patterns(used.category, there)
    own = chosen(dataset.summaries, names, used.segment)
    # Where a domain's tokens are counted and others' are not, it can be ranked and not compared.
    comparable = used.weight == "sample" or used.by == "specificity" or are_counted(every)
    special = specificities.specificity(own, every, used.weight) if name is not None and comparable else None
    way = Way(used.by, used.mode, used.weight, used.reverse)
    origin = Origin(
        criterion=used.by,
        domains={} if name is None else {name: 1.0},
        rule=_rule(used),
        model_fingerprint=dataset.info.get("model_fingerprint"),
        answers_hash=dataset.hash,
    )
    return Compared(rankings.rank(own, every, special, way, origin), special, tuple(remarks))


def _opened(given: Any) -> Activations:
    if isinstance(given, Activations):
        return given
    if not is_path(given):
        raise InputError(f"a dataset is {type(given).__name__}: give an open activation dataset, or its folder")
    return Activations.open(place(given))


def _rule(used: Used) -> str:
    how = [*(["interleaved with all"] if used.mode == "interleaved" else []), *(["reversed"] if used.reverse else [])]
    parts = "thoughts and answers" if used.segment == "both" else f"segment {used.segment}"
    return ", ".join([FALLING, *how, f"{parts}, each {used.weight} the same"])
