"""Which experts of nano to keep, by family: every choice is measured on questions that nothing was fitted on.

    python -m experiments.families WORK --report docs/families.md

Eight families × keep 12, 10, 8, 6 × criteria, `random` with five seeds among them; what counts in the profile; and one
model for all families. Stopped at any time, the same command goes on. Calibration and evaluation questions are apart by
their hashes, and `eval` checks it.
"""

import json
import os
from pathlib import Path

import click

from convert.sources import NANO, open_source
from gptoss_jax.evaluation import job
from gptoss_jax.evaluation.sides import Request
from gptoss_jax.run.judging import judged

from ..nano.families import FAMILIES, pick
from . import choices, page
from .choices import Choice

KEEP = (12, 10, 8, 6)
OPTIONS = {"seq_len": (512,), "dtype": "float32", "max_new_tokens": 128, "batch_size": 64}


def write_rows(file: Path, split: str, count: int, after: int = 0) -> None:
    """So many questions of each family behind the first ones, with conversation and answer."""
    if not file.exists():
        lines, first = [], {one.question for one in pick(split, list(FAMILIES), after)} if after else set()
        for number, one in enumerate(pick(split, list(FAMILIES), after + count)):
            if one.question in first:
                continue
            row = {"id": f"{split}-{number}", "messages": one.messages(), "family": one.family, "answer": one.answer}
            lines.append(json.dumps(row) + "\n")
        file.write_text("".join(lines), encoding="utf-8")


def measure(found: list[Choice], rows: Path, out: Path, questions: int, family: str | None) -> None:
    """Evaluate all choices together, unless that is done."""
    if (out / "eval.json").exists():
        return
    click.echo(f"{family or 'all families'}: {len(found)} keep-sets")
    some = {"domain": (family,)} if family else {}
    asked = {"replies": questions, "answer_column": "answer", "domain_column": "family"}
    chosen = judged(data=str(rows), **some, **asked, **OPTIONS)
    request = Request(
        NANO, {choice.name: choice.keep_sets for choice in found}, *chosen, command="experiments.families"
    )
    job.run(request, open_source, out, resume=True, tell=click.echo)


@click.command()
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--questions", type=click.IntRange(2), default=100, show_default=True, help="Of each family, to answer.")
@click.option("--calibration", type=click.IntRange(10), default=100, show_default=True, help="Of each family.")
@click.option("--report", type=click.Path(path_type=Path), help="The file of the report.  [default: WORK/families.md]")
def main(work: Path, questions: int, calibration: int, report: Path | None) -> None:
    """Profile, choose, evaluate, and write the report."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    work.mkdir(parents=True, exist_ok=True)
    rows = {"calibration": work / "calibration.jsonl", "evaluation": work / "evaluation.jsonl"}
    for split, file in rows.items():
        write_rows(file, split, {"calibration": calibration, "evaluation": questions}[split])
    profiles = choices.profiles(rows["calibration"], work)
    for family in FAMILIES:
        found = choices.of_family(profiles, family, KEEP)
        measure(found, rows["evaluation"], work / "eval" / family, questions, family)
    together = choices.for_all(profiles["all"], KEEP)
    # A family's own questions tell more of it; of all families together half as many are answered.
    measure(together, rows["evaluation"], work / "eval" / "all", questions * len(FAMILIES) // 2, None)
    # What was read off these questions is measured on others.
    write_rows(work / "afresh.jsonl", "evaluation", questions, after=questions)
    for family in FAMILIES:
        found = [one for one in choices.of_family(profiles, family, KEEP) if (one.kind, one.rule) in choices.AFRESH]
        measure(found, work / "afresh.jsonl", work / "afresh" / family, questions, family)
    page.write(work, profiles["all"], KEEP, report or work / "families.md")


if __name__ == "__main__":
    main()
