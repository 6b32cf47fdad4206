"""The job `eval`: keep-sets of a model, or the model itself, beside a baseline on the same rows.

Letters: see `config`.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..data.answers import read_answers
from ..data.rows import prompts_hash
from ..errors import OptionError
from ..files import atomic
from ..files.paths import AnyPath, is_path, place
from ..network.source import Source
from ..report.rates import rate
from ..run import choose
from ..run import job as runs
from ..run.artifacts import peak_rss_bytes, versions
from ..run.bar import bar
from ..run.options import Judging, Placing, declared_options, flag_of
from ..run.progress import Progress
from . import baseline as baselines
from .answering import Answerer, Questions, Said, questions
from .baseline import StoredBaseline
from .llama_lines import llama_lines
from .markdown import eval_report
from .material import Material, material
from .measure import Measured, measure
from .replies import Judged, judge
from .scored import ScoredTokens
from .sides import OpenSource, Request, Sides, sides
from .stored import EVAL, to_json
from .summary import Candidate, Setting, Summary, summarise

REPORT, REPLIES = "eval.md", "replies.jsonl"
BASELINE = ""  # the name of the baseline's replies
RESUMED = ("batch_size", "engine", "memory_gib", "mesh", "weights", "dtype")  # options of Placing that decide results


@dataclass(frozen=True)
class Finished:
    """What the job gives."""

    summary: Summary
    replies: Mapping[str, Sequence[Said]]
    """Of each model by its name, where they were asked for."""
    said: list[str]
    """Lines for the user."""


def run(
    request: Request,
    open_source: OpenSource,
    target: AnyPath,
    overwrite: bool = False,
    resume: bool = False,
    tell: Callable[[str], Any] = lambda line: None,
) -> Finished:
    """Measure, and write eval.json, eval.md and, where there are replies, replies.jsonl to the folder `target`.

    `tell` is given what a user should know, line by line, before the first step."""
    kept = Progress(target)
    atomic.try_folder(target, overwrite)
    if request.write_baseline is not None:
        atomic.check_free(request.write_baseline, overwrite)
    found = sides(request, open_source)
    _check_apart(request, target, found)
    rows = material(request, found)
    asked = _asked(request, found, rows)
    kept.begin(_settings(request, found, rows), resume)
    for line in [*rows.remarks, _told(rows)]:
        tell(line)
    with runs.keeping(kept):
        measured = measure(found, rows.blocks, request.placing, kept, request.write_baseline is not None)
        said = {} if asked is None else _replies(request, found, rows, asked, kept)
        finished = _finished(request, found, rows, measured, asked, said)
        _write(finished, asked, rows, target, overwrite)
        if request.write_baseline is not None:
            _write_baseline(request, found, rows, measured, overwrite)
    kept.remove()
    return finished


def _check_apart(request: Request, target: AnyPath, found: Sides) -> None:
    """OutputError where an output is or holds an input."""
    data = request.data.data
    inputs = [found.variants.source.folder, *([place(str(data))] if data and is_path(data) else [])]
    inputs += [found.baseline.folder] if isinstance(found.baseline, Source) else []
    outputs = [target, *([] if request.write_baseline is None else [request.write_baseline])]
    for output in outputs:
        atomic.check_apart(output, *inputs[:1], *inputs[2:], or_inside=True)
        atomic.check_apart(output, *inputs[1:2])


class Asked(NamedTuple):
    """What is asked of every model, and the answers that are right; None where rows have none."""

    questions: Questions
    answers: list[Any] | None


def _asked(request: Request, found: Sides, rows: Material) -> Asked | None:
    """The questions; DataError where an answer cannot be read."""
    judging, source = request.judging, found.variants.source
    if not judging.replies:
        return None
    if isinstance(found.baseline, StoredBaseline):
        raise OptionError("--replies needs the baseline itself, which answers too: name the model, not a file of it")
    asked = questions(rows.rows, judging.replies, rows.tokenizer, source)
    finals = [next((p.content for p in reply if p.channel in ("final", "")), None) for reply in asked.replies]
    answers = [rows.rows[n].answer for n in asked.rows] if judging.answer_column else finals
    if not judging.answer_column and None in answers:
        return Asked(asked, None)
    named = [f"row {rows.rows[n].id or n + 1}" for n in asked.rows]
    return Asked(asked, read_answers(judging.answer_kind, answers, named))


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


def _replies(request: Request, found: Sides, rows: Material, asked: Asked, kept: Progress) -> dict[str, list[Said]]:
    """What each model says to every question; the baseline's own are under BASELINE."""
    judging, prompts, source = request.judging, asked.questions.prompts, found.variants.source
    kept_vLE = found.variants.kept_vLE
    with bar(len(prompts) * (len(found.places) + 1), "replies") as advance:

        def answerer(of: Source) -> Answerer:
            return Answerer(of, rows.tokenizer, request.placing.dtype, judging.max_new_tokens, kept)

        ours = answerer(source)
        other = ours if found.baseline is None else answerer(found.baseline)
        said = {BASELINE: other.answer("replies-baseline", prompts, None, advance)}
        for name, variant in found.places.items():
            among = None if kept_vLE is None else kept_vLE[variant]
            if among is not None and among.all() and found.baseline is None:
                said[name] = said[BASELINE]  # what keeps all is the baseline
                advance(len(prompts))
            else:
                said[name] = ours.answer(f"replies-{variant}", prompts, among, advance)
        return said


def _finished(
    request: Request, found: Sides, rows: Material, measured: Measured, asked: Asked | None, said: dict[str, list[Said]]
) -> Finished:
    """What was found, and lines of it for the user."""
    tokens = {length: measured.scored(blocks, found.places) for length, blocks in rows.blocks.items()}
    candidates = [Candidate(name, request.keep_sets.get(name)) for name in found.places]
    judged = {name: _judged(replies, request.judging, asked) for name, replies in said.items()}
    setting = _setting(request, found, rows, asked)
    summary = summarise(setting, candidates, tokens, judged.pop(BASELINE, []), judged)
    return Finished(summary, said, [*_lines(tokens, setting.baseline), _took(measured)])


def _lines(tokens: Mapping[int, ScoredTokens], baseline: str) -> Iterator[str]:
    """The lines that people's scripts read, of each model and length."""
    for length, scored in tokens.items():
        for name, other in scored.others.items():
            yield f"{name} beside {baseline}, blocks of {length} tokens:"
            yield from llama_lines(scored.baseline, other)


def _took(measured: Measured) -> str:
    speed = rate(measured.tokens / max(measured.seconds, 1e-9), ",")
    peak = peak_rss_bytes() / choose.GIB
    return f"{measured.tokens:,.0f} tokens at {speed} tokens/s; engine {measured.engine}; peak memory {peak:.2f} GiB"


def _judged(replies: Sequence[Said], judging: Judging, asked: Asked | None) -> list[Judged]:
    assert asked is not None, "there are replies"
    answers = asked.answers or [None] * len(replies)
    pairs = zip(replies, answers, strict=True)
    return [judge(r.token_ids, r.parts, r.ended, answer, judging.answer_kind) for r, answer in pairs]


def _setting(request: Request, found: Sides, rows: Material, asked: Asked | None) -> Setting:
    """On what models were compared, and how."""
    baseline = f"{request.model}, all experts"
    if isinstance(found.baseline, StoredBaseline):
        baseline = f"{found.baseline.model}, as {found.baseline.where} has it"
    elif found.baseline is not None:
        baseline = str(request.baseline)
    data = request.data.data
    return Setting(
        model=request.model,
        model_fingerprint=found.variants.source.fingerprint(),
        baseline=baseline,
        data=str(data) if is_path(data) else f"{len(data)} records given in Python",
        rows=len(rows.rows),
        blocks={length: len(blocks) for length, blocks in rows.blocks.items()},
        prompts_hash=prompts_hash(rows.rows),
        calibration="disjoint" if rows.is_disjoint else "unknown",
        answers=request.judging.answer_kind if asked and asked.answers is not None else "",
        command=request.command,
        warnings=tuple(rows.remarks),
    )


def _write(finished: Finished, asked: Asked | None, rows: Material, target: AnyPath, overwrite: bool) -> None:
    """The files of the folder."""
    with atomic.new_folder(target, overwrite, last=EVAL) as folder:
        (folder / REPORT).write_text(eval_report(finished.summary), encoding="utf-8", errors="backslashreplace")
        if asked is not None:
            lines = _reply_lines(finished.replies, asked, rows)
            (folder / REPLIES).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        (folder / EVAL).write_text(to_json(finished.summary), encoding="utf-8")


def _reply_lines(replies: Mapping[str, Sequence[Said]], asked: Asked, rows: Material) -> Iterator[str]:
    """Every reply as a JSON object; that of the baseline is of the model null."""
    for name, said in replies.items():
        for number, reply in zip(asked.questions.rows, said, strict=True):
            row = {"row": number, "id": rows.rows[number].id, "domain": rows.rows[number].domain}
            text = {"text": rows.tokenizer.decode(reply.token_ids), "ended": reply.ended}
            yield json.dumps({"model": name or None, **row, **text}, ensure_ascii=False)


def _write_baseline(request: Request, found: Sides, rows: Material, measured: Measured, overwrite: bool) -> None:
    """What later comparisons need of the model."""
    assert request.write_baseline is not None
    digests = {length: blocks.digest for length, blocks in rows.blocks.items()}
    data = baselines.to_bytes(request.model, found.variants.source.fingerprint(), measured.model, digests)
    atomic.write_file(request.write_baseline, data, overwrite)
