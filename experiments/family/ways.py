"""How should a family's experts be ranked? Soft prunes by some ways on the calibration questions themselves.

    python -m experiments.family.ways WORK [--keep 12]

WORK is the folder of `python -m experiments.family`, which has recorded answers there. No evaluation question is asked:
what is chosen here is measured there afresh.
"""

import json
from pathlib import Path

import click
import numpy as np

import gptoss_jax as gj
from convert.sources import NANO
from gptoss_jax.fingerprints.folder import Activations

from ..families.results import Results
from ..nano.families import FAMILIES
from .members import GREEDY, RANKED

WAYS = {
    "as published: frequency, interleaved with all answers'": {"mode": "interleaved"},
    "frequency": {},
    "frequency in thoughts": {"segment": "think"},
    "frequency in thoughts, interleaved": {"segment": "think", "mode": "interleaved"},
    "specificity in thoughts": RANKED,
}


def measured(work: Path, family: str, keep: int) -> dict[str, float]:
    """The share of the family's own questions that each way's soft prune answers."""
    dataset, out = Activations.open(work / "fingerprints"), work / "ways" / f"{keep}-{family}"
    if not out.exists():
        lines = (work / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
        own = [row for row in map(json.loads, lines) if row["category"] == family]
        sets = {way: gj.fingerprint.rank(dataset, family, **options).keep(keep) for way, options in WAYS.items()}
        options = {"answer_column": "answer", "seq_len": (256,), "batch_size": 64, "resume": True}
        gj.evaluate(NANO, own, keep_sets=sets, out=out, replies=len(own), **options, **GREEDY)
    found = Results.read(out).answers
    return {way: float(found[way][:, 0].mean()) for way in WAYS}


@click.command()
@click.argument("work", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--keep", type=click.IntRange(4, 16), default=12, show_default=True)
def main(work: Path, keep: int) -> None:
    """Print the table: exact match in per cent."""
    (work / "ways").mkdir(exist_ok=True)
    found = {family: measured(work, family, keep) for family in FAMILIES}
    click.echo(f"| ranked by | {' | '.join(found)} | mean |\n|---|{'---:|' * (len(found) + 1)}")
    for way in WAYS:
        shares = [100 * of[way] for of in found.values()]
        click.echo(f"| {way} | {' | '.join(f'{share:.0f}' for share in shares)} | {np.mean(shares):.1f} |")


if __name__ == "__main__":
    main()
