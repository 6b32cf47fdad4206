"""The steps of both engines: a layer, and what stands behind the last one, forward and backward. Letters: see `config`.

Gradients between layers are float32, in whatever type the network computes: each layer adds to them twice, and in
bfloat16 each sum would be rounded. It costs half a hidden state more in memory, beside those of all layers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..config import SLIDING, Config
from ..devices.placement import Placement
from ..network import rope
from ..network.batch import Batch, Tokens
from ..network.model import GptOss, Head, Interventions, Layer
from ..run.steps import Asked, float32_is_float32, layer_step
from .loss import Finals, Loss, Teacher, distance, top
from .trained import Trained, into

NOTHING = Asked(statistics=False)


class Where(NamedTuple):
    """What a layer is told of its tokens."""

    tokens: Tokens
    rope_tables: tuple[Array, Array]
    sliding: Bool[Array, ""]
    kept: Bool[Array, "B E"] | None
    """The experts of this layer that the tokens of each row may choose."""


def where(batch: Batch, index: Int[Array, ""], config: Config) -> Where:
    """For the layer of that index."""
    sliding = jnp.array([kind == SLIDING for kind in config.layer_types])[index]
    kept_BE = None if batch.kept is None else batch.kept[:, index]
    return Where(batch.tokens, rope.tables(config, batch.tokens.positions), sliding, kept_BE)


def layer_forward(
    layer: Layer,
    trained: Trained,
    x_BSD: Float[Array, "B S D"],
    batch: Batch,
    index: Int[Array, ""],
    config: Config,
    place: Placement,
) -> Float[Array, "B S D"]:
    """The output of the layer of that index, with what is trained of it."""
    return layer_step(into(layer, trained), x_BSD, batch, index, config, place, NOTHING)[0]


@float32_is_float32
def layer_backward(
    layer: Layer,
    trained: Trained,
    x_BSD: Float[Array, "B S D"],
    change_BSD: Float[Array, "B S D"],
    where: Where,
    place: Placement,
    index: Int[Array, ""] | None = None,
) -> tuple[Float[Array, "B S D"], Trained]:
    """From the gradient by the layer's output, float32, those by its input and by what is trained of it.

    The layer runs again as far as it is needed. `index` is its own, where its experts' kernels are those of all layers.
    """

    def attended(trained: Trained, x_BSD: Array) -> Array:
        return into(layer, trained).attend(x_BSD, where.tokens, where.rope_tables, where.sliding, place)[0]

    def mixed(trained: Trained, x_BSD: Array) -> Array:
        return into(layer, trained).mix(x_BSD, where.tokens, place, index, Interventions(kept=where.kept)).output_BSD

    attended_BSD, attention_backward = jax.vjp(attended, trained, x_BSD)
    _, mixture_backward = jax.vjp(mixed, trained, x_BSD + attended_BSD)
    of_mixture, more_BSD = mixture_backward(change_BSD.astype(x_BSD.dtype))
    change_BSD = change_BSD + more_BSD.astype(jnp.float32)
    of_attention, more_BSD = attention_backward(change_BSD.astype(x_BSD.dtype))
    change_BSD = change_BSD + more_BSD.astype(jnp.float32)
    return change_BSD, jax.tree.map(jnp.add, of_mixture, of_attention)


@float32_is_float32
def head_loss(
    head: Head | GptOss,
    trained: Trained,
    x_BSD: Float[Array, "B S D"],
    batch: Batch,
    teacher: Teacher,
    place: Placement,
) -> Loss:
    """The loss, from the last layer's output."""
    final_BSD = into(head, trained).final_norm(x_BSD)
    return distance(final_BSD, teacher, head.unembedding[...], batch, place)[0]


@float32_is_float32
def head_backward(
    head: Head | GptOss,
    trained: Trained,
    x_BSD: Float[Array, "B S D"],
    batch: Batch,
    teacher: Teacher,
    place: Placement,
) -> tuple[Loss, Float[Array, "B S D"], Trained]:
    """The loss, and the gradients of its sum by the last layer's output, float32, and by what is trained behind it."""

    def normed(trained: Trained, x_BSD: Array) -> Array:
        return into(head, trained).final_norm(x_BSD)

    loss, change_BSD = distance(normed(trained, x_BSD), teacher, head.unembedding[...], batch, place)
    _, norm_backward = jax.vjp(normed, trained, x_BSD.astype(jnp.float32))
    of_head, change_BSD = norm_backward(change_BSD)
    return loss, change_BSD, of_head


@float32_is_float32
def head_teacher(
    head: Head | GptOss, x_BSD: Float[Array, "B S D"], batch: Batch, place: Placement, kind: Any
) -> Teacher:
    """What the model expects, as a teacher of that class."""
    final_BSD = head.final_norm(x_BSD)
    return Finals(final_BSD) if kind is Finals else top(final_BSD, head.unembedding[...], batch, place)
