"""The command `generate`."""

import json
from collections import deque
from typing import TYPE_CHECKING, Any

import click

from ..errors import DataError, UserError, reason, refusal
from ..files.paths import AnyPath, storage_errors
from ..run.options import SIDE_BY_SIDE, Answering, Placing, Sampling, by_flag, taken
from . import terminal
from .options import MODEL, PATH, options_of, soft_prune, some_of

if TYPE_CHECKING:
    from ..generation.answer import Answer, Reply


@click.command()
@click.argument("model", type=MODEL)
@click.option("--prompt", "prompts", multiple=True, help="What the user says; given several times, a batch.")
@click.option("--messages", type=PATH, help="A JSON list of messages, or JSONL of such lists.")
@options_of(Answering, Sampling)
@some_of(Placing, *SIDE_BY_SIDE)
@soft_prune
@click.option("--trace", type=PATH, help="A folder for which experts each token chose, with their gates.")
@click.option("--overwrite", is_flag=True, help="Replaces an existing folder of --trace, at the end.")
@click.option("--resume", is_flag=True, help="Goes on with the unfinished run beside --trace, if there is one.")
def generate(
    model: str,
    prompts: tuple[str, ...],
    messages: Any,
    keep_sets: Any,
    trace: Any,
    overwrite: bool,
    resume: bool,
    **options: Any,
) -> None:
    """Answer with MODEL, channel by channel.

    MODEL is a folder in Hugging Face form, an Orbax checkpoint, a hub id, or nano, the small model that ships with the
    project. One reply appears as it is generated; those of several prompts, many of which run side by side, when all
    have ended. All devices of all processes are used; docs/pods.md says how many processes run as one.
    """
    answering, sampling, placing = taken(Answering, options), taken(Sampling, options), taken(Placing, options)
    if bool(prompts) == bool(messages):
        raise UserError("generate takes either --prompt or --messages")
    from ..devices import hosts
    from ..files.atomic import check_apart
    from ..interface import jobs
    from ..interface.model import open_masked
    from ..run.job import join

    own = {"MODEL": model, "--prompt": prompts, "--messages": str(messages), "--keep-sets": str(keep_sets)}
    join(placing, own | by_flag(answering, sampling, placing))
    conversations = _read(messages) if messages else list(prompts)
    answer = jobs.answer(open_masked(model, keep_sets), conversations, answering, sampling, placing)
    if trace is not None:
        check_apart(trace, *(given for given in (messages, keep_sets) if given is not None))
    with jobs.tracing(answer, trace, overwrite, resume):
        if hosts.is_first():
            for remark in answer.remarks:
                terminal.complain(remark)
            _show(answer)
        else:
            deque(answer.grow(), maxlen=0)  # process 0 speaks
    if hosts.is_first():
        replies = [answer.reply(number) for number in range(len(conversations))]
        if unfinished := sum(not reply.ended for reply in replies):
            terminal.complain(f"{unfinished} of {len(replies)} replies did not end: see --max-new-tokens")


def _read(file: AnyPath) -> list[Any]:
    """The conversations of a file: one, or in JSONL one a line; each messages, or an object that holds them."""
    try:
        with storage_errors(file):
            text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{file}: {refusal(error)}: name a file with messages") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    # No other character ends a line of JSON: some stand within texts.
    lines = text.split("\n") if file.suffix == ".jsonl" else [text]
    conversations = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            conversations.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}, line {number}: not valid JSON ({reason(error)}): mend or remove it") from None
        if not isinstance(conversations[-1], list | dict):
            raise DataError(f"{file}, line {number}: expected messages, or an object that holds them")
    if not conversations:
        raise DataError(f"{file}: holds no conversation")
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
