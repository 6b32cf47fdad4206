"""The command `rank`."""

import os
from typing import Any

import click

from ..run.choosing import Ranked
from . import terminal
from .options import MODEL, PATH, options_of


@click.command()
@click.argument("profile", type=MODEL)
@options_of(Ranked)
@click.option("--out", type=PATH, default="ranking.json", help="The file for the ranking.")
@click.option("--overwrite", is_flag=True, help="Replaces an existing file.")
def rank(profile: Any, out: Any, **options: Any) -> None:
    """Rank the experts of each layer, best first.

    PROFILE is a profile's folder or a saliency.parquet; for a criterion of the weights alone a MODEL stands in its
    place, as the command profile takes it. The file says by which criterion and over which data it ranks.
    """
    # No device is needed, and on one host of many JAX would wait for the others.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from ..interface import choosing
    from ..run.bar import bar

    ranking = choosing.rank(profile, out=out, progress=bar, **options)
    thin = sum(0 < count < options["min_count"] for counts in ranking.counts or [] for count in counts)
    behind = f", {thin} of them behind for want of {options['min_count']} tokens" if options["min_count"] else ""
    terminal.report(f"{len(ranking.layers)} layers of {len(ranking.layers[0])} experts{behind} {ranking.origin}: {out}")
