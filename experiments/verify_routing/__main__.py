"""Whether a model chooses the experts that were recorded when it answered, as far as rounding lets it.

    python -m experiments.verify_routing MODEL RECORDED

For who has the weights. RECORDED is what is published of answers, …_examples.json in a folder or a tar archive as
`fingerprint import` reads them, or a trace's folder. Its tokens are forced through MODEL in float32 and in bfloat16,
and the chosen experts are compared with those recorded, by layer and by rank. The two types compared with each other
say what agreement to expect, and a last line says whether it is reached. The exit status is 1 where it is not.
"""

import sys
from dataclasses import replace

import click

from convert.sources import open_source
from gptoss_jax.errors import UserError
from gptoss_jax.files.paths import place
from gptoss_jax.run.options import Placing

from . import agreement, forcing, recorded


@click.command()
@click.argument("model")
@click.argument("recorded_at", metavar="RECORDED")
@click.option("--answers", type=click.IntRange(1), default=256, show_default=True, help="The most that are taken.")
@click.option("--batch-size", type=click.IntRange(1), help="Rows of a step.  [default: by memory]")
@click.option("--engine", type=click.Choice(["auto", "resident", "streamed"]), default="auto", show_default=True)
def main(model: str, recorded_at: str, answers: int, batch_size: int | None, engine: str) -> None:
    """Print the agreement and the verdict."""
    try:
        source = open_source(model)
        found = recorded.read(place(recorded_at), source)
        taken = found.answers[:answers]
        ours = forcing.in_both(source, taken, replace(Placing(), batch_size=batch_size, engine=engine))
    except UserError as error:
        click.echo(f"verify_routing: {error}", err=True)
        sys.exit(2)
    theirs = forcing.recorded(taken)
    said = [*found.remarks, f"{len(theirs.experts_TLk):,} tokens of {len(taken)} answers are compared."]
    shown = agreement.report(theirs, ours)
    click.echo("\n".join([*said, "", shown]))
    sys.exit(0 if "\nAGREES" in shown else 1)


if __name__ == "__main__":
    main()
