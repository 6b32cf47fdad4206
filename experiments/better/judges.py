"""By what should candidates be picked? Few rows are drawn again and again: how much worse than the best candidate is
the one that the KL of these rows takes, and the one that their right answers take?

    python -m experiments.better.judges WORK --family times --family logic

WORK is that of `experiments.better`. Judged is on evaluation questions by which variants may be told apart, none of
which is among those of the report.
"""

from pathlib import Path

import click
import jax
import numpy as np

from convert.sources import locate
from gptoss_jax.evaluation.markdown import table

from ..nano.families import FAMILIES
from .candidates import PICKED_OF
from .measure import Judge, save
from .variants import Ways

DRAWS = 2000


@click.command()
@click.argument("work", type=click.Path(path_type=Path, exists=True))
@click.option("--family", type=click.Choice([*FAMILIES]), multiple=True, default=("times", "logic"))
@click.option("--keep", type=int, default=8, show_default=True)
@click.option("--rows", type=int, default=40, show_default=True, help="That judge.")
def main(work: Path, family: tuple[str, ...], keep: int, rows: int) -> None:
    """Print what each way of judging loses, in points of exact match, by family."""
    jax.config.update("jax_compilation_cache_dir", str((work / "compiled").absolute()))
    model, lines = Path(str(locate("nano"))), []
    for name in family:
        ways = Ways(model, name, keep, work)
        judge, sets = Judge(model, ways.asked.evaluation), ways.choices.sets(keep)
        files = [ways.work / f"{rule}, judged, {keep}.npy" for rule in PICKED_OF]
        for rule, file in zip(PICKED_OF, files, strict=True):
            if not file.exists():
                save(file, judge.of(sets[rule].layers, {}))
        found = [np.load(file) for file in files]
        by_kl, by_answers = lost(np.stack(found), rows)
        right = ", ".join(f"{rule} {of[:, 0].mean():.1%}" for rule, of in zip(PICKED_OF, found, strict=True))
        lines.append([name, right, f"{100 * by_kl:.1f}", f"{100 * by_answers:.1f}"])
    click.echo("\n".join(table(["", "right", f"points lost by the KL of {rows} rows", "by their answers"], lines)))


def lost(found: np.ndarray, rows: int) -> tuple[float, float]:
    """What is lost beside the best candidate, in the mean of draws: by the KL, and by right answers. `found` is
    [candidates, questions, 3]: right or wrong, Σ KL and tokens."""
    rng, right = np.random.default_rng(0), found[:, :, 0].mean(1)
    losses = np.zeros((DRAWS, 2))
    for draw in range(DRAWS):
        of_draw = found[:, rng.integers(0, found.shape[1], rows)].sum(1)
        picked = np.argmin(of_draw[:, 1] / of_draw[:, 2]), np.argmax(of_draw[:, 0])
        losses[draw] = [right.max() - right[one] for one in picked]
    by_kl, by_answers = losses.mean(0)
    return float(by_kl), float(by_answers)


if __name__ == "__main__":
    main()
