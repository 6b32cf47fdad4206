"""The command `eval`."""

from typing import Any

import click

from ..run.judging import OF_DATA, OF_PLACING, Judging, judged
from ..run.options import Data, Placing
from . import terminal
from .options import MODEL, PATH, command_line, options_of, some_of


@click.command("eval")
@click.argument("model", type=MODEL)
@some_of(Data, *OF_DATA)
@click.option(
    "--keep-sets",
    type=PATH,
    multiple=True,
    help="A keep.json, of which the experts of MODEL are left; given several times, all go through it together.",
)
@click.option(
    "--baseline",
    type=MODEL,
    help="Another model, or a file of --write-baseline.  [default: MODEL with all its experts]",
)
@click.option("--write-baseline", type=PATH, help="The file for what later comparisons need of MODEL as the baseline.")
@options_of(Judging)
@some_of(Placing, *OF_PLACING)
@click.option("--out", type=PATH, default="eval", help="The folder for eval.json and eval.md.")
@click.option("--overwrite", is_flag=True, help="Replaces existing outputs, at the end.")
@click.option("--resume", is_flag=True, help="Goes on with the unfinished run beside --out, if there is one.")
def evaluate(
    model: str,
    keep_sets: tuple[Any, ...],
    baseline: Any,
    write_baseline: Any,
    out: Any,
    overwrite: bool,
    resume: bool,
    **options: Any,
) -> None:
    """Say what MODEL loses by keep-sets, or beside another model, with intervals.

    MODEL is a folder in Hugging Face form, an Orbax checkpoint of this project, a hub id, or nano, the small model
    that ships with the project. Rows by which the keep-sets were chosen are refused. The last lines for each of the
    keep-sets are those of llama-perplexity --kl-divergence.

    What is finished of a run is kept in the folder OUT.progress until OUT is complete.
    """
    chosen = judged(**options)
    from convert.sources import open_source

    from ..evaluation import job
    from ..evaluation.sides import Request
    from ..interface.judging import named_keep_sets
    from ..interface.model import open
    from ..run.progress import resumable

    sets = named_keep_sets([*keep_sets] or None, open(model))
    request = Request(model, sets, *chosen, baseline, write_baseline, command_line())
    with resumable(out):
        finished = job.run(request, open_source, out, overwrite, resume, terminal.complain)
    for text in finished.said:
        terminal.show(text)
