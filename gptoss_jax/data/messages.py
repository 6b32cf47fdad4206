"""Messages as people write them → `conversation.Message`: OpenAI's form and ShareGPT's, as JSON gives them.

Nothing is passed over: what cannot be written in harmony is refused by name, and what is not needed is said.
"""

import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import DataError, shown
from .conversation import FUNCTIONS, Message, Role
from .harmony import CHANNEL, MARKS, RECIPIENT, START, HarmonyText, Part, messages_of, pieces

Say = Callable[[str], None]
"""Takes what a user should know of a conversation that was not taken as it stands."""

CHANNELS = ("analysis", "commentary", "final")
ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    # OpenAI's older name, then ShareGPT's and those of other models.
    "function": "tool",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_call": "assistant",
}
TEXT_PARTS = ("text", "input_text", "output_text")
THINKING = ("thinking", "reasoning_content", "reasoning")
OF_ALL = {"role", "content"}
OF_ASSISTANTS = {*THINKING, "channel", "recipient", "content_type", "tool_calls", "function_call", "refusal"}
OF_TOOLS = {"name", "tool_call_id"}


class Waiting:
    """Calls without a result, which are found by their id, by their tool, or in their order, each in constant time."""

    def __init__(self) -> None:
        self._calls: list[tuple[str, str]] = []  # id and tool
        self._found: set[int] = set()
        self._by: dict[tuple[str, str], deque[int]] = {}  # a key's kind and value: the calls that have it

    def add(self, identity: str, tool: str) -> None:
        """Remember a call."""
        for key in (("id", identity), ("tool", tool), ("any", "")):
            self._by.setdefault(key, deque()).append(len(self._calls))
        self._calls.append((identity, tool))

    def take(self, identity: str, tools: Sequence[str]) -> str:
        """The tool of the first call of an id, or of some tool, or of all; empty where there is none.

        A call without an id may be the one that is meant, where none has the id.
        """
        of_tools = [("tool", tool) for tool in tools] or [("any", "")]
        for key in [("id", identity), ("id", "")] if identity else of_tools:
            queue = self._by.get(key, deque())
            while queue and queue[0] in self._found:
                queue.popleft()
            if queue:
                self._found.add(queue[0])
                return self._calls[queue.popleft()][1]
        return ""


def read_messages(values: Sequence[Any], say: Say) -> list[Message]:
    """The messages of a list; DataError names the first that cannot be taken whole.

    Tools' results name their call by its id or its function, or answer the first call that has none yet.
    """
    if not values:
        raise DataError("the list of messages is empty")
    waiting = Waiting()
    found: list[Message] = []
    for number, value in enumerate(values, 1):
        try:
            found += _message(_as_openai(value, say), waiting, say)
        except DataError as error:
            raise DataError(f"message {number}: {error}") from None
    return found


def _as_openai(value: Any, say: Say) -> dict[str, Any]:
    """A message with the keys that OpenAI's form has; those that hold nothing are absent, as tables fill them in."""
    if not isinstance(value, Mapping):
        raise DataError(f"is {kind_of(value)}, expected an object with role and content")
    message = {key: x for key, x in value.items() if x is not None}
    if "from" in message and "role" not in message:
        message = {{"from": "role", "value": "content"}.get(key, key): x for key, x in message.items()}
        say("taken for ShareGPT's form (from, value)")
    if "role" not in message:
        raise DataError(f"has no role: its keys are {', '.join(sorted(map(repr, value)))}")
    role = message["role"]
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"its role is {shown(role)}, expected one of {', '.join(ROLES)}")
    if role == "function_call" and "content" in message:
        message["tool_calls"] = message.pop("content")
    if role != ROLES[role]:
        say(f"role {role!r} taken for {ROLES[role]}")
    return {**message, "role": ROLES[role]}


def _message(message: dict[str, Any], waiting: Waiting, say: Say) -> list[Message]:
    role = message["role"]
    read = OF_ALL | (OF_ASSISTANTS if role == "assistant" else OF_TOOLS if role == "tool" else set())
    for key in sorted(message.keys() - read):
        # What a key of this name says of other roles would be lost.
        if key in OF_ASSISTANTS and _holds_something(message[key]):
            raise DataError(f"its role is {role}, and it has {key}, which only the assistant's have")
        say(f"key {key!r} of {role} messages is not read")
    if role == "assistant":
        return _assistant(message, waiting, say)
    if "content" not in message:
        raise DataError(f"its role is {role}, and it has no content")
    content, thinking = _content(message["content"], of_tool=role == "tool")
    if thinking:
        raise DataError(f"its role is {role}, and a part of it is reasoning, which only the assistant's are")
    if role != "tool":
        return [Message(role, content)]
    tool = _answered(message, waiting)
    return [Message("tool", content, channel="commentary", author=tool)]


def _assistant(message: dict[str, Any], waiting: Waiting, say: Say) -> list[Message]:
    """Reasoning, what the user reads, and calls, in this order: each is a message of harmony."""
    content, thinking = _content(message.get("content", message.get("refusal", "")))
    given = [thinking, *(_text(message[key], key) for key in THINKING if key in message)]
    reasoning = list(dict.fromkeys(text for text in given if text))
    if len(reasoning) > 1:
        raise DataError(f"has reasoning twice, and not the same: keep one of {', '.join(THINKING)}")
    calls = _calls(message)
    found = [Message("assistant", text, "analysis") for text in reasoning]
    if content.startswith((CHANNEL, START)):
        if reasoning or calls or message.keys() & {"channel", "recipient", "content_type"}:
            raise DataError("its content has harmony's marks, and it has other keys that say the same")
        say("content with harmony's marks taken for the messages that it writes out")
        found = _written_out(content)
    elif message.keys() & {"channel", "recipient"}:
        found.append(_addressed(message, content))
    elif calls:
        # What stands beside calls is said to the user before them: harmony's preamble.
        found += [Message("assistant", content, "commentary")] if content else []
    elif content or not reasoning:
        if "content" not in message and "refusal" not in message:
            raise DataError("its role is assistant, and it has neither content nor calls")
        found.append(Message("assistant", content, "final"))
    for sent in found:
        if sent.recipient:
            waiting.add("", sent.recipient)
    for identity, call in calls:
        waiting.add(identity, call.recipient)
    return found + [call for _, call in calls]


def _addressed(message: Mapping[str, Any], content: str) -> Message:
    """A message that names its channel or its recipient itself."""
    recipient = _text(message.get("recipient", ""), "recipient")
    recipient = "" if recipient in ("all", "user") else recipient
    channel = message.get("channel", "commentary" if recipient else "final")
    if channel not in CHANNELS:
        raise DataError(f"its channel is {shown(channel)}, expected one of {', '.join(CHANNELS)}")
    return Message(
        "assistant", content, channel, recipient, content_type=_text(message.get("content_type", ""), "type")
    )


def _written_out(content: str) -> list[Message]:
    """The messages of a reply that was kept with harmony's marks, from behind `<|start|>assistant` or from there."""
    text = content if content.startswith(START) else f"{START}assistant{content}"
    parts, stray = messages_of(list(pieces(HarmonyText(text), MARKS)))
    if stray.strip():
        raise DataError(f"its content has harmony's marks, and {shown(stray.strip())} is of no message")
    return [_of_part(part) for part in parts]


def _of_part(part: Part) -> Message:
    if part.role != "assistant":
        raise DataError(f"its content holds a message by {shown(part.role)}: give each role's messages apart")
    recipient = RECIPIENT.search(part.header)
    rest = part.header.removeprefix("assistant").replace(recipient[0] if recipient else "", "", 1)
    rest = rest.replace(f"{CHANNEL}{part.channel}", "", 1).strip()
    return Message("assistant", part.content, part.channel or "final", recipient[1] if recipient else "", "", rest)


def _calls(message: Mapping[str, Any]) -> list[tuple[str, Message]]:
    """The id and the message of each call."""
    given = _json_or(message.get("tool_calls", []))
    given = [given] if isinstance(given, Mapping) else given
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise DataError(f"its tool_calls are {kind_of(given)}, expected a list")
    if "function_call" in message:
        given = [*given, message["function_call"]]
    return [_call(call) for call in given]


def _call(call: Any) -> tuple[str, Message]:
    if not isinstance(call, Mapping):
        raise DataError(f"a call is {kind_of(call)}, expected an object with name and arguments")
    function = call.get("function") or call.get("custom") or call
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name or any(c.isspace() for c in name):
        raise DataError(f"a call's name is {shown(name)}, expected the name of a function")
    arguments = function.get("arguments", function.get("parameters", function.get("input")))
    is_text = isinstance(arguments, str)
    text = arguments if is_text else "{}" if arguments is None else json.dumps(arguments, ensure_ascii=False)
    kind = "" if "input" in function else "json"
    recipient = name if name.startswith(FUNCTIONS) else FUNCTIONS + name
    return str(call.get("id") or ""), Message("assistant", text, "commentary", recipient, content_type=kind)


def _answered(message: Mapping[str, Any], waiting: Waiting) -> str:
    """The tool whose result this is; its call waits no longer."""
    identity, name = str(message.get("tool_call_id") or ""), str(message.get("name") or "")
    names = [FUNCTIONS + name.removeprefix(FUNCTIONS), name] if name else []
    tool = waiting.take(identity, names)
    if tool or names:
        return tool or names[0]
    raise DataError(f"its role is tool, and it answers no call{f' of id {shown(identity)}' if identity else ''}")


def _content(content: Any, of_tool: bool = False) -> tuple[str, str]:
    """A content's text, and the reasoning that stands among its parts."""
    if isinstance(content, str):
        return content, ""
    if of_tool and not isinstance(content, list):
        return json.dumps(content, ensure_ascii=False), ""
    if not isinstance(content, list):
        raise DataError(f"its content is {kind_of(content)}, expected text or a list of parts")
    each = [_part(part) for part in content]
    if of_tool and any(kind == "" for _, kind in each):
        return json.dumps(content, ensure_ascii=False), ""
    texts = [text for text, kind in each if kind == "text"]
    return "".join(texts), "".join(text for text, kind in each if kind == "thinking")


def _part(part: Any) -> tuple[str, str]:
    """A part's text, and its kind: text or thinking, or nothing for an object that is no part."""
    if isinstance(part, str):
        return part, "text"
    if not isinstance(part, Mapping):
        raise DataError(f"a part of its content is {kind_of(part)}, expected an object with type and text")
    kind = part.get("type", "text" if "text" in part else "")
    if kind in TEXT_PARTS or kind == "refusal":
        return _text(part.get("text", part.get("refusal")), "the text of a part"), "text"
    if kind in ("thinking", "reasoning"):
        return _text(part.get(kind, part.get("text")), "the text of a part"), "thinking"
    if not kind:
        return "", ""
    raise DataError(f"a part of its content is of type {shown(kind)}: GPT-OSS reads text alone")


def read_tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    """The tools of a row, a list or JSON text of one, in the form that chat templates take; DataError names what is
    none."""
    tools = _json_or(value)
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise DataError(f"its tools are {kind_of(tools)}, expected a list")
    return tuple(_tool(tool) for tool in tools)


def _tool(tool: Any) -> Mapping[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f"a tool is {shown(tool)}, expected an object with name, description and parameters")
    parameters = _json_or(function.get("parameters", function.get("input_schema")) or {})
    described = {"name": function["name"], "description": function.get("description") or ""}
    return {"type": "function", "function": {**described, "parameters": parameters}}


def as_json(text: str) -> Any:
    """What a text says in JSON; None where it is another text."""
    if text.lstrip()[:1] not in ("[", "{"):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _json_or(value: Any) -> Any:
    """A value, which some columns hold as the text of JSON."""
    if not isinstance(value, str):
        return value
    read = as_json(value)
    return value if read is None else read


def _holds_something(value: Any) -> bool:
    return value not in ("", [], {}, False)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"its {what} is {kind_of(value)}, expected text")
    return value


def kind_of(value: Any) -> str:
    """What a value of JSON is, as messages call it."""
    return "null" if value is None else type(value).__name__
