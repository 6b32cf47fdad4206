"""Distillation of models larger than memory: all batches pass layer by layer, and back. Letters: see `config`."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..config import Config
from ..devices.placement import Placement, here
from ..evaluation.compare import Top
from ..network.batch import Batch
from ..network.model import Layer
from ..network.source import Source
from ..run.engine import Clock, Timed
from ..run.steps import STEPS_KEPT
from ..run.streamed import Layers
from .engine import Found
from .loss import Finals, Loss, Teacher
from .steps import head_backward, head_loss, head_teacher, layer_backward, layer_forward, where
from .trained import Trained, joined, of_head, of_layer, stacked, written


class Streamed:
    """A layer is read while another runs. A step reads all of them twice, for all batches at once: first to last, where
    each layer's input is kept, and last to first, where each runs again. See `Engine`."""

    def __init__(self, source: Source, dtype: Any, kind: type[Finals] | type[Top] = Finals):
        """`kind` is that of the teachers."""
        self.layers, self.config = Layers(source, dtype), source.config
        self.kind, self.forward, self.head, self.backward = kind, Clock(), Clock(), Clock()
        layer, back, teacher, loss, head_back = _jitted(self.config, kind)  # type: ignore[arg-type]  # a class is hashable
        self._whole_layer, self._layer = (Timed(layer, self.forward) for _ in range(2))
        self._layer_backward = Timed(back, self.backward)
        self._teacher, self._loss, self._head_backward = (Timed(x, self.head) for x in (teacher, loss, head_back))

    def teach(self, batches: Sequence[Batch]) -> list[Teacher]:
        """See `Engine`."""
        batches = [replace(batch, kept=None) for batch in batches]
        *_, last = self._inputs(self._whole_layer, None, batches, keep=False)
        head = self.layers.head()
        return [self._teacher(batch.shape, head, x, batch) for x, batch in zip(last, batches, strict=True)]

    def gradients(self, trained: Trained, batches: Sequence[Batch], teachers: Sequence[Teacher]) -> Found:
        """See `Engine`."""
        trained = written(trained)
        *inputs, last = self._inputs(self._layer, trained, batches, keep=True)
        kl, weight, changes, of_final = self._behind_layers(trained, last, batches, teachers)
        del last
        of_layers: list[Trained] = []
        for index, layer in self.layers.each(range(self.config.num_layers)[::-1]):
            in_layer, total = of_layer(trained, index), None
            for number, (x_BSD, batch) in enumerate(zip(inputs.pop(), batches, strict=True)):
                asked = layer, in_layer, x_BSD, changes[number], batch, np.asarray(index)
                changes[number], found = self._layer_backward(batch.shape, *asked)
                total = found if total is None else jax.tree.map(jnp.add, total, found)
            of_layers.insert(0, total or {})
        return Found(kl, weight, joined(stacked(of_layers), of_final))

    def losses(self, trained: Trained, batches: Sequence[Batch], teachers: Sequence[Teacher]) -> Loss:
        """See `Engine`."""
        trained = written(trained)
        *_, last = self._inputs(self._layer, trained, batches, keep=False)
        head, behind = self.layers.head(), of_head(trained)
        found = [
            jax.device_get(self._loss(batch.shape, head, behind, x_BSD, batch, teacher))
            for x_BSD, batch, teacher in zip(last, batches, teachers, strict=True)
        ]
        return Loss(*map(np.concatenate, zip(*found, strict=True)))

    def _inputs(self, step: Timed, trained: Trained | None, batches: Sequence[Batch], keep: bool) -> list[list[Any]]:
        """What goes into each layer, and comes out of the last, of each batch; without `keep` the latter alone."""
        inputs = [[jnp.asarray(self.layers.embed(batch)) for batch in batches]]
        for index, layer in self.layers.each(range(self.config.num_layers)):
            in_layer = of_layer(trained, index) if trained else {}
            outputs = [
                step(batch.shape, layer, in_layer, x_BSD, batch, np.asarray(index))
                for x_BSD, batch in zip(inputs[-1], batches, strict=True)
            ]
            inputs = [*inputs, outputs] if keep else [outputs]
        return inputs

    def _behind_layers(
        self, trained: Trained, last: list[Any], batches: Sequence[Batch], teachers: Sequence[Teacher]
    ) -> tuple[float, float, list[Any], Trained]:
        """Of all batches: the loss, what they count, the gradients by what comes out of the last layer, each, and by
        what is trained behind it, summed."""
        head, behind = self.layers.head(), of_head(trained)
        found = [
            self._head_backward(batch.shape, head, behind, x_BSD, batch, teacher)
            for x_BSD, batch, teacher in zip(last, batches, teachers, strict=True)
        ]
        losses, changes, of_final = zip(*found, strict=True)
        kl, weight = (float(sum(np.sum(x) for x in of_rows)) for of_rows in zip(*losses, strict=True))
        return kl, weight, list(changes), jax.tree.map(lambda *each: sum(each), *of_final)


@lru_cache(STEPS_KEPT)
def _jitted(config: Config, kind: Any) -> tuple[Any, ...]:
    """A layer forward and backward; the teacher, the loss and its gradient behind the last one."""
    place = here()
    steps: list[Any] = [
        partial(layer_forward, config=config, place=place),
        partial(_backward, config=config, place=place),
        partial(head_teacher, place=place, kind=kind),
        partial(head_loss, place=place),
        partial(head_backward, place=place),
    ]
    return tuple(jax.jit(step) for step in steps)


def _backward(
    layer: Layer,
    trained: Trained,
    x_BSD: Float[Array, "B S D"],
    change_BSD: Float[Array, "B S D"],
    batch: Batch,
    index: Int[Array, ""],
    config: Config,
    place: Placement,
) -> tuple[Float[Array, "B S D"], Trained]:
    """The layer of that index alone, backward."""
    return layer_backward(layer, trained, x_BSD, change_BSD, where(batch, index, config), place)
