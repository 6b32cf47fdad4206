"""The command `plan`."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import mesh_sizes, weights_option

if TYPE_CHECKING:
    from ..config import Config

PRESETS = {"gpt-oss-20b": "GPT_OSS_20B", "gpt-oss-120b": "GPT_OSS_120B"}


@click.command()
@click.argument("model")
@click.option("--topology", required=True, help="A TPU slice, e.g. v5e:2x4.")
@click.option("--mesh", callback=mesh_sizes, help="data=N,expert=M.  [default: as profile chooses]")
@click.option("--batch", type=click.IntRange(1), default=16, help="Rows a step.")
@click.option("--seq-len", type=click.IntRange(1), default=2048, help="Tokens a row.")
@weights_option
@click.option("--tokens", type=click.IntRange(1), default=100_000_000, help="Tokens to estimate hours for.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object in place of the table.")
def plan(
    model: str,
    topology: str,
    mesh: tuple[int, int] | None,
    batch: int,
    seq_len: int,
    weights: str,
    tokens: int,
    as_json: bool,
) -> None:
    """Compile the profile step for a TPU slice, and say what it takes there: memory, work, exchanges.

    MODEL is gpt-oss-20b, gpt-oss-120b, nano, or a folder that holds config.json. No TPU and no weights are needed.
    """
    # What compiles for TPUs does not run on one.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from ..devices import mesh as sharding
    from ..devices import topologies
    from ..pods import plan as job

    config = _config(model)
    data, expert = mesh or sharding.default_sizes(config, len(topologies.devices(topology)))
    case = job.Case(config, topology, data, expert, weights, batch, seq_len)
    case.mesh()

    def compile_step(case: job.Case) -> job.Compiled:
        click.echo(f"compiling {case.batch} × {case.seq_len} tokens for {case.topology}", err=True)
        return job.compile_step(case)

    compiled = compile_step(case)
    largest = job.largest_batch(compiled, compile_step)
    said = job.figures(compiled, largest)
    if as_json:
        click.echo(json.dumps(said, indent=2))
    elif compiled.fits:
        click.echo(job.table(said, tokens))
    if not compiled.fits:
        raise job.refusal(compiled, largest)


def _config(model: str) -> "Config":
    from convert.sources import NANO, locate

    from .. import config
    from ..files.paths import read_json

    if model in PRESETS:
        return getattr(config, PRESETS[model])
    path = (locate(model) if model == NANO else Path(model)) / "config.json"
    return config.Config.from_json(read_json(path), str(path))
