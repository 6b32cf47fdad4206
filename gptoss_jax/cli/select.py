"""The command `select`."""

import os
from typing import Any

import click

from ..run.choosing import Keeping, Ranked
from ..run.options import Writing, taken
from . import terminal
from .options import MODEL, PATH, option_of, options_of

NAMED = 20  # domains whose loss is shown


@click.command()
@click.argument("profile", type=MODEL)
@options_of(Keeping, Ranked)
@option_of(Writing, "format")
@click.option("--model", type=MODEL, help="With --budget-gib, the model of a profile that does not say its sizes.")
@click.option("--out", type=PATH, default="keep.json", help="The file for the keep-sets.")
@click.option("--overwrite", is_flag=True, help="Replaces existing files.")
def select(profile: Any, out: Any, overwrite: bool, model: Any, format: str, **options: Any) -> None:
    """Choose the experts of each layer that stay: so many, as many as fit, or as hold a share.

    PROFILE is a profile's folder or a saliency.parquet; for a criterion of the weights alone a MODEL. The file has the
    reason for each expert, and prune --keep-sets takes it. What each domain loses is printed: its coverage is the mean
    over layers of the score that is kept of it, over what its own best experts, as many, would keep; of reap_sum where
    a criterion is a mean or may be negative.
    """
    ranked, keeping = taken(Ranked, options), taken(Keeping, options)
    # No device is needed. On one host of many, JAX would wait for the others before it says which there are.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from ..interface import choosing

    for selected in choosing.choose(profile, ranked, keeping, format, model, out, overwrite):
        kept = selected.keep_sets
        for remark in selected.remarks:
            terminal.complain(f"{selected.file}: {remark}")
        terminal.report(f"{len(kept.layers)} layers of {len(kept.layers[0])} experts {kept.origin}: {selected.file}")
        if selected.coverage:
            lost = [f"{name} {share:.3f}" for name, share in selected.coverage.items()]
            further = f" and {len(lost) - NAMED:,} domains that keep more" if len(lost) > NAMED else ""
            terminal.report(f"coverage, worst first: {', '.join(lost[:NAMED])}{further}")
