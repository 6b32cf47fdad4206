"""Conversations of four domains from public question sets, as rows with messages.

    python -m experiments.real_rows TEXT_FOLDER OUT.jsonl

TEXT_FOLDER holds gsm8k_test.jsonl (grade-school maths, MIT), mmlu_dev_val.tar.xz (57 subjects, MIT) and
pubmedqa_labelled.json.xz (medical abstracts, MIT).
"""

import csv
import hashlib
import io
import json
import lzma
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from gptoss_jax.files.atomic import write_file

SUBJECTS = {
    "law": ("international_law", "jurisprudence", "professional_law"),
    "science": (
        "astronomy",
        "college_biology",
        "college_chemistry",
        "college_physics",
        "conceptual_physics",
        "high_school_biology",
        "high_school_chemistry",
        "high_school_physics",
    ),
}


def _row(row_id: str, domain: str, question: str, thinking: str, answer: str) -> dict[str, Any]:
    assistant = {"role": "assistant", "thinking": thinking, "content": answer}
    return {"id": row_id, "domain": domain, "messages": [{"role": "user", "content": question}, assistant]}


def maths(folder: Path) -> Iterator[dict[str, Any]]:
    """Word problems: the worked solution is the reasoning."""
    with open(folder / "gsm8k_test.jsonl", encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            record = json.loads(line)
            worked, _, answer = record["answer"].rpartition("#### ")
            worked = re.sub(r"<<.*?>>", "", worked).strip()
            yield _row(f"gsm8k-{number}", "maths", record["question"], worked, f"The answer is {answer}.")


def medicine(folder: Path) -> Iterator[dict[str, Any]]:
    """A question on an abstract: the authors' conclusion is the reasoning."""
    with lzma.open(folder / "pubmedqa_labelled.json.xz", "rt", encoding="utf-8") as file:
        for number, record in json.load(file).items():
            question = "\n\n".join([*record["CONTEXTS"], record["QUESTION"]])
            answer = record["final_decision"].capitalize() + "."
            yield _row(f"pubmedqa-{number}", "medicine", question, record["LONG_ANSWER"], answer)


def multiple_choice(folder: Path, domain: str) -> Iterator[dict[str, Any]]:
    """Questions with four choices; there is no worked reasoning, so the chosen text is it."""
    with tarfile.open(folder / "mmlu_dev_val.tar.xz") as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            subject = re.sub(r"_(dev|val)\.csv$", "", Path(member.name).name)
            if subject not in SUBJECTS[domain]:
                continue
            content = archive.extractfile(member)
            assert content is not None
            table = csv.reader(io.TextIOWrapper(content, encoding="utf-8", newline=""))
            for number, (question, *choices, letter) in enumerate(table):
                listed = "\n".join(f"{name}. {choice}" for name, choice in zip("ABCD", choices, strict=True))
                right = choices["ABCD".index(letter)]
                yield _row(
                    f"{Path(member.name).stem}-{number}",
                    domain,
                    f"{question}\n\n{listed}",
                    f"Of the choices, this one holds: {right}",
                    f"{letter}. {right}",
                )


@click.command()
@click.argument("text_folder", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--rows-per-domain", type=click.IntRange(1), default=200, show_default=True)
@click.option("--overwrite", is_flag=True)
def main(text_folder: Path, out: Path, rows_per_domain: int, overwrite: bool) -> None:
    """Write so many rows of each domain, chosen by the hash of their ids."""
    sources = [maths(text_folder), medicine(text_folder)]
    sources += [multiple_choice(text_folder, domain) for domain in SUBJECTS]
    lines = []
    for source in sources:
        rows = sorted(source, key=lambda row: hashlib.sha256(row["id"].encode()).digest())[:rows_per_domain]
        lines += [json.dumps(row, ensure_ascii=False) for row in rows]
        click.echo(f"{rows[0]['domain']}: {len(rows)} rows")
    write_file(out, "\n".join(lines) + "\n", overwrite)


if __name__ == "__main__":
    main()
