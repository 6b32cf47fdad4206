"""A model of nano for each of its families, cut by the fingerprints of its own answers, with a card that is measured.

    python -m experiments.family WORK --keep 12 --keep 8 [--push-to-hub OWNER] [--endpoint URL]

WORK/models gets the checkpoints, and WORK/README.md their table. Stopped at any time, the same command goes on, and
further sizes join those that are there. The keep-sets of gpt-oss-20b's family are written by
`python -m experiments.families.published`.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from gptoss_jax.errors import UserError
from gptoss_jax.files import atomic

from ..families.results import Results
from ..nano.families import FAMILIES
from . import hub, members, questions
from .card import family_table
from .cut import cut
from .members import Member

EVALUATED = "eval-{}"  # by the number of experts
SIZES = click.IntRange(4, 16)  # a token of nano uses 4 experts of 16


def make(
    work: Path, keeps: Sequence[int], families: Sequence[str], count: int
) -> Iterator[tuple[Member, Results, Path]]:
    """The models of these sizes and of all that WORK had before, with what was measured of them."""
    work.mkdir(parents=True, exist_ok=True)
    rows = {split: work / f"{split}.jsonl" for split in ("calibration", "evaluation")}
    for split, file in rows.items():
        questions.write_rows(file, questions.rows(split, families, count))
    dataset = members.recorded(rows["calibration"], families, work / "fingerprints")
    for keep in sorted({*keeps, *_finished(work)}, reverse=True):
        some, evaluation = members.members(dataset, rows["calibration"], families, keep), work / EVALUATED.format(keep)
        found = members.measured(some, rows["evaluation"], evaluation)
        for member in some:
            folder = cut(member, found, evaluation, rows["evaluation"], work / "models")
            click.echo(f"{member.name}: {folder}")
            yield member, found, folder


def _finished(work: Path) -> Iterator[int]:
    """The sizes that were evaluated."""
    numbers = (folder.name.removeprefix(EVALUATED.format("")) for folder in work.glob(EVALUATED.format("*")))
    return (int(number) for number in numbers if number.isdecimal())


@click.command()
@click.argument("work", type=click.Path(path_type=Path, file_okay=False))
@click.option("--keep", "keeps", type=SIZES, multiple=True, default=(12, 8), show_default=True)
@click.option("--family", "families", type=click.Choice([*FAMILIES]), multiple=True, help="Some, in the place of all.")
@click.option(
    "--questions", "count", type=click.IntRange(3, 50), default=50, show_default=True, help="Of each family and split."
)
@click.option("--push-to-hub", "owner", metavar="OWNER", help="Uploads each model to OWNER/its name.")
@click.option("--endpoint", help="The hub's address.  [default: that of huggingface_hub]")
def main(
    work: Path,
    keeps: tuple[int, ...],
    families: tuple[str, ...],
    count: int,
    owner: str | None,
    endpoint: str | None,
) -> None:
    """Record, choose, measure, cut; then upload."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        if endpoint is not None and owner is None:
            raise click.UsageError("--endpoint goes with --push-to-hub")
        some = [family for family in FAMILIES if not families or family in families]
        made = list(make(work, keeps, some, count))
        table = family_table([(member, found) for member, found, _ in made])
        atomic.write_file(work / "README.md", table.encode(), overwrite=True)
        for address in hub.push([folder for *_, folder in made], owner, endpoint) if owner else ():
            click.echo(address)
    except UserError as error:
        click.echo(f"family: {error}", err=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
