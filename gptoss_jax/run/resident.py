"""The engine whose devices hold all weights. Letters: see `config`."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import jax
import numpy as np

from ..devices import hosts
from ..network.batch import Batch
from ..network.model import GptOss
from ..selection.greedy import WIDE, Grams
from .engine import Clock, Timed, Unit
from .steps import Asked, Mapped


class Resident:
    """Each batch passes all layers in one step, mapped over devices by `mapping`; a unit is a batch."""

    keeps_units = False

    def __init__(self, model: GptOss, mapping: Callable[[Asked], Mapped]):
        self.model, self.mapping, self.clock = model, mapping, Clock()
        self.steps: dict[Asked, tuple[Mapped, Timed]] = {}
        self.num_layers = model.config.num_layers

    def run(self, batches: Iterable[Batch], asked: Asked, done: int) -> Iterator[Unit]:
        if asked not in self.steps:
            mapped = self.mapping(asked)
            self.steps[asked] = mapped, Timed(mapped.step, self.clock)
        mapped, step = self.steps[asked]
        for batch in islice(batches, done, None):
            placed = jax.tree.map(mapped.put, batch)
            results = hosts.gather(step(batch.shape, self.model, placed))
            S = batch.shape[1]

            def rows(x: Any, S: int = S) -> np.ndarray:
                return np.asarray(x).reshape(-1, S)  # pmap has the devices as a further axis

            def layers(x: Any, is_wide: bool = True, S: int = S) -> np.ndarray:
                return np.asarray(x).reshape(self.num_layers, -1, S, *(x.shape[-1:] if is_wide else ()))

            yield Unit(
                first_layer=0,
                tokens=batch.tokens.count,
                statistics=None if results.statistics is None else results.statistics.to_host(),
                routing=None if results.routing is None else jax.tree.map(layers, results.routing),
                grams=None if results.grams is None else Grams(*map(layers, results.grams, WIDE)),
                scores=None if results.scores is None else np.stack([rows(x) for x in results.scores], axis=-1),
                finals=results.finals,
            )
