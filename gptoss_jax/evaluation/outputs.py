"""What an evaluation leaves: its summary, tables and replies in a folder, and lines for people's scripts."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ..data.rows import prompts_hash
from ..files import atomic
from ..files.parquet import write_parquet
from ..files.paths import AnyPath, is_path
from ..reports.rates import rate
from ..run.artifacts import peak_rss_bytes
from ..run.choose import GIB
from . import baseline as baselines
from .answering import Said
from .asking import BASELINE, Asked, judged
from .baseline import StoredBaseline
from .by_row import ROWS, by_row
from .llama_lines import llama_lines
from .markdown import eval_report
from .material import Material
from .measure import Measured
from .scored import ScoredTokens
from .sides import Request, Sides
from .stored import EVAL, to_json
from .summary import Candidate, Setting, Summary, summarise

REPORT, REPLIES = "eval.md", "replies.jsonl"


@dataclass(frozen=True)
class Finished:
    """What the job gives."""

    summary: Summary
    rows: pa.Table
    """As `by_row` has it."""
    replies: list[dict[str, Any]]
    """Every reply of every model, as the lines of replies.jsonl."""
    said: list[str]
    """Lines for the user."""


def finished(
    request: Request,
    sides: Sides,
    rows: Material,
    measured: Measured,
    asked: Asked | None,
    said: Mapping[str, list[Said]],
) -> Finished:
    """What was found."""
    tokens = {length: measured.scored(blocks, sides.places) for length, blocks in rows.blocks.items()}
    config = sides.variants.source.config
    whole = (config.num_experts,) * config.num_layers
    candidates = [Candidate(name, request.keep_sets.get(name), whole) for name in sides.places]
    of_model = {} if asked is None else {name: judged(each, request.judging, asked) for name, each in said.items()}
    numbers = [] if asked is None else asked.questions.rows
    table = by_row(rows.rows, tokens, numbers, {name or None: each for name, each in of_model.items()})
    setting = _setting(request, sides, rows, asked)
    summary = summarise(setting, candidates, tokens, of_model.pop(BASELINE, []), of_model, _domains(rows))
    lines = [*_lines(tokens, setting.baseline), _took(measured)]
    return Finished(summary, table, [*_replies(said, numbers, rows)], lines)


def _domains(rows: Material) -> dict[str, np.ndarray]:
    """Of each domain that has a name, where there are several, whether each row is of it."""
    of = np.array([row.domain for row in rows.rows])
    return {name: of == name for name in rows.domains if name} if len(rows.domains) > 1 else {}


def _lines(tokens: Mapping[int, ScoredTokens], baseline: str) -> Iterator[str]:
    """The lines that people's scripts read, of each model and length."""
    for length, scored in tokens.items():
        for name, other in scored.others.items():
            yield f"{name} beside {baseline}, blocks of {length} tokens:"
            yield from llama_lines(scored.baseline, other)


def _took(measured: Measured) -> str:
    speed = rate(measured.tokens / max(measured.seconds, 1e-9), ",")
    peak = peak_rss_bytes() / GIB
    return f"{measured.tokens:,.0f} tokens at {speed} tokens/s; engine {measured.engine}; peak memory {peak:.2f} GiB"


def _setting(request: Request, sides: Sides, rows: Material, asked: Asked | None) -> Setting:
    """On what models were compared, and how."""
    baseline = f"{request.model}, all experts"
    if isinstance(sides.baseline, StoredBaseline):
        baseline = f"{sides.baseline.model}, as {sides.baseline.where} has it"
    elif sides.baseline is not None:
        baseline = str(request.baseline)
    data = request.data.data
    return Setting(
        model=request.model,
        model_fingerprint=sides.variants.source.fingerprint(),
        baseline=baseline,
        data=str(data) if is_path(data) else f"{len(data)} records given in Python",
        rows=len(rows.rows),
        blocks={length: len(blocks) for length, blocks in rows.blocks.items()},
        prompts_hash=prompts_hash(rows.rows),
        calibration="disjoint" if rows.is_disjoint else "unknown",
        answers=request.judging.answer_kind if asked and asked.answers is not None else "",
        command=request.command,
        warnings=(*rows.remarks, *(asked.remarks if asked else ())),
    )


def _replies(said: Mapping[str, Sequence[Said]], numbers: Sequence[int], rows: Material) -> Iterator[dict[str, Any]]:
    """Every reply; that of the baseline is of the model null."""
    for name, replies in said.items():
        for number, reply in zip(numbers, replies, strict=True):
            row = {"row": number, "id": rows.rows[number].id, "domain": rows.rows[number].domain}
            text = {"text": rows.tokenizer.decode(reply.token_ids), "ended": reply.ended}
            yield {"model": name or None, **row, **text}


def write(found: Finished, target: AnyPath, overwrite: bool) -> None:
    """Write the files of the folder."""
    with atomic.new_folder(target, overwrite, last=EVAL) as folder:
        (folder / REPORT).write_text(eval_report(found.summary), encoding="utf-8", errors="backslashreplace")
        write_parquet(folder / ROWS, found.rows)
        if found.replies:
            lines = "".join(f"{json.dumps(reply, ensure_ascii=False)}\n" for reply in found.replies)
            (folder / REPLIES).write_text(lines, encoding="utf-8")
        (folder / EVAL).write_text(to_json(found.summary), encoding="utf-8")


def write_baseline(request: Request, sides: Sides, rows: Material, measured: Measured, overwrite: bool) -> None:
    """What later comparisons need of the model."""
    assert request.write_baseline is not None
    digests = {length: blocks.digest for length, blocks in rows.blocks.items()}
    data = baselines.to_bytes(request.model, sides.variants.source.fingerprint(), measured.model, digests)
    atomic.write_file(request.write_baseline, data, overwrite)
