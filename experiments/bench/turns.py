"""`python -m experiments.bench.turns`: what it takes to read one long row, beside the tokenizer alone.

The published tokenizer, a template in its form; a row of so many turns, calls, or characters is read, written as
harmony, tokenised and weighed. Each time is the best of three.
"""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from gptoss_jax.data.groups import Groups
from gptoss_jax.data.remarks import Remarks
from gptoss_jax.data.rows import ColumnNames, Reading, Row, read_rows
from gptoss_jax.data.template import Template
from gptoss_jax.data.tokens import encode, load_tokenizer

from .. import tokenizers

SIZES = (1_000, 8_000, 64_000)
WORDS = "The sum of three and four is seven. "


def turns(count: int) -> list[dict[str, Any]]:
    """User and assistant in turns."""
    return [{"role": ("user", "assistant")[n % 2], "content": f"{n}: {WORDS}"} for n in range(count)]


def calls(count: int) -> list[dict[str, Any]]:
    """One message with all calls, then all results in the opposite order."""
    made = [{"id": str(n), "function": {"name": "add", "arguments": {"a": n}}} for n in range(count // 2)]
    results = [
        {"role": "tool", "tool_call_id": call["id"], "content": f"{call['id']}: {WORDS}"} for call in reversed(made)
    ]
    return [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": made}, *results]


def characters(count: int) -> list[dict[str, Any]]:
    """Two turns, each of so many sentences."""
    return [*turns(1), {"role": "assistant", "content": WORDS * count}]


def quickest(work: Callable[[], Any]) -> float:
    """Seconds."""
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


@click.command()
def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizers.write_published(Path(folder))
        tokenizer = load_tokenizer(Path(folder))
    reading = Reading(ColumnNames(), lambda: Template(tokenizer), Remarks())
    click.echo("| row | characters | read and weighed, s | tokenizer alone, s | ratio |\n|---|---:|---:|---:|---:|")
    for make in (turns, calls, characters):
        for size in SIZES:
            record = json.loads(json.dumps({"messages": make(size)}))

            def rows(record: Any = record) -> list[Row]:
                return list(read_rows([("row", record)], reading))

            (row,) = rows()
            whole = quickest(lambda: encode(rows(), tokenizer, Groups([""]), len(tokenizer), None))
            alone = quickest(lambda text=row.text: tokenizer(text, add_special_tokens=False))
            click.echo(
                f"| {size:,} {make.__name__} | {len(row.text):,} | {whole:.3f} | {alone:.3f} | {whole / alone:.2f} |"
            )


if __name__ == "__main__":
    main()
