"""Replies whose trace is written: which experts each of their tokens chose. Letters: see `config`."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ..devices import hosts
from ..files import atomic
from ..files.paths import AnyPath
from ..routing.tables import About
from ..routing.traces import TRACE, Writer
from ..run.artifacts import versions
from ..run.job import keeping
from ..run.options import by_flag
from ..run.progress import Progress, resumable
from .answer import Answer
from .recording import Recording

# Options that decide what is said, or to the bit how: a run that goes on has the same.
PLACED = ("--mesh", "--weights", "--dtype")


@contextmanager
def traced(answer: Answer, target: AnyPath, overwrite: bool, resume: bool) -> Iterator[None]:
    """A block in which replies grow, and behind which their trace stands at `target`.

    What is finished is kept in a folder beside it until then; with `resume` only the other replies grow. OutputError
    where `target` is not free, ResumeError where an unfinished run is in the way or is one of other prompts.
    """
    kept, about = Progress(target), About.of(answer.source)
    if hosts.is_first():
        atomic.try_folder(target, overwrite)
        atomic.check_apart(target, answer.source.folder, or_inside=True)
        kept.begin(settings(answer, about), resume)
    with resumable(target), keeping(kept):
        answer.recording = Recording(answer.asked, kept, about, answer.tokenizer)
        yield
        with hosts.first_alone():
            if hosts.is_first():
                with atomic.new_folder(target, overwrite, last=TRACE) as folder:
                    writer = Writer(folder, about)
                    for reply in answer.recording.replies():
                        writer.add(replace(reply, prompt_id=str(int(reply.prompt_id) + 1)))
                    writer.finish({"versions": versions(), "options": options(answer)})
    if hosts.is_first():
        kept.remove()


def settings(answer: Answer, about: About) -> dict[str, Any]:
    """All that decides what a run says, by the names that users know."""
    prompts = hashlib.sha256(b"".join(prompt.tobytes() + b"\n" for prompt in answer.prompts)).hexdigest()
    return {
        "the model's fingerprint": about.model_fingerprint,
        "the prompts' hash": prompts,
        "the versions": {name: versions()[name] for name in ("gptoss-jax", "jax")},
        **options(answer),
    }


def options(answer: Answer) -> dict[str, Any]:
    """The options that decide what is said."""
    placing = {flag: value for flag, value in by_flag(answer.placing).items() if flag in PLACED}
    return by_flag(answer.answering, answer.sampling) | placing
