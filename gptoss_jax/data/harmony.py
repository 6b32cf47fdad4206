"""Harmony text → tokens and what each of them counts.

Harmony is GPT-OSS's conversation format: `<|start|>role<|channel|>c<|message|>content<|end|>`. A token
is kept when its characters overlap the content of a message by `assistant`, in any channel.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, TokenizerError, reason
from .batching import Document
from .rows import Row

MESSAGE = re.compile(
    r"<\|start\|>(?P<header>(?:(?!<\|start\|>|<\|message\|>).)*)<\|message\|>"
    r"(?P<content>.*?)(?=<\|end\|>|<\|call\|>|<\|return\|>|\Z)",
    re.DOTALL,
)
CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
ROWS_AT_ONCE = 256  # the tokenizer gives offsets as Python tuples, some 300 bytes a token
# The chat template states the current date; a fixed one makes equal rows equal text on any day.
# It is the day on which the models were published.
CONVERSATION_DATE = "2025-08-05"
# Stands before the template, whose own calls then find this macro and not the clock.
FIXED_DATE = "{% macro strftime_now(format) %}" + CONVERSATION_DATE + "{% endmacro %}{{ '' }}"


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's own tokenizer, as transformers reads it."""
    from transformers import PreTrainedTokenizerFast  # GPT-OSS's class; to find a class out would load PyTorch

    if not (folder / "tokenizer.json").exists():
        raise TokenizerError(f"{folder}: holds no tokenizer.json: copy the tokenizer of the original model there")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:
        raise TokenizerError(f"{folder}: the tokenizer cannot be read: {reason(error)}") from error
    if "auto_map" in tokenizer.init_kwargs:
        raise TokenizerError(f"{folder}: the tokenizer has code of its own, which is never run: copy the original's")
    return tokenizer


def render(messages: list[Any], tokenizer: Any, effort: str = "medium", generate: bool = False) -> str:
    """Harmony text of a list of messages by the tokenizer's chat template; DataError where it fails.

    `effort` is the reasoning's; with `generate` the text ends where the assistant is to speak.
    """
    if not tokenizer.chat_template:
        raise TokenizerError("the tokenizer has no chat template: add chat_template.jinja to the model's folder")
    if not all(isinstance(message, dict) for message in messages):
        raise DataError("expected a list of messages, each an object with role and content")
    messages = [_without_absent(message) for message in messages]
    try:
        template = FIXED_DATE + tokenizer.get_chat_template()
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, reasoning_effort=effort, add_generation_prompt=generate
        )
    # Templates are programs of the checkpoint: whatever they raise is about these messages.
    except Exception as error:
        raise DataError(f"the chat template refuses these messages: {reason(error)}") from None


def _without_absent(value: Any) -> Any:
    """Tables give every message every field, and every tool call every argument; templates ask what is there."""
    if isinstance(value, dict):
        present = {name: x for name, x in value.items() if x is not None and not (name == "tool_calls" and x == [])}
        return {name: _without_absent(x) for name, x in present.items()}
    return [_without_absent(x) for x in value] if isinstance(value, list) else value


def reply_parts(text: str) -> list[tuple[str, str]]:
    """Channel and content of each message of a reply, which goes on where its prompt ends; the last may be a part."""
    messages = MESSAGE.finditer("<|start|>assistant" + text)
    return [(_channel(match["header"]), match["content"]) for match in messages]


def kept_spans(text: str, channel_weights: Mapping[str, float] | None = None) -> list[tuple[int, int, float]]:
    """Character ranges of the assistant's contents, with the weight of their channel (1 if not given)."""
    spans = []
    for match in MESSAGE.finditer(text):
        header = match["header"]
        role = re.split(r"[\s<]", header, maxsplit=1)[0]
        if role == "assistant":
            weight = 1.0 if channel_weights is None else channel_weights.get(_channel(header), 0.0)
            spans.append((*match.span("content"), weight))
    return spans


def _channel(header: str) -> str:
    """The channel that a message's header names; empty where it names none."""
    channel = CHANNEL.search(header)
    return channel[1] if channel else ""


def encode(
    rows: Sequence[Row],
    tokenizer: Any,
    domains: Sequence[str],
    vocab_size: int,
    max_length: int | None,
    truncate: str = "left",
    keep_all: bool = False,
    channel_weights: Mapping[str, float] | None = None,
) -> list[Document]:
    """Tokens and weights of each row; no special tokens are added.

    A row longer than `max_length` tokens loses its head (truncate "left", so that the tail, where the
    assistant speaks, stays) or its tail ("right"). A token with an empty character range is never kept.
    """
    documents = []
    for first in range(0, len(rows), ROWS_AT_ONCE):
        some = rows[first : first + ROWS_AT_ONCE]
        encoded = tokenizer(
            [row.text for row in some], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        for row, token_ids, offsets in zip(some, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            ids = _checked(token_ids, vocab_size)
            spans = [(0, len(row.text), 1.0)] if keep_all else kept_spans(row.text, channel_weights)
            weights = _weights(np.array(offsets, np.int64).reshape(-1, 2), spans)
            part = slice(None)
            if max_length is not None and len(ids) > max_length:
                part = slice(-max_length, None) if truncate == "left" else slice(max_length)
            truncated = part != slice(None)
            documents.append(Document(ids[part].copy(), weights[part].copy(), domains.index(row.domain), truncated))
    return documents


def token_ids(text: str, tokenizer: Any, vocab_size: int) -> np.ndarray:
    """Tokens of a text, int32; no special tokens are added."""
    return _checked(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], vocab_size)


def _checked(token_ids: Sequence[int], vocab_size: int) -> np.ndarray:
    ids = np.array(token_ids, np.int32)
    if ids.max(initial=0) >= vocab_size:
        raise TokenizerError(
            f"the tokenizer gives token {ids.max()}, the model's vocab_size is {vocab_size}: "
            "tokenizer and model do not belong together"
        )
    return ids


def _weights(offsets: np.ndarray, spans: Sequence[tuple[int, int, float]]) -> np.ndarray:
    starts, ends = offsets[:, 0], offsets[:, 1]
    weights = np.zeros(len(offsets), np.float32)
    for first, last, weight in spans:
        weights[(starts < last) & (ends > first) & (ends > starts)] = weight
    return weights
