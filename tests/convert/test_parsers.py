"""What parses the files of a checkpoint: any bytes give a value that is sound, or the one error for users."""

import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert import checksums, expert_mapping, folder, orbax, shards
from gptoss_jax.config import TINY, Config
from gptoss_jax.errors import CheckpointError, ConfigError, UserError


class Parser(NamedTuple):
    """A parser, what it raises, and what is behind a file that it accepts."""

    parse: Callable[[bytes], Any]
    error: type[UserError]
    sample: Any
    """The JSON that such a file holds, or its bytes."""
    is_sound: Callable[[Any, int], bool]
    """Of a value and the size of its file."""
    pack: Callable[[bytes], bytes] = bytes
    """From the JSON's bytes to the file's."""


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def with_length(header: bytes) -> bytes:
    """A safetensors file of 26 bytes of tensors."""
    return struct.pack("<Q", len(header)) + header + bytes(26)


def lie_in_a_row(entries: list[shards.Entry], size: int) -> bool:
    ends = [*(e.offset for e in entries), size]
    return all(e.nbytes >= 0 and e.offset + e.nbytes == end for e, end in zip(entries, ends[1:], strict=True))


HEADER = {"__metadata__": {"format": "pt"}, "a": entry("BF16", [3, 4], 0, 24), "b": entry("U8", [2], 24, 26)}
SHARDS = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
DIGESTS = b"".join(
    b"%s  %s\n" % (digits, name)
    for digits, name in ((b"0" * 64, b"config.json"), (b"f" * 64, b"LICENSE"), (b"\\" + b"9" * 64, rb"a\nb"))
)
PARSERS = {
    "safetensors header": Parser(
        lambda data: shards.parse_header(data, len(data)), CheckpointError, HEADER, lie_in_a_row, with_length
    ),
    "index": Parser(
        shards.parse_index,
        CheckpointError,
        {"metadata": {"total_size": 26}, "weight_map": SHARDS},
        lambda found, _: all(type(shard) is str and Path(shard).name == shard for shard in found.values()),
    ),
    "config": Parser(
        folder.parse_config,
        ConfigError,
        TINY.to_json(),
        lambda found, _: Config.from_json(found[1].to_json()) == found[1],
    ),
    "Orbax index": Parser(
        orbax.parse_index,
        CheckpointError,
        {"orbax/ocdbt/manifest.ocdbt": 120, "orbax/d/0": 0},
        lambda found, _: all(name.startswith("orbax/") and type(n) is int and n >= 0 for name, n in found.items()),
    ),
    "expert mapping": Parser(
        lambda data: expert_mapping.parse(data, TINY),
        CheckpointError,
        {str(layer): {str(2 * expert): expert for expert in range(7)} for layer in range(4)},
        lambda found, _: [len({*numbers}) for numbers in found] == [7] * 4 and min(map(min, found)) >= 0,
    ),
    "SHA256SUMS": Parser(
        checksums.parse,
        CheckpointError,
        DIGESTS,
        lambda found, _: all(len(digest) == 64 and "/" not in name for name, digest in found.items()),
    ),
}
EACH = pytest.mark.parametrize("parser", PARSERS.values(), ids=PARSERS)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from([10**400, 1 << 63]) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def whole(parser: Parser) -> bytes:
    """The file that the sample makes."""
    return parser.pack(parser.sample if type(parser.sample) is bytes else json.dumps(parser.sample).encode())


def gives_a_value_or_its_error(parser: Parser, data: bytes) -> None:
    try:
        found = parser.parse(data)
    except parser.error as error:
        assert str(error).count("\n") == 0
        return
    assert parser.is_sound(found, len(data))


@EACH
def test_the_sample_is_accepted(parser: Parser) -> None:
    found = parser.parse(whole(parser))
    assert found and parser.is_sound(found, len(whole(parser)))


@EACH
@given(data=st.binary(max_size=200))
def test_any_bytes(parser: Parser, data: bytes) -> None:
    gives_a_value_or_its_error(parser, data)
    gives_a_value_or_its_error(parser, parser.pack(data))


@EACH
@given(data=st.data())
def test_a_file_with_other_bytes_in_some_place(parser: Parser, data: st.DataObject) -> None:
    before = whole(parser)
    first, last = sorted(data.draw(st.tuples(*[st.integers(0, len(before))] * 2)))
    gives_a_value_or_its_error(parser, before[:first] + data.draw(st.binary(max_size=8)) + before[last:])


@EACH
@given(data=st.data())
def test_json_with_another_value_in_some_place(parser: Parser, data: st.DataObject) -> None:
    if type(parser.sample) is bytes:
        return
    changed = {"": copy.deepcopy(parser.sample)}
    at: Any = changed
    while True:
        key = data.draw(st.sampled_from(sorted(at) if type(at) is dict else range(len(at))))
        if not at[key] or type(at[key]) not in (dict, list) or data.draw(st.integers(0, 3)) == 0:
            break
        at = at[key]
    at[key] = data.draw(VALUES)
    gives_a_value_or_its_error(parser, parser.pack(json.dumps(changed[""]).encode()))


@EACH
def test_brackets_without_end(parser: Parser) -> None:
    with pytest.raises(parser.error):
        parser.parse(parser.pack(b"[" * 100_000))


REFUSED = [
    ("safetensors header", {"a": entry("BF16", [3, 4], 0, 24)}, "bytes behind the last"),
    ("safetensors header", HEADER | {"b": entry("U8", [True, 2], 24, 26)}, "whole numbers"),
    ("safetensors header", HEADER | {"b": entry("F8", [2], 24, 20)}, "do not fit"),
    ("safetensors header", HEADER | {"b": entry(7, [2], 24, 26)}, "dtype"),  # type: ignore[arg-type]
    ("safetensors header", HEADER | {"b\nc": entry("U8", [2], 24, 26)}, "must be words"),
    ("index", {"weight_map": SHARDS | {"b": 7}}, "no plain file name"),
    ("index", {"weight_map": SHARDS | {"b\nc": "b.safetensors"}}, "control characters"),
    ("index", {"weight_map": SHARDS | {"b": "../b.safetensors"}}, "no plain file name"),
    ("index", {"weight_map": SHARDS | {"b": ".."}}, "no plain file name"),
    ("index", {"weight_map": SHARDS | {"b": ""}}, "no plain file name"),
    ("config", TINY.to_json() | {"rope_theta": 10**400}, "rope_theta"),
    ("Orbax index", {"config.json": 1}, "no file below"),
    ("Orbax index", {"orbax/../../etc": 1}, "no file below"),
    ("Orbax index", {"orbax/d/0": -1}, "-1"),
    ("Orbax index", {"orbax/d\n0": 1}, "no file below"),
    ("Orbax index", {"orbax/d/0": True}, "True"),
]


@pytest.mark.parametrize(("name", "content", "says"), REFUSED)
def test_refused(name: str, content: Any, says: str) -> None:
    parser = PARSERS[name]
    with pytest.raises(parser.error) as raised:
        parser.parse(parser.pack(json.dumps(content).encode()))
    assert says in str(raised.value)


@pytest.mark.parametrize("data", [b"", DIGESTS * 2, DIGESTS.upper(), b"0" * 64 + b"  sub/folder\n", DIGESTS + b"\n"])
def test_lists_of_digests_that_are_refused(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="SHA256SUMS: line"):
        checksums.parse(data)


def test_readers_give_what_parsers_give(tiny_mxfp4: Path) -> None:
    index = tiny_mxfp4 / shards.INDEX
    assert shards.read_index(index) == shards.parse_index(index.read_bytes())
    file = min(tiny_mxfp4.glob("*.safetensors"))
    read, parsed = shards.read_header(file), shards.parse_header(file.read_bytes(), file.stat().st_size)
    assert [(t.name, t.dtype, t.shape, t.offset, t.nbytes) for t in read] == [tuple(vars(e).values()) for e in parsed]
    assert folder.read_config(tiny_mxfp4) == folder.parse_config((tiny_mxfp4 / "config.json").read_bytes())
