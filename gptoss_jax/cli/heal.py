"""The command `heal`."""

from typing import Any

import click

from ..run.distilling import OF_DATA, OF_PLACING, Distilling
from ..run.options import Data, Placing, Writing
from . import terminal
from .options import MODEL, PATH, options_of, some_of


@click.command()
@click.argument("model", type=MODEL)
@click.option(
    "--keep-sets",
    type=PATH,
    required=True,
    multiple=True,
    help="A keep.json: the experts of MODEL that stay; given several times, all are healed, and the one with the least "
    "KL on rows that are held out is written.",
)
@some_of(Data, *OF_DATA)
@options_of(Distilling)
@some_of(Placing, *OF_PLACING)
@options_of(Writing)
@click.option("--out", type=PATH, default="healed", help="The folder for the checkpoint.")
@click.option("--overwrite", is_flag=True, help="Replaces an existing folder, at the end.")
@click.option("--resume", is_flag=True, help="Goes on with the unfinished run beside --out, if there is one.")
def heal(model: str, keep_sets: Any, out: Any, overwrite: bool, resume: bool, **options: Any) -> None:
    """Write what keep-sets leave of MODEL, with routers that have learnt to expect what all of MODEL expects.

    MODEL is a folder in Hugging Face form, an Orbax checkpoint of this project, a hub id, or nano, the small model
    that ships with the project. A fifth of the rows is held out: where their interval does not show that the training
    helped, the pruned model is written as it was. Rows of domains that --domain does not name show what was lost there.

    What is finished of a run is kept in the folder OUT.progress until OUT is complete.
    """
    from ..interface import healing
    from ..run.bar import bar
    from ..run.progress import resumable

    with resumable(out):
        healed = healing.heal(
            model,
            [*keep_sets],
            options.pop("data"),
            out=out,
            overwrite=overwrite,
            resume=resume,
            progress=bar,
            tell=terminal.complain,
            **options,
        )
    if healed.pruned is None:
        return
    for warning in healed.pruned.warnings:
        terminal.complain(f"warning: {warning}")
    for one in healed.tried if len(healed.tried) > 1 else ():
        terminal.report(f"{one['name']}: KL {one['kl'][0]:.4g} ({one['kl'][1]:.4g} to {one['kl'][2]:.4g}) healed")
    found = healed.healing
    for name, of in [("", found.overall), *found.domains.items()]:
        if name in found.healed_for and name:
            continue
        where = f"domain {name}" if name else "held out"
        terminal.report(f"{where}: KL {of.pruned.value:.4g} pruned, {of.healed.value:.4g} healed, {of.rows:,} rows")
    what = "healed" if found.is_kept else "rolled back to the pruned model, since the interval does not exclude zero"
    terminal.report(f"{healed.pruned.name}: {what}: {healed.folder}")
