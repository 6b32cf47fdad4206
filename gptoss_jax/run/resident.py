"""The engine whose devices hold all weights. Letters: see `config`."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import jax
import numpy as np

from ..devices import hosts
from ..network.batch import Batch
from ..network.model import GptOss
from .engine import Clock, Timed, Unit
from .steps import Mapped, Step, profile_step, scored_profile_step


class Resident:
    """Each batch passes all layers in one step, mapped over devices by `mapping`; a unit is a batch."""

    keeps_units = False

    def __init__(self, model: GptOss, mapping: Callable[[Step], Mapped]):
        self.model, self.mapping, self.clock = model, mapping, Clock()
        self.num_layers = model.config.num_layers

    def run(self, batches: Iterable[Batch], scored: bool, done: int) -> Iterator[Unit]:
        mapped = self.mapping(scored_profile_step if scored else profile_step)
        step = Timed(mapped.step, self.clock)
        for batch in islice(batches, done, None):
            placed = jax.tree.map(mapped.put, batch)
            result = hosts.gather(step(batch.token_ids.shape, self.model, placed))
            scores = None
            if result.scores is not None:
                shape = -1, batch.token_ids.shape[1]  # pmap has the devices as a further axis
                scores = np.stack([np.asarray(x).reshape(shape) for x in result.scores], axis=-1)
            yield Unit(result.statistics.to_host(), 0, batch.num_tokens, scores)
