"""The questions of a family: those that choices and healings see, and those that nothing has seen."""

import json
from pathlib import Path
from typing import NamedTuple

from gptoss_jax.data.tokens import load_tokenizer

from ..nano.corpus import prompt_and_reply
from ..nano.families import Instance, pick

# Evaluation questions by which variants of the method were told apart while they were made; figures are of those behind
# them. Of divisors there are some 600 in all, and none was looked at for this; on other models none was of any family.
LOOKED_AT = {"divisors": 200}
OTHERS_LOOKED_AT = 600


class Questions(NamedTuple):
    """Of one family."""

    family: str
    calibration: Path
    """Rows of whole conversations."""
    evaluation: list[Instance]


def questions(model: Path, family: str, seed: int, calibration: int, count: int, work: Path) -> Questions:
    """So many questions, those to evaluate behind all that were looked at; the model's seed draws them."""
    file = work / "rows" / f"{family}.jsonl"
    after = 0 if seed else LOOKED_AT.get(family, OTHERS_LOOKED_AT)
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        _write(file, model, pick("calibration", [family], calibration, seed))
    return Questions(family, file, pick("evaluation", [family], after + count, seed)[after:])


def may_be_looked_at(family: str, seed: int) -> list[Instance]:
    """200 evaluation questions by which variants may be told apart: none of those of the report."""
    end = 400 if seed else LOOKED_AT.get(family, OTHERS_LOOKED_AT)
    return pick("evaluation", [family], end, seed)[end - 200 :]


def _write(file: Path, model: Path, examples: list[Instance]) -> None:
    tokenizer, lines = load_tokenizer(model), []
    for number, example in enumerate(examples):
        text = "".join(prompt_and_reply(example, tokenizer))
        lines.append(json.dumps({"id": f"{example.family}-{number}", "text": text, "family": example.family}))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
