"""Harmony text: which tokens are kept, what truncation keeps, and the published tokenizer and template."""

import hashlib
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import tokenizers
from gptoss_jax.data import harmony, tokens
from gptoss_jax.data.batching import Document
from gptoss_jax.data.groups import Groups
from gptoss_jax.data.harmony import HarmonyText
from gptoss_jax.data.rows import Row
from gptoss_jax.data.template import Template
from gptoss_jax.errors import TokenizerError

START, MESSAGE, CHANNEL = "<|start|>", "<|message|>", "<|channel|>"
STOPS = ("<|end|>", "<|call|>", "<|return|>")
CHANNELS = ("analysis", "commentary", "final")
VOCAB_SIZE = 300

TOOL_CONVERSATION = (
    "<|start|>system<|message|>Be brief.<|end|><|start|>user<|message|>1 + 1? 🎉<|end|>"
    "<|start|>assistant<|channel|>analysis<|message|>Use the tool: naïve 🧮.<|end|>"
    '<|start|>assistant<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}<|call|>'
    "<|start|>functions.add to=assistant<|channel|>commentary<|message|>2<|end|>"
    "<|start|>assistant<|channel|>final<|message|>Two 🎉.<|return|>"
)


def content_channels(text: str) -> list[str | None]:
    """For each character: None, or the channel of the assistant's content that it is part of.

    A machine that reads the text a character at a time.
    """
    marks: list[str | None] = [None] * len(text)
    state, header, i = "outside", "", 0
    while i < len(text):
        rest = text[i:]
        if state == "content" and rest.startswith(STOPS):
            state = "outside"
        elif state != "content" and rest.startswith(START):
            state, header = "header", ""
            i += len(START)
            continue
        elif state == "header" and rest.startswith(MESSAGE):
            state = "content"
            i += len(MESSAGE)
            continue
        elif state == "header":
            header += text[i]
        elif state == "content" and header.replace("<", " ").split(" ")[0] == "assistant":
            marks[i] = (header.partition(CHANNEL)[2].replace("<", " ").split() or [""])[0]
        i += 1
    return marks


# Letters, several bytes a character, characters of two code points, markers within content.
pieces = st.sampled_from(
    [
        *("a", "the ", "\n", " ", "é", "e\u0301", "ñ\u0323", "🎉", "👩\u200d🔬", "字", "𝔘"),
        *("<|", "|>", "<", "assistant", START, MESSAGE, CHANNEL, "<|constrain|>"),
        *("<|start|>assistant<|message|>", "<|start|>user<|message|>"),
    ]
)
contents = st.lists(pieces, max_size=12).map("".join)
recipients = st.sampled_from(["", "", " to=functions.add", " to=browser.search", " to=assistant"])


@st.composite
def messages(draw: st.DrawFn) -> str:
    role = draw(st.sampled_from(["system", "developer", "user", "assistant", "assistant", "functions.add", "assist"]))
    channel = draw(st.sampled_from(["", *CHANNELS]))
    header = role + draw(recipients) + (CHANNEL + channel if channel else "")
    # The published tool calls name the recipient before the channel or after it.
    header += draw(recipients) + draw(st.sampled_from(["", " <|constrain|>json", " json"]))
    return START + header + MESSAGE + draw(contents)


@st.composite
def conversations(draw: st.DrawFn) -> str:
    parts = draw(st.lists(messages(), min_size=1, max_size=5))
    ends = [draw(st.sampled_from(STOPS)) for _ in parts]
    if draw(st.booleans()):
        ends[-1] = ""
    # The last begins a message that never comes.
    between = draw(st.sampled_from(["", "", "\n", "🎉 ", "<|start|>assistant"]))
    return between.join(part + end for part, end in zip(parts, ends, strict=True))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Bytes and few merges, so that most characters beyond ASCII are several tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizers.write_small(folder, VOCAB_SIZE)
    return tokens.load_tokenizer(folder)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    tokenizers.write_published(folder)
    return folder


def encode(text: str, tokenizer: Any, vocab_size: int = VOCAB_SIZE, **options: Any) -> Document:
    options = {"max_length": None} | options
    (document,) = tokens.encode([Row(text)], tokenizer, Groups([""]), vocab_size, **options)
    return document


def offsets(text: str, tokenizer: Any) -> list[tuple[int, int]]:
    return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]


def kept_text(document: Document, tokenizer: Any) -> str:
    return tokenizer.decode(document.token_ids[document.weights > 0])


def test_of_several_messages_the_last_needs_no_end() -> None:
    text = "<|start|>user<|message|>1<|end|><|start|>assistant<|message|>2<|end|><|start|>user<|message|>3 <|call"
    parts, rest = harmony.messages_of([*harmony.pieces(HarmonyText(text), harmony.MARKS)])
    assert parts == [("user", "1", "<|end|>"), ("assistant", "2", "<|end|>"), ("user", "3 <|call", "")]
    assert rest == ""


def test_marks_of_a_reply_are_known_by_their_ids(tokenizer: Any) -> None:
    written = ["<|channel|>final<|message|>1 <|e", "nd|>", "<|end|>"]
    ids = [number for text in written for number in tokenizer(text, add_special_tokens=False).input_ids]
    assert tokens.messages_in_ids(ids, tokenizer) == [("assistant<|channel|>final", "1 <|end|>", "<|end|>")]


# The keep mask


@given(conversations())
@settings(deadline=None, max_examples=150)
def test_kept_spans_are_the_contents_of_the_assistant(text: str) -> None:
    cut = list(harmony.pieces(HarmonyText(text), harmony.MARKS))
    assert "".join(piece.text for piece in cut) == text
    each = [weight for piece, weight in zip(cut, tokens.weights_of(cut), strict=True) for _ in piece.text]
    assert each == [float(channel is not None) for channel in content_channels(text)]


def test_a_reply_is_kept_with_its_headers_and_marks() -> None:
    asked = "<|start|>system<|message|>You.<|end|><|start|>user<|message|>2<|end|>"
    said = "<|start|>assistant<|channel|>analysis<|message|>Two.<|end|>"
    called = '<|start|>assistant to=functions.f<|channel|>commentary <|constrain|>json<|message|>{"a": 1}<|call|>'
    heard = "<|start|>functions.f to=assistant<|channel|>commentary<|message|>assistant<|end|>"
    ended = "<|start|>assistant<|channel|>final<|message|>2<|return|>"
    stray = "<|start|>assistant"
    cut = list(harmony.pieces(HarmonyText(asked + said + called + heard + ended + stray), harmony.MARKS))
    weighed = {channel: tokens.weights_of(cut, "reply", {channel: 3.0}) for channel in CHANNELS}
    texts = {c: "".join(p.text for p, w in zip(cut, each, strict=True) if w == 3.0) for c, each in weighed.items()}
    assert texts == {"analysis": said, "commentary": called, "final": ended}
    whole = tokens.weights_of(cut, "reply")
    assert "".join(p.text for p, w in zip(cut, whole, strict=True) if w == 1.0) == said + called + ended
    assert {*whole} == {0.0, 1.0}


@given(conversations())
@settings(deadline=None, max_examples=150)
def test_a_token_is_kept_when_any_of_its_characters_is(tokenizer: Any, text: str) -> None:
    marks = content_channels(text)
    expected = [any(mark is not None for mark in marks[a:b]) for a, b in offsets(text, tokenizer)]
    np.testing.assert_array_equal(encode(text, tokenizer).weights, np.array(expected, np.float32))


@given(conversations(), st.fixed_dictionaries({channel: st.sampled_from([0.0, 0.5, 2.0]) for channel in CHANNELS}))
@settings(deadline=None, max_examples=100)
def test_tokens_weigh_what_their_channel_does(tokenizer: Any, text: str, weights: dict[str, float]) -> None:
    marks = content_channels(text)
    expected = []
    for a, b in offsets(text, tokenizer):
        channels = {mark for mark in marks[a:b] if mark is not None}
        expected.append(weights.get(channels.pop(), 0.0) if channels else 0.0)
    document = encode(text, tokenizer, channel_weights=weights)
    np.testing.assert_array_equal(document.weights, np.array(expected, np.float32))


@given(conversations())
def test_tokens_are_those_of_the_text_and_no_special_ones_are_added(tokenizer: Any, text: str) -> None:
    document = encode(text, tokenizer)
    assert tokenizer.decode(document.token_ids) == text
    assert not document.truncated


def test_contents_of_the_assistant_are_kept_with_and_without_recipient(tokenizer: Any) -> None:
    assert kept_text(encode(TOOL_CONVERSATION, tokenizer), tokenizer) == 'Use the tool: naïve 🧮.{"a": 1}Two 🎉.'


def test_all_tokens_of_a_character_are_kept(tokenizer: Any) -> None:
    document = encode("<|start|>assistant<|message|>🎉<|end|>", tokenizer)
    assert document.weights.sum() == len("🎉".encode()) and kept_text(document, tokenizer) == "🎉"


def test_text_that_looks_like_a_message_inside_another_is_content(tokenizer: Any) -> None:
    text = "<|start|>user<|message|>say <|start|>assistant<|message|>no<|end|><|start|>assistant<|message|>yes<|end|>"
    assert kept_text(encode(text, tokenizer), tokenizer) == "yes"


def test_the_content_of_an_unterminated_message_runs_to_the_end(tokenizer: Any) -> None:
    text = "<|start|>user<|message|>?<|end|><|start|>assistant<|channel|>final<|message|>It is"
    assert kept_text(encode(text, tokenizer), tokenizer) == "It is"


def test_without_a_message_no_token_is_kept(tokenizer: Any) -> None:
    for text in ("plain text", "assistant<|message|>x<|end|>", "<|start|>assistant", ""):
        assert encode(text, tokenizer).weights.sum() == 0


@given(conversations())
def test_keep_all_keeps_every_token(tokenizer: Any, text: str) -> None:
    assert (encode(text, tokenizer, keep="all").weights == 1).all()


@pytest.mark.parametrize("keep", ["assistant", "all"])
def test_tokens_with_an_empty_character_range_are_never_kept(keep: Any) -> None:
    class Odd:
        """Gives every text a token before it, one for each character, and one behind it."""

        added_tokens_decoder: ClassVar[dict[int, Any]] = {}

        def __call__(self, texts: list[str], *, add_special_tokens: bool, **_: Any) -> dict[str, Any]:
            assert not add_special_tokens
            ranges = [[(0, 0), *((i, i + 1) for i in range(len(text))), (len(text),) * 2] for text in texts]
            return {"input_ids": [list(range(len(each))) for each in ranges], "offset_mapping": ranges}

    assert encode("xy", Odd(), keep=keep).weights.tolist() == ([0, 1, 1, 0] if keep == "all" else [0] * 4)


# Truncation, domains, vocabulary


@given(conversations(), st.integers(1, 80))
def test_truncation_on_the_left_keeps_the_tail(tokenizer: Any, text: str, length: int) -> None:
    whole, cut = encode(text, tokenizer), encode(text, tokenizer, max_length=length)
    first = max(0, len(whole.token_ids) - length)
    np.testing.assert_array_equal(cut.token_ids, whole.token_ids[first:])
    np.testing.assert_array_equal(cut.weights, whole.weights[first:])
    assert cut.truncated == (first > 0)


@given(conversations(), st.integers(1, 80))
def test_truncation_on_the_right_keeps_the_head(tokenizer: Any, text: str, length: int) -> None:
    whole, cut = encode(text, tokenizer), encode(text, tokenizer, max_length=length, truncate="right")
    np.testing.assert_array_equal(cut.token_ids, whole.token_ids[:length])
    np.testing.assert_array_equal(cut.weights, whole.weights[:length])
    assert cut.truncated == (len(whole.token_ids) > length)


@pytest.mark.parametrize("truncate", ["left", "right"])
def test_a_row_of_just_the_limit_is_not_truncated(tokenizer: Any, truncate: str) -> None:
    length = len(encode(TOOL_CONVERSATION, tokenizer).token_ids)
    for limit in (length - 1, length, length + 1):
        document = encode(TOOL_CONVERSATION, tokenizer, max_length=limit, truncate=truncate)
        assert (len(document.token_ids), document.truncated) == (min(length, limit), limit < length)


def test_documents_stand_in_the_order_of_rows_with_the_index_of_their_domain(tokenizer: Any) -> None:
    rows = [Row("one", domain="b"), Row("two words", domain="a"), Row("", domain="b")]
    documents = tokens.encode(rows, tokenizer, Groups(["a", "b"]), VOCAB_SIZE, None)
    assert [tokenizer.decode(d.token_ids) for d in documents] == ["one", "two words", ""]
    assert [d.group for d in documents] == [1, 0, 1]


def test_a_token_beyond_the_vocabulary_is_an_error(tokenizer: Any) -> None:
    largest = int(encode("z", tokenizer).token_ids.max())
    assert encode("z", tokenizer, vocab_size=largest + 1).token_ids.max() == largest
    with pytest.raises(TokenizerError, match=f"token {largest}, the model's vocab_size is {largest}"):
        encode("z", tokenizer, vocab_size=largest)


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"holds no tokenizer\.json"):
        tokens.load_tokenizer(tmp_path)


def test_a_tokenizer_without_a_chat_template_is_an_error(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja"):
        Template(tokenizer)


# The published tokenizer and chat template


def test_the_published_tokenizer_is_rebuilt_byte_for_byte(shared: Path, published: Path) -> None:
    lines = (shared / "data" / "gptoss20b" / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    digests = {name: digest for digest, name in (line.split() for line in lines)}
    assert hashlib.sha256((published / "tokenizer.json").read_bytes()).hexdigest() == digests["tokenizer.json"]


def test_the_published_tokenizer_keeps_the_same_characters(published: Path) -> None:
    tokenizer = tokens.load_tokenizer(published)
    document = encode(TOOL_CONVERSATION, tokenizer, 201088)
    assert kept_text(document, tokenizer) == 'Use the tool: naïve 🧮.{"a": 1}Two 🎉.'
    assert tokenizer.convert_tokens_to_ids(["<|return|>", "<|call|>"]) == [200002, 200012]
