"""The job that heals what pruning leaves, as a function with the names and defaults of the command line."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from convert import cut
from convert.cut import Bar, Pruned, silent
from convert.tensors import AnyCheckpoint

from ..devices import hosts
from ..files import atomic
from ..files.paths import AnyPath, is_path, place
from ..healing import job
from ..healing.card import section
from ..healing.job import Healing, Request
from ..network.source import Source
from ..run.distilling import HEAL, distilled
from ..run.job import join
from ..run.options import Writing, taken
from ..run.progress import Progress
from ..selection.keep_sets import KeepSets
from .checkpoints import checkpoint_of
from .judging import named_keep_sets
from .model import Model, as_model

SEVERAL = "set"


@dataclass(frozen=True)
class Healed:
    """A checkpoint that was written, and may stand where its folder's path may, with what its healing found."""

    folder: AnyPath
    """Where it lies."""
    pruned: Pruned | None
    """None in processes other than the first, which write nothing."""
    healing: Healing
    tried: tuple[dict[str, Any], ...] = ()
    """Of each of the keep-sets that were healed its name, its number of experts, and the KL with its interval."""

    def __fspath__(self) -> str:
        return str(self.folder)


def heal(
    model: Any,
    keep_sets: Any,
    data: Any,
    *,
    out: str | AnyPath,
    overwrite: bool = False,
    resume: bool = False,
    progress: Bar = silent,
    tell: Callable[[str], Any] = lambda line: None,
    **options: Any,
) -> Healed:
    """Write a pruned model whose routers have learnt to expect what the whole model expects.

    Args:
        model: an open model, or the name of one: the whole model.
        keep_sets: what `select` gives, its file, or for each layer the experts that stay; or a list of these, or
            {name: keep-sets}, which are all healed, and of which the one with the least KL on rows that are held out
            is written.
        data: a path or hub id as --data takes it, or a list of records: dictionaries of columns. A fifth of the rows
            is held out, and decides whether what was trained is kept.
        out: the folder for the checkpoint, whose heal.json has what was found.
        overwrite: replaces an existing folder, at the end.
        resume: goes on with the unfinished run beside `out`, if there is one.
        progress: makes a bar for the writing.
        tell: is given what a user should know, line by line, before the first step.
        **options: those of the command `heal`, by their names there with underscores, as steps=60 or train="small".
            An open model's dtype and weights are its own where they are not given.

    DataError where too few rows are there; StatisticsError where a loss is not finite; and others of `errors`.

    Example:
        >>> import gptoss_jax as gj
        >>> rows = [{"text": f"{n} + {n} = {2 * n}"} for n in range(40)]
        >>> kept = [[0, 2, 4, 6, 8, 10]] * 6
        >>> healed = gj.heal("nano", kept, rows, out="healed", tokens="all", steps=2, max_seq_length=64)
        >>> healed.healing.overall.rows > 1
        True
    """
    opened = as_model(model)
    if isinstance(model, Model):
        options = {"dtype": opened.dtype, "weights": opened.weights} | options
    writing = taken(Writing, options)
    chosen = distilled(data=str(data) if is_path(data) else data, **options)
    source, target = checkpoint_of(opened), place(out)
    sets = named_keep_sets(keep_sets, opened)
    for name, one in sets.items():
        one.check(source.config, name)
        cut.checked(one, source.config, lower_top_k=False)
    kept, command = Progress(target), f"gptoss_jax.heal({opened.name!r}, …)"
    requests = {name: Request(opened.name, one, *chosen, command) for name, one in sets.items()}
    settings = {"MODEL": opened.name, "--out": str(target), "--format": writing.format}
    layers = {name: one.layers for name, one in sets.items()}
    join(chosen[-1], {**settings, "the keep-sets": layers, **next(iter(requests.values())).by_flag()})
    if hosts.is_first():
        overwrite = kept.may_replace(overwrite, resume)
        atomic.try_folder(target, overwrite)
    found = _each(requests, source, kept, resume, tell)
    best = min(found, key=lambda name: found[name].overall.written.value)
    tried = [_line(name, sets[name], found[name]) for name in sets]
    chosen_sets, pruned = replace(sets[best], tried=tried if len(sets) > 1 else sets[best].tried), None
    with hosts.first_alone():
        if hosts.is_first():
            pruned = _written(found[best], chosen_sets, source, target, writing, overwrite, progress)
            kept.remove()
    return Healed(target, pruned, found[best], tuple(tried))


def _written(
    healing: Healing,
    keep_sets: KeepSets,
    source: AnyCheckpoint,
    target: AnyPath,
    writing: Writing,
    overwrite: bool,
    progress: Bar,
) -> Pruned:
    """The checkpoint, with what was healed in it and heal.json beside it."""
    return cut.prune(
        source,
        keep_sets,
        target,
        model=healing.request.model,
        format=writing.format,  # type: ignore[arg-type]
        max_shard_bytes=writing.max_shard_size,
        overwrite=overwrite,
        healed=cut.Healed(healing.values, section(healing), {HEAL: healing.to_json().encode()}),
        progress=progress,
    )


def _each(
    requests: Mapping[str, Request], source: Source, kept: Progress, resume: bool, tell: Callable[[str], Any]
) -> dict[str, Healing]:
    """What each healing finds. Of several, each has its progress in the folder of all."""
    if len(requests) == 1:
        return {name: job.run(request, source, kept, resume, tell) for name, request in requests.items()}
    if hosts.is_first():
        kept.begin({"the keep-sets": {name: request.keep_sets.layers for name, request in requests.items()}}, resume)
        kept.write(SEVERAL, b"each has a folder of its own")
    found = {}
    for number, (name, request) in enumerate(requests.items()):
        own = Progress(kept.folder / f"{SEVERAL}-{number}")
        found[name] = job.run(request, source, own, own.exists(), tell)
    return found


def _line(name: str, keep_sets: KeepSets, healing: Healing) -> dict[str, Any]:
    """What the card says of keep-sets that were healed."""
    of = healing.overall.written
    return {"name": f"{name}, healed", "keep": len(keep_sets.layers[0]), "kl": [of.value, of.low, of.high]}
