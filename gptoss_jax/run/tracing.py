"""The trace of a profile: what each token chose, kept while the profile runs, and written at its end.

Letters: see `config`.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ..data.dataset import Dataset
from ..data.rows import Row, row_hash
from ..errors import OutputError, ResumeError, StorageError
from ..files import atomic
from ..files.paths import AnyPath, is_local, storage_errors
from ..network.batch import Batch, Tokens
from ..routing.segments import OTHER, of_row
from ..routing.tables import About, Routed
from ..routing.traces import TRACE, Writer
from .engine import Clock, Engine, Unit
from .progress import Progress, State
from .steps import Asked, Chosen

ORIGIN = ("model", "command", "options", "versions", "settings_hash")  # of profile.json, which trace.json has too
HALF = np.dtype(np.float16)


@dataclass(frozen=True)
class Tracing:
    """Where the trace of a profile is to stand."""

    target: AnyPath
    overwrite: bool
    standing: str
    """The hash of the settings of the run whose finished trace stands there already; empty where none does."""

    @classmethod
    def begin(cls, target: AnyPath, kept: Progress, out: AnyPath, overwrite: bool, goes_on: bool) -> "Tracing":
        """OutputError where a trace cannot be written there, said before hours of work.

        One that is finished may be of the run that `goes_on`: `is_whole` knows by the settings."""
        with named():
            here, *others = (path.resolve() if is_local(path) else path for path in (target, out, kept.folder))
            for other in others:
                if here == other or here in other.parents or other in here.parents:
                    raise OutputError(f"{target}: --out {out} is there too: give another --trace")
            standing = standing_hash(target / TRACE) if goes_on else ""
            # Files of a remote folder come one after the other, trace.json last.
            overwrite = overwrite or (goes_on and not standing and not is_local(target))
            if overwrite or not standing:
                atomic.try_folder(target, overwrite)
        return cls(target, overwrite, standing)

    def is_whole(self, settings_hash: str) -> bool:
        """Whether the trace of the run with these settings stands there; OutputError where another run's is in the
        way."""
        if self.standing and self.standing != settings_hash and not self.overwrite:
            raise OutputError(f"{self.target}: exists already, and is not of this run: give another --trace")
        return self.standing == settings_hash

    def write(
        self, dataset: Dataset, state: State, kept: Progress, tokenizer: Any, about: About, info: dict[str, Any]
    ) -> None:
        """Write what `Traced` has kept of all batches, one of them in memory at a time, unless it stands already."""
        if self.is_whole(info["settings_hash"]):
            return
        with named(), atomic.new_folder(self.target, self.overwrite, last=TRACE) as folder:
            writer, names = Writer(folder, about), prompt_ids(dataset.rows)
            taken = dict.fromkeys(names, 1)
            for portion, (first, part) in enumerate(_portions(dataset, state)):
                reading = _Reading(part, names[first:], taken, tokenizer)
                for number, tokens in enumerate(part.numbered()):
                    if tokens.count:
                        experts_TLk, gates_TLk = _read(kept, portion, number, tokens.count, about)
                        for prompt in reading.prompts(tokens, experts_TLk, gates_TLk):
                            writer.add(prompt)
            writer.finish({name: info[name] for name in ORIGIN})


@contextmanager
def named() -> Iterator[None]:
    """A block whose errors name the option --trace where they speak of --out."""
    try:
        yield
    except (OutputError, ResumeError, StorageError) as error:
        said = str(error).replace("another --out", "another --trace").replace("an --out", "a --trace")
        raise type(error)(said) from error


def standing_hash(file: AnyPath) -> str:
    """The hash of the settings of the run that wrote the file, the last of its output; empty where none is finished."""
    try:
        with storage_errors(file):
            return str(json.loads(file.read_bytes())["settings_hash"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


class Traced:
    """An engine whose first pass also keeps what each token chose: files of the progress, one for each unit, in which
    its layers' experts and gates stand as the trace has them."""

    def __init__(self, engine: Engine, kept: Progress, state: State, about: About):
        self.engine, self.kept, self.state, self.about = engine, kept, state, about
        self.num_layers, self.keeps_units = engine.num_layers, engine.keeps_units

    @property
    def clock(self) -> Clock:
        """The engine's."""
        return self.engine.clock

    @clock.setter
    def clock(self, clock: Clock) -> None:
        self.engine.clock = clock

    def run(self, batches: Iterable[Batch], asked: Asked, done: int) -> Iterator[Unit]:
        if self.state.weighting:  # a later pass over the same tokens
            yield from self.engine.run(batches, asked, done)
            return
        portion = len(self.state.curve)
        real: list[np.ndarray] = []  # of each batch that the engine has taken

        def seen() -> Iterator[Batch]:
            for batch in batches:
                real.append(np.asarray(batch.tokens.segments) > 0)
                yield batch

        for unit_number, unit in enumerate(self.engine.run(seen(), asked._replace(routing=True), done), done):
            # A layer at a time the engine takes all batches at once, else each when its unit comes.
            number = unit_number % len(real)
            assert unit.routing is not None, "asked for"
            self.kept.write(_file(portion, number, unit.first_layer), _packed(unit.routing, real[number], self.about))
            yield unit


def _file(portion: int, batch: int, first_layer: int) -> str:
    return f"routing-{portion}.{batch}.{first_layer}"


def _packed(chosen: Chosen, real_BS: np.ndarray, about: About) -> np.ndarray:
    """The choices [l, B, S, k] of the tokens that are not padding as bytes: gates, and then experts."""
    gates, experts = (np.asarray(x)[:, real_BS] for x in (chosen.gates, chosen.experts))
    arrays = gates.astype(HALF), experts.astype(about.expert_type)
    return np.concatenate([array.ravel().view(np.uint8) for array in arrays])


def _read(kept: Progress, portion: int, batch: int, tokens: int, about: About) -> tuple[np.ndarray, np.ndarray]:
    """The experts and gates of a batch's tokens, [T, L, k] each, from one file or from one for each layer."""
    experts: list[np.ndarray] = []  # [T, k] of each layer, as are the gates
    gates: list[np.ndarray] = []
    shape = (-1, tokens, about.top_k)
    while len(gates) < about.num_layers:
        name = _file(portion, batch, len(gates))
        data = kept.read(name)
        if data is None or not len(data):
            raise kept.damaged(name)
        choices = len(data) // (HALF.itemsize + about.expert_type.itemsize)
        of_gates, of_experts = np.split(data, [choices * HALF.itemsize])
        gates.extend(of_gates.view(HALF).reshape(shape))
        experts.extend(of_experts.view(about.expert_type).reshape(shape))
    return np.stack(experts, axis=1), np.stack(gates, axis=1)


def _portions(dataset: Dataset, state: State) -> Iterator[tuple[int, Dataset]]:
    """The portions of rows that ran, each with the number of its first row: all at once, or as `stable` took them."""
    if not state.curve:
        yield 0, dataset
    first = 0
    for point in state.curve:
        yield first, dataset.part(first, point["rows"])
        first = point["rows"]


def prompt_ids(rows: Sequence[Row]) -> list[str]:
    """A name for each row: its id, or its hash where it has none. Of several rows with one name the second gets #2
    behind it, the third #3."""
    taken: dict[str, int] = {}
    return [_free(row.id or f"{row_hash(row):016x}", taken) for row in rows]


def _free(name: str, taken: dict[str, int]) -> str:
    """The name, with a number behind it where it is taken; `taken` has all names that are, and their last numbers."""
    free, number = name, taken.get(name, 1)
    while free in taken:
        number += 1
        free = f"{name}#{number}"
    taken |= {free: 1, name: number}
    return free


class _Reading:
    """Takes batches apart into the documents that they are made of."""

    def __init__(self, dataset: Dataset, names: Sequence[str], taken: dict[str, int], tokenizer: Any):
        """`names` are those of the rows; pieces of them get others, which are then `taken` too."""
        self.documents, self.names, self.taken = dataset.documents, names, taken
        self.tokenizer, self.eos = tokenizer, dataset.layout.eos
        packed = dataset.layout.kind == "packed"
        lengths = [len(document.token_ids) + packed for document in self.documents]
        self.starts = np.cumsum([0, *lengths])[:-1]
        self._whole = lru_cache(1)(self._tokens_and_segments)  # a document may be in several pieces

    def prompts(self, tokens: Tokens, experts_TLk: np.ndarray, gates_TLk: np.ndarray) -> Iterator[Routed]:
        """The documents of a batch, or pieces of them. `tokens` has numbers in the place of ids; arrays are of its
        tokens that are not padding."""
        real_BS = tokens.segments > 0
        rows_T, numbers_T, positions_T = np.nonzero(real_BS)[0], tokens.ids[real_BS], tokens.positions[real_BS]
        documents_T = np.searchsorted(self.starts, numbers_T, side="right") - 1
        begins = np.flatnonzero(np.diff(documents_T, prepend=-1) | np.diff(rows_T, prepend=0))
        for begin, end in zip(begins, [*begins[1:], len(numbers_T)], strict=True):
            document = int(documents_T[begin])
            first = int(numbers_T[begin] - self.starts[document])
            token_ids, segments = (x[first : first + end - begin] for x in self._whole(document))
            name = self.names[document]
            yield Routed(
                prompt_id=_free(f"{name}@{first}", self.taken) if first else name,
                token_ids=token_ids,
                positions=positions_T[begin:end],
                segments=segments,
                generated=np.zeros(end - begin, bool),
                experts=experts_TLk[begin:end],
                gates=gates_TLk[begin:end],
            )

    def _tokens_and_segments(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Of a document and the EOS that is packed behind it."""
        document = self.documents[number]
        ids, before = document.token_ids, document.before
        segments = of_row(np.concatenate([before, ids]), self.tokenizer)[len(before) :]
        return np.append(ids, np.int32(self.eos)), np.append(segments, np.uint8(OTHER))
