"""How people spell a conversation in the columns of a record, each declared once in the table at the end."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DataError
from .conversation import Conversation, Message
from .harmony import MESSAGE, START, HarmonyText
from .messages import Say, as_json, kind_of, read_messages, read_tools
from .template import SETTINGS, Template

Record = Mapping[str, Any]
BESIDE = ("tools", "functions", "system", "chat_template_kwargs")  # columns that belong to the conversation of another


@dataclass(frozen=True)
class Spelling:
    """One way of spelling a conversation."""

    columns: tuple[str, ...]
    """Those that it needs."""
    read: Callable[[Record, Say], Conversation | str]
    """Gives the conversation, or harmony text as it stands."""

    @property
    def name(self) -> str:
        """What users call it."""
        return " and ".join(self.columns)


def conversation_of(record: Record, column: str | None, apart: Sequence[str | None], say: Say) -> Conversation | str:
    """The conversation of a record, or its harmony text.

    Args:
        record: its columns.
        column: the one to read; by default those of the spelling that the record has, or the one that it has at all.
        apart: columns that hold something else, as the id.
        say: takes what was taken for what, and what was not read.

    DataError where none or several can be meant, or where the conversation cannot be taken whole.
    """
    if column is not None:
        if column not in record:
            raise DataError(f"no column {column!r}: there are {', '.join(sorted(record))}")
        return of_value(record[column], f"column {column!r}", record, say)
    present = {name for name, value in record.items() if value is not None}
    fitting = [spelling for spelling in SPELLINGS if present.issuperset(spelling.columns)]
    if len(fitting) > 1:
        found = ", ".join(spelling.name for spelling in fitting)
        raise DataError(f"it can be read by several columns ({found}): name one with --text-column")
    if fitting:
        if fitting[0].columns != ("text",):
            say(f"column{'s' * (len(fitting[0].columns) > 1)} {fitting[0].name} read as a conversation")
        return fitting[0].read(record, say)
    single = [name for name in sorted(present - {*apart, *BESIDE}) if isinstance(record[name], str | list | Mapping)]
    if len(single) != 1:
        raise DataError(
            f"no column is known to hold its text: there are {', '.join(sorted(record)) or 'none'}; name one with "
            f"--text-column, or give {', or '.join(spelling.name for spelling in SPELLINGS)}"
        )
    say(f"column {single[0]!r} taken for the text")
    return of_value(record[single[0]], f"column {single[0]!r}", record, say)


def of_value(value: Any, what: str, record: Record, say: Say) -> Conversation | str:
    """The conversation that one value holds: messages, an object with them, JSON text of either, or text.

    `what` names the value; the record's columns beside it belong to it.
    """
    if isinstance(value, str):
        read = as_json(value)
        if not (_is_messages(read) or (isinstance(read, dict) and _is_messages(_inner(read)))):
            return value
        say("JSON text taken for messages")
        return of_value(read, what, record, say)
    if isinstance(value, Mapping) and isinstance(_inner(value), list):
        return of_value(_inner(value), what, {**record, **value}, say)
    if not isinstance(value, list):
        raise DataError(f"{what} holds {kind_of(value)}, expected text or a list of messages")
    return _with_beside(read_messages(value, say), record, say)


def harmony_of(
    messages: Sequence[Any], template: Template, say: Say, effort: str = "medium", generate: bool = False
) -> HarmonyText:
    """Harmony text of a list of messages, as a profile's rows have it: without the reasoning of earlier turns."""
    read = of_value(list(messages), "the list of messages", {}, say)
    if isinstance(read, str):
        return HarmonyText(read)
    return template.write(as_seen(read, generate, say), effort, generate)


def as_seen(conversation: Conversation, generate: bool, say: Say) -> Conversation:
    """The conversation as the model sees it, without the reasoning of earlier turns; what goes is said."""
    seen = conversation.without_earlier_analysis(generate)
    if len(seen.messages) < len(conversation.messages):
        say("reasoning of earlier turns left out, as chat templates do")
    return seen


def _inner(value: Record) -> Any:
    return value.get("messages", value.get("conversations"))


def _is_messages(value: Any) -> bool:
    return (
        isinstance(value, list) and bool(value) and all(isinstance(x, dict) and {*x} & {"role", "from"} for x in value)
    )


def _with_beside(messages: Sequence[Message], record: Record, say: Say) -> Conversation:
    """The conversation with what the record's other columns say of it."""
    system, settings = record.get("system"), record.get("chat_template_kwargs") or {}
    if system is not None and not isinstance(system, str):
        raise DataError(f"column 'system' holds {type(system).__name__}, expected text")
    if system and not messages[0].instructs:
        messages = [Message("system", system), *messages]
    elif system and messages[0].content != system:
        raise DataError("column 'system' and the first message give different instructions: keep one of them")
    tools = read_tools(record.get("tools") or record.get("functions") or [])
    if not isinstance(settings, Mapping) or (unknown := sorted({*settings} - {*SETTINGS})):
        named = unknown[0] if isinstance(settings, Mapping) else settings
        raise DataError(f"chat_template_kwargs has {named!r}: the template is told {', '.join(SETTINGS)}")
    if sum(message.instructs for message in messages) > 1:
        say("instructions after the first written as messages of their own")
    return Conversation(tuple(messages), tools, {k: x for k, x in settings.items() if x is not None})


def _prompt_and_completion(record: Record, say: Say) -> Conversation | str:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str) and isinstance(completion, str) and START in prompt and MESSAGE in prompt:
        return prompt + completion
    return _turns([("user", "prompt", prompt), ("assistant", "completion", completion)], record, say)


def _alpaca(record: Record, say: Say) -> Conversation | str:
    instruction, more = record["instruction"], record.get("input")
    if not isinstance(instruction, str) or not isinstance(more, str | None):
        raise DataError("columns 'instruction' and 'input' hold no text")
    asked = f"{instruction}\n{more}" if more else instruction
    turns: list[tuple[str, str, Any]] = []
    for pair in record.get("history") or ():
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise DataError("column 'history' holds no pairs of what user and assistant said")
        turns += [("user", "history", pair[0]), ("assistant", "history", pair[1])]
    turns += [("user", "instruction", asked), ("assistant", "output", record["output"])]
    return _turns(turns, record, say)


def _turns(turns: Sequence[tuple[str, str, Any]], record: Record, say: Say) -> Conversation:
    """Role, column and value of each turn, as a conversation; a value may be messages itself."""
    messages: list[Any] = []
    for role, column, value in turns:
        if not isinstance(value, str | list):
            raise DataError(f"column {column!r} holds {type(value).__name__}, expected text or a list of messages")
        messages += value if isinstance(value, list) else [{"role": role, "content": value}]
    return _with_beside(read_messages(messages, say), record, say)


def _column(name: str) -> Spelling:
    return Spelling((name,), lambda record, say: of_value(record[name], f"column {name!r}", record, say))


SPELLINGS = (
    *map(_column, ("text", "messages", "conversations", "conversation")),
    Spelling(("prompt", "completion"), _prompt_and_completion),
    Spelling(("instruction", "output"), _alpaca),
)
