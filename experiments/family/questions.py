"""What is asked: rows of nano's families, to record answers or to measure."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptoss_jax.errors import OutputError

from ..nano import QUESTIONS
from ..nano.families import read

BENCHMARK = "nano"  # of the recorded answers
ANSWERS = 3  # that a card shows


@dataclass(frozen=True)
class Asked:
    """A question of a family, and the answer that is right."""

    id: str
    family: str
    question: str
    answer: str


def rows(split: str, families: Sequence[str], count: int) -> list[dict[str, object]]:
    """So many rows of each family, by the SHA-256 of their questions."""
    of_split = read(QUESTIONS / f"{split}.jsonl")
    found: list[dict[str, object]] = []
    for family in families:
        own = sorted((one for one in of_split if one.family == family), key=lambda one: _digest(one.question))
        found += [
            {
                "id": _digest(one.question)[:16],
                "benchmark": BENCHMARK,
                "category": family,
                "messages": one.messages(),
                "answer": one.answer,
            }
            for one in own[:count]
        ]
    return found


def _digest(question: str) -> str:
    return hashlib.sha256(question.encode()).hexdigest()


def write_rows(file: Path, several: Sequence[dict[str, object]]) -> None:
    """An object a line. OutputError where the file holds other rows: what is beside it was made with those."""
    text = "".join(json.dumps(row) + "\n" for row in several)
    if not file.exists():
        file.write_text(text, encoding="utf-8")
    elif file.read_text(encoding="utf-8") != text:
        raise OutputError(f"{file}: holds other questions than are asked for: take another folder")


def shown(file: Path, family: str) -> list[Asked]:
    """The family's questions whose SHA-256 is lowest, which are its first rows."""
    return list(_asked(file, family))[:ANSWERS]


def _asked(file: Path, family: str) -> Iterator[Asked]:
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["category"] == family:
            yield Asked(row["id"], family, row["messages"][0]["content"], row["answer"])
