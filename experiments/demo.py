"""The main job on something small: a checkpoint with random weights, and rows from Python's own documentation.

    make demo

Profiles by domain, ranks, prunes to half the experts for each domain, reloads what was written, and
compares it with the full model whose dropped experts are masked. Random weights know nothing: what the
table shows is that every step fits the next, not that pruning keeps quality.
"""

import json
import os
import pydoc_data.topics
import random
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click
import numpy as np

from convert.from_hf import Checkpoint
from gptoss_jax import batching, harmony, model, select
from gptoss_jax.config import FULL, SLIDING, TINY, Config
from gptoss_jax.forward import forward_step
from gptoss_jax.outputs import new_folder
from gptoss_jax.rows import Row

from . import checkpoints, tokenizers
from .measure import program

CONFIG: Config = replace(
    TINY,
    hidden_size=128,
    expert_hidden_size=160,
    num_experts=16,
    top_k=4,
    layer_types=(SLIDING, FULL, SLIDING, FULL),
    sliding_window=32,
    vocab_size=2048,
)
ROWS = 40  # of each domain
KEEP = CONFIG.num_experts // 2


def conversation(question: str, thinking: str, answer: str) -> str:
    """One exchange in harmony form."""
    return (
        f"<|start|>user<|message|>{question}<|end|>"
        f"<|start|>assistant<|channel|>analysis<|message|>{thinking}<|end|>"
        f"<|start|>assistant<|channel|>final<|message|>{answer}<|return|>"
    )


def arithmetic(rng: random.Random) -> Iterator[str]:
    """Sums, worked."""
    while True:
        a, b, c = (rng.randrange(2, 1000) for _ in range(3))
        worked = f"{a} + {b} = {a + b}; {a + b} - {c} = {a + b - c}."
        yield conversation(f"What is {a} + {b} - {c}?", worked, str(a + b - c))


def characters(rng: random.Random) -> Iterator[str]:
    """Names of characters."""
    while True:
        character = chr(rng.choice([*range(0xA1, 0x180), *range(0x391, 0x3CA), *range(0x2190, 0x2200)]))
        name = unicodedata.name(character, "unassigned").lower()
        yield conversation(f"Which character is {character}?", f"U+{ord(character):04X}.", f"It is the {name}.")


def language(rng: random.Random) -> Iterator[str]:
    """Paragraphs of the Python reference."""
    topics = sorted(pydoc_data.topics.topics.items())
    while True:
        topic, text = rng.choice(topics)
        paragraphs = [" ".join(p.split()) for p in text.split("\n\n") if len(p) > 80] or [text]
        yield conversation(
            f"What does Python's reference say of {topic}?", f"See {topic}.", rng.choice(paragraphs)[:600]
        )


DOMAINS = {"arithmetic": arithmetic, "characters": characters, "language": language}


def write_rows(file: Path) -> list[Row]:
    """ROWS rows of each domain, as JSONL."""
    rows = [
        Row(text, id=f"{name}-{i}", domain=name)
        for name, source in DOMAINS.items()
        for i, text in zip(range(ROWS), source(random.Random(0)), strict=False)
    ]
    file.write_text("".join(json.dumps(vars(row)) + "\n" for row in rows), encoding="utf-8")
    return rows


def largest_difference(full: Path, pruned: Path, keep_sets: select.Ranking, rows: list[Row]) -> float:
    """Between the logits of the pruned checkpoint and those of the full one with its other experts masked."""
    source = Checkpoint(full)
    tokenizer = harmony.load_tokenizer(full)
    documents = harmony.encode(rows, tokenizer, sorted(DOMAINS), CONFIG.vocab_size, max_length=512)
    masked = model.mask_experts(model.load(source, "float32"), keep_sets)
    cut = model.load(Checkpoint(pruned), "float32")
    return max(
        float(np.abs(np.asarray(forward_step(masked, b).logits) - np.asarray(forward_step(cut, b).logits)).max())
        for b in batching.padded(documents, 8, 512)
    )


def table_row(folder: Path, domain: str, rows: list[Row]) -> str:
    """What pruning for one domain kept, and how far the cut is from the mask."""
    columns = select.read_columns(folder / "profile", domain)
    mapping = json.loads((folder / domain / "expert_mapping.json").read_text(encoding="utf-8"))
    keep_sets = [[int(old) for old in mapping[str(layer)]] for layer in range(CONFIG.num_layers)]
    mass = columns["gate_norm_sum"]
    kept = sum(mass[layer, experts].sum() for layer, experts in enumerate(keep_sets)) / mass.sum()
    tokens = int(columns["count"][0].sum()) // CONFIG.top_k
    size = sum(f.stat().st_size for f in (folder / domain).glob("*.safetensors")) / 1e6
    difference = largest_difference(
        folder / "model", folder / domain, keep_sets, [r for r in rows if r.domain == domain]
    )
    return f"{domain:12} {tokens:12,} {keep_sets[0]!s:30} {kept:14.1%} {size:8.2f} {difference:12.1e}"


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default="demo", show_default=True)
def main(out: Path) -> None:
    """Run the main job in a folder of its own, and replace what an earlier demo left there."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with new_folder(out / "model", overwrite=True) as folder:
        checkpoints.write_random(folder, CONFIG, seed=0)
        tokenizers.write_small(folder, CONFIG.vocab_size)
    rows = write_rows(out / "rows.jsonl")
    data = ("--data", out / "rows.jsonl", "--domain-column", "domain", "--max-seq-length", 512, "--batch-size", 16)
    program("profile", out / "model", *data, "--out", out / "profile", "--overwrite")
    for domain in DOMAINS:
        ranking = out / f"{domain}.json"
        program("rank", out / "profile", "--domain", domain, "--out", ranking, "--overwrite")
        program("prune", out / "model", "--ranking", ranking, "--keep", KEEP, "--out", out / domain, "--overwrite")
    size = sum(f.stat().st_size for f in (out / "model").glob("*.safetensors")) / 1e6
    click.echo(f"\nPruned from {CONFIG.num_experts} to {KEEP} experts a layer, {size:.2f} MB before:\n")
    click.echo("domain        kept tokens experts kept in layer 0        saliency kept       MB cut − masked")
    for domain in DOMAINS:
        click.echo(table_row(out, domain, rows))
    click.echo("\ncut − masked: largest difference of any logit, float32, between the pruned checkpoint and the full")
    click.echo("one with its other experts' router logits at −∞. The report and the cards:")
    for file in (out / "profile" / "report.md", *(out / domain / "README.md" for domain in DOMAINS)):
        click.echo(f"  {file}")


if __name__ == "__main__":
    main()
