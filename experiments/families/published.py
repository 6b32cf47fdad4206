"""The published family in form: rankings of gpt-oss-20b's experts by domain × 29 sizes, as keep-sets with names.

    python -m experiments.families.published RANKINGS OUT

RANKINGS is a folder of rankings by layer, each named for its domain. `gptoss-jax prune` takes what is written.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click

import gptoss_jax as gj
from convert.card import model_name
from gptoss_jax.config import GPT_OSS_20B
from gptoss_jax.files.atomic import new_folder

SIZES = range(GPT_OSS_20B.top_k, GPT_OSS_20B.num_experts + 1)


class Member(NamedTuple):
    """One model of the family."""

    name: str
    domain: str
    parameters: int
    keep_sets: gj.KeepSets


def family(rankings: Path) -> Iterator[Member]:
    """All members, by domain and size."""
    for file in sorted(rankings.glob("*.json")):
        ranking = gj.Ranking.read(file, GPT_OSS_20B)
        for size in SIZES:
            name, parameters = model_name(GPT_OSS_20B, size, file.stem), GPT_OSS_20B.num_parameters(size)
            yield Member(name, file.stem, parameters, ranking.keep(size))


def table(members: list[Member]) -> str:
    """Domains in rows, sizes in columns: the parameters, which are those of the names."""
    domains = sorted({member.domain for member in members})
    lines = ["# Keep-sets of gpt-oss-20b", "", "| experts a layer | parameters | domains |", "|---:|---:|---|"]
    for size in SIZES:
        lines.append(f"| {size} | {GPT_OSS_20B.num_parameters(size):,} | {', '.join(domains)} |")
    return "\n".join(lines) + "\n"


@click.command()
@click.argument("rankings", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("out", type=click.Path(path_type=Path))
def main(rankings: Path, out: Path) -> None:
    """Write a file for each member, and README.md with their parameters."""
    members = list(family(rankings))
    with new_folder(out) as folder:
        for member in members:
            (folder / f"{member.name}.json").write_text(member.keep_sets.to_json(), encoding="utf-8")
        (folder / "README.md").write_text(table(members), encoding="utf-8")
    click.echo(f"{len(members)} keep-sets: {out}")


if __name__ == "__main__":
    main()
