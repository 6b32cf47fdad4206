"""The columns of a trace: what the tokens of some prompts chose as rows of a table, and back. Letters: see `config`."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float, Int32, Integer, UInt8

from ..errors import TokenizerError, refusal, shown
from ..files.paths import AnyPath, storage_errors
from ..network.source import Source
from .segments import SEGMENTS

VERSION = 1
LIST_ITEMS = {name: f"{name}.list.element" for name in ("experts", "gates")}  # their columns, as Parquet calls them


def expert_type(num_experts: int) -> np.dtype[Any]:
    """The narrowest type of the number of one of so many experts."""
    return np.dtype(np.uint8 if num_experts <= 256 else np.uint16)


@dataclass(frozen=True)
class About:
    """What a trace is of: it says how its lists are read, and whether two traces are of one model."""

    num_layers: int
    top_k: int
    num_experts: int
    model_fingerprint: str
    tokenizer_hash: str
    """SHA-256 of tokenizer.json, which decides what a text's tokens are."""

    @classmethod
    def of(cls, source: Source) -> "About":
        """What a trace of this model is of; TokenizerError where it has no tokenizer."""
        config = source.config
        return cls(
            config.num_layers, config.top_k, config.num_experts, source.fingerprint(), tokenizer_hash(source.folder)
        )

    @property
    def width(self) -> int:
        """L·k."""
        return self.num_layers * self.top_k

    @property
    def expert_type(self) -> Any:
        """The type of an expert's number."""
        return expert_type(self.num_experts)

    def schema(self) -> pa.Schema:
        """The columns of a part; its metadata is this."""
        return pa.schema(
            [
                pa.field("prompt_id", pa.string(), nullable=False),
                pa.field("position", pa.int32(), nullable=False),
                pa.field("token_id", pa.int32(), nullable=False),
                pa.field("segment", pa.dictionary(pa.int8(), pa.string()), nullable=False),
                pa.field("generated", pa.bool_(), nullable=False),
                pa.field("experts", pa.list_(pa.field("element", pa.from_numpy_dtype(self.expert_type)), self.width)),
                pa.field("gates", pa.list_(pa.field("element", pa.float16()), self.width)),
            ],
            metadata={"version": str(VERSION)} | {name: str(value) for name, value in asdict(self).items()},
        )


@dataclass(frozen=True)
class Routed:
    """A prompt's n tokens, and what the first m of them chose: behind a reply's last token no step was taken.

    Tokens stand in the order in which the network saw them."""

    prompt_id: str
    token_ids: Int32[np.ndarray, " n"]
    positions: Int32[np.ndarray, " n"]
    segments: UInt8[np.ndarray, " n"]
    """Places in `segments.SEGMENTS`."""
    generated: Bool[np.ndarray, " n"]
    """Whether the model wrote it."""
    experts: Integer[np.ndarray, "m L k"]
    """Best first."""
    gates: Float[np.ndarray, "m L k"]
    """Rounded to float16 where they are written: by at most one part in 2,048, and below 6e-5 by at most 3e-8."""

    def __len__(self) -> int:
        """n."""
        return len(self.token_ids)


def tokenizer_hash(folder: AnyPath) -> str:
    """SHA-256 of a checkpoint's tokenizer.json; TokenizerError where it has none."""
    file = folder / "tokenizer.json"
    try:
        with storage_errors(file):
            return sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise TokenizerError(f"{file}: {refusal(error)}: copy the tokenizer of the original model there") from None


def table_of(prompts: Sequence[Routed], about: About) -> pa.Table:
    """The rows of some prompts, one after the other."""
    lengths = [len(prompt) for prompt in prompts]
    lacks = np.concatenate([np.zeros(0, bool), *(np.arange(len(p)) >= len(p.experts) for p in prompts)])
    codes = _joined([prompt.segments for prompt in prompts], np.dtype(np.int8))
    columns = [
        pa.array(np.repeat(np.array([p.prompt_id for p in prompts], object), lengths), pa.string()),
        pa.array(_joined([p.positions for p in prompts], np.dtype(np.int32))),
        pa.array(_joined([p.token_ids for p in prompts], np.dtype(np.int32))),
        pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(SEGMENTS)),
        pa.array(_joined([p.generated for p in prompts], np.dtype(bool))),
        _lists([p.experts for p in prompts], lacks, about, "experts"),
        _lists([p.gates for p in prompts], lacks, about, "gates"),
    ]
    return pa.Table.from_arrays(columns, schema=about.schema())


def _joined(arrays: Iterable[np.ndarray], dtype: np.dtype[Any]) -> np.ndarray:
    """Arrays in a row, in one type; of none an empty one."""
    return np.concatenate([np.zeros(0, dtype), *(array.astype(dtype, copy=False) for array in arrays)])


def _lists(arrays: Sequence[np.ndarray], lacks: np.ndarray, about: About, name: str) -> pa.Array:
    """[m, L, k] of each prompt as the column of that name, null where a token `lacks` it."""
    kind = about.schema().field(name).type
    values = np.zeros((len(lacks), about.width), kind.value_type.to_pandas_dtype())
    values[~lacks] = np.concatenate([values[:0], *(array.reshape(-1, about.width) for array in arrays)])
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), type=kind, mask=pa.array(lacks))


def write_part(file: Path, prompts: Sequence[Routed], about: About) -> None:
    """Write a part; equal prompts give equal bytes."""
    # Numbers of experts are few, so that a dictionary packs them; of gates the upper bytes are alike.
    packed = ["prompt_id", "segment", LIST_ITEMS["experts"]]
    with file.open("wb") as stream:
        pq.write_table(
            table_of(prompts, about),
            stream,
            compression="zstd",
            use_dictionary=packed,
            use_byte_stream_split=[LIST_ITEMS["gates"]],
            row_group_size=max(1, sum(map(len, prompts))),
        )


def prompts_of(table: pa.Table, about: About) -> list[Routed]:
    """The prompts of a part; ValueError where it is not as `table_of` makes it."""
    ids = table["prompt_id"].combine_chunks()
    codes = _codes(table["segment"].combine_chunks())
    columns = {name: table[name].to_numpy() for name in ("token_id", "position", "generated")}
    has = np.asarray(table["experts"].is_valid())
    if (has != np.asarray(table["gates"].is_valid())).any():
        raise ValueError("a token has experts and no gates, or gates and no experts")
    experts, gates = (_arrays(table[name], about) for name in ("experts", "gates"))
    if experts.max(initial=0) >= about.num_experts:
        raise ValueError(f"a token chose expert {experts.max()} of {about.num_experts}")
    before = np.concatenate([[0], np.cumsum(has)])  # tokens that chose, before each
    found = []
    for begin, end in _runs(ids.dictionary_encode().indices.to_numpy()):
        m = int(has[begin:end].sum())
        if has[begin + m : end].any():
            raise ValueError(f"prompt {shown(ids[begin].as_py())} has a token without experts before others with them")
        found.append(
            Routed(
                prompt_id=ids[begin].as_py(),
                token_ids=columns["token_id"][begin:end],
                positions=columns["position"][begin:end],
                segments=codes[begin:end],
                generated=columns["generated"][begin:end],
                experts=experts[before[begin] : before[end]],
                gates=gates[before[begin] : before[end]],
            )
        )
    return found


def _runs(numbers: np.ndarray) -> Iterator[tuple[int, int]]:
    """Begin and end of each run of equal numbers."""
    ends = [*(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)] if len(numbers) else []
    return zip([0, *ends[:-1]], ends, strict=True)


def _codes(column: pa.Array) -> np.ndarray:
    """The segments of a column of their names, uint8; ValueError where there are others."""
    if unknown := {*column.dictionary.to_pylist()} - {*SEGMENTS}:
        raise ValueError(f"a segment is {shown(min(map(str, unknown)))}")
    places = np.array([SEGMENTS.index(name) for name in column.dictionary.to_pylist()], np.uint8)
    return places[column.indices.to_numpy()]


def _arrays(column: pa.ChunkedArray, about: About) -> np.ndarray:
    """[m, L, k] of a column of lists, without those that are null."""
    values = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return values.reshape(-1, about.num_layers, about.top_k)
