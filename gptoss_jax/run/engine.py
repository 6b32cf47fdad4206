"""What engines share: the pieces that a run's work comes in, and steps whose time is kept. Letters: see `config`."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from ..devices.topologies import does_not_fit
from ..errors import MeshError
from ..network.batch import Batch
from ..selection.greedy import Grams
from ..statistics.sums import Statistics
from .steps import Asked, Chosen


class Unit(NamedTuple):
    """A finished piece of a run's work, in an order that is always the same."""

    first_layer: int
    tokens: float
    """Tokens that passed, times the share of the layers that they passed."""
    statistics: Statistics | None = None
    """The statistics of some layers, [l, G, …], on the host."""
    routing: Chosen | None = None
    """What a batch's tokens chose in these layers, [l, B, S, k], on the host."""
    scores: np.ndarray | None = None
    """float32 [B, S, 2] of a whole batch: see `scores.TokenScores`."""
    finals: np.ndarray | None = None
    """[B, N, D] of a whole batch, in the type of the computation."""
    grams: Grams | None = None
    """What choosing together needs of a batch's tokens in these layers, [l, B, S, …], on the host."""


@runtime_checkable  # annotations are checked in tests
class Engine(Protocol):
    """What computes a profile: `resident.Resident`, or `streamed.Streamed`."""

    clock: "Clock"
    num_layers: int
    keeps_units: bool
    """Whether it keeps something of each unit itself, and can go on from the last one alone."""

    def run(self, batches: Iterable[Batch], asked: Asked, done: int) -> Iterator[Unit]:
        """All batches through the model, without the first `done` units. A unit counts as finished when the next one
        is asked for."""
        ...


@dataclass
class Clock:
    """What a run has taken so far."""

    seconds: float = 0.0
    """The time of the steps alone."""
    compile_seconds: float = 0.0
    """The time of compiling, and of bringing arrays to the devices."""


class Timed:
    """A jitted step, compiled once for each shape of a batch, with the time of compiling kept apart."""

    def __init__(self, step: Any, clock: Clock):
        self.step, self.clock = step, clock
        self.compiled: dict[tuple[int, ...], Any] = {}

    def __call__(self, batch_shape: tuple[int, ...], *arguments: Any) -> Any:
        """The step's results, when they are there; MeshError where a step does not fit."""
        self.prepare(batch_shape, *arguments)
        start = time.perf_counter()
        result = jax.block_until_ready(self.compiled[batch_shape](*arguments))
        self.clock.seconds += time.perf_counter() - start
        return result

    def prepare(self, batch_shape: tuple[int, ...], *arguments: Any) -> None:
        """Compile for a shape that is new; `jax.ShapeDtypeStruct` may stand for arrays that are still to come."""
        start = time.perf_counter()
        if batch_shape not in self.compiled:
            with _room_for(batch_shape):
                self.compiled[batch_shape] = self.step.lower(*arguments).compile()
        self.clock.compile_seconds += time.perf_counter() - start


@contextmanager
def _room_for(shape: tuple[int, ...]) -> Iterator[None]:
    """MeshError where the compiler finds that a step does not fit into a device's memory."""
    try:
        yield
    except Exception as error:
        if not (amounts := does_not_fit(error)):
            raise
        needed, available = (amount / (1 << 30) for amount in amounts)
        raise MeshError(
            f"a step of {shape[0]} × {shape[1]} tokens needs {needed:.2f} GiB of {available:.2f} on each device, "
            f"{needed - available:.2f} too much: take a smaller --batch-size, a larger expert in --mesh, or --weights "
            "mxfp4; gptoss-jax plan finds what fits"
        ) from error
