"""The engine for models larger than memory: all rows pass one layer, then the next. Letters: see `config`."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..config import Config, Form
from ..devices.placement import here
from ..network.batch import Batch
from ..network.model import Head, Layer
from ..network.source import Source, abstract_part, load_part
from .engine import Clock, Timed, Unit
from .progress import Progress
from .steps import STEPS_KEPT, Asked, Results, final_step, layer_step, score_step


def weights_form(source: Source) -> Form:
    """The form in which a layer's experts are read: four bits stay four bits, in the layout that asks least work."""
    if not source.quantized:
        return "bf16"
    # The kernels of TPUs take the experts of a layer at once.
    return "mxfp4" if jax.default_backend() == "tpu" else source.four_bits


class Layers:
    """The weights of a source, of which a layer at a time is in memory, and the next one comes."""

    def __init__(self, source: Source, dtype: Any):
        self.source, self.config, self.dtype = source, source.config, jnp.dtype(dtype)
        self.form = weights_form(source)

    def each(self, indices: Sequence[int], meanwhile: Callable[[], None] = lambda: None) -> Iterator[tuple[int, Layer]]:
        """The layers of these indices: each is read while the one before it is used, the first during `meanwhile`."""
        if not indices:  # the run was stopped behind its last unit
            return
        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(self._read, indices[0])
            meanwhile()
            for number, index in enumerate(indices, 1):
                layer = coming.result()
                if number < len(indices):
                    coming = reader.submit(self._read, indices[number])
                yield index, layer

    def abstract(self) -> Layer:
        """Any layer, with shapes and types in the place of arrays."""
        part: Layer = abstract_part(self._make, self.dtype)
        return part

    def head(self) -> Head:
        """What stands behind the layers."""
        part: Head = load_part(self.source, lambda: Head(self.config, rngs=nnx.Rngs(0)), self.dtype)
        return part

    def embed(self, batch: Batch) -> np.ndarray:
        """What stands before them, [B, S, D]."""
        return self.source.rows("embedding", batch.tokens.ids).astype(self.dtype, copy=False)

    def _make(self) -> Layer:
        return Layer(self.config, self.form, rngs=nnx.Rngs(0))

    def _read(self, index: int) -> Layer:
        part: Layer = load_part(self.source, self._make, self.dtype, f"layers/{index}/")
        return part


class Streamed:
    """A layer is read while the one before it runs; a unit is one layer of one batch.

    What a batch's rows are between two layers is kept by `progress`, from which a killed run goes on, and in
    memory too as far as `activation_bytes` go.
    """

    keeps_units = True

    def __init__(self, source: Source, dtype: Any, progress: Progress, activation_bytes: int):
        self.config, self.dtype, self.layers = source.config, jnp.dtype(dtype), Layers(source, dtype)
        self.clock, self.num_layers = Clock(), self.config.num_layers
        self.steps: dict[Asked, _Steps] = {}
        self.hidden = _Hidden(progress, self.dtype, self.config.hidden_size, activation_bytes)

    def run(self, batches: Iterable[Batch], asked: Asked, done: int) -> Iterator[Unit]:
        batches = list(batches)
        if asked not in self.steps:
            self.steps[asked] = _Steps(*(Timed(step, self.clock) for step in _jitted(self.config, asked)))
        step, score, final = self.steps[asked]
        first, done = divmod(done, len(batches))
        last = self.config.num_layers - 1

        def compile() -> None:
            shape = batches[done].shape
            x_BSD = jax.ShapeDtypeStruct((*shape, self.config.hidden_size), self.dtype)
            step.prepare(shape, self.layers.abstract(), x_BSD, batches[done], np.asarray(first))

        for index, layer in self.layers.each(range(first, self.num_layers), meanwhile=compile):
            head = self.layers.head() if (asked.scores or asked.finals) and index == last else None
            for number, batch in list(enumerate(batches))[done if index == first else 0 :]:
                shape = batch.shape
                x_BSD = self.hidden.get(index, number, shape) if index else self.layers.embed(batch)
                x_BSD, results = step(shape, layer, x_BSD, batch, np.asarray(index))
                if index < last:
                    self.hidden.put(index + 1, number, np.asarray(x_BSD))
                if head is not None and asked.scores:
                    results = results._replace(scores=score(shape, head, x_BSD, batch))
                if head is not None and asked.finals:
                    results = results._replace(finals=final(shape, head, x_BSD, batch))
                yield self._unit(index, batch, results)
                self.hidden.drop(index, number)

    def _unit(self, layer: int, batch: Batch, results: Results) -> Unit:
        """What one layer gave of one batch."""
        layered = (results.statistics, results.routing, results.grams)
        statistics, routing, grams = jax.tree.map(lambda x: x[None], layered)
        return Unit(
            first_layer=layer,
            tokens=batch.tokens.count / self.num_layers,
            statistics=None if statistics is None else statistics.to_host(),
            routing=jax.tree.map(np.asarray, routing),
            scores=None if results.scores is None else np.stack(jax.device_get(results.scores), axis=-1),
            finals=None if results.finals is None else np.asarray(results.finals),
            grams=jax.tree.map(np.asarray, grams),
        )


class _Steps(NamedTuple):
    """The steps of a layer, and of what stands behind the last one."""

    layer: Timed
    score: Timed
    final: Timed


@lru_cache(STEPS_KEPT)
def _jitted(config: Config, asked: Asked) -> tuple[Any, Any, Any]:
    """Those of a layer, of scores and of finals, jitted."""
    place = here()
    layer = partial(layer_step, config=config, place=place, asked=asked)
    return jax.jit(layer), jax.jit(partial(score_step, place=place)), jax.jit(final_step)


class _Hidden:
    """The hidden states of all rows before some layer, by batches."""

    def __init__(self, progress: Progress, dtype: Any, hidden_size: int, limit: int):
        self.progress, self.dtype, self.hidden_size, self.limit = progress, dtype, hidden_size, limit
        self.held: dict[str, np.ndarray] = {}

    def put(self, layer: int, batch: int, x_BSD: np.ndarray) -> None:
        name = f"batch-{batch}.layer-{layer}"
        self.progress.write(name, x_BSD.view(np.uint8))
        if sum(x.nbytes for x in self.held.values()) + x_BSD.nbytes <= self.limit:
            self.held[name] = x_BSD

    def get(self, layer: int, batch: int, shape: tuple[int, ...]) -> np.ndarray:
        name = f"batch-{batch}.layer-{layer}"
        if name in self.held:
            return self.held[name]
        data = self.progress.read(name)
        if data is None or data.size != np.prod(shape) * self.hidden_size * self.dtype.itemsize:
            raise self.progress.damaged(name)
        return data.view(self.dtype).reshape(*shape, self.hidden_size)

    def drop(self, layer: int, batch: int) -> None:
        name = f"batch-{batch}.layer-{layer}"
        self.held.pop(name, None)
        self.progress.drop(name)
