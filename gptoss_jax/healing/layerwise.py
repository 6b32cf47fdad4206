"""One layer of a pruned model, brought near what the whole model has there. Letters: see `config`.

The residual stream behind the layer is x + y, x the pruned stream behind attention and y what the experts add to it;
the whole model's there is h. So y is to be h − x, the target, and what a token's squared distance counts is w/‖h‖², w
its own weight. N are the experts that are kept; P are the pairs i ≤ j of their outputs and, last of all, the target.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from ..config import Config
from ..devices.placement import Placement
from ..network.batch import Batch
from ..network.model import Interventions, Layer
from ..network.products import OUTPUTS, pairs, products
from ..run.steps import float32_is_float32
from ..selection.greedy import gates, squared
from .steps import Where, where
from .trained import Trained, into, written

# Of Adam on a layer's router, whose rate falls to zero as a cosine: a step takes all tokens, of which nothing has the
# size of an expert's output any more. A step of Adam moves every value of a row by as much, so that a logit moves by
# the more the wider the model is; the rate times the width is what was found best for nano.
STEPS, RATE_TIMES_WIDTH = 100, 5.0
RIDGE = 0.01  # of the mean of the diagonal, by which experts that few tokens chose are held where they were


class Aim(NamedTuple):
    """What a layer's experts are to give for a batch."""

    x_BSD: Float[Array, "B S D"]
    """The pruned stream behind attention."""
    target_BSD: Float[Array, "B S D"]
    """float32."""
    weights_BS: Float[Array, "B S"]


class Grams(NamedTuple):
    """All that a router is fitted by, however wide outputs are."""

    normed_TD: Float[Any, "T D"]
    """What the router takes."""
    products_TP: Float[Any, "T P"]
    """f_i·f_j, f_i·target and target·target, in the order of `products.pairs`; float32."""
    weights_T: Float[Any, " T"]


class Sums(NamedTuple):
    """All that biases are fitted by: sums over tokens, q their weights, g the gates of experts, 0 where they are not
    chosen, and r the target less what the experts give."""

    gates_EE: Float[Any, "E E"]
    """Σ q·g·gᵀ."""
    rests_ED: Float[Any, "E D"]
    """Σ q·g·rᵀ."""


def gram_bytes(config: Config, kept: int, tokens: int, dtype: Any) -> int:
    """What fitting a router over so many tokens takes: `Grams` on the host and on the device, as much again as its
    products take on the way back, and a block of outputs, which are rounded from float32."""
    products_bytes, vector = 4 * len(pairs(kept + 1)[0]), config.hidden_size * jnp.dtype(dtype).itemsize
    return tokens * (2 * vector + 4 * products_bytes) + 2 * min(OUTPUTS, tokens * kept) * vector


def aimed(
    layer: Layer,
    whole_BSD: Float[Array, "B S D"],
    pruned_BSD: Float[Array, "B S D"],
    batch: Batch,
    at: Where,
    place: Placement,
) -> Aim:
    """From the whole model's stream behind the layer, and the pruned one's before it."""
    x_BSD = pruned_BSD + layer.attend(pruned_BSD, at.tokens, at.rope_tables, at.sliding, place)[0]
    wide_BSD = whole_BSD.astype(jnp.float32)
    weights_BS = jnp.where(batch.weights == 0, 0, batch.weights / (wide_BSD**2).sum(-1))
    return Aim(x_BSD, wide_BSD - x_BSD.astype(jnp.float32), weights_BS)


@float32_is_float32
def grams_step(
    layer: Layer,
    values: Trained,
    whole_BSD: Float[Array, "B S D"],
    pruned_BSD: Float[Array, "B S D"],
    batch: Batch,
    index: Int[Array, ""],
    kept_N: Int[Array, " N"],
    config: Config,
    place: Placement,
) -> Grams:
    """By what the router of the layer of that index, with these values, is fitted over a batch."""
    layer = into(layer, values)
    aim = aimed(layer, whole_BSD, pruned_BSD, batch, where(batch, index, config), place)
    D, weights_T = config.hidden_size, aim.weights_BS.reshape(-1)
    normed_TD, target_T1D = layer.moe_norm(aim.x_BSD).reshape(-1, D), aim.target_BSD.reshape(-1, 1, D)
    experts, E = layer.moe.experts, config.num_experts
    found_TP = products(experts, normed_TD, weights_T != 0, E, place, kept_N, target_T1D)
    return Grams(normed_TD, found_TP, weights_T)


@float32_is_float32
def sums_step(
    layer: Layer,
    values: Trained,
    whole_BSD: Float[Array, "B S D"],
    pruned_BSD: Float[Array, "B S D"],
    batch: Batch,
    index: Int[Array, ""],
    config: Config,
    place: Placement,
) -> Sums:
    """By what the biases of the layer of that index, with these values, are fitted over a batch."""
    layer, at = into(layer, values), where(batch, index, config)
    aim = aimed(layer, whole_BSD, pruned_BSD, batch, at, place)
    mixed = layer.mix(aim.x_BSD, at.tokens, place, None, Interventions(kept=at.kept))
    experts_Tk, gates_Tk = mixed.routing.experts_Tk, mixed.routing.gates_Tk
    T, D = len(experts_Tk), config.hidden_size
    gates_TE = jnp.zeros((T, config.num_experts)).at[jnp.arange(T)[:, None], experts_Tk].set(gates_Tk)
    rests_TD = aim.target_BSD.reshape(-1, D) - mixed.mixture.output_TD
    weighted_TE = aim.weights_BS.reshape(-1, 1) * gates_TE
    return Sums(jnp.einsum("TE,TF->EF", weighted_TE, gates_TE), jnp.einsum("TE,TD->ED", weighted_TE, rests_TD))


@float32_is_float32
def loss(rows: Trained, grams: Grams, top_k: int) -> Float[Array, ""]:
    """Σ q·‖target − y‖² as a part of Σ q·‖target‖², where the kept experts' `kernel` and `bias` of the router are
    these. The choice of experts has no gradient, their gates have one."""
    logits_TN = jnp.einsum("TD,ND->TN", grams.normed_TD, rows["kernel"], preferred_element_type=jnp.float32)
    gates_TN = jax.vmap(partial(gates, top_k=top_k))(logits_TN + rows["bias"][None])
    # The target is one more output, whose gate is −1.
    change_TV = jnp.pad(gates_TN, ((0, 0), (0, 1)), constant_values=-1)
    distances_T = jax.vmap(squared)(grams.products_TP, change_TV)
    return (grams.weights_T * distances_T).sum() / (grams.weights_T * grams.products_TP[:, -1]).sum()


@partial(jax.jit, static_argnames=("top_k", "steps", "rate"))
def fitted_router(
    rows: Trained, grams: Grams, top_k: int, steps: int = STEPS, rate: float = RATE_TIMES_WIDTH
) -> tuple[Trained, Float[Array, " looks"]]:
    """The rows with the least loss of all that Adam passes, and the losses, that of the first rows before all others.
    As in a training, each is that of the rows as they will be written."""
    optimizer = optax.adam(optax.cosine_decay_schedule(rate / grams.normed_TD.shape[1], steps))

    def step(state: tuple[Any, ...], _: None) -> tuple[tuple[Any, ...], Array]:
        rows, moments, best, least = state
        as_written = written(rows)
        found, gradients = jax.value_and_grad(loss)(as_written, grams, top_k)
        best = jax.tree.map(partial(jnp.where, found < least), as_written, best)
        updates, moments = optimizer.update(gradients, moments, rows)
        return (optax.apply_updates(rows, updates), moments, best, jnp.minimum(found, least)), found

    (*_, best, _), losses = lax.scan(step, (rows, optimizer.init(rows), rows, jnp.inf), length=steps + 1)
    return best, losses


def shifts(sums: Sums, kept: Sequence[int]) -> Float[np.ndarray, "N D"]:
    """What is added to the biases of the kept experts: (G + λI)⁻¹·R, in float64. Gates sum to 1, so that what all of
    them get alike is added to the layer's output."""
    gates_NN = np.asarray(sums.gates_EE, np.float64)[np.ix_(kept, kept)]
    ridge = RIDGE * np.trace(gates_NN) / len(kept)
    rests_ND = np.asarray(sums.rests_ED, np.float64)[np.asarray(kept)]
    return np.linalg.solve(gates_NN + ridge * np.eye(len(kept)), rests_ND)
