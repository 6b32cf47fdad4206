"""The engine whose devices hold all weights. Letters: see `config`."""

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ..config import Config, Form
from ..devices import hosts
from ..devices import mesh as sharding
from ..devices.mesh import DATA, EXPERT
from ..devices.placement import over
from ..network import cache
from ..network.cache import Cache
from ..network.model import Head, Layer
from ..network.source import Source, abstract_part, filled
from ..run.steps import STEPS_KEPT, Chosen
from .decoder import Advanced, Prompt, of_prompts, padded
from .steps import How, Network, Prompts, Rows, State, decode, empty, prefill

STEPS_AT_ONCE = 16  # tokens between two looks at what was generated


def abstract(config: Config, dtype: Any, mesh: Mesh, form: Form = "bf16") -> Network:
    """The network with shapes, dtypes and shardings over the mesh in the place of arrays."""

    def part(make: Any) -> Any:
        return abstract_part(make, dtype, mesh)

    layer = part(lambda: Layer(config, form, rngs=nnx.Rngs(0)))
    embedding = part(lambda: {"embedding": jnp.zeros((config.vocab_size, config.hidden_size))})["embedding"]
    return Network(embedding, (layer,) * config.num_layers, part(lambda: Head(config, rngs=nnx.Rngs(0))))


def load(source: Source, dtype: Any, mesh: Mesh, form: Form = "bf16") -> Network:
    """The network with all weights, split over the mesh."""
    shapes = abstract(source.config, dtype, mesh, form)
    layers = tuple(filled(source, layer, f"layers/{i}/") for i, layer in enumerate(shapes.layers))
    embedding = filled(source, {"embedding": shapes.embedding})["embedding"]
    return Network(embedding, layers, filled(source, shapes.head))


class Mapped(NamedTuple):
    """The steps over the devices of a mesh, jitted; they take the network and the state, which goes."""

    prefill: Any
    """Takes prompts too, of which each device gets those that become its rows."""
    decode: Any
    state: State
    """How a mesh splits the state."""


@lru_cache(STEPS_KEPT)
def mapped(how: How, mesh: Mesh) -> Mapped:
    """The steps of a network, which may be an abstract one."""
    place, state = over(mesh), _state_specs(how)

    def over_devices(step: Any, more_in: Any, out: Any) -> Any:
        def whole(network: Network, *rest: Any) -> Any:
            # check_vma: the kernels do not say over which axes their results vary.
            in_specs, out_specs = (sharding.specs(network), state, *more_in), (state, out)
            split = jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
            return split(network, *rest)

        return jax.jit(whole, donate_argnums=1)

    return Mapped(
        over_devices(partial(prefill, how=how, place=place), [_of_rows(Prompts, how)], _chosen_specs(how, 1)),
        over_devices(
            partial(decode, how=how, place=place, steps=STEPS_AT_ONCE), [], (P(None, DATA), _chosen_specs(how, 2))
        ),
        state,
    )


def empty_state(how: How, batch_size: int, capacity: int, dtype: Any) -> State:
    """Rows that are all free, with room for `capacity` tokens each."""
    kinds = how.config.layer_types
    caches = tuple(cache.empty(how.config, batch_size, capacity, kind, dtype) for kind in kinds)
    return State(empty(how, batch_size), caches)


@lru_cache(STEPS_KEPT)
def _nothing(how: How, mesh: Mesh, batch_size: int, capacity: int, dtype: Any) -> Any:
    """`empty_state` over a mesh, jitted."""
    shardings = jax.tree.map(partial(NamedSharding, mesh), mapped(how, mesh).state)
    return jax.jit(partial(empty_state, how, batch_size, capacity, dtype), out_shardings=shardings)


class Resident:
    """Prompts pass all layers at once, and then all rows some steps, mapped over the devices of a mesh."""

    def __init__(self, network: Network, how: How, mesh: Mesh, batch_size: int, capacity: int):
        """`capacity` is the most tokens that a row may have."""
        self.network, self.mesh, self.batch_size = network, mesh, batch_size
        self.shares, self.share = mesh.shape[DATA], hosts.share(mesh)
        self.steps = mapped(how, mesh)
        self.state: State = _nothing(how, mesh, batch_size, capacity, network.embedding.dtype)()

    def advance(self, admitted: Sequence[tuple[int, Prompt]]) -> Advanced:
        """See `Decoder`."""
        of_prompt: dict[int, Chosen] = {}
        for prompts, places in padded(admitted, self.batch_size, self.shares):
            self.state, chosen = self.steps.prefill(self.network, self.state, jax.tree.map(self._put, prompts))
            if chosen is not None:
                of_prompt |= of_prompts(hosts.gather(chosen), places, prompts.lengths)
        self.state, said = self.steps.decode(self.network, self.state)
        (tokens, chosen), done = hosts.gather((said, self.state.rows.done))
        return Advanced([of_prompt.get(n) for n in range(len(admitted))], tokens, chosen, done)

    def _put(self, rows: np.ndarray) -> jax.Array:
        """An array [B, …] on the devices, of which each process gives its own part."""
        return jax.make_array_from_process_local_data(NamedSharding(self.mesh, P(DATA)), self.share.own(rows))


def _of_rows(kind: Any, how: How) -> Any:
    """Every array [B, …] of rows or prompts, split over `data`."""
    specs = kind(*(P(DATA),) * len(kind._fields))
    return specs if how.masked else specs._replace(kept=None)


def _state_specs(how: How) -> State:
    """How a mesh splits the state: rows over `data`, the heads of caches over `expert`."""
    by_head: Any = P(DATA, EXPERT)
    by_row: Any = P(DATA)
    return State(_of_rows(Rows, how), (Cache(by_head, by_head, by_row),) * how.config.num_layers)


def _chosen_specs(how: How, before: int) -> Chosen | None:
    """Of choices with so many dimensions before that of rows."""
    spec: Any = P(*(None,) * before, DATA)
    return Chosen(spec, spec) if how.routing else None
