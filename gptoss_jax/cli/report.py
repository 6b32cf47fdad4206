"""The command `report`."""

from typing import Any

import click

from . import terminal
from .options import MODEL, PATH, command_line


@click.command()
@click.argument("paths", type=PATH, nargs=-1, required=True)
@click.option("--model", type=MODEL, help="With traces, the model that was traced: its tokenizer says what tokens are.")
@click.option("--out", type=PATH, default="report.html", help="The file for the page.")
@click.option("--title", default="", help="What stands at its head.  [default: the model's name]")
@click.option("--overwrite", is_flag=True, help="Replaces an existing file.")
def report(paths: tuple[Any, ...], model: Any, out: Any, title: str, overwrite: bool) -> None:
    """Write one HTML page that shows profiles, fingerprints, keep-sets, evaluations, healings and traces.

    PATHS are folders and files that the other commands wrote: those of profile or fingerprint, of which there is one at
    least, of eval, heal and --trace, keep.json files, and rankings; bare lists of experts are keep-sets. The page opens
    from disk: it holds all that it shows, and needs no network. What is not given is left out of it, and the page says
    so.
    """
    from ..interface import showing

    file = showing.report(*paths, model=model, out=out, title=title, overwrite=overwrite, command=command_line())
    terminal.report(str(file))
