"""What runs on devices: prompts through the network into rows' caches, then a token a step. Letters: see `config`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ..config import SLIDING, Config
from ..devices.placement import Placement
from ..network import rope
from ..network.batch import Tokens
from ..network.cache import Cache
from ..network.model import Head, Interventions, Layer, embed
from ..routing.tables import expert_type
from ..run.options import Sampling
from ..run.steps import Chosen, float32_is_float32
from .sampling import sample


class Network(NamedTuple):
    """The model with a module for each layer: a step of one token would copy its weights out of a stack."""

    embedding: Float[Array, "V D"]
    layers: tuple[Layer, ...]
    head: Head


class Rows(NamedTuple):
    """What is known of each row between two steps, beside its caches."""

    tokens: Int[Array, " B"]
    """The next token: chosen, and not yet seen by the network."""
    positions: Int[Array, " B"]
    """Its position."""
    limits: Int[Array, " B"]
    """The position that the row must not reach."""
    numbers: Int[Array, " B"]
    """The number of its prompt, by which draws of rows differ."""
    done: Bool[Array, " B"]
    kept: Bool[Array, "B L E"] | None = None
    """The experts that its tokens may choose; None for all."""


class State(NamedTuple):
    """Rows, and their keys and values in each layer."""

    rows: Rows
    caches: tuple[Cache, ...]


class Prompts(NamedTuple):
    """Prompts, padded on the right, that go to some of the rows."""

    ids: Int[Any, "B S"]
    lengths: Int[Any, " B"]
    slots: Int[Any, " B"]
    """Which of this device's rows each becomes; one behind the last for those that only fill the batch."""
    limits: Int[Any, " B"]
    numbers: Int[Any, " B"]
    kept: Bool[Any, "B L E"] | None = None


class How(NamedTuple):
    """What does not change from step to step; static."""

    config: Config
    sampling: Sampling
    stop_ids: tuple[int, ...]
    routing: bool = False
    """Whether steps return what was routed."""
    masked: bool = False
    """Whether each row says which experts its tokens may choose."""


def empty(how: How, batch_size: int) -> Rows:
    """Rows that are all free."""
    zeros, config = jnp.zeros(batch_size, jnp.int32), how.config
    kept_BLE = jnp.ones((batch_size, config.num_layers, config.num_experts), bool) if how.masked else None
    return Rows(zeros, zeros, zeros, zeros, jnp.ones(batch_size, bool), kept_BLE)


def prefill(
    network: Network, state: State, prompts: Prompts, how: How, place: Placement
) -> tuple[State, Chosen | None]:
    """The state with prompts in some of its rows, and what the tokens of these chose, [L, B, S, k]."""
    caches = [held.empty(len(prompts.lengths)) for held in state.caches]
    x_BSD, caches, chosen = step(network, tokens_of(prompts), caches, prompts.kept, how, place)
    rows = begun(network.head, x_BSD, prompts, how, place)
    return State(put(state.rows, rows, prompts.slots), put(state.caches, caches, prompts.slots)), chosen


def tokens_of(prompts: Prompts) -> Tokens:
    """What the network takes of prompts."""
    positions = jnp.broadcast_to(jnp.arange(prompts.ids.shape[1]), prompts.ids.shape)
    return Tokens(prompts.ids, positions, (positions < prompts.lengths[:, None]).astype(jnp.int32))


def begun(head: Head, x_BSD: Float[Array, "B S D"], prompts: Prompts, how: How, place: Placement) -> Rows:
    """The rows behind prompts, of which this is the last layer's output."""
    last_BD = x_BSD[jnp.arange(len(x_BSD)), prompts.lengths - 1]
    tokens = next_tokens(head, last_BD, prompts.numbers, prompts.lengths, how, place)
    return Rows(tokens, prompts.lengths, prompts.limits, prompts.numbers, jnp.zeros(len(x_BSD), bool), prompts.kept)


def put(rows: Any, new: Any, slots: Int[Array, " B"]) -> Any:
    """Arrays [rows, …] with new ones in some of their places; what is behind the last is dropped."""
    return jax.tree.map(lambda x, some: x.at[slots].set(some, mode="drop"), rows, new)


def decode(
    network: Network, state: State, how: How, place: Placement, steps: int
) -> tuple[State, tuple[Int[Array, "N B"], Chosen | None]]:
    """So many tokens of each row, −1 behind its end, and what they chose, [N, L, B, k]. A row's last token, which
    nothing follows, does not pass the network."""

    def one_token(state: State, _: None) -> tuple[State, Any]:
        rows, emitted_B, tokens = fed(state.rows, how)
        x_B1D, caches, chosen = step(network, tokens, state.caches, rows.kept, how, place)
        rows = grown(network.head, x_B1D, rows, how, place)
        return State(rows, caches), (emitted_B, jax.tree.map(lambda x: x[:, :, 0], chosen))

    return lax.scan(one_token, state, length=steps)


def fed(rows: Rows, how: How) -> tuple[Rows, Int[Array, " B"], Tokens]:
    """Rows as they are when their next tokens are said; these tokens, −1 where a row had ended; and those of them that
    the network is to see."""
    emitted_B = jnp.where(rows.done, -1, rows.tokens)
    is_stop = jnp.isin(rows.tokens, jnp.array(how.stop_ids, jnp.int32))
    rows = rows._replace(done=rows.done | is_stop | (rows.positions + 1 >= rows.limits))
    # Rows that are done go on in segment 0, as padding, whose experts do not run.
    segments = jnp.where(rows.done, 0, 1)
    return rows, emitted_B, Tokens(rows.tokens[:, None], rows.positions[:, None], segments[:, None])


def grown(head: Head, x_B1D: Float[Array, "B 1 D"], rows: Rows, how: How, place: Placement) -> Rows:
    """Rows with the next token, from the last layer's output for the one before it."""
    positions = rows.positions + 1
    tokens = next_tokens(head, x_B1D[:, 0], rows.numbers, positions, how, place)
    return rows._replace(
        tokens=jnp.where(rows.done, rows.tokens, tokens), positions=jnp.where(rows.done, rows.positions, positions)
    )


def next_tokens(
    head: Head, x_BD: Float[Array, "B D"], numbers: Array, positions: Array, how: How, place: Placement
) -> Int[Array, " B"]:
    """What follows the last layer's output, at these positions."""
    logits_BV = place.gather_experts(float32_is_float32(head.logits)(head.final_norm(x_BD)))
    return sample(logits_BV, numbers, positions, how.sampling)


@float32_is_float32
def step(
    network: Network,
    tokens: Tokens,
    caches: Sequence[Cache],
    kept_BLE: Bool[Array, "B L E"] | None,
    how: How,
    place: Placement,
) -> tuple[Float[Array, "B S D"], tuple[Cache, ...], Chosen | None]:
    """Tokens through all layers: the last one's output, the caches, and what was chosen, [L, B, S, k]."""
    tables = rope.tables(how.config, tokens.positions)
    x_BSD = embed(tokens.ids, network.embedding, how.config.vocab_size, place)
    after: list[Cache] = []
    chosen: list[Any] = []
    for index, (layer, held) in enumerate(zip(network.layers, caches, strict=True)):
        x_BSD, held, some = one_layer(layer, x_BSD, tokens, tables, held, index, kept_BLE, how, place)
        after.append(held)
        chosen.append(some)
    return x_BSD, tuple(after), jax.tree.map(lambda *x: jnp.stack(x), *chosen)


def one_layer(
    layer: Layer,
    x_BSD: Float[Array, "B S D"],
    tokens: Tokens,
    tables: tuple[Array, Array],
    held: Cache,
    index: int | Int[Array, ""],
    kept_BLE: Bool[Array, "B L E"] | None,
    how: How,
    place: Placement,
) -> tuple[Float[Array, "B S D"], Cache, Chosen | None]:
    """The layer of that index: its output, its cache, and what was chosen, [B, S, k], as narrow as traces have it."""
    config = how.config
    sliding = jnp.array([kind == SLIDING for kind in config.layer_types])[index]
    masks = Interventions(kept=None if kept_BLE is None else kept_BLE[:, index])
    output = layer(x_BSD, tokens, tables, sliding, place, cache=held, interventions=masks)
    assert output.cache is not None  # one was given
    chosen = None
    if how.routing:
        routing = output.routing
        experts, gates = (x.reshape(*tokens.ids.shape, -1) for x in (routing.experts_Tk, routing.gates_Tk))
        chosen = Chosen(experts.astype(expert_type(config.num_experts)), gates.astype(jnp.float16))
    return output.hidden, output.cache, chosen
