"""Replies whose trace is written: which experts each of their tokens chose. Letters: see `config`."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ..devices import hosts
from ..files import atomic
from ..files.paths import AnyPath, is_local
from ..routing.tables import About
from ..routing.traces import TRACE, Writer
from ..run.artifacts import versions
from ..run.job import keeping
from ..run.options import by_flag
from ..run.progress import Progress, resumable
from ..run.tracing import named, standing_hash
from .answer import Answer
from .recording import Recording

# Options that decide what is said, or to the bit how: a run that goes on has the same.
PLACED = ("--mesh", "--weights", "--dtype")


class Taking(NamedTuple):
    """Replies that are taken down, and how what is made of them is written."""

    recording: Recording
    overwrite: bool
    settings_hash: str
    """It stands in the last file that is written, and tells whose output stands at a place."""


@contextmanager
def recorded(
    answer: Answer, target: AnyPath, last: str, overwrite: bool, resume: bool, **asked: Any
) -> Iterator[Taking]:
    """A block in which replies grow and are kept, whole ones with what their tokens chose, until it is left.

    They are kept in a folder beside `target`; with `resume` only the other replies grow. `last` is the file of `target`
    that is written last, `asked` what else a run that goes on must share. OutputError where `target` is not free,
    ResumeError where an unfinished run is in the way or is another one.
    """
    kept, about = Progress(target), About.of(answer.source)
    wanted = {**settings(answer, about), **asked}
    digest = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
    if hosts.is_first():
        # A run that was killed after all was written, or while files of a remote folder were, writes them again.
        standing = standing_hash(target / last)
        is_own = standing == digest or not (standing or is_local(target))
        overwrite = overwrite or (resume and kept.begun() is not None and is_own)
        atomic.try_folder(target, overwrite)
        atomic.check_apart(target, answer.source.folder, or_inside=True)
        kept.begin(wanted, resume)
    with resumable(target), keeping(kept):
        answer.recording = Recording(answer.asked, kept, about, answer.tokenizer)
        yield Taking(answer.recording, overwrite, digest)
    if hosts.is_first():
        kept.remove()


@contextmanager
def traced(answer: Answer, target: AnyPath, overwrite: bool, resume: bool) -> Iterator[None]:
    """A block in which replies grow, and behind which their trace stands at `target`; see `recorded`."""
    with named(), recorded(answer, target, TRACE, overwrite, resume) as taking:
        yield
        with hosts.first_alone():
            if hosts.is_first():
                names = [str(number) for number in range(1, len(answer.prompts) + 1)]
                with atomic.new_folder(target, taking.overwrite, last=TRACE) as folder:
                    write_trace(folder, answer, taking, names)


def write_trace(folder: Path, answer: Answer, taking: Taking, names: Sequence[str]) -> None:
    """The trace of all replies, whose prompts have these names, in a folder that is there."""
    writer = Writer(folder, taking.recording.about)
    for name, reply in zip(names, taking.recording.replies(), strict=True):
        writer.add(replace(reply, prompt_id=name))
    writer.finish({"versions": versions(), "options": options(answer), "settings_hash": taking.settings_hash})


def settings(answer: Answer, about: About) -> dict[str, Any]:
    """All that decides what a run says, by the names that users know."""
    return {
        "the model's fingerprint": about.model_fingerprint,
        "the prompts' hash": answer.prompts_hash,
        "the versions": {name: versions()[name] for name in ("gptoss-jax", "jax")},
        **options(answer),
    }


def options(answer: Answer) -> dict[str, Any]:
    """The options that decide what is said."""
    placing = {flag: value for flag, value in by_flag(answer.placing).items() if flag in PLACED}
    return by_flag(answer.answering, answer.sampling) | placing
