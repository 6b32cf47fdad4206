"""The main job on nano, the small trained GPT-OSS that ships with the project.

    make demo

Profiles nano by family of tasks, ranks its experts for one family, and keeps half of them. Beside the full model and
the pruned one stand one pruned for another family and three pruned at random, on questions that neither the training
nor the profile saw: exact match of the answers that they generate, and perplexity of the right replies.
"""

import os
from pathlib import Path
from typing import Any

import click

import gptoss_jax as gj
from convert.sources import NANO

from .nano import QUESTIONS, evaluate
from .nano.families import FAMILIES, read
from .nano.specialise import write_rows

FAMILY, OTHER = "arithmetic", "kinship"
RANDOM_SEEDS = range(3)


def cut(profile: gj.Profile, out: Path, name: str, kept: int, **options: Any) -> Path:
    """Rank by some criterion or domain, and prune to so many experts a layer: the new checkpoint's folder."""
    ranking = gj.rank(profile, out=out / f"{name}.json", overwrite=True, **options)
    pruned = gj.prune(NANO, ranking.keep(kept), name, out=out / name, overwrite=True)
    click.echo(f"{name}: the best {kept} experts of each layer {ranking.origin}")
    return pruned.folder


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default="demo", show_default=True)
@click.option("--family", type=click.Choice(list(FAMILIES)), default=FAMILY, show_default=True, help="To prune for.")
@click.option("--other", type=click.Choice(list(FAMILIES)), default=OTHER, show_default=True, help="To compare with.")
@click.option("--keep", type=click.Choice(["assistant", "all"]), default="all", show_default=True, help="What counts.")
def main(out: Path, family: str, other: str, keep: str) -> None:
    """Run the main job in a folder of its own, and replace what an earlier demo left there.

    All tokens count, as a pruned model also reads the question and writes harmony's marks: where only the contents of
    replies did, half of the experts answered 14 % of the questions, not 70 % (docs/measurements.md).
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    model, rows = gj.open(NANO), out / "rows.jsonl"
    nano, half = Path(str(model.source.folder)), model.config.num_experts // 2
    out.mkdir(parents=True, exist_ok=True)
    write_rows(rows, nano, read(QUESTIONS / "calibration.jsonl"))
    options = {"domain_column": "family", "keep": keep, "max_seq_length": 512, "batch_size": 32}
    profile = gj.profile(model, rows, **options, out=out / "profile", overwrite=True)
    click.echo(f"profile: {profile.info['kept_tokens']:,} kept tokens of {len(profile.domains)} families")
    models = {"all experts": nano}
    models |= {f"half, for {name}": cut(profile, out, name, half, domain=name) for name in (family, other)}
    for seed in RANDOM_SEEDS:
        models[f"half, random {seed}"] = cut(profile, out, f"random-{seed}", half, criterion="random", seed=seed)

    questions = read(QUESTIONS / "evaluation.jsonl")
    click.echo(f"\n{'':20}{'exact match':>24}{'perplexity':>24}{'MB':>8}")
    click.echo(f"{'':20}{family:>14}{'others':>14}{family:>12}{'others':>12}")
    for name, folder in models.items():
        scores = evaluate.score(folder, questions)
        parts = scores.pop(family), evaluate.total(scores.values())
        exact = "".join(f"{part.accuracy:7.0%} of {part.asked:3}" for part in parts)
        perplexity = "".join(f"{part.perplexity:12.3f}" for part in parts)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6
        click.echo(f"{name:20}{exact}{perplexity}{size:8.2f}")
    click.echo(f"\nReport: {out / 'profile' / 'report.md'}, ranking: {out / family}.json")
    click.echo(f"Checkpoint: {out / family}, its card: {out / family / 'README.md'}")


if __name__ == "__main__":
    main()
