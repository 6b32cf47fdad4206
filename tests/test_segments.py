"""The segments of tokens, against a reading by characters in which each token is written out alone."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from convert.sources import NANO, open_source
from experiments import tokenizers
from gptoss_jax.data.conversation import Conversation, Message
from gptoss_jax.data.harmony import HarmonyText
from gptoss_jax.data.template import Template
from gptoss_jax.data.tokens import load_tokenizer, token_ids
from gptoss_jax.routing.segments import SEGMENTS, of_reply, of_row

from .conftest import conversation
from .test_harmony import TOOL_CONVERSATION, conversations

MESSAGE = re.compile(
    r"<\|start\|>((?:(?!<\|start\|>).)*?)<\|message\|>(.*?)(<\|end\|>|<\|call\|>|<\|return\|>|\Z)", re.DOTALL
)
HEADER = re.compile(r"<\|start\|>assistant(?![^\s<])(?:(?!<\|(?:start|message)\|>).)*\Z", re.DOTALL)


def by_characters(ids: Any, tokenizer: Any) -> list[str]:
    """The segment of each token: its characters are written out token by token, a character for each byte, and
    messages are found in the text that they make together."""
    words = [token.replace("Ġ", " ").replace("Ċ", "\n") for token in tokenizer.convert_ids_to_tokens([*map(int, ids)])]
    text = "".join(words)
    of = ["prompt"] * len(text)
    behind = 0
    for message in MESSAGE.finditer(text):
        behind = message.end()
        if re.match(r"assistant(?![^\s<])", message[1]):
            of[message.start() : message.end()] = ["other"] * len(message[0])
            channel = re.search(r"<\|channel\|>\s*(\w+)", message[1])
            inside = {"analysis": "think", "final": "answer"}.get(channel[1] if channel else "", "other")
            of[message.start(2) : message.end(2)] = [inside] * len(message[2])
    if last := HEADER.search(text, behind):
        of[last.start() :] = ["other"] * len(last[0])
    found, at = [], 0
    for word in words:
        (segment,) = {*of[at : at + len(word)]}
        found.append(segment)
        at += len(word)
    return found


def names(codes: np.ndarray) -> list[str]:
    return [SEGMENTS[code] for code in codes]


@pytest.fixture(scope="module")
def nano() -> Any:
    return load_tokenizer(Path(str(open_source(NANO).folder)))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("published")
    tokenizers.write_published(folder)
    return load_tokenizer(folder)


@pytest.fixture(params=["nano", pytest.param("published", marks=pytest.mark.slow)])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def ids_of(text: str, tokenizer: Any) -> np.ndarray:
    return token_ids(HarmonyText(text), tokenizer, len(tokenizer))


@pytest.mark.parametrize("text", [TOOL_CONVERSATION, conversation(2), "no harmony at all", ""])
def test_a_row(text: str, tokenizer: Any) -> None:
    ids = ids_of(text, tokenizer)
    assert names(of_row(ids, tokenizer)) == by_characters(ids, tokenizer)


def test_every_end_of_a_row_and_every_begin(tokenizer: Any) -> None:
    ids = ids_of(TOOL_CONVERSATION, tokenizer)
    for cut in range(len(ids)):
        for part in (ids[:cut], ids[cut:]):
            assert names(of_row(part, tokenizer)) == by_characters(part, tokenizer), cut


@settings(max_examples=200)
@given(text=conversations())
def test_any_conversation(text: str, nano: Any) -> None:
    ids = ids_of(text, nano)
    assert names(of_row(ids, nano)) == by_characters(ids, nano)


def test_think_and_answer_are_the_words_and_nothing_else(tokenizer: Any) -> None:
    """No token more or less at either end, and no mark among them."""
    ids = ids_of(TOOL_CONVERSATION, tokenizer)
    found = np.array(names(of_row(ids, tokenizer)))
    said = {segment: tokenizer.decode(ids[found == segment]) for segment in ("think", "answer")}
    assert said == {"think": "Use the tool: naïve 🧮.", "answer": "Two 🎉."}


def test_what_only_looks_like_a_mark_ends_nothing(tokenizer: Any) -> None:
    words = "The mark <|end|> ends a message."
    text = f"<|start|>assistant<|channel|>analysis<|message|>{words}<|end|>"
    ids = token_ids(HarmonyText(text, (text.index("<|end|>"),)), tokenizer, len(tokenizer))
    found = np.array(names(of_row(ids, tokenizer)))
    assert tokenizer.decode(ids[found == "think"]) == words and {*found} == {"think", "other"}


def reply_of(tokenizer: Any, said: str) -> tuple[np.ndarray, np.ndarray]:
    """A prompt by the chat template, and a reply."""
    asked = Conversation((Message("user", "1 + 1?"),))
    written = Template(tokenizer).write(asked, "medium", generate=True)
    return token_ids(written, tokenizer, len(tokenizer)), ids_of(said, tokenizer)


def test_a_reply(tokenizer: Any) -> None:
    said = "<|channel|>analysis<|message|>Adding.<|end|><|start|>assistant<|channel|>final<|message|>It is 2.<|return|>"
    prompt, reply = reply_of(tokenizer, said)
    found = names(of_reply(prompt, reply, tokenizer))
    assert {*found[: len(prompt)]} == {"prompt"}
    # The prompt ends with <|start|>assistant, so that the whole text is a row.
    assert found[len(prompt) :] == by_characters([*prompt, *reply], tokenizer)[len(prompt) :]
    assert {*found[len(prompt) :]} == {"think", "answer", "other"}
    for end in range(len(reply)):
        part = names(of_reply(prompt, reply[:end], tokenizer))
        assert part == found[: len(prompt) + end], end


def test_nothing_of_a_reply_is_prompt(tokenizer: Any) -> None:
    prompt, reply = reply_of(tokenizer, "<|channel|>final<|message|>2<|end|>, or<|start|>user<|message|>so?<|end|>")
    found = names(of_reply(prompt, reply, tokenizer))[len(prompt) :]
    assert found.count("answer") == 1 and {*found} == {"answer", "other"}


def test_a_reply_that_goes_on_with_a_message(tokenizer: Any) -> None:
    prompt = ids_of("<|start|>assistant<|channel|>analysis<|message|>Let me", tokenizer)
    reply = ids_of(" think.<|end|>", tokenizer)
    found = names(of_reply(prompt, reply, tokenizer))
    assert found == ["prompt"] * len(prompt) + ["think"] * (len(reply) - 1) + ["other"]


def test_without_tokens(nano: Any) -> None:
    assert of_row([], nano).shape == (0,) and of_reply([], [], nano).dtype == np.uint8
