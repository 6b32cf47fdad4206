"""nano's pruned models as drafts of nano: how many of their tokens it accepts, and how many it says a step.

    python -m experiments.speculative [--questions 8] [--temperature 0]

Held-out questions of all families, in float32. Experts to keep are chosen from a profile of the calibration questions,
by `reap_sum` over all families, or at random with several seeds. Greedy replies are compared with those that nano gives
alone, token by token. A pruned model takes as many experts a token as the whole one, so that on one device its step
costs no less: the last column says how cheap it would have to be.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import jax

import gptoss_jax as gj
from convert.sources import NANO, open_source
from gptoss_jax.devices import mesh
from gptoss_jax.generation import choose, resident
from gptoss_jax.generation.answer import read_stop_ids
from gptoss_jax.generation.continuous import prompts_of, replies
from gptoss_jax.generation.decoder import Prompt
from gptoss_jax.generation.steps import How, Network
from gptoss_jax.network.source import Masked, Source
from gptoss_jax.run.options import Placing, Sampling

from ..nano import QUESTIONS
from ..nano.families import FAMILIES, read
from ..nano.specialise import write_rows
from .decoding import Reply, Speculative

LENGTHS, KEEP = (1, 2, 4, 8), (12, 10, 8, 6)
DTYPE, MAX_NEW_TOKENS = "float32", 128


def held_out(source: Source, count: int) -> list[Prompt]:
    """So many questions of each family, as prompts."""
    model = gj.open(NANO)
    every = read(QUESTIONS / "evaluation.jsonl")
    asked = [one for family in FAMILIES for one in [e for e in every if e.family == family][:count]]
    ids = [model.token_ids(one.messages()[:1])[0] for one in asked]
    return prompts_of(ids, source.config, MAX_NEW_TOKENS)


def keep_sets(seeds: int) -> Iterator[tuple[str, int, list[gj.KeepSets]]]:
    """What drafts keep: by what, how many experts, and the keep-sets, at random one for each seed."""
    with tempfile.TemporaryDirectory() as name:
        rows = Path(name) / "rows.jsonl"
        write_rows(rows, Path(str(open_source(NANO).folder)), read(QUESTIONS / "calibration.jsonl"))
        profile = gj.profile(NANO, rows, dtype=DTYPE, batch_size=32, max_seq_length=512)
    for keep in KEEP:
        yield "reap_sum", keep, [gj.select(profile, keep, "reap_sum")]
        yield "random", keep, [gj.select(profile, keep, "random", seed=seed) for seed in range(seeds)]


def loaded(source: Source) -> Network:
    """All weights, on one device."""
    return resident.load(source, DTYPE, mesh.make(source.config, 1, 1, jax.devices()[:1]))


def row(name: str, keep: int, length: int, found: Sequence[Sequence[Reply]], alone: Sequence[list[int]] | None) -> str:
    """One line of the table, of the replies of one or several drafts."""
    every = [reply for some in found for reply in some]
    accepted, judged = (sum(getattr(reply, name) for reply in every) for name in ("accepted", "judged"))
    # The first token of a reply comes of the prompt.
    a_step = sum(len(reply.token_ids) - 1 for reply in every) / sum(reply.rounds for reply in every)
    same = "—"
    if alone is not None:
        equal = [r.token_ids == one for some in found for r, one in zip(some, alone, strict=True)]
        same = f"{sum(equal)} of {len(equal)}"
    cells = (name, keep, length, f"{accepted / judged:.1%}", f"{a_step:.2f}", same, f"{(a_step - 1) / length:.2f}")
    return f"| {' | '.join(map(str, cells))} |"


@click.command()
@click.option("--questions", type=click.IntRange(1), default=8, show_default=True, help="Of each family.")
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Keep-sets at random.")
def main(questions: int, temperature: float, seeds: int) -> None:
    """Print a line for each draft and draft length."""
    source, sampling = open_source(NANO), Sampling(temperature=temperature)
    folder = Path(str(source.folder))
    prompts, stops = held_out(source, questions), tuple(read_stop_ids(folder, gj.open(NANO).tokenizer))
    alone: Any = None
    if temperature == 0:
        how = How(source.config, sampling, stops)
        alone = replies(choose.decoder(source, Placing(engine="resident", dtype=DTYPE), prompts, how), prompts)
    target = loaded(source)
    speculative = [Speculative(target, target, source.config, length, sampling) for length in LENGTHS]
    click.echo(f"{len(prompts)} questions, temperature {temperature:g}, on {jax.devices()[0].platform}\n")
    click.echo("| draft keeps by | of 16 experts | drafted | accepted | tokens a step | replies equal | break-even |")
    click.echo("|---|---:|---:|---:|---:|---:|---:|")
    for name, keep, sets in keep_sets(seeds):
        drafts = [loaded(Masked(source, one.layers)) for one in sets]
        for length, one in zip(LENGTHS, speculative, strict=True):
            found = []
            for one.draft in drafts:  # of the same shapes: nothing is compiled anew
                found.append(one.replies(prompts, stops))
            click.echo(row(name, keep, length, found, alone))


if __name__ == "__main__":
    main()
