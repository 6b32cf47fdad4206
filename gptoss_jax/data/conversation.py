"""One model of a conversation, and the harmony text that is written from it.

Who speaks, through which channel and to whom is known here, and not looked for in text: contents are text whatever they
look like.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .harmony import CALL, CHANNEL, CONSTRAIN, END, MESSAGE, RETURN, START, HarmonyText

Role = Literal["system", "developer", "user", "assistant", "tool"]
FUNCTIONS = "functions."  # the namespace of a row's own tools


@dataclass(frozen=True)
class Message:
    """One message."""

    role: Role
    content: str
    channel: str = ""
    """analysis, commentary or final; empty where the role has none."""
    recipient: str = ""
    """Whom it calls, as functions.add; empty where it speaks to all."""
    author: str = ""
    """Of a tool's result the tool, as functions.add."""
    content_type: str = ""
    """As json, of a call's arguments; `<|constrain|>` before it is a mark."""

    @property
    def calls(self) -> bool:
        """Whether it calls a tool."""
        return self.role == "assistant" and bool(self.recipient)

    @property
    def instructs(self) -> bool:
        """Whether it is by who made the application, in front of what users and assistant say."""
        return self.role in ("system", "developer")


@dataclass(frozen=True)
class Conversation:
    """What was said, and with which tools at hand."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    """Functions in OpenAI's form: {"type": "function", "function": {"name", "description", "parameters"}}."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What the chat template is told beside, as model_identity."""

    def without_earlier_analysis(self, generate: bool) -> "Conversation":
        """The conversation as the model sees it when it goes on: reasoning is dropped once the answer stands.

        The chat template does the same: it keeps what has no final message behind it, and what stands directly before
        a final message that ends the conversation, unless the assistant is to speak next.
        """
        last = max((n for n, m in enumerate(self.messages) if m.channel == "final"), default=-1)
        ends = last == len(self.messages) - 1 and not generate
        first = last
        while ends and first > 0 and self.messages[first - 1].channel == "analysis":
            first -= 1
        kept = (m for n, m in enumerate(self.messages) if n >= first or m.channel != "analysis")
        return Conversation(tuple(kept), self.tools, self.settings)

    def without_reply(self) -> "Conversation":
        """The conversation without what the assistant says at its end."""
        kept = list(self.messages)
        while kept and kept[-1].role == "assistant":
            kept.pop()
        return Conversation(tuple(kept), self.tools, self.settings)


class Writer:
    """Text that grows, and remembers what only looks like a mark."""

    def __init__(self, marks: re.Pattern[str]):
        self._marks, self._length = marks, 0
        self._texts: list[str] = []
        self._literals: list[int] = []

    def marked(self, text: str) -> None:
        """Add text whose marks are marks."""
        self._texts.append(text)
        self._length += len(text)

    def text(self, text: str) -> None:
        """Add text that has none, whatever it looks like."""
        self._literals += (self._length + mark.start() for mark in self._marks.finditer(text))
        self.marked(text)

    def message(self, message: Message, is_last: bool) -> None:
        """Add a message. One by the assistant that ends the conversation ends as the model ends its reply."""
        self.marked(START)
        self.text(message.author if message.role == "tool" else message.role)
        recipient = "assistant" if message.role == "tool" else message.recipient
        if recipient:
            self.text(f" to={recipient}")
        if message.channel:
            self.marked(CHANNEL)
            self.text(message.channel)
        if message.content_type:
            constrains = message.content_type.startswith(CONSTRAIN)
            self.marked(f" {CONSTRAIN}" if constrains else " ")
            self.text(message.content_type.removeprefix(CONSTRAIN))
        self.marked(MESSAGE)
        self.text(message.content)
        ends_reply = is_last and message.role == "assistant" and message.channel in ("", "final")
        self.marked(CALL if message.calls else RETURN if ends_reply else END)

    def written(self) -> HarmonyText:
        """What was added so far."""
        return HarmonyText("".join(self._texts), tuple(self._literals))
