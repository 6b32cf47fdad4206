"""The main job on the model that ships with the project: what pruning for one family of tasks keeps, and what it loses.

    make demo

Profiles nano by family on calibration rows, ranks its experts, and prunes to half of them: for one family, for another,
and three times at random. Each of these and the full model then answer held-out questions of every family, and are
asked how much the right answers surprise them.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import optax

from convert.from_hf import NANO, Checkpoint, locate
from gptoss_jax import batching, harmony, model
from gptoss_jax.forward import forward_step
from gptoss_jax.rows import Row

from .measure import program
from .nano import evaluate, specialise
from .nano.corpus import prompt_and_reply
from .nano.families import Instance, read

FAMILY, OTHER = "arithmetic", "kinship"
RANDOM_SEEDS = (0, 1, 2)
NANO_ROWS = Path(__file__).parent / "nano"  # calibration.jsonl and evaluation.jsonl
ROWS, LENGTH = 32, 256  # of a batch


class Quality(NamedTuple):
    """What a model makes of some questions."""

    right: int
    asked: int
    nats: float
    """Of the kept tokens, each from those before it."""
    tokens: int

    @classmethod
    def sum(cls, some: Iterable["Quality"]) -> "Quality":
        return cls(*map(sum, zip(*some, strict=True)))

    def __str__(self) -> str:
        exact = f"{self.right / self.asked:.0%} ({self.right} of {self.asked})"
        return f"{exact:>17} {np.exp(self.nats / self.tokens):>10.3f}"


def surprise(folder: Path, examples: Sequence[Instance]) -> tuple[float, int]:
    """Nats of the assistant's words, and how many tokens they are."""
    source = Checkpoint(folder)
    network, tokenizer = model.load(source, "float32"), harmony.load_tokenizer(folder)
    rows = [Row("".join(prompt_and_reply(example, tokenizer))) for example in examples]
    documents = harmony.encode(rows, tokenizer, [""], source.config.vocab_size, LENGTH)
    nats, tokens = 0.0, 0
    for batch in batching.padded(documents, ROWS, LENGTH):
        logits = forward_step(network, batch).logits[:, :-1]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.token_ids[:, 1:])
        kept = batch.weights[:, 1:] > 0
        nats, tokens = nats + float(np.asarray(losses)[kept].sum()), tokens + int(kept.sum())
    return nats, tokens


def quality(folder: Path, questions: Sequence[Instance]) -> dict[str, Quality]:
    """By family."""
    right = evaluate.accuracy(folder, questions)
    return {f: Quality(*right[f], *surprise(folder, [q for q in questions if q.family == f])) for f in right}


def prune(out: Path, nano: Path, name: str, keep: int, *ranked: object) -> Path:
    """Rank and prune; returns the checkpoint's folder."""
    ranking = out / f"{name}.json"
    program("rank", out / "profile", *ranked, "--out", ranking, "--overwrite")
    program("prune", nano, "--ranking", ranking, "--keep", keep, "--domain", name, "--out", out / name, "--overwrite")
    return out / name


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default="demo", show_default=True)
def main(out: Path) -> None:
    """Run the main job in a folder of its own, and replace what an earlier demo left there."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    out.mkdir(parents=True, exist_ok=True)
    nano = Path(str(locate(NANO)))
    config = Checkpoint(nano).config
    keep = config.num_experts // 2
    specialise.write_rows(out / "rows.jsonl", nano, read(NANO_ROWS / "calibration.jsonl"))
    data = ("--data", out / "rows.jsonl", "--domain-column", "family", "--max-seq-length", LENGTH)
    program("profile", nano, *data, "--batch-size", ROWS, "--dtype", "float32", "--out", out / "profile", "--overwrite")
    models = {f"all {config.num_experts} experts": nano}
    for name in (FAMILY, OTHER):
        models[f"{keep} for {name}"] = prune(out, nano, name, keep, "--domain", name)
    for seed in RANDOM_SEEDS:
        chosen = prune(out, nano, f"random-{seed}", keep, "--criterion", "random", "--seed", seed)
        models[f"{keep} at random, {seed}"] = chosen

    questions = read(NANO_ROWS / "evaluation.jsonl")
    click.echo(
        "\nOn questions that served neither training nor calibration: exact match, and perplexity of right replies\n"
    )
    click.echo(f"{'':20}{FAMILY:>28}{'the other families':>28}")
    for name, folder in models.items():
        found = quality(folder, questions)
        others = Quality.sum(q for family, q in found.items() if family != FAMILY)
        click.echo(f"{name:20}{found[FAMILY]}{others}")
    click.echo("\nWhere it lies:")
    for file in ("profile/report.md", f"{FAMILY}.json", FAMILY, f"{FAMILY}/README.md"):
        click.echo(f"  {out / file}")


if __name__ == "__main__":
    main()
