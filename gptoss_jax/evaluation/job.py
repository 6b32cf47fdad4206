"""The job `eval`: keep-sets of a model, or the model itself, beside a baseline on the same rows.

Letters: see `config`.
"""

from collections.abc import Callable
from typing import Any

from ..data.rows import prompts_hash
from ..files import atomic
from ..files.paths import AnyPath, is_path, place
from ..network.source import Source
from ..run import job as runs
from ..run.artifacts import versions
from ..run.judging import Judging
from ..run.options import Placing, declared_options, flag_of
from ..run.progress import Progress
from .asking import ask, replies
from .baseline import StoredBaseline
from .material import Material, material
from .measure import measure
from .outputs import Finished, finished, write, write_baseline
from .sides import OpenSource, Request, Sides, sides

RESUMED = ("batch_size", "engine", "memory_gib", "mesh", "weights", "dtype")  # options of Placing that decide results


def run(
    request: Request,
    open_source: OpenSource,
    target: AnyPath,
    overwrite: bool = False,
    resume: bool = False,
    tell: Callable[[str], Any] = lambda line: None,
) -> Finished:
    """Measure, and write eval.json, eval.md, rows.parquet and, where there are replies, replies.jsonl to `target`.

    `tell` is given what a user should know, line by line, before the first step."""
    kept = Progress(target)
    atomic.try_folder(target, overwrite)
    if request.write_baseline is not None:
        atomic.try_file(request.write_baseline, overwrite)
    found = sides(request, open_source)
    _check_apart(request, target, found)
    rows = material(request, found)
    asked = ask(request, found, rows)
    kept.begin(_settings(request, found, rows), resume)
    for line in [*rows.remarks, *(asked.remarks if asked else ()), _told(rows)]:
        tell(line)
    with runs.keeping(kept):
        measured = measure(found, rows.blocks, request.placing, kept, request.write_baseline is not None)
        said = {} if asked is None else replies(request, found, rows, asked, kept)
        done = finished(request, found, rows, measured, asked, said)
        write(done, target, overwrite)
        if request.write_baseline is not None:
            write_baseline(request, found, rows, measured, overwrite)
    kept.remove()
    return done


def _check_apart(request: Request, target: AnyPath, found: Sides) -> None:
    """OutputError where an output is or holds an input."""
    models = [source.folder for source in (found.variants.source, found.baseline) if isinstance(source, Source)]
    data = request.data.data
    for output in [target, *([] if request.write_baseline is None else [request.write_baseline])]:
        atomic.check_apart(output, *models, or_inside=True)
        if data and is_path(data):
            atomic.check_apart(output, place(str(data)))


def _settings(request: Request, found: Sides, rows: Material) -> dict[str, Any]:
    """All that decides what a run computes, by the names that users know."""
    theirs = found.baseline.fingerprint if isinstance(found.baseline, StoredBaseline) else None
    if isinstance(found.baseline, Source):
        theirs = found.baseline.fingerprint()
    judging = {flag_of(Judging, name): getattr(request.judging, name) for name in declared_options(Judging)}
    placing = {flag_of(Placing, name): getattr(request.placing, name) for name in RESUMED}
    return {
        "the model's fingerprint": found.variants.source.fingerprint(),
        "the baseline's fingerprint": theirs,
        "the keep-sets": {name: kept.layers for name, kept in request.keep_sets.items()},
        "the rows' hash": prompts_hash(rows.rows),
        "the versions": {name: versions()[name] for name in ("gptoss-jax", "jax")},
        "writing a baseline": request.write_baseline is not None,
        **judging,
        **placing,
    }


def _told(rows: Material) -> str:
    """What has been read."""
    said = [f"{len(b)} blocks of {n} tokens, {int(b.scored.real.sum()):,} scored" for n, b in rows.blocks.items()]
    return f"{len(rows.rows):,} rows: {'; '.join(said)}"
