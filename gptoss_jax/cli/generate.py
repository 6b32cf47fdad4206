"""The command `generate`."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import DataError, UserError, reason

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy as np


def _finite(_: Any, __: Any, value: float) -> float:
    if not math.isfinite(value):
        raise click.BadParameter(f"{value} is no number")
    return value


@click.command()
@click.argument("model")
@click.option("--prompt", "prompts", multiple=True, help="What the user says; given several times, a batch.")
@click.option("--messages", type=click.Path(path_type=Path), help="JSON list of messages, or JSONL of such lists.")
@click.option(
    "--reasoning-effort", type=click.Choice(["low", "medium", "high"]), default="medium", help="For the chat template."
)
@click.option("--max-new-tokens", type=click.IntRange(1), default=512, help="Tokens that a reply has at most.")
@click.option(
    "--temperature", type=click.FloatRange(0), callback=_finite, default=1.0, help="0 takes the most probable token."
)
@click.option("--top-k", type=click.IntRange(0), default=0, help="Choose among so many tokens; 0 among all.")
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    callback=_finite,
    default=1.0,
    help="Choose among the most probable tokens that together have this probability.",
)
@click.option("--seed", type=click.IntRange(0, (1 << 32) - 1), default=0, help="Seed of the choice.")
@click.option(
    "--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", help="Of weights and products."
)
def generate(
    model: str,
    prompts: tuple[str, ...],
    messages: Path | None,
    reasoning_effort: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    dtype: str,
) -> None:
    """Answer with MODEL, channel by channel.

    MODEL is a folder in Hugging Face form, an Orbax checkpoint, a hub id, or nano, the small model that ships with the
    project. One reply appears as it is generated; those of several prompts, which run as one batch, when all have
    ended.
    """
    from convert.sources import open_source

    from .. import generate as job
    from ..data import harmony
    from ..files.paths import local_folder

    if bool(prompts) == bool(messages):
        raise UserError("generate takes either --prompt or --messages")
    conversations = _read(messages) if messages else [[{"role": "user", "content": prompt}] for prompt in prompts]
    source = open_source(model)
    with local_folder(source.folder) as folder:
        tokenizer = harmony.load_tokenizer(folder)
        stop_ids = job.read_stop_ids(folder, tokenizer)
    texts = [harmony.render(c, tokenizer, reasoning_effort, generate=True) for c in conversations]
    ids = [harmony.token_ids(text, tokenizer, source.config.vocab_size) for text in texts]
    job.check_room(ids, source.config)
    sampling = job.Sampling(temperature, top_k, top_p, seed)
    network = job.load(source, dtype)
    replies = _show(job.generate(network, source.config, ids, max_new_tokens, sampling, stop_ids), len(ids), tokenizer)
    unfinished = sum(reply[-1] not in stop_ids for reply in replies)
    if unfinished:
        click.echo(f"{unfinished} of {len(replies)} replies did not end: see --max-new-tokens", err=True)


def _read(file: Path) -> list[list[Any]]:
    """The conversations of a file."""
    try:
        text = file.read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if line.strip()] if file.suffix == ".jsonl" else [text]
        conversations: list[Any] = [json.loads(line) for line in lines]
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: no list of messages can be read: {reason(error)}") from None
    conversations = [c.get("messages") if isinstance(c, dict) else c for c in conversations]
    if not conversations or not all(isinstance(c, list) and c for c in conversations):
        raise DataError(f"{file}: expected a list of messages, each an object with role and content")
    return conversations


def _show(chunks: "Iterable[np.ndarray]", count: int, tokenizer: Any) -> "Sequence[list[int]]":
    """Print replies as their tokens come, and return these."""
    replies: list[list[int]] = [[] for _ in range(count)]
    shown = ""
    for tokens_BN in chunks:
        for reply, tokens in zip(replies, tokens_BN, strict=True):
            reply += [int(token) for token in tokens if token >= 0]
        if count == 1:
            text = _by_channel(tokenizer.decode(replies[0]), whole=False)
            click.echo(text[len(shown) :], nl=False)
            shown = text
    for number, reply in enumerate(replies, 1):
        if count > 1:
            click.echo(f"--- {number}")
        click.echo(_by_channel(tokenizer.decode(reply), whole=True)[len(shown) :])
    return replies


def _by_channel(text: str, whole: bool) -> str:
    """Messages with the names of their channels above. What is shown of an unfinished reply only grows."""
    from ..data import harmony

    parts = harmony.reply_parts(text)
    if not parts:
        return text if whole else ""  # a model that does not speak harmony
    lines = "\n\n".join(f"[{channel or 'assistant'}]\n{content}" for channel, content in parts)
    # The bytes of a character may come in two tokens: it is not shown by halves.
    return lines if whole else lines.rstrip("\ufffd")
