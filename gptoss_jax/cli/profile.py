"""The command `profile`."""

from typing import Any

import click

from ..run.options import Counting, Data, Placing, named
from . import terminal
from .options import MODEL, PATH, command_line, options_of, soft_prune


@click.command()
@click.argument("model", type=MODEL)
@options_of(Data, Counting, Placing)
@soft_prune
@click.option("--out", type=PATH, default="profile", help="The folder for the artifacts.")
@click.option("--trace", type=PATH, help="A folder for which experts each token chose, with their gates.")
@click.option("--overwrite", is_flag=True, help="Replaces existing output folders, at the end.")
@click.option("--resume", is_flag=True, help="Goes on with the unfinished run beside --out, if there is one.")
def profile(model: str, keep_sets: Any, out: Any, trace: Any, overwrite: bool, resume: bool, **options: Any) -> None:
    """Run rows through MODEL and write the statistics of its experts.

    MODEL is a folder in Hugging Face form, an Orbax checkpoint of this project, a hub id, or nano, the small model
    that ships with the project. All devices of all processes are used; docs/pods.md says how many processes run as one.

    What is finished of a run is kept in the folder OUT.progress until OUT is complete.
    """
    chosen = named(**options)
    from ..interface.model import open_masked
    from ..run import job
    from ..run.progress import resumable

    name = f"{model}, masked by {keep_sets}" if keep_sets else model
    request = job.Request(name, *chosen, command=command_line(), trace=trace)
    job.start(request, out=str(out), overwrite=overwrite, resume=resume)
    with resumable(out):
        finished = job.run(
            request, lambda _: open_masked(model, keep_sets).source, out, overwrite, resume, terminal.complain
        )
    if finished.said:
        terminal.report(finished.said)
