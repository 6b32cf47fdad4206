"""The command `rank`."""

from typing import Any

import click

from ..run.choosing import Ranked
from . import terminal
from .options import PATH, options_of


@click.command()
@click.argument("profile", type=PATH)
@options_of(Ranked)
@click.option("--out", type=PATH, default="ranking.json", help="The file for the ranking.")
@click.option("--overwrite", is_flag=True, help="Replaces an existing file.")
def rank(profile: Any, out: Any, **options: Any) -> None:
    """Rank the experts of each layer, best first.

    PROFILE is a profile's folder or a saliency.parquet. The file says by which criterion and over which data it ranks.
    """
    from ..interface import choosing

    ranking = choosing.rank(profile, out=out, **options)
    terminal.report(f"{len(ranking.layers)} layers of {len(ranking.layers[0])} experts {ranking.origin}: {out}")
