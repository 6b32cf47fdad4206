"""The command `rank`."""

from typing import Any

import click

from ..selection.criteria import CRITERIA, LETTERS
from . import terminal
from .options import PATH

CRITERION_HELP = "\n".join(
    [
        f"The score; experts with a higher one stay. {LETTERS}\n\n\b",
        *(f"{criterion.name}: {criterion.help}" for criterion in CRITERIA.values()),
    ]
)


@click.command()
@click.argument("profile", type=PATH)
@click.option("--criterion", type=click.Choice([*CRITERIA]), default="reap", help=CRITERION_HELP)
@click.option("--domain", help="Ranks by the statistics of this domain alone.")
@click.option("--seed", type=click.IntRange(0), default=0, help="The seed of criteria that draw.")
@click.option(
    "--min-count",
    type=click.IntRange(0),
    default=0,
    help="Ranks experts that fewer tokens chose behind all others, by falling reap_sum: a mean over a few tokens is "
    "chance. 0 ranks all by the criterion, as published rankings do.",
)
@click.option("--out", type=PATH, default="ranking.json", help="The file for the ranking.")
@click.option("--overwrite", is_flag=True, help="Replaces an existing file.")
def rank(profile: Any, out: Any, **options: Any) -> None:
    """Rank the experts of each layer, best first.

    PROFILE is a profile's folder or a saliency.parquet. The file says by which criterion and over which data it ranks.
    """
    from ..interface import choosing

    ranking = choosing.rank(profile, out=out, **options)
    thin = sum(0 < count < options["min_count"] for counts in ranking.counts or [] for count in counts)
    behind = f", {thin} of them behind for want of {options['min_count']} tokens" if options["min_count"] else ""
    terminal.report(f"{len(ranking.layers)} layers of {len(ranking.layers[0])} experts{behind} {ranking.origin}: {out}")
