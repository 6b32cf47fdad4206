"""What is finished of a run, kept in a folder beside its output, so that a killed run can go on."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import safetensors.numpy

from ..devices import hosts
from ..errors import OutputError, ResumeError, reason
from ..files.atomic import replace_file
from ..files.paths import AnyPath
from ..statistics.sums import Statistics
from ..statistics.weightings import WEIGHTINGS
from .engine import Unit

T = TypeVar("T")

SUFFIX = ".progress"
VERSION = 2  # of the files' content: what the first programs kept has none
RUN, STATE = "run", "state"
DIGEST_BYTES = hashlib.sha256().digest_size  # at the head of each file
SHARE = 20  # saving may take at most one twentieth of the run


@contextmanager
def resumable(out: AnyPath) -> Iterator[None]:
    """A block after which whoever stops it is told whether what is finished is kept."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        if not hosts.is_first():
            stop.add_note("process 0 says what is kept")
        elif Progress(out).exists():
            stop.add_note("what is finished is kept: the same command with --resume goes on")
        raise


@runtime_checkable  # annotations are checked in tests
class Kept(Protocol):
    """A state that can be kept."""

    def to_bytes(self) -> bytes:
        """Write the state as a file's bytes."""
        ...


class Progress:
    """Files of one run. Each stands under its name when it is whole, and its digest tells whether it still is."""

    def __init__(self, out: AnyPath):
        self.folder = out.parent / (out.name + SUFFIX)
        self.settings: dict[str, Any] = {}
        self._due = 0.0

    def begin(self, settings: dict[str, Any], resume: bool) -> None:
        """ResumeError where an unfinished run is in the way, or is one of other settings. Writes nothing."""
        self.settings = json.loads(json.dumps(settings))  # as they come back
        theirs = self.begun()
        if theirs is None:
            if self.folder.is_dir() and not all(file.name.startswith(".") for file in self.folder.iterdir()):
                raise ResumeError(f"{self.folder}: is no unfinished run: remove that folder, or give another --out")
            return
        if not resume:
            raise ResumeError(
                f"{self.folder}: holds an unfinished run: --resume goes on with it, or remove that folder to begin anew"
            )
        for name in sorted({*theirs, *self.settings}):
            if theirs.get(name) != self.settings.get(name):
                raise ResumeError(
                    f"{self.folder}: the unfinished run has {name} {theirs.get(name)!r}, this one "
                    f"{self.settings.get(name)!r}: use the same, or remove that folder to begin anew"
                )

    def may_replace(self, overwrite: bool, resume: bool) -> bool:
        """Whether the output may be replaced: one beside an unfinished run that goes on is its own, which was killed
        before it could say that it is done."""
        return overwrite or (resume and self.begun() is not None)

    def write(self, name: str, data: Any) -> None:
        """Keep the bytes of a buffer under `name`, in the place of what stood there."""
        first = not self.exists()
        try:
            if first:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._put(RUN, json.dumps({"version": VERSION, "settings": self.settings}).encode())
            self._put(name, data)
        except Exception as error:  # remote storages have classes of their own
            if first:
                self.remove()
            why = getattr(error, "strerror", None) or reason(error)
            raise OutputError(f"{self.folder}: {why}: free some space or mend it") from error

    def _put(self, name: str, data: Any) -> None:
        payload = memoryview(data).cast("B")
        replace_file(self.folder / name, [hashlib.sha256(payload).digest(), payload])

    def read(self, name: str) -> np.ndarray | None:
        """uint8, mapped into memory where the folder is on this machine; None where nothing is kept under `name`."""
        file = self.folder / name
        try:
            if not file.exists():
                return None
            if isinstance(file, Path) and file.stat().st_size > DIGEST_BYTES:
                whole: np.ndarray = np.memmap(file, np.uint8, "r")
            else:
                whole = np.frombuffer(file.read_bytes(), np.uint8)
        except Exception as error:
            raise ResumeError(f"{file}: cannot be read: {reason(error)}") from error
        payload = whole[DIGEST_BYTES:]
        if hashlib.sha256(payload.data).digest() != whole[:DIGEST_BYTES].tobytes():
            raise self.damaged(name)
        return payload

    def damaged(self, name: str) -> ResumeError:
        """What to raise where a file's content is not what was written."""
        return ResumeError(f"{self.folder / name}: is damaged: remove that folder to begin anew")

    def drop(self, name: str) -> None:
        """Keep nothing under `name`; what cannot be removed now is in nobody's way."""
        with suppress(Exception):
            (self.folder / name).unlink(missing_ok=True)

    def save(self, state: "Kept", always: bool, name: str = STATE) -> None:
        """Keep the state under `name`, unless it was kept a short while ago."""
        if always or time.monotonic() >= self._due:
            start = time.monotonic()
            self.write(name, state.to_bytes())
            self._due = time.monotonic() + SHARE * (time.monotonic() - start)

    def state(self) -> "State":
        """What a profile kept last, or the state of one that begins."""
        return self.kept(State.from_bytes, STATE) or State()

    def kept(self, read: Callable[[bytes], T], name: str) -> T | None:
        """What was kept last under `name`, of the first process; None where nothing was."""
        kept = self.read(name) if hosts.is_first() else None
        data = hosts.from_first(b"" if kept is None else kept.tobytes())
        try:
            return read(data) if data else None
        except Exception as error:  # of several packages; the digest is right
            raise self._foreign() from error

    def remove(self) -> None:
        """The output is complete. The settings go last: where they are missing, nothing is of a run."""
        with suppress(Exception):  # what is left is in nobody's way
            empty(self.folder)
            self.folder.rmdir()

    def exists(self) -> bool:
        """Whether anything is kept."""
        return (self.folder / RUN).exists()

    def begun(self) -> dict[str, Any] | None:
        """The settings of the unfinished run, where there is one."""
        kept = self.read(RUN)
        if kept is None:
            return None
        try:
            found = json.loads(kept.tobytes())
            settings: dict[str, Any] = found["settings"]
            if found["version"] == VERSION and isinstance(settings, dict):
                return settings
        except (ValueError, KeyError, TypeError, RecursionError):
            pass  # the digest is right
        raise self._foreign()

    def _foreign(self) -> ResumeError:
        what = "another version of this program keeps an unfinished run there"
        return ResumeError(f"{self.folder}: {what}: go on with that one, or remove that folder to begin anew")


def empty(folder: Any) -> None:
    """Remove what is in a folder; the settings of a run after all else."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == RUN):
        if path.is_dir():
            empty(path)
            path.rmdir()
        else:
            path.unlink()


@dataclass
class State:
    """How far a run is: all that it needs to go on, beside what its engine keeps."""

    weighting: str = ""
    """The name of the weighting whose pass this is; empty in the first, in which tokens count alike."""
    units: int = 0
    """How many units of this pass, or portion, are finished."""
    tokens: float = 0.0
    """Tokens that went through, of all passes."""
    seconds: float = 0.0
    compile_seconds: float = 0.0
    statistics: Statistics | None = None
    """[L, G, …], of the first pass."""
    weighted: dict[str, np.ndarray] = field(default_factory=dict)
    """[L, G, E] Σ w·g·n of later passes, by their weightings."""
    scores: list[np.ndarray] = field(default_factory=list)
    """The scores of each whole batch, [B, S, 2]."""
    curve: list[dict[str, Any]] = field(default_factory=list)
    """A point for each finished portion of the rows, where they come in portions: see `stable`."""
    kept: list[list[int]] = field(default_factory=list)
    """The experts of each layer that would be kept after the last of them."""

    def add(self, unit: Unit, num_layers: int) -> None:
        """One more unit, whose statistics were asked for, is finished."""
        assert unit.statistics is not None
        if unit.scores is not None:
            self.scores.append(unit.scores)
        if self.statistics is None:
            self.statistics = unit.statistics.zeros(num_layers)
        if not self.weighting:
            self.statistics.add(unit.first_layer, unit.statistics)
        else:
            sums = self.weighted.setdefault(self.weighting, np.zeros_like(self.statistics.gate_norm_sum))
            layers = slice(unit.first_layer, unit.first_layer + len(unit.statistics.gate_norm_sum))
            sums[layers] += unit.statistics.gate_norm_sum
        self.units += 1
        self.tokens += unit.tokens

    def to_bytes(self) -> bytes:
        """Write the state as a file's bytes."""
        numbers = {name: getattr(self, name) for name in NUMBERS}
        arrays = {f"scores/{i}": scores for i, scores in enumerate(self.scores)}
        arrays |= {} if self.statistics is None else self.statistics.arrays()
        arrays |= {f"weighted/{name}": sums for name, sums in self.weighted.items()}
        return safetensors.numpy.save(arrays, {"numbers": json.dumps(numbers)})

    @classmethod
    def from_bytes(cls, data: bytes) -> "State":
        """Read what `to_bytes` writes."""
        arrays = safetensors.numpy.load(data)
        length = int.from_bytes(data[:8], "little")
        numbers = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["numbers"])
        if {*numbers} != {*NUMBERS}:
            raise ValueError("other numbers are kept")
        scores = [arrays.pop(f"scores/{i}") for i in range(sum(name.startswith("scores/") for name in arrays))]
        weighted = {name: arrays.pop(f"weighted/{name}") for name in WEIGHTINGS if f"weighted/{name}" in arrays}
        return cls(**numbers, statistics=Statistics(**arrays) if arrays else None, weighted=weighted, scores=scores)


NUMBERS = ("weighting", "units", "tokens", "seconds", "compile_seconds", "curve", "kept")
