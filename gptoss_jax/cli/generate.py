"""The command `generate`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import DataError, UserError, reason
from ..run.options import Answering, Placing, Sampling, taken
from . import terminal
from .options import option_of, options_of

if TYPE_CHECKING:
    from ..generation import Answer, Reply


@click.command()
@click.argument("model")
@click.option("--prompt", "prompts", multiple=True, help="What the user says; given several times, a batch.")
@click.option("--messages", type=click.Path(path_type=Path), help="A JSON list of messages, or JSONL of such lists.")
@options_of(Answering, Sampling)
@option_of(Placing, "dtype")
def generate(model: str, prompts: tuple[str, ...], messages: Path | None, dtype: str, **options: Any) -> None:
    """Answer with MODEL, channel by channel.

    MODEL is a folder in Hugging Face form, an Orbax checkpoint, a hub id, or nano, the small model that ships with the
    project. One reply appears as it is generated; those of several prompts, which run as one batch, when all have
    ended.
    """
    answering, sampling = taken(Answering, options), taken(Sampling, options)
    from ..interface import jobs

    if bool(prompts) == bool(messages):
        raise UserError("generate takes either --prompt or --messages")
    conversations = _read(messages) if messages else list(prompts)
    answer = jobs.answer(model, conversations, answering, sampling, dtype)
    _show(answer)
    replies = [answer.reply(number) for number in range(len(conversations))]
    unfinished = sum(not reply.ended for reply in replies)
    if unfinished:
        terminal.complain(f"{unfinished} of {len(replies)} replies did not end: see --max-new-tokens")


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


def _show(answer: "Answer") -> None:
    """Print replies: a single one while it grows, several when all have ended."""
    count, shown = len(answer.prompts), ""
    for _ in answer.grow():
        if count == 1:
            text = _by_channel(answer.reply(0), whole=False)
            terminal.show(text[len(shown) :], nl=False)
            shown = text
    for number in range(count):
        if count > 1:
            terminal.show(f"--- {number + 1}")
        terminal.show(_by_channel(answer.reply(number), whole=True)[len(shown) :])


def _by_channel(reply: "Reply", whole: bool) -> str:
    """Messages with the names of their channels above. What is shown of an unfinished reply only grows."""
    if not reply.parts:
        return terminal.cleaned(reply.text, None) if whole else ""  # a model that does not speak harmony
    lines = "\n\n".join(f"[{channel or 'assistant'}]\n{content}" for channel, content in reply.parts)
    # The bytes of a character may come in two tokens: it is not shown by halves.
    return terminal.cleaned(lines if whole else lines.rstrip("\ufffd"), None)
