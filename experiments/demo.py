"""The main job on nano, the small trained GPT-OSS that ships with the project.

    make demo

Profiles nano by family of tasks, and keeps half of its experts for one family: those that REAP ranks best, those that
elimination leaves, the same with healed routers, and a random half. All stand beside the full model on questions
that neither the training nor any choice saw: exact match of the answers that they generate, and perplexity of the right
replies, on the family and on all others. Last of all it makes a page of the profile, the keep-sets, what they
cost by family, the healing, and some replies of all experts and of half of them, token by token.
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

FAMILY = "lists"
RANDOM_SEEDS = range(1)
LENGTH = 512
ON_THE_PAGE = 5  # questions


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default="demo", show_default=True)
@click.option("--family", type=click.Choice(list(FAMILIES)), default=FAMILY, show_default=True, help="To prune for.")
@click.option("--keep", type=click.Choice(["assistant", "all"]), default="all", show_default=True, help="What counts.")
def main(out: Path, family: str, keep: str) -> None:
    """Run the main job in a folder of its own, and replace what an earlier demo left there.

    In the profile all tokens count, as a pruned model also reads the question and writes harmony's marks: where only
    the contents of replies did, half of the experts answered 14 % of the questions, not 70 % (docs/measurements.md).
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    model, rows = gj.open(NANO), out / "rows.jsonl"
    nano, half = Path(str(model.source.folder)), model.config.num_experts // 2
    out.mkdir(parents=True, exist_ok=True)
    write_rows(rows, nano, read(QUESTIONS / "calibration.jsonl"))
    of_family: dict[str, Any] = {"domain_column": "family", "domain": family}
    options = {"max_seq_length": LENGTH, "batch_size": 32, "dtype": "float32"}
    counted = {"domain_column": "family", "keep": keep, **options}
    profile = gj.profile(model, rows, **counted, out=out / "profile", overwrite=True)
    click.echo(f"profile: {profile.info['kept_tokens']:,} kept tokens of {len(profile.domains)} families")
    sets = {"reap": profile.rank(domain=family).keep(half)}
    sets["greedy_cosine"] = gj.select(model, half, rule="greedy_cosine", data=rows, **of_family, **options)
    sets |= {f"random {seed}": profile.rank("random", family, seed).keep(half) for seed in RANDOM_SEEDS}
    models = {"all experts": nano}
    for name, kept in sets.items():
        pruned = gj.prune(model, kept, family, out=out / name.replace(" ", "-"), overwrite=True)
        models[f"half, {name}"] = Path(str(pruned.folder))
        click.echo(f"{pruned.folder}: {half} experts of each layer {kept.origin}")
    learnt = of_family | {"domain": (family,), "max_seq_length": LENGTH, "batch_size": 4, "dtype": "float32"}
    healed = gj.heal(model, sets["greedy_cosine"], rows, out=out / "healed", overwrite=True, **learnt)
    of = healed.healing.overall
    click.echo(f"{healed.folder}: KL {of.pruned.value:.4f} before, {of.healed.value:.4f} after")
    models["half, healed"] = Path(str(healed.folder))

    questions = read(QUESTIONS / "evaluation.jsonl")
    click.echo(f"\n{'':22}{'exact match':>24}{'perplexity':>24}{'MB':>8}")
    click.echo(f"{'':22}{family:>14}{'others':>14}{family:>12}{'others':>12}")
    for name, folder in models.items():
        scores = evaluate.score(folder, questions)
        parts = scores.pop(family), evaluate.total(scores.values())
        exact = "".join(f"{part.accuracy:7.0%} of {part.asked:3}" for part in parts)
        perplexity = "".join(f"{part.perplexity:12.3f}" for part in parts)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6
        click.echo(f"{name:22}{exact}{perplexity}{size:8.2f}")
    click.echo(f"\nCheckpoint: {healed.folder}, its card: {out / 'healed' / 'README.md'}")
    asked = [one.question for one in questions if one.family == family][:ON_THE_PAGE]
    write_rows(out / "evaluation.jsonl", nano, questions)
    measured = {"whole_rows": True, "seq_len": (LENGTH,), "domain_column": "family", "dtype": "float32"}
    gj.evaluate(model, out / "evaluation.jsonl", keep_sets=sets, out=out / "eval", overwrite=True, **measured)
    click.echo(f"Page, for a browser: {page(out, model, sets, asked)}")


def page(out: Path, model: gj.Model, sets: dict[str, gj.KeepSets], asked: list[str]) -> Path:
    """The page of what `out` holds and of keep-sets, with replies of all experts and of those that elimination left."""
    files = [out / f"{name.replace(' ', '-')}.json" for name in sets]
    for file, kept in zip(files, sets.values(), strict=True):
        kept.write(file, overwrite=True)
    left = gj.open(NANO).masked(sets["greedy_cosine"])
    for name, replying in (("all-experts", model), ("half-of-them", left)):
        gj.generate(replying, asked, trace=out / name, overwrite=True, temperature=0.0)
    things = [out / "profile", *files, *(out / name for name in ("eval", "healed", "all-experts", "half-of-them"))]
    return Path(str(gj.report(*things, model=model, out=out / "page.html", overwrite=True)))


if __name__ == "__main__":
    main()
