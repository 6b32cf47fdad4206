"""Other ways to choose together and to heal, beside the one that the product has: each measured, kept or dropped.

    python -m experiments.better.variants WORK --keep 8
    python -m experiments.better.variants WORK --model nano-1/model --seed 1

WORK is that of `experiments.better`, whose profiles, eliminations and rows are used. Questions to answer are evaluation
questions by which variants may be told apart: none of them is among those of the report. Stopped at any time, the same
command goes on.
"""

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np

import gptoss_jax as gj
from convert.sources import locate
from gptoss_jax.data import batching, tokens
from gptoss_jax.data.groups import Groups
from gptoss_jax.data.rows import Row
from gptoss_jax.data.tokens import load_tokenizer
from gptoss_jax.evaluation.markdown import table
from gptoss_jax.healing import job
from gptoss_jax.network.source import load
from gptoss_jax.run import steps
from gptoss_jax.run.choose import resident_mesh
from gptoss_jax.run.distilling import distilled
from gptoss_jax.run.options import Placing
from gptoss_jax.run.progress import Progress
from gptoss_jax.run.resident import Resident
from gptoss_jax.search.elimination import ASKED
from gptoss_jax.selection.greedy import Grams, eliminate

from ..nano import evaluate
from ..nano.corpus import prompt_and_reply
from ..nano.families import FAMILIES, Instance, pick
from .candidates import KD, Choices
from .material import Questions, may_be_looked_at
from .measure import DTYPE, Judge, Values, save

FEWER = 50  # rows
FAR = 1e9  # what is taken from the logit of an expert that is out of reach
LAYERS_EXCHANGED = 2
Layers = list[list[int]]

SLOW, BOTH, SMALL = {"rate": 3e-3}, {"reconstruct": ("routers", "biases")}, {"train": "small"}
# Of the sets of `greedy`, and of those of `greedy_cosine`.
HEALINGS: dict[str, dict[str, Any]] = {
    "KD": {},
    "KD, rate 1e-3": {"rate": 1e-3},
    "KD, rate 3e-3": SLOW,
    "KD, rate 3e-3, 180 steps": SLOW | {"steps": 180},
    "KD, rate 3e-3, small parameters too": SLOW | SMALL,
    "KD, rate 3e-3, the 64 most probable tokens teach": SLOW | {"teacher": "top"},
    "KD, rate 3e-3, of 50 rows": SLOW | {"num_rows": FEWER},
    "routers by layer, biases, then KD, rate 3e-3": SLOW | BOTH,
    "routers by layer, biases, no KD": BOTH | {"steps": 0},
}
OF_COSINE: dict[str, dict[str, Any]] = {
    "KD of greedy_cosine": {},
    "KD of greedy_cosine, rate 3e-2": {"rate": 3e-2},
    "KD of greedy_cosine, 180 steps": {"steps": 180},
    "KD of greedy_cosine, all tokens": {"tokens": "all"},
    "KD of greedy_cosine, small parameters too": SMALL,
    "KD of greedy_cosine, small parameters too, rate 1e-2": SMALL | {"rate": 1e-2},
    "greedy_cosine, routers by layer, biases, then KD": BOTH,
    "greedy_cosine, routers by layer, biases, then KD, small parameters too": BOTH | SMALL,
}


class Ways:
    """Of one family: what each variant chooses or heals."""

    def __init__(self, model: Path, family: str, keep: int, work: Path, seed: int = 0):
        asked = Questions(family, work / "rows" / f"{family}.jsonl", may_be_looked_at(family, seed))
        self.model, self.seed, self.asked, self.keep, self.work = model, seed, asked, keep, work / "variants" / family
        self.work.mkdir(parents=True, exist_ok=True)
        self.choices = Choices(model, asked, work)
        self.source = gj.open(str(model)).source
        self.mesh = resident_mesh(self.source, Placing())

    def all(self) -> dict[str, Callable[[], tuple[Layers, Values]]]:
        """By their names, what makes each."""
        chosen: dict[str, Callable[[], Layers]] = {
            "greedy": lambda: self.choices.eliminated("greedy").keep(self.keep).layers,
            "greedy_cosine": lambda: self.choices.eliminated("greedy_cosine").keep(self.keep).layers,
            "greedy, the 8 best experts of a token": lambda: self._greedy(reach=8),
            "greedy, the 6 best experts of a token": lambda: self._greedy(reach=6),
            "greedy of 50 rows": lambda: self._greedy(rows=self._rows()[:FEWER]),
            "greedy, the model's own replies": lambda: self._greedy(rows=self._own()),
            "greedy, replies alone": lambda: self._greedy(counted="reply"),
            "greedy, then exchanges": self._exchanged,
        }
        healed = {
            name: partial(self._healed, name, rule, how)
            for rule, healings in (("greedy", HEALINGS), ("greedy_cosine", OF_COSINE))
            for name, how in healings.items()
        }
        return {name: lambda make=make: (make(), {}) for name, make in chosen.items()} | healed

    def _rows(self) -> list[Row]:
        lines = self.asked.calibration.read_text(encoding="utf-8").splitlines()
        return [Row(said["text"], said["id"]) for said in map(json.loads, lines)]

    def _own(self) -> list[Row]:
        """The prompts with what the model itself replies."""
        tokenizer = load_tokenizer(self.model)
        examples: Sequence[Instance] = pick("calibration", [self.asked.family], len(self._rows()), self.seed)
        said = evaluate.replies(self.source, self.model, examples)
        return [Row(prompt_and_reply(e, tokenizer)[0] + reply) for e, reply in zip(examples, said, strict=True)]

    def _greedy(self, rows: list[Row] | None = None, reach: int | None = None, counted: str = "all") -> Layers:
        config, number = self.source.config, self.source.config.num_experts - self.keep
        layers = []
        for grams in self._grams(self._rows() if rows is None else rows, counted):
            if reach is not None:
                best_Tr = np.sort(grams.logits_TE, axis=1)[:, -reach, None]
                logits_TE = np.where(grams.logits_TE < best_Tr, grams.logits_TE - FAR, grams.logits_TE)
                grams = grams._replace(logits_TE=logits_TE.astype(np.float32))
            gone = eliminate(grams, config.top_k, self.keep).gone
            assert len(gone) == number
            layers.append(sorted({*range(config.num_experts)} - {*gone}))
        return layers

    def _grams(self, rows: list[Row], counted: str) -> list[Grams]:
        """Of each layer, of all tokens that count."""
        model = load(self.source, DTYPE, self.mesh)
        groups, config = Groups([""]), self.source.config
        encoded = tokens.encode(rows, load_tokenizer(self.model), groups, config.vocab_size, 256, keep=counted)  # type: ignore[arg-type]
        batches = list(batching.padded(encoded, 32, 256))
        engine = Resident(model, partial(steps.mapped, mesh=self.mesh))
        found: list[list[Grams]] = [[] for _ in range(config.num_layers)]
        for batch, unit in zip(batches, engine.run(batches, ASKED, 0), strict=True):
            assert unit.grams is not None
            for layer in range(config.num_layers):
                found[layer].append(Grams(*(x[layer][batch.weights > 0] for x in unit.grams)))
        return [Grams(*map(np.concatenate, zip(*of, strict=True))) for of in found]

    def _exchanged(self) -> Layers:
        """Of the layers that cost most, the exchange of one expert for another that lowers the KL most, end to end, on
        the rows that chose."""
        ranking = self.choices.eliminated("greedy")
        layers = ranking.keep(self.keep).layers
        assert ranking.losses is not None
        cost = [of[self.keep] for of in ranking.losses]
        judge = Judge(self.model, pick("calibration", [self.asked.family], FEWER, self.seed))

        def divergence(layers: Layers) -> float:
            found = judge._divergence(layers, {})
            return float(found[:, 0].sum() / found[:, 1].sum())

        least = divergence(layers)
        for layer in sorted(range(len(layers)), key=lambda one: -(cost[one] or 0))[:LAYERS_EXCHANGED]:
            kept, best = layers[layer], layers
            for gone in kept:
                for coming in sorted({*range(self.source.config.num_experts)} - {*kept}):
                    of_layer = sorted({*kept} - {gone} | {coming})
                    tried = [*layers[:layer], of_layer, *layers[layer + 1 :]]
                    if (kl := divergence(tried)) < least:
                        least, best = kl, tried
            layers = best
        return layers

    def _healed(self, name: str, rule: str, how: dict[str, Any]) -> tuple[Layers, Values]:
        layers = self.choices.eliminated(rule).keep(self.keep).layers
        chosen = distilled(data=str(self.asked.calibration), **KD | how)
        kept = Progress(self.work / f"{name}.npz")
        found = job.run(job.Request(self.asked.family, gj.KeepSets(layers), *chosen), self.source, kept, kept.exists())
        kept.remove()
        return layers, found.values


@click.command()
@click.argument("work", type=click.Path(path_type=Path, exists=True))
@click.option("--model", default="nano", show_default=True)
@click.option("--seed", default=0, show_default=True, help="That of the model, from which its questions follow.")
@click.option("--family", type=click.Choice([*FAMILIES]), multiple=True, default=(*FAMILIES,), show_default="all")
@click.option("--keep", type=int, default=8, show_default=True)
@click.option("--variant", multiple=True, help="[default: all]")
def main(work: Path, model: str, seed: int, family: tuple[str, ...], keep: int, variant: tuple[str, ...]) -> None:
    """Measure what is not measured yet, and print the table."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    jax.config.update("jax_compilation_cache_dir", str((work / "compiled").absolute()))
    folder, found = Path(str(locate(model))), dict[str, dict[str, np.ndarray]]()
    for name in family:
        ways = Ways(folder, name, keep, work, seed)
        judge = Judge(folder, ways.asked.evaluation)
        for way, make in ways.all().items():
            if variant and way not in variant:
                continue
            file = ways.work / f"{way}, {keep}.npy"
            if not file.exists():
                save(file, judge.of(*make()))
            answered = np.load(file)
            found.setdefault(way, {})[name] = answered
            right, kl, of = answered.sum(0)
            click.echo(f"{name}: {way}: {right / len(answered):.1%} right, KL {kl / of:.4f}", err=True)
    click.echo(_table(found, family))


def _table(found: dict[str, dict[str, np.ndarray]], family: Sequence[str]) -> str:
    """Exact match in per cent and KL of each variant, by family and in the mean."""
    rows = []
    for way, of in found.items():
        each = [(100 * x[:, 0].mean(), x[:, 1].sum() / x[:, 2].sum()) for x in (of[name] for name in family)]
        means = np.mean(each, axis=0)
        rows.append([way, *(f"{right:.1f}; {kl:.4f}" for right, kl in [*each, means])])
    return "\n".join(table(["", *family, "mean"], rows))


if __name__ == "__main__":
    main()
