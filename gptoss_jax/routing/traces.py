"""Traces: which experts each token chose, and with which gates, as Parquet, a row a token.

A trace is a folder of parts, part-00000.parquet and so on, and of trace.json, which is written last. A part holds whole
prompts, one after the other, each in the order in which the network saw its tokens. docs/traces.md has the columns.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..config import Config
from ..errors import TraceError, plain, reason, refusal, shown
from ..files.paths import AnyPath, place, storage_errors
from .tables import VERSION, About, Routed, prompts_of, write_part

TRACE = "trace.json"
PART = re.compile(r"part-\d{5,}\.parquet")
PART_TOKENS = 1 << 17  # of gpt-oss-20b 38 MB in memory


class Writer:
    """Writes a trace into a folder that is there, with at most a part of it in memory.

    Example:
        with atomic.new_folder(target, overwrite, last=TRACE) as folder:
            writer = Writer(folder, About.of(source))
            for routed in ...:
                writer.add(routed)
            writer.finish({"model": "nano"})
    """

    def __init__(self, folder: Path, about: About):
        self.folder, self.about = folder, about
        self.parts: list[dict[str, Any]] = []
        self.prompt_ids: set[str] = set()
        self._waiting: list[Routed] = []
        self._tokens = 0  # of those that wait

    def add(self, prompt: Routed) -> None:
        """One more prompt, which has a token, and an id that no other one has."""
        assert len(prompt) and prompt.prompt_id not in self.prompt_ids, prompt.prompt_id
        self.prompt_ids.add(prompt.prompt_id)
        if self._waiting and self._tokens + len(prompt) > PART_TOKENS:
            self._write()
        self._waiting.append(prompt)
        self._tokens += len(prompt)

    def finish(self, info: Mapping[str, Any]) -> None:
        """Write what is left, and trace.json, which also has `info`."""
        if self._waiting:
            self._write()
        found = {
            "kind": "trace",
            "version": VERSION,
            **asdict(self.about),
            "prompts": sum(part["prompts"] for part in self.parts),
            "tokens": sum(part["tokens"] for part in self.parts),
            "parts": self.parts,
            **info,
        }
        (self.folder / TRACE).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")

    def _write(self) -> None:
        name = f"part-{len(self.parts):05}.parquet"
        write_part(self.folder / name, self._waiting, self.about)
        self.parts.append({"file": name, "prompts": len(self._waiting), "tokens": self._tokens})
        self._waiting, self._tokens = [], 0


class Trace:
    """A trace that was written: its prompts one after the other, or one by its id, as NumPy arrays.

    Example:
        >>> import tempfile, gptoss_jax as gj
        >>> folder = tempfile.mkdtemp() + "/trace"
        >>> profile = gj.profile("nano", [{"id": "sum", "text": "2 + 2 = 4"}], max_seq_length=64, trace=folder)
        >>> trace = gj.Trace.open(folder)
        >>> trace.prompts
        ['sum']
        >>> trace["sum"].experts.shape  # tokens, layers, experts a token
        (7, 6, 4)
    """

    def __init__(self, folder: AnyPath, info: dict[str, Any], about: About):
        self.folder, self.info, self.about = folder, info, about
        self._places: dict[str, int] | None = None

    @classmethod
    def open(cls, folder: str | AnyPath) -> "Trace":
        """Read what trace.json says; TraceError where it is none that this program reads."""
        path = place(folder)
        file = path / TRACE
        try:
            with storage_errors(path):
                data = file.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise TraceError(f"{path}: is no finished trace: it holds no {TRACE}") from None
        except OSError as error:
            raise TraceError(f"{file}: cannot be read ({refusal(error)})") from None
        info, about = parse_info(data, str(file))
        return cls(path, info, about)

    def check(self, config: Config, fingerprint: str) -> None:
        """TraceError where the trace is not of this model."""
        for name in ("num_layers", "top_k", "num_experts"):
            if (theirs := getattr(self.about, name)) != getattr(config, name):
                raise TraceError(
                    f"{self.folder}: is of a model whose {name} is {theirs}, this one's is {getattr(config, name)}: "
                    "trace this model"
                )
        if self.about.model_fingerprint != fingerprint:
            raise TraceError(f"{self.folder}: is of another model with the same sizes: trace this model")

    @property
    def prompts(self) -> list[str]:
        """The ids of all prompts, in their order."""
        return [*self._part_of()]

    def __len__(self) -> int:
        """How many prompts it has."""
        return int(self.info["prompts"])

    def __iter__(self) -> Iterator[Routed]:
        """All prompts, one part of them in memory at a time. TraceError where a part is damaged."""
        for number in range(len(self.info["parts"])):
            yield from self._part(number)

    def __getitem__(self, prompt_id: str) -> Routed:
        """The prompt of that id, whose part is read; TraceError where there is none."""
        number = self._part_of().get(prompt_id)
        if number is None:
            raise TraceError(f"{self.folder}: has no prompt {shown(prompt_id)}: `prompts` lists them")
        return next(prompt for prompt in self._part(number) if prompt.prompt_id == prompt_id)

    def _part_of(self) -> dict[str, int]:
        """The part of each prompt, by its id."""
        if self._places is None:
            found: dict[str, int] = {}
            for number in range(len(self.info["parts"])):
                ids = self._read(number, ["prompt_id"])["prompt_id"].combine_chunks().unique().to_pylist()
                found |= dict.fromkeys(ids, number)
            self._places = found
        return self._places

    def _part(self, number: int) -> list[Routed]:
        table, part = self._read(number), self.info["parts"][number]
        try:
            prompts = prompts_of(table, self.about)
            if (len(prompts), len(table)) != (part["prompts"], part["tokens"]):
                raise ValueError(f"holds {len(prompts)} prompts of {len(table)} tokens, {TRACE} says otherwise")
        except ValueError as error:
            raise TraceError(f"{self.folder / part['file']}: {error}: trace again") from None
        return prompts

    def _read(self, number: int, columns: list[str] | None = None) -> pa.Table:
        file = self.folder / self.info["parts"][number]["file"]
        try:
            with storage_errors(file), file.open("rb") as stream:
                part = pq.ParquetFile(stream)
                if not part.schema_arrow.equals(self.about.schema(), check_metadata=True):
                    raise ValueError(f"its columns or its metadata are not those that {TRACE} says")
                return part.read(columns, use_threads=False)  # as files.parquet
        except (OSError, pa.ArrowException, ValueError) as error:
            raise TraceError(f"{file}: no part of this trace ({plain(reason(error))}): trace again") from None


def parse_info(data: bytes, where: str) -> tuple[dict[str, Any], About]:
    """The content of trace.json, and what it is of; TraceError where it is none of this version."""
    try:
        info = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{where}: not a JSON file ({reason(error)}): trace again") from None
    if not isinstance(info, dict) or info.get("kind") != "trace":
        raise TraceError(f"{where}: is no trace: give a folder that --trace wrote")
    if info.get("version") != VERSION:
        raise TraceError(
            f"{where}: is of version {shown(info.get('version'))}, this program reads version {VERSION}: take the "
            "gptoss-jax that wrote it"
        )
    try:
        about = About(**{name: _of_kind(info.get(name), kind, name) for name, kind in About.__annotations__.items()})
        for name in ("prompts", "tokens"):
            _of_kind(info.get(name), int, name)
        for part in _of_kind(info.get("parts"), list, "parts"):
            for name, kind in (("file", str), ("prompts", int), ("tokens", int)):
                _of_kind(part.get(name) if isinstance(part, dict) else None, kind, f"part's {name}")
            if not PART.fullmatch(part["file"]):
                raise ValueError(f"its part's file is {shown(part['file'])}")
    except ValueError as error:
        raise TraceError(f"{where}: {error}: trace again") from None
    return info, about


def _of_kind(value: Any, kind: Any, name: str) -> Any:
    """The value; ValueError where it is of another type, or a number below 0."""
    if type(value) is not kind or (kind is int and value < 0):
        raise ValueError(f"its {name} is {shown(value)}")
    return value
