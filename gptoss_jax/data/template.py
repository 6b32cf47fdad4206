"""A checkpoint's chat template: the system message, instructions and tools are its to write.

What follows is harmony by definition, and is written by `conversation`. The template is asked for a conversation's
beginning alone, so that its cost does not grow with turns, and nothing of theirs can be lost in it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from ..errors import DataError, TokenizerError, reason
from .conversation import Conversation, Message, Writer
from .harmony import END, MESSAGE, START, HarmonyText, marks_of

# The chat template states the current date; a fixed one makes equal rows equal text on any day.
# It is the day on which the models were published.
CONVERSATION_DATE = "2025-08-05"
# Stands before the template, whose own calls then find this macro and not the clock.
FIXED_DATE = "{% macro strftime_now(format) %}" + CONVERSATION_DATE + "{% endmacro %}{{ '' }}"
# Stands for what looks like a mark on its way through the template; no text has this character, which is no letter of
# any script. It stands for itself too.
STAND_IN = "\U0010fffd"
STANDS_IN = re.compile(f"{STAND_IN}([0-9]+){STAND_IN}")
TURN = f"{START}user{MESSAGE}{STAND_IN}{END}"  # what the template writes of the turn by which its beginning is known
SETTINGS = ("reasoning_effort", "model_identity", "builtin_tools")  # what the published template can be told beside


class Template:
    """What writes conversations for one model."""

    def __init__(self, tokenizer: Any):
        """TokenizerError where there is no chat template."""
        if not tokenizer.chat_template:
            raise TokenizerError("the tokenizer has no chat template: add chat_template.jinja to the model's folder")
        self._tokenizer, self.marks = tokenizer, marks_of(tokenizer)
        self._template = FIXED_DATE + tokenizer.get_chat_template()
        self._begin = lru_cache(maxsize=64)(self._beginning)

    def write(self, conversation: Conversation, effort: str = "medium", generate: bool = False) -> HarmonyText:
        """Harmony text of a conversation; DataError where the template refuses its beginning or leaves some of it out.

        `effort` is the reasoning's where the conversation states none; with `generate` the text ends where the
        assistant is to speak.
        """
        messages = list(conversation.messages)
        first = messages.pop(0) if messages and messages[0].instructs else None
        settings = {"reasoning_effort": effort, **conversation.settings}
        tools = json.dumps(list(conversation.tools))
        writer = Writer(self.marks)
        for text, is_marked in self._begin(first, tools, json.dumps(settings)):
            (writer.marked if is_marked else writer.text)(text)
        for number, message in enumerate(messages, 1):
            writer.message(message, is_last=number == len(messages) and not generate)
        if generate:
            writer.marked(f"{START}assistant")
        return writer.written()

    def _beginning(self, first: Message | None, tools: str, settings: str) -> list[tuple[str, bool]]:
        """What stands before the first turn: texts, and whether their marks are marks."""
        shield = Shield(self.marks)
        given = [] if first is None else [{"role": first.role, "content": shield.hidden(first.content)}]
        hidden = [shield.everywhere(tool) for tool in json.loads(tools)]
        written = self._applied([*given, {"role": "user", "content": STAND_IN}], hidden, json.loads(settings))
        if not written.endswith(TURN):
            raise TokenizerError(
                "the chat template does not write harmony: copy chat_template.jinja of the original model, or give "
                "rows of text"
            )
        written = written.removesuffix(TURN)
        if first is not None and given[0]["content"] not in written:
            raise DataError(f"the chat template leaves out the {first.role} message, or changes it")
        for tool in hidden:
            if lost := [text for text in _told(tool) if text not in written]:
                raise DataError(f"the chat template leaves out {shield.shown(lost[0])[:80]!r} of the row's tools")
        return shield.cut(written)

    def _applied(self, messages: list[Any], tools: list[Any], settings: Mapping[str, Any]) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tools=tools or None, chat_template=self._template, tokenize=False, **settings
            )
        # Templates are programs of the checkpoint: whatever they raise is about this beginning.
        except Exception as error:
            raise DataError(f"the chat template refuses this conversation: {reason(error)}") from None
        return text


class Shield:
    """Hides from a template what looks like a mark in texts that are none, and finds it again in what it wrote."""

    def __init__(self, marks: re.Pattern[str]):
        self._looks_like = re.compile(f"{marks.pattern}|{STAND_IN}")
        self._hidden: list[str] = []

    def hidden(self, text: str) -> str:
        """The text with stand-ins."""

        def stand_in(match: re.Match[str]) -> str:
            self._hidden.append(match[0])
            return f"{STAND_IN}{len(self._hidden) - 1}{STAND_IN}"

        return self._looks_like.sub(stand_in, text)

    def everywhere(self, value: Any) -> Any:
        """A value of JSON with stand-ins in all of its texts."""
        if isinstance(value, str):
            return self.hidden(value)
        if isinstance(value, dict):
            return {self.hidden(name): self.everywhere(x) for name, x in value.items()}
        return [self.everywhere(x) for x in value] if isinstance(value, list) else value

    def shown(self, text: str) -> str:
        """The text without stand-ins."""
        return "".join(part for part, _ in self.cut(text))

    def cut(self, text: str) -> list[tuple[str, bool]]:
        """The text, cut at its stand-ins: what they stand for has no marks, what stands between has."""
        between = STANDS_IN.split(text)
        return [(self._hidden[int(part)], False) if number % 2 else (part, True) for number, part in enumerate(between)]


def _told(tool: Any) -> Sequence[str]:
    """What of a tool a model must be told: names and descriptions of the function and of what it is given."""
    function = tool["function"]
    parameters = function.get("parameters") or {}
    each = [(name, schema) for name, schema in (parameters.get("properties") or {}).items()]
    descriptions = [schema.get("description") for _, schema in each if isinstance(schema, dict)]
    told = [function["name"], function.get("description"), *(name for name, _ in each), *descriptions]
    return [text for text in told if text]
