"""The job that compares models, as a function with the names and defaults of the command line."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..evaluation import job
from ..evaluation.sides import Request
from ..evaluation.summary import Summary
from ..files.paths import AnyPath, is_path, place
from ..network.source import Source
from ..run.judging import judged
from ..selection.keep_sets import KeepSets
from .checkpoints import as_keep_sets
from .model import Model, as_model


def evaluate(
    model: Any,
    data: Any,
    *,
    keep_sets: Any = None,
    baseline: Any = None,
    write_baseline: str | AnyPath | None = None,
    out: str | AnyPath | None = None,
    overwrite: bool = False,
    resume: bool = False,
    **options: Any,
) -> Summary:
    """Compare what keep-sets leave of a model, or the model itself, with a baseline, on the same rows.

    Args:
        model: an open model, or the name of one.
        data: a path or hub id as --data takes it, or a list of records: dictionaries of columns.
        keep_sets: keep-sets, their file, a list of either, or {name: keep-sets}; all go through the model together.
        baseline: another model, its name, or a file that `write_baseline` made; by default the model with all experts.
        write_baseline: the file for what comparisons need of the model, which is then compared with nothing.
        out: a folder for eval.json and eval.md; without it nothing is written.
        overwrite: replaces an existing folder, at the end.
        resume: goes on with the unfinished run beside `out`, if there is one.
        **options: those of the command `eval`, by their names there with underscores, as seq_len=(1024, 2048).

    Raises what the command line says in one line: OptionError, DataError, RankingError and others of `errors`.

    Example:
        >>> import gptoss_jax as gj
        >>> rows = [{"text": f"{n} + {n} = {2 * n}"} for n in range(20)]
        >>> found = gj.evaluate("nano", rows, keep_sets=[[0, 2, 4, 6, 8, 10]] * 6, keep="all", seq_len=(64,))
        >>> found.entries[0].quality[64].estimates["kl"].value > 0
        True
    """
    opened = as_model(model)
    chosen = judged(data=str(data) if is_path(data) else data, **options)
    request = Request(
        opened.name,
        named_keep_sets(keep_sets, opened),
        *chosen,
        baseline=baseline.name if isinstance(baseline, Model) else baseline,
        write_baseline=None if write_baseline is None else place(write_baseline),
        command=f"gptoss_jax.evaluate({opened.name!r}, …)",
    )

    def source(name: str) -> Source:
        if isinstance(baseline, Model) and name == baseline.name != opened.name:
            return baseline.source
        return opened.source if name == opened.name else as_model(name).source

    if out is not None:
        return job.run(request, source, place(out), overwrite, resume).summary
    with tempfile.TemporaryDirectory() as folder:
        return job.run(request, source, Path(folder) / "eval").summary


def named_keep_sets(given: Any, model: Model) -> dict[str, KeepSets]:
    """Keep-sets by their names: those of a mapping, those of files, or numbers."""
    if given is None:
        return {}
    if isinstance(given, Mapping):
        return {str(name): _keep_sets(one, model) for name, one in given.items()}
    several = list(given) if isinstance(given, list | tuple) and any(map(_is_one, given)) else [given]
    files = [place(one) for one in several if is_path(one)]
    if twice := [file for number, file in enumerate(files) if file in files[:number]]:
        raise InputError(f"the keep-sets {twice[0]} are given twice: leave one out")
    stems = [file.stem for file in files]
    found: dict[str, KeepSets] = {}
    for number, one in enumerate(several, 1):
        name = f"keep-sets {number}"
        if is_path(one):
            name = place(one).stem
            name = str(one) if stems.count(name) > 1 else name  # files of one name in several folders
        found[name] = _keep_sets(one, model)
    return found


def _is_one(given: Any) -> bool:
    """Whether a member of a list is keep-sets by itself, and not those of a layer."""
    return is_path(given) or isinstance(given, KeepSets)


def _keep_sets(given: Any, model: Model) -> KeepSets:
    return KeepSets.read(given, model.config) if is_path(given) else as_keep_sets(given)
