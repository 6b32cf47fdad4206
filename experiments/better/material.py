"""The questions of a family: those that choices and healings see, and those that nothing has seen."""

import json
from pathlib import Path
from typing import NamedTuple

from gptoss_jax.data.tokens import load_tokenizer

from ..nano.corpus import prompt_and_reply
from ..nano.families import Instance, pick

# Questions that tell of variants while they are made; the figures are of those behind them.
LOOKED_AT = 600


class Questions(NamedTuple):
    """Of one family."""

    family: str
    calibration: Path
    """Rows of whole conversations."""
    evaluation: list[Instance]
    others: Path
    """Calibration rows of all families, of which the other ones show what is lost elsewhere."""


def questions(
    model: Path, family: str, families: list[str], seed: int, calibration: int, count: int, after: int, work: Path
) -> Questions:
    """So many questions, those to evaluate behind the first `after`; the model's seed draws them."""
    file, others = work / "rows" / f"{family}.jsonl", work / "rows" / "all.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        _write(file, model, pick("calibration", [family], calibration, seed))
    if not others.exists():
        _write(others, model, pick("calibration", families, calibration, seed))
    return Questions(family, file, pick("evaluation", [family], after + count, seed)[after:], others)


def _write(file: Path, model: Path, examples: list[Instance]) -> None:
    tokenizer, lines = load_tokenizer(model), []
    for number, example in enumerate(examples):
        text = "".join(prompt_and_reply(example, tokenizer))
        lines.append(json.dumps({"id": f"{example.family}-{number}", "text": text, "family": example.family}))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
