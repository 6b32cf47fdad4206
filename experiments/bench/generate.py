"""Our generation beside transformers' `generate` on the same CPU, checkpoint and prompts.

    python -m experiments.bench.generate MODEL [--trace-alone] [--new 32]

Greedy, float32, both in one process, in turns; no stop ends a row. A rate is of all new tokens over the whole call,
prompts included, after a call that compiles and warms up. Ours is also timed at the end of long contexts, and with a
trace. Needs the test extra.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import click
import numpy as np

from convert.sources import open_source
from gptoss_jax.generation import choose
from gptoss_jax.generation.continuous import generate, prompts_of, replies
from gptoss_jax.generation.decoder import Prompt
from gptoss_jax.generation.recording import Recording
from gptoss_jax.generation.resident import STEPS_AT_ONCE, Resident
from gptoss_jax.generation.steps import How
from gptoss_jax.network.source import Source
from gptoss_jax.routing.tables import About
from gptoss_jax.routing.traces import Writer
from gptoss_jax.run.options import Placing, Sampling
from gptoss_jax.run.progress import Progress
from gptoss_jax.run.reading import tokenizer_of

PROMPT, NEW = 100, 128  # tokens
BATCHES = (1, 16)
CONTEXTS = (256, 1024, 4096)
GREEDY = Sampling(temperature=0.0)
RESIDENT = Placing(engine="resident", dtype="float32")


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def prompts(source: Source, batch_size: int, length: int, new: int) -> list[Prompt]:
    ids = np.random.default_rng(0).integers(0, source.config.vocab_size, (batch_size, length)).astype(np.int32)
    return prompts_of(list(ids), source.config, new)


def beside_transformers(source: Source, batch_size: int, rounds: int) -> str:
    """One line of the table; both must say the same."""
    import torch
    from transformers import AutoModelForCausalLM

    asked, how = prompts(source, batch_size, PROMPT, NEW), How(source.config, GREEDY, ())
    decoder = choose.decoder(source, RESIDENT, asked, how)
    theirs = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
    ids = torch.tensor(np.array([prompt.token_ids for prompt in asked])).long()
    fixed = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def run_ours() -> np.ndarray:
        return np.array(replies(decoder, asked))

    def run_theirs() -> np.ndarray:
        with torch.inference_mode():
            return theirs.generate(ids, attention_mask=torch.ones_like(ids), **fixed)[:, PROMPT:].numpy()

    equal = np.array_equal(run_ours(), run_theirs())
    pairs = [(seconds(run_ours), seconds(run_theirs)) for _ in range(rounds)]
    rates = [batch_size * NEW / median(side) for side in zip(*pairs, strict=True)]
    ratios = sorted(b / a for a, b in pairs)
    spread = f"{median(ratios):.2f} × ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    return f"| {batch_size} | {rates[0]:,.0f} | {rates[1]:,.0f} | {spread} | {'equal' if equal else 'DIFFERENT'} |"


def at_context(source: Source, batch_size: int, context: int, rounds: int) -> str:
    """One line: new tokens a second, by the last chunk of a call, whose rows are then `context` long."""
    asked = prompts(source, batch_size, context - 2 * STEPS_AT_ONCE, 2 * STEPS_AT_ONCE)
    decoder = choose.decoder(source, RESIDENT, asked, How(source.config, GREEDY, ()))

    def last_chunk() -> float:
        chunks = generate(decoder, asked)
        next(chunks)
        return seconds(lambda: next(chunks))

    last_chunk()
    each = median(last_chunk() for _ in range(rounds)) / STEPS_AT_ONCE
    return f"| {batch_size} | {context:,} | {batch_size / each:,.0f} | {each * 1e3:.2f} |"


def traced(source: Source, batch_size: int, rounds: int, new: int) -> str:
    """One line: what it costs to keep what each token chose, and to write the trace, in turns."""
    asked, how = prompts(source, batch_size, PROMPT, new), How(source.config, GREEDY, ())
    plain = choose.decoder(source, RESIDENT, asked, how)
    assert isinstance(plain, Resident)
    capacity = max(cache.keys.shape[2] for cache in plain.state.caches)
    routing = Resident(plain.network, how._replace(routing=True), plain.mesh, batch_size, capacity)
    about, tokenizer = About.of(source), tokenizer_of(source)

    def with_trace() -> None:
        with tempfile.TemporaryDirectory() as name:
            kept = Progress(Path(name) / "trace")
            kept.begin({}, resume=False)
            recording = Recording(asked, kept, about, tokenizer)
            for grown in generate(routing, asked):
                recording.take(grown)
            recording.save()
            writer = Writer(Path(name), about)
            for reply in recording.replies():
                writer.add(reply)
            writer.finish({})

    with_trace()
    replies(plain, asked)
    pairs = [(seconds(lambda: replies(plain, asked)), seconds(with_trace)) for _ in range(rounds)]
    ratios = sorted(b / a for a, b in pairs)
    return f"| {batch_size} | {median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}) |"


@click.command()
@click.argument("model")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Pairs of runs.")
@click.option("--trace-alone", is_flag=True, help="Prints the last table only.")
@click.option("--new", type=click.IntRange(1), default=NEW, show_default=True, help="Tokens of the last table.")
def main(model: str, rounds: int, trace_alone: bool, new: int) -> None:
    """Print the tables."""
    source = open_source(model)
    if not trace_alone:
        _without_trace(source, rounds)
    click.echo("\n| rows | seconds with a trace, over those without |\n|---:|---|")
    for size in BATCHES:
        click.echo(traced(source, size, rounds, new))


def _without_trace(source: Source, rounds: int) -> None:
    beside = [beside_transformers(source, size, rounds) for size in BATCHES]
    long = [at_context(source, size, context, rounds) for size in BATCHES for context in CONTEXTS]
    click.echo(
        "| rows | ours, tokens/s | transformers, tokens/s | ours over theirs | tokens |\n|---:|---:|---:|---:|---|"
    )
    click.echo("\n".join(beside))
    click.echo("\n| rows | context | tokens/s | ms a step |\n|---:|---:|---:|---:|")
    click.echo("\n".join(long))


if __name__ == "__main__":
    main()
