"""The command `merge`."""

from typing import Any

import click

from . import terminal
from .options import PATH, command_line


@click.command()
@click.argument("profiles", type=PATH, nargs=-1, required=True)
@click.option("--out", type=PATH, default="profile", help="The folder for the artifacts.")
@click.option("--overwrite", is_flag=True, help="Replaces an existing output folder, at the end.")
def merge(profiles: tuple[Any, ...], out: Any, overwrite: bool) -> None:
    """Add finished PROFILES over different rows of one model.

    PROFILES are the folders of two or more of them. The result is a profile as one run over the rows of all gives it.
    """
    from ..interface import jobs

    merged = jobs.merge(profiles, out=out, overwrite=overwrite, command=command_line())
    tokens, rows = (merged.info[name] for name in ("total_tokens", "rows"))
    terminal.report(f"{len(profiles)} profiles: {tokens:,} tokens of {rows:,} rows; report: {out / 'report.md'}")
