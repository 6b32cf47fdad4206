"""The job `fingerprint record`: a model answers, and what its tokens choose becomes an activation dataset.

Letters: see `config`; T are routed tokens.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..data import tokens as tokenizing
from ..data.conversation import Conversation, Message
from ..data.harmony import START, HarmonyText, marks_of, messages_of, pieces, question_and_reply
from ..data.remarks import Remarks
from ..data.rows import Row, prompts_hash
from ..data.template import Template
from ..devices import hosts
from ..errors import DataError
from ..evaluation.replies import loops
from ..files import atomic
from ..files.paths import AnyPath, is_path, place
from ..generation.answer import Answer
from ..generation.traced import Taking, options, recorded, write_trace
from ..network.source import Source
from ..routing.segments import ANSWER, THINK
from ..routing.tables import Routed
from ..run import reading
from ..run.artifacts import versions
from ..run.fingerprinting import Asked
from ..run.options import Answering, Data, Placing, Sampling
from ..run.tracing import prompt_ids
from .folder import INFO, TRACES, Activations
from .summaries import Group, Summary
from .traces import sums_of

OF_SEGMENT = {"think": THINK, "answer": ANSWER}


@dataclass(frozen=True)
class Request:
    """What is asked of the job."""

    model: str
    """The model's name, as the user gave it."""
    data: Data
    asked: Asked
    answering: Answering
    sampling: Sampling
    placing: Placing
    domains: Mapping[str, Sequence[str]] | None = None
    command: str = ""


@dataclass(frozen=True)
class Question:
    """What is asked, and where it comes from."""

    row: Row
    prompt: str
    """What the user said last."""
    written: HarmonyText

    @property
    def of(self) -> tuple[str, str]:
        """Benchmark and category."""
        benchmark, _, category = self.row.domain.partition("/")
        return benchmark, category


def record(
    request: Request,
    open_source: Callable[[str], Source],
    target: AnyPath,
    overwrite: bool = False,
    resume: bool = False,
    tell: Callable[[str], Any] = lambda line: None,
) -> Activations:
    """Ask all questions of the data, and write the dataset to `target`; `tell` is given what a user should know.

    What is finished is kept beside `target` until then, and with `resume` only the other questions are asked.
    """
    source, remarks = open_source(request.model), Remarks()
    if is_path(request.data.data):
        atomic.check_apart(target, place(str(request.data.data)))
    found = questions(request, source, remarks)
    said = dict.fromkeys(remarks.lines())
    written = [question.written for question in found]
    answer = Answer(source, written, request.answering, request.sampling, request.placing, said)
    rows = {"the rows' hash": prompts_hash(question.row for question in found)}
    with recorded(answer, target, INFO, overwrite, resume, **rows) as taking:
        recording = taking.recording
        if hosts.is_first():
            for line in [*answer.remarks, f"{len(found):,} questions, of which {len(recording.missing()):,} are asked"]:
                tell(line)
        deque(answer.grow(), maxlen=0)
        made = None
        with hosts.first_alone():
            if hosts.is_first():
                names = prompt_ids([question.row for question in found])
                made = activations(request, source, answer, taking, found, names)
                with atomic.new_folder(target, taking.overwrite, last=INFO) as folder:
                    (folder / TRACES).mkdir()
                    write_trace(folder / TRACES, answer, taking, names)
                    made.write(folder)
    return made or Activations.open(target)


def questions(request: Request, source: Source, remarks: Remarks) -> list[Question]:
    """What the rows ask, in their order; DataError names a row that asks nothing."""
    tokenizer, asked, data = reading.tokenizer_of(source), request.asked, request.data
    effort = request.answering.reasoning_effort
    rows = reading.read(data, tokenizer, remarks, domains=asked.columns, effort=effort)
    marks, template, found = marks_of(tokenizer), Template(tokenizer), []
    for number, row in enumerate(rows, 1):
        row = asked.named(row)
        question = _question(row, marks, template, effort)
        if question is not None:
            found.append(question)
        elif not data.skip_bad_rows:
            what = f"row {row.id or number} asks nothing: give conversations, or a column with what the user says"
            raise DataError(f"{what} by --text-column; --skip-bad-rows leaves such rows out")
        else:
            remarks.say("left out, as they ask nothing", row.id or str(number))
    if not found:
        raise DataError("no row asks anything: give conversations, or name the column with what the user says")
    return found


def _question(row: Row, marks: Any, template: Template, effort: str) -> Question | None:
    """What a row asks: a text without marks is what the user says."""
    if row.text and START not in row.text:
        asked = Conversation((Message("user", row.text),))
        return Question(row, row.text, template.write(asked, effort, generate=True))
    # A text may end where the model is to go on.
    cut = question_and_reply(HarmonyText(row.text.removesuffix(f"{START}assistant"), row.literals), marks)
    if cut is None:
        return None
    said, _ = messages_of(list(pieces(cut[0], marks)))
    of_user = [part.content for part in said if part.role == "user"]
    return Question(row, of_user[-1], cut[0]) if of_user else None


@dataclass
class _Sums:
    """Of a segment of a group's answers so far."""

    samples: int = 0
    tokens: int = 0
    frequency_LE: Any = 0.0
    density_LE: Any = 0.0
    count_LE: Any = 0
    gate_sum_LE: Any = 0.0

    def add(self, tokens: int, count_LE: np.ndarray, gate_sum_LE: np.ndarray) -> None:
        self.samples, self.tokens = self.samples + 1, self.tokens + tokens
        self.frequency_LE = self.frequency_LE + count_LE / tokens
        self.density_LE = self.density_LE + gate_sum_LE / tokens
        self.count_LE, self.gate_sum_LE = self.count_LE + count_LE, self.gate_sum_LE + gate_sum_LE

    def summary(self, group: Group, segment: str) -> Summary:
        """With means over answers, and sums over tokens."""
        n = self.samples
        means_LE = self.frequency_LE / n, self.density_LE / n
        return Summary(group, segment, n, self.tokens / n, *means_LE, self.count_LE, self.gate_sum_LE)


@dataclass
class _Made:
    """What comes of replies, one after the other."""

    sums: dict[tuple[Group, str], _Sums] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)


def activations(
    request: Request,
    source: Source,
    answer: Answer,
    taking: Taking,
    found: Sequence[Question],
    names: Sequence[str],
) -> Activations:
    """The dataset of replies that are all whole. DataError where none has thoughts or an answer."""
    made, config = _Made(), source.config
    for reply, question, name in zip(taking.recording.replies(), found, names, strict=True):
        row = _answer(reply, question, name, answer)
        group = Group(*question.of, row["finished"], row["repetition"])
        for segment, tokens, count_LE, gate_sum_LE in of_segments(reply, config.num_experts):
            row[f"{segment}_tokens"] = tokens
            made.sums.setdefault((group, segment), _Sums()).add(tokens, count_LE, gate_sum_LE)
        made.answers.append(row)
    if not made.sums:
        raise DataError("no reply has thoughts or an answer: the model speaks no harmony, or --max-new-tokens is small")
    order = sorted(made.sums, key=lambda key: (key[0], key[1] != "think"))
    info = {
        "source": request.data.data if is_path(request.data.data) else "records given in Python",
        "model": request.model,
        "model_fingerprint": source.fingerprint(),
        "num_layers": config.num_layers,
        "num_experts": config.num_experts,
        "top_k": config.top_k,
        "counted": "contents",
        "groups": len({group for group, _ in order}),
        "samples": len(made.answers),
        "answers": len(made.answers),
        "domains": None if request.domains is None else {name: [*some] for name, some in request.domains.items()},
        "rows_hash": prompts_hash(question.row for question in found),
        "remarks": [*answer.remarks],
        "command": request.command,
        "versions": versions(),
        "options": options(answer),
        "settings_hash": taking.settings_hash,
    }
    return Activations.of([made.sums[key].summary(*key) for key in order], made.answers, info)


def of_segments(reply: Routed, num_experts: int) -> Iterator[tuple[str, int, np.ndarray, np.ndarray]]:
    """The segments of a reply that have tokens: name, routed tokens, how many of these chose each expert, [L, E], and
    the sums of their gates."""
    routed = len(reply.experts)
    for name, code in OF_SEGMENT.items():
        mine_T = reply.generated[:routed] & (reply.segments[:routed] == code)
        if mine_T.any():
            gates = reply.gates[mine_T].astype(np.float64)
            yield name, int(mine_T.sum()), *sums_of(reply.experts[mine_T], gates, num_experts)


def _answer(reply: Routed, question: Question, name: str, answer: Answer) -> dict[str, Any]:
    """A row of answers.parquet, without the tokens of its segments."""
    token_ids = reply.token_ids[reply.generated].tolist()
    said = tokenizing.messages_in_ids(token_ids, answer.tokenizer)
    benchmark, category = question.of
    return {
        "prompt_id": name,
        "benchmark": benchmark,
        "category": category,
        "prompt": question.prompt,
        "reply": answer.tokenizer.decode(token_ids),
        "think": "\n\n".join(part.content for part in said if part.channel == "analysis"),
        "answer": "\n\n".join(part.content for part in said if part.channel == "final"),
        "think_tokens": 0,
        "answer_tokens": 0,
        "finished": bool(token_ids) and token_ids[-1] in answer.stop_ids,
        "repetition": loops(token_ids),
    }
