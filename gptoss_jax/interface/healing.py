"""The job that heals what pruning leaves, as a function with the names and defaults of the command line."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from convert import cut
from convert.cut import Bar, Pruned, silent

from ..errors import OptionError
from ..files import atomic
from ..files.paths import AnyPath, is_path, place
from ..healing import job
from ..healing.card import section
from ..healing.job import Healing, Request
from ..run.distilling import distilled
from ..run.options import Writing, taken
from ..run.progress import Progress
from ..selection.keep_sets import KeepSets
from .checkpoints import as_keep_sets, checkpoint_of
from .model import Model, as_model

FILE = "heal.json"


@dataclass(frozen=True)
class Healed:
    """A checkpoint that was written, and may stand where its folder's path may, with what its healing found."""

    pruned: Pruned
    healing: Healing

    @property
    def folder(self) -> AnyPath:
        """Where it lies."""
        return self.pruned.folder

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
        keep_sets: what `select` gives, its file, or for each layer the experts that stay.
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
    kept_sets = KeepSets.read(keep_sets, opened.config) if is_path(keep_sets) else as_keep_sets(keep_sets)
    if chosen[2].coordinator:
        raise OptionError("heal is one process: leave out --coordinator")
    cut.checked(kept_sets, source.config, lower_top_k=False)
    atomic.try_folder(target, overwrite)
    kept = Progress(target)
    request = Request(opened.name, kept_sets, *chosen, f"gptoss_jax.heal({opened.name!r}, …)")
    healing = job.run(request, source, kept, resume, tell)
    pruned = cut.prune(
        source,
        kept_sets,
        target,
        model=opened.name,
        format=writing.format,  # type: ignore[arg-type]
        max_shard_bytes=writing.max_shard_size,
        overwrite=overwrite,
        healed=cut.Healed(healing.values, section(healing), {FILE: healing.to_json().encode()}),
        progress=progress,
    )
    kept.remove()
    return Healed(pruned, healing)
