"""The command `plan`."""

import json
import os
from typing import TYPE_CHECKING, Any

import click

from ..run.options import Slice
from . import terminal
from .options import MODEL, options_of

if TYPE_CHECKING:
    from ..pods.plan import Case


@click.command()
@click.argument("model", type=MODEL)
@options_of(Slice)
@click.option("--tokens", type=click.IntRange(1), default=100_000_000, help="The tokens to estimate hours for.")
@click.option("--json", "as_json", is_flag=True, help="Prints one JSON object in place of the table.")
def plan(model: str, tokens: int, as_json: bool, **options: Any) -> None:
    """Compile the profile step for a TPU slice, and say what it takes there: memory, work, exchanges.

    MODEL is gpt-oss-20b, gpt-oss-120b, nano, or a folder that holds config.json; openai/ may stand before the first
    two. No TPU and no weights are needed.
    """
    # What compiles for TPUs does not run on one.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from ..interface import jobs
    from ..pods import words

    def told(case: "Case") -> None:
        terminal.complain(f"compiling {case.batch} × {case.seq_len} tokens for {case.topology}")

    planned = jobs.plan(model, progress=told, **options)
    if as_json:
        terminal.show(json.dumps(planned.figures, indent=2))
    elif planned.fits:
        terminal.show(words.table(planned.figures, tokens))
    if planned.refusal:
        raise planned.refusal
