"""Keep-sets that are found by running the model, for `select`: with them comes JAX."""

import tempfile
from collections.abc import Callable, Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from ..devices import hosts
from ..errors import OptionError
from ..files import atomic
from ..files.paths import AnyPath, is_path, place
from ..run.choosing import OF_DATA, OF_PLACING, Keeping, Ranked, Searching
from ..run.job import join
from ..run.options import Counting, Data, Options, Placing, flag_of, taken
from ..run.progress import Progress
from ..search import greedy
from ..selection.mixes import weights_of
from ..selection.ranking import Ranking
from ..selection.serving import serving_limits
from .choosing import Selected, affordable, check_files, numbers, written
from .model import Model, as_model


def eliminate(
    model: Any,
    ranked: Ranked,
    keeping: Keeping,
    format: str = "same",
    out: str | AnyPath | None = None,
    overwrite: bool = False,
    resume: bool = False,
    tell: Callable[[str], Any] = lambda line: None,
    **options: Any,
) -> list[Selected]:
    """What `select --rule greedy` runs; `tell` is given what a user should know before the first step."""
    opened = as_model(model)
    if isinstance(model, Model):
        options = {"dtype": opened.dtype, "weights": opened.weights} | options
    request = _request(opened.name, ranked, keeping, options)
    counts, why = [], tuple[str, ...]()
    if keeping.budget_gib is None:
        counts = numbers(keeping.keep, opened.config.num_experts)
    else:
        counts, why = affordable(keeping, opened.config, opened.source.quantized, format)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "keep.json" if out is None else place(out)
        join(request.placing, {"MODEL": opened.name, "--out": str(target), **request.by_flag()})
        if hosts.is_first():
            check_files(counts, target, overwrite)
            atomic.check_free(_of_all(target), overwrite)
        kept = Progress(target)
        ranking = greedy.run(request, opened.source, kept, resume, tell)
        found = [_selected(ranking, count, why, opened.config.top_k) for count in counts]
        with hosts.first_alone():
            if hosts.is_first():
                ranking.write(_of_all(target), overwrite)
                found = written(found, counts, target, overwrite)
                kept.remove()
    return found


def _request(model: str, ranked: Ranked, keeping: Keeping, options: dict[str, Any]) -> greedy.Request:
    """OptionError where something is asked for that the rule does not know."""
    _refuse(ranked, {"domain", "seed"})
    _refuse(keeping, {"keep", "budget_gib", "context", "rows", "blend"})
    known = ["data", *OF_DATA, "tokens", *OF_PLACING]
    if unknown := sorted({*options} - {*known}):
        raise OptionError(f"there is no option {unknown[0]!r} of the rule greedy: there are {', '.join(known)}")
    searching = taken(Searching, options)
    if is_path(searching.data) and not str(searching.data):
        raise OptionError("--rule greedy runs MODEL over rows: name them with --data")
    rows = str(searching.data) if is_path(searching.data) else searching.data
    own = {"data": rows, "domain": tuple(weights_of(ranked.domain)), "seed": ranked.seed}
    data = taken(Data, own | {name: options.pop(name) for name in OF_DATA if name in options})
    counting = Counting(keep=searching.tokens)
    return greedy.Request(model, data, counting, taken(Placing, options), ranked.domain, keeping.blend)


def _refuse(given: Options, known: Collection[str]) -> None:
    for field in fields(given):
        if field.name not in known and getattr(given, field.name) != field.default:
            raise OptionError(f"{flag_of(type(given), field.name)} means nothing to --rule greedy: leave it out")


def _selected(ranking: Ranking, count: int, why: tuple[str, ...], top_k: int) -> Selected:
    kept = ranking.keep(count)
    assert ranking.losses is not None, "they are what the ranking follows from"
    lost = np.array([losses[count] if count < len(losses) else 0 for losses in ranking.losses])
    worst = int(lost.argmax())
    told = f"layers' outputs move by {lost.mean():.4g} of the stream's square in the mean, most in layer "
    return Selected(kept, {}, (*why, *serving_limits(count, top_k), f"{told}{worst}: {lost[worst]:.4g}"))


def _of_all(target: AnyPath) -> AnyPath:
    """The file for the ranking: with it every other number of experts is chosen too."""
    return target.with_name(f"{target.stem}-ranking{target.suffix}")
