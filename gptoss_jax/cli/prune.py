"""The command `prune`."""

import os
from typing import Any

import click

from ..errors import UserError
from ..run.kinds import KEEP
from ..run.options import Option, Writing
from . import terminal
from .options import MODEL, PATH, Value, options_of

KEPT = Option(KEEP, "How many experts to keep in each layer, or how many per cent of them.")


@click.command()
@click.argument("model", type=MODEL)
@click.option("--ranking", type=PATH, help="A ranking's JSON file; it goes with --keep.")
@click.option("--keep", type=Value(KEPT, "--keep"), metavar=KEEP.metavar, help=KEPT.help)
@click.option("--keep-sets", type=PATH, help="A keep.json, in place of ranking and number.")
@click.option(
    "--eval", type=PATH, help="An eval.json in which these keep-sets were measured: the card says what was found."
)
@options_of(Writing)
@click.option(
    "--domain",
    help="What the model is specialised in, for its name and card.  [default: the domain that was ranked, or general]",
)
@click.option("--lower-top-k", is_flag=True, help="Allows fewer experts than each token uses now.")
@click.option(
    "--out",
    type=PATH,
    help="The folder for the checkpoint; for a storage it is made in TMPDIR first.  [default: its name]",
)
@click.option("--overwrite", is_flag=True, help="Replaces an existing output folder, at the end.")
@click.option(
    "--verify",
    is_flag=True,
    help="Reads the files again from the disk before they get their final name, or are copied to a storage.",
)
def prune(model: str, ranking: Any, keep: Any, keep_sets: Any, **options: Any) -> None:
    """Write MODEL with only the best experts of each layer.

    MODEL is a folder in Hugging Face form, an Orbax checkpoint of this project, a hub id, or nano, the small model
    that ships with the project. What is written has Hugging Face form. The file SHA256SUMS in the new folder has the
    digest of every other: in that folder, sha256sum -c SHA256SUMS says at any time whether a byte has changed.
    """
    if (keep_sets is None) == (ranking is None) or (ranking is None) != (keep is None):
        raise UserError("prune takes either --ranking with --keep, or --keep-sets")
    # No device is needed. On one host of many, JAX would wait for the others before it says which there are.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from ..interface import checkpoints
    from ..interface.model import open
    from ..run.bar import bar

    opened = open(model)
    kept = checkpoints.read_choice(opened, ranking, keep, keep_sets)
    pruned = checkpoints.prune(opened, kept, progress=bar, **options)
    for warning in pruned.warnings:
        terminal.complain(f"warning: {warning}")
    experts = f"{pruned.num_kept} of {opened.config.num_experts} experts a layer"
    if isinstance(keep, str):
        experts += f" ({keep} of {opened.config.num_experts}: {pruned.num_kept})"
    before, after = (f"{size / 1e6:,.1f} MB" for size in (pruned.source_bytes, pruned.weight_bytes))
    terminal.report(f"{pruned.name}: {experts} {kept.origin}; weights {before} before, {after} now: {pruned.folder}")
