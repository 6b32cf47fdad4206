"""What every model is asked, and what each replies."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..data.answers import read_answers
from ..errors import OptionError
from ..network.source import Source
from ..run.bar import bar
from ..run.judging import Judging
from ..run.progress import Progress
from .answering import Answerer, Questions, Said, questions
from .baseline import StoredBaseline
from .material import Material
from .replies import Judged, judge
from .sides import Request, Sides

BASELINE = ""  # the name of the baseline's replies


class Asked(NamedTuple):
    """What is asked of every model, and the answers that are right; None where rows have none."""

    questions: Questions
    answers: list[Any] | None
    remarks: list[str]
    """What a user should know of them."""


def ask(request: Request, found: Sides, rows: Material) -> Asked | None:
    """The questions; DataError where an answer cannot be read."""
    judging, source = request.judging, found.variants.source
    if not judging.replies:
        return None
    if isinstance(found.baseline, StoredBaseline):
        raise OptionError("--replies needs the baseline itself, which answers too: name the model, not a file of it")
    asked = questions(rows.rows, judging.replies, rows.tokenizer, source)
    finals = [next((p.content for p in reply if p.channel in ("final", "")), None) for reply in asked.replies]
    answers = [rows.rows[n].answer for n in asked.rows] if judging.answer_column else finals
    count, remarks = len(asked.rows), []
    if count < judging.replies:
        remarks.append(f"--replies {judging.replies}: {count:,} of {len(rows.rows):,} rows ask something in harmony")
    if not judging.answer_column and None in answers:
        unknown = f"{answers.count(None):,} of {count:,} questions have no final reply in the data, nor --answer-column"
        return Asked(asked, None, [*remarks, f"{unknown}: no exact match is measured"])
    named = [f"row {rows.rows[n].id or n + 1}" for n in asked.rows]
    return Asked(asked, read_answers(judging.answer_kind, answers, named), remarks)


def replies(request: Request, found: Sides, rows: Material, asked: Asked, kept: Progress) -> dict[str, list[Said]]:
    """What each model says to every question; the baseline's own are under BASELINE."""
    judging, prompts, kept_vLE = request.judging, asked.questions.prompts, found.variants.kept_vLE
    # The baseline is the first variant, or another model.
    variants = sorted({*found.places.values(), *([0] if found.baseline is None else [])})
    among = [None if kept_vLE is None else kept_vLE[variant] for variant in variants]
    other = found.baseline if isinstance(found.baseline, Source) else None
    with bar(len(prompts) * (len(variants) + (other is not None)), "replies") as advance:

        def answers(name: str, of: Source, among: Sequence[np.ndarray | None]) -> list[list[Said]]:
            answerer = Answerer(of, rows.tokenizer, request.placing, judging.max_new_tokens, kept)
            return answerer.answer(name, prompts, among, advance)

        said = dict(zip(variants, answers("replies", found.variants.source, among), strict=True))
        baseline = said[0] if other is None else answers("replies-baseline", other, [None])[0]
    return {BASELINE: baseline, **{name: said[variant] for name, variant in found.places.items()}}


def judged(said: Sequence[Said], judging: Judging, asked: Asked) -> list[Judged]:
    """What is counted of each reply of a model."""
    answers = asked.answers or [None] * len(said)
    pairs = zip(said, answers, strict=True)
    return [judge(reply.token_ids, reply.parts, reply.ended, answer, judging.answer_kind) for reply, answer in pairs]
