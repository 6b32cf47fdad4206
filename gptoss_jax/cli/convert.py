"""The command `convert`."""

import os
from typing import Any

import click

from ..run.options import Placing, Writing
from . import terminal
from .options import MODEL, PATH, option_of, options_of


@click.command()
@click.argument("model", type=MODEL)
@click.option("--to", type=click.Choice(["orbax", "hf"]), required=True, help="Orbax, or Hugging Face form.")
@options_of(Writing)
@option_of(Placing, "mesh")
@click.option(
    "--out", type=PATH, required=True, help="The folder for the checkpoint; for a storage it is made in TMPDIR first."
)
@click.option("--overwrite", is_flag=True, help="Replaces an existing output folder, at the end.")
def convert(model: str, to: str, out: Any, **options: Any) -> None:
    """Write MODEL as an Orbax checkpoint or in Hugging Face form.

    MODEL is a folder in Hugging Face form, an Orbax checkpoint of this project, a hub id, or nano, the small model
    that ships with the project. What has the asked form keeps its bytes. Every mesh can restore an Orbax checkpoint,
    from whichever it was saved. --max-shard-size goes with --to hf, and --mesh with --to orbax, where it says from
    which devices arrays are saved, in the place of the CPU.
    """
    if to == "hf" or not options["mesh"]:
        # No device is needed. On one host of many, JAX would wait for the others before it says which there are.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from ..interface import checkpoints
    from ..run.bar import bar

    converted = checkpoints.convert(model, to, out, progress=bar, **options)
    for warning in converted.warnings:
        terminal.complain(f"warning: {warning}")
    experts = f"{converted.num_experts} {'MXFP4' if converted.quantized else 'BF16'} experts"
    form = "Orbax" if to == "orbax" else "Hugging Face"
    terminal.report(f"{converted.num_layers} layers of {experts} for {form}: {out}")
