"""The engine for models larger than memory: all rows pass a layer, then the next. Letters: see `config`."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ..devices.placement import here
from ..network import cache, rope
from ..network.batch import Tokens
from ..network.cache import Cache
from ..network.model import Head, Layer
from ..network.source import Source, abstract_part, filled, load_part
from ..run.steps import STEPS_KEPT, Chosen, float32_is_float32
from ..run.streamed import weights_form
from .decoder import Advanced, Prompt, of_prompts, padded
from .steps import How, Prompts, Rows, begun, empty, fed, grown, one_layer, put, tokens_of


class Streamed:
    """A layer is read while the one before it runs, and serves all rows and all new prompts before it goes; caches and
    what stands behind the layers stay in memory."""

    shares = 1

    def __init__(self, source: Source, dtype: Any, how: How, batch_size: int, capacity: int):
        """`capacity` is the most tokens that a row may have."""
        self.source, self.dtype, self.how, self.batch_size = source, jnp.dtype(dtype), how, batch_size
        kinds = how.config.layer_types
        self.caches = [cache.empty(how.config, batch_size, capacity, kind, self.dtype) for kind in kinds]
        self.rows = empty(how, batch_size)
        self.head = load_part(source, lambda: Head(how.config, rngs=nnx.Rngs(0)), dtype)
        self.layers = self._read_ahead()
        self._fed, self._one, self._some, self._grown, self._begun = _jitted(how)

    def advance(self, admitted: Sequence[tuple[int, Prompt]]) -> Advanced:
        """See `Decoder`: one token of each row."""
        batches = list(padded(admitted, self.batch_size))
        self.rows, said_B, tokens = self._fed(self.rows)
        runs = not bool(self.rows.done.all())
        x_B1D = self._embed(tokens.ids) if runs else None
        x_by_batch = [self._embed(prompts.ids) for prompts, _ in batches]
        chosen: list[Any] = []
        of_batch: list[list[Any]] = [[] for _ in batches]
        # Where rows have said their last tokens and none come, no layer is read.
        for index, layer in enumerate(islice(self.layers, len(self.caches) if runs or batches else 0)):
            held, number = self.caches[index], np.asarray(index)
            if runs:
                x_B1D, held, some = self._one(layer, x_B1D, tokens, self.rows.kept, held=held, index=number)
                chosen.append(_to_host(some))
            for b, (prompts, _) in enumerate(batches):
                x_by_batch[b], held, some = self._some(layer, x_by_batch[b], prompts, held=held, index=number)
                of_batch[b].append(_to_host(some))
            self.caches[index] = jax.block_until_ready(held)  # the layer's weights go before the next but one comes
        if runs:
            self.rows = self._grown(self.head, x_B1D, self.rows)
        for (prompts, _), x_BSD in zip(batches, x_by_batch, strict=True):
            self.rows = self._begun(self.head, x_BSD, prompts, self.rows)
        return self._advanced(admitted, batches, of_batch, chosen, np.asarray(said_B))

    def _advanced(
        self, admitted: Sequence[Any], batches: Any, of_batch: Any, chosen: list[Any], said_B: np.ndarray
    ) -> Advanced:
        of_prompt: dict[int, Chosen] = {}
        if self.how.routing:
            for (prompts, places), some in zip(batches, of_batch, strict=True):
                of_prompt |= of_prompts(Chosen(*map(np.stack, zip(*some, strict=True))), places, prompts.lengths)
        of_rows = None
        if self.how.routing and chosen:
            of_rows = Chosen(*(np.stack(x)[None, :, :, 0] for x in zip(*chosen, strict=True)))
        prompts_chosen = [of_prompt.get(n) for n in range(len(admitted))]
        return Advanced(prompts_chosen, said_B[None], of_rows, np.asarray(self.rows.done))

    def _read_ahead(self) -> Iterator[Layer]:
        """The layers, from the first to the last and again, the next of which is read meanwhile."""
        config, form = self.how.config, weights_form(self.source)
        shapes = abstract_part(lambda: Layer(config, form, rngs=nnx.Rngs(0)), self.dtype)

        def read(index: int) -> Any:
            return filled(self.source, shapes, f"layers/{index % config.num_layers}/")

        with ThreadPoolExecutor(1) as reader:
            index, coming = 0, reader.submit(read, 0)
            while True:
                layer = coming.result()
                index += 1
                coming = reader.submit(read, index)
                yield layer

    def _embed(self, ids: Any) -> np.ndarray:
        return self.source.rows("embedding", np.asarray(ids)).astype(self.dtype, copy=False)


@lru_cache(STEPS_KEPT)
def _jitted(how: How) -> tuple[Any, ...]:
    """`fed`, `_one`, `_some`, `grown` and `_begun`, jitted."""
    place = here()
    return (
        jax.jit(partial(fed, how=how)),
        jax.jit(partial(_one, how=how, place=place), donate_argnames="held"),
        jax.jit(partial(_some, how=how, place=place), donate_argnames="held"),
        jax.jit(partial(grown, how=how, place=place)),
        jax.jit(partial(_begun, how=how, place=place)),
    )


@float32_is_float32
def _one(
    layer: Layer,
    x_B1D: Float[Array, "B 1 D"],
    tokens: Tokens,
    kept_BLE: Bool[Array, "B L E"] | None,
    held: Cache,
    index: Int[Array, ""],
    how: How,
    place: Any,
) -> Any:
    """The next token of each row through one layer."""
    tables = rope.tables(how.config, tokens.positions)
    return one_layer(layer, x_B1D, tokens, tables, held, index, kept_BLE, how, place)


@float32_is_float32
def _some(
    layer: Layer,
    x_BSD: Float[Array, "B S D"],
    prompts: Prompts,
    held: Cache,
    index: Int[Array, ""],
    how: How,
    place: Any,
) -> Any:
    """Prompts through one layer, whose cache takes them in."""
    tokens, empty = tokens_of(prompts), held.empty(len(x_BSD))
    tables = rope.tables(how.config, tokens.positions)
    x_BSD, own, chosen = one_layer(layer, x_BSD, tokens, tables, empty, index, prompts.kept, how, place)
    return x_BSD, put(held, own, prompts.slots), chosen


def _begun(head: Head, x_BSD: Float[Array, "B S D"], prompts: Prompts, rows: Rows, how: How, place: Any) -> Rows:
    """The rows with those that begin behind prompts."""
    return put(rows, begun(head, x_BSD, prompts, how, place), prompts.slots)


def _to_host(chosen: Chosen | None) -> Chosen | None:
    return None if chosen is None else Chosen(*map(np.asarray, chosen))
