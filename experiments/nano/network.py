"""nano's sizes, its first weights, and one step of its training. Letters: see `gptoss_jax.config`."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float
from optax import contrib

from gptoss_jax.config import FULL, SLIDING, Config, Yarn
from gptoss_jax.devices import mesh as sharding
from gptoss_jax.devices.placement import Placement
from gptoss_jax.kernels.mxfp4 import round_to_mxfp4
from gptoss_jax.network import rope
from gptoss_jax.network.batch import Batch
from gptoss_jax.network.model import GptOss
from gptoss_jax.network.router import Routing, entropy

CONFIG = Config(
    num_layers=6,
    hidden_size=160,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    num_experts=16,
    top_k=4,
    expert_hidden_size=96,
    vocab_size=2048,
    layer_types=(SLIDING, FULL) * 3,
    sliding_window=32,
    rope_theta=10000.0,
    rope_scaling=Yarn(factor=8.0, original_context=1024),
    max_position=8192,
)


# Of what first weights look up: queries and keys of a distance, whose score is then 4 above that of the next one; the
# size of a note in the residual stream, over what attention adds; queries and keys of a token; tokens of a row.
LOOK_BACK, NOTE, LOOK_UP, FAR = 5.0, 4.0, 1.5, 64


class Recipe(NamedTuple):
    """What decides the training, beside data and sizes."""

    steps: int = 4500
    rows: int = 16
    length: int = 256
    rate: float = 6e-3
    """Of learning, of kernels; after the warm-up and until the last share of the steps, in which it falls to a
    fiftieth."""
    adam_rate: float = 6e-3
    """That of all else: embeddings, routers, norms, biases, sinks."""
    warmup: int = 50
    decay: float = 0.2
    """That share; in it experts are rounded to MXFP4 in the forward too."""
    weight_decay: float = 0.1
    balance: float = 0.01
    """Of the load-balance loss: keeps all experts alive, and lets families choose differently."""

    @property
    def decay_from(self) -> int:
        """The first step of the last share."""
        return self.steps - round(self.decay * self.steps)


class State(NamedTuple):
    """What a step takes and gives."""

    parameters: Any
    optimizer: Any


class Metrics(NamedTuple):
    """What a step tells."""

    loss: Float[Array, ""]
    """Mean over predicted tokens, in nats."""
    family_loss_G: Float[Array, " G"]
    router_entropy_L: Float[Array, " L"]
    """Mean over tokens, in nats."""
    load_LE: Float[Array, "L E"]
    """Share of the pairs that each expert got."""


def first_weights(config: Config, seed: int) -> GptOss:
    """Kernels that keep the size of what passes them; what is added to the residual stream is smaller, as there are
    2·L such additions (Radford et al. 2019, GPT-2, section 2.3). Embeddings have the size of all these together:
    smaller ones would be lost among them, and with them which token stands where."""
    model = GptOss(config, rngs=nnx.Rngs(seed))
    graph, parameters = nnx.split(model)

    def scaled(path: Any, x: Array) -> Array:
        name = sharding.path_of(path)
        if name == "embedding":
            return x / 0.02
        if not name.endswith("kernel"):
            return x
        inputs = config.num_heads * config.head_dim if "o_kernel" in name else x.shape[-1]
        added = 2 * config.num_layers if name.endswith(("o_kernel", "down_kernel")) else 1
        return x / 0.02 / math.sqrt(inputs * added)  # the model draws them at 0.02

    model = nnx.merge(graph, jax.tree.map_with_path(scaled, parameters))
    _look_up(model)
    return model


def _look_up(model: GptOss) -> None:
    """Layers begin with heads that find where the current token stood before, to read on from there.

    All families ask for that: numbers and names of the question come again in the reasoning. It takes two layers (the
    induction heads of Olsson et al. 2022, arXiv:2209.11895), which gradients find late: from random weights nano did
    not repeat a paragraph after 775 steps (docs/measurements.md).

    Where layers slide, the heads of the first key look 1, 2, … tokens back, by biases alone: the product of query and
    key is then Σ cos(θ·(distance − δ)) over the pairs of the rotary embedding, highest at δ. Where they see all, the
    first head compares the current token with the one that the first layer's head has noted beside each token.
    """
    config, attention = model.config, model.layers.attention
    names = "q_kernel", "q_bias", "k_kernel", "k_bias", "v_kernel", "o_kernel"
    q_kernel, q_bias, k_kernel, k_bias, v_kernel, o_kernel = (np.array(getattr(attention, n)[...]) for n in names)
    slides_L = np.array([kind == SLIDING for kind in config.layer_types])
    angle_f = rope.frequencies(config)
    for head in range(config.num_heads // config.num_kv_heads):
        turned = np.concatenate([np.cos(angle_f * (head + 1)), -np.sin(angle_f * (head + 1))])
        q_bias[slides_L, head], q_kernel[slides_L, head] = LOOK_BACK * turned, q_kernel[slides_L, head] / LOOK_BACK
    k_bias[slides_L, 0] = LOOK_BACK * np.repeat([1, 0], len(angle_f))
    k_kernel[slides_L, 0] /= LOOK_BACK

    o_kernel[0, :, 0] *= NOTE
    noted_Dh = o_kernel[0, :, 0]
    # Pairs that turn by a radian and more within a row would not know the token again.
    slow_h = np.tile(angle_f * FAR < 1, 2)
    q_kernel[~slides_L, 0] = LOOK_UP * slow_h[:, None] * v_kernel[0, 0]
    k_kernel[~slides_L, 0] = LOOK_UP * slow_h[:, None] * (noted_Dh / (noted_Dh**2).sum(0)).T
    for name, array in zip(names, (q_kernel, q_bias, k_kernel, k_bias, v_kernel, o_kernel), strict=True):
        getattr(attention, name)[...] = jnp.asarray(array)


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Muon for kernels behind clipping, AdamW for all else: the loss that AdamW alone reached in 250 steps, kernels
    trained by Muon reached in 150 (docs/measurements.md). Kernels alone decay."""

    def rate(highest: float) -> optax.Schedule:
        parts = [
            optax.linear_schedule(0, highest, recipe.warmup),
            optax.constant_schedule(highest),
            optax.linear_schedule(highest, highest / 50, recipe.steps - recipe.decay_from),
        ]
        return optax.join_schedules(parts, [recipe.warmup, recipe.decay_from])

    muon = contrib.muon(
        rate(recipe.rate),
        weight_decay=recipe.weight_decay,
        adam_b2=0.95,
        adam_learning_rate=rate(recipe.adam_rate),
        muon_weight_dimension_numbers=matrices,
        consistent_rms=0.2,  # of an update, about what AdamW's have (Liu et al. 2025, arXiv:2502.16982)
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


def matrices(parameters: Any) -> Any:
    """Which axes of each kernel are inputs and outputs; those before them count layers and experts. None for what is no
    matrix between activations: rows of the router's are looked up by its choice, as those of the embedding are."""

    def one(path: Any, x: Array) -> contrib.MuonDimensionNumbers | None:
        name = sharding.path_of(path)
        if not name.endswith("kernel") or "router" in name:
            return None
        axes, inputs = tuple(range(x.ndim)), 2 if name.endswith("o_kernel") else 1
        counted = 2 if "experts" in name else 1
        return contrib.MuonDimensionNumbers(axes[x.ndim - inputs :], axes[counted : x.ndim - inputs])

    return jax.tree.map_with_path(one, parameters)


def rounded(parameters: Any) -> Any:
    """Experts' kernels as MXFP4 will hold them; gradients pass as if they were not rounded."""

    def one(path: Any, x: Array) -> Array:
        if not sharding.path_of(path).endswith(("gate_up_kernel", "down_kernel")):
            return x
        return x + jax.lax.stop_gradient(round_to_mxfp4(x) - x)

    return jax.tree.map_with_path(one, parameters)


def reply_loss(logits_BSV: Float[Array, "B S V"], batch: Batch) -> tuple[Float[Array, ""], Float[Array, " G"]]:
    """Mean loss over the tokens of replies, each from the logits before it, and by family."""
    shifted = jax.tree.map(lambda x: jnp.roll(x, -1, axis=1), batch)
    inside = shifted.tokens.segments == batch.tokens.segments
    weights_BS = jnp.where(inside, shifted.weights, 0).at[:, -1].set(0)
    losses_BS = optax.softmax_cross_entropy_with_integer_labels(logits_BSV, shifted.tokens.ids)
    family_BSG = jax.nn.one_hot(batch.groups, batch.num_groups) * weights_BS[..., None]
    sums_G, counts_G = (family_BSG * losses_BS[..., None]).sum((0, 1)), family_BSG.sum((0, 1))
    return sums_G.sum() / counts_G.sum(), sums_G / jnp.maximum(counts_G, 1)


def load(routing: Routing, batch: Batch) -> tuple[Float[Array, "L E"], Float[Array, "L E"]]:
    """Share of the pairs, and mean probability, of each expert; padding left out."""
    valid_1T1 = (batch.tokens.segments.reshape(1, -1, 1) > 0).astype(jnp.float32)
    E = routing.logits_TE.shape[-1]
    chosen_LTE = jax.nn.one_hot(routing.experts_Tk, E).sum(2)
    probability_LTE = jax.nn.softmax(routing.logits_TE, axis=-1)
    tokens = valid_1T1.sum()
    share_LE = (chosen_LTE * valid_1T1).sum(1) / (tokens * routing.experts_Tk.shape[-1])
    return share_LE, (probability_LTE * valid_1T1).sum(1) / tokens


@partial(jax.jit, static_argnames=("graph", "recipe", "round_experts"), donate_argnames="state")
def train_step(state: State, batch: Batch, graph: Any, recipe: Recipe, round_experts: bool) -> tuple[State, Metrics]:
    """One step on the replies' loss and the routers' balance."""
    place = Placement(jax.default_backend(), differentiable=True)

    def objective(parameters: Any) -> tuple[Array, Metrics]:
        model = nnx.merge(graph, rounded(parameters) if round_experts else parameters)
        output = model(batch.tokens, place, lambda layer: layer.routing)
        loss, by_family = reply_loss(model.logits(output.final), batch)
        routing = output.layers
        share_LE, probability_LE = load(routing, batch)
        # Fedus et al. 2021 (Switch Transformer), section 2.2: 1 where the load is even, E where one has all.
        uneven = share_LE.shape[1] * (jax.lax.stop_gradient(share_LE) * probability_LE).sum(1).mean()
        entropy_L = jax.vmap(entropy)(routing.logits_TE).mean(1)
        return loss + recipe.balance * uneven, Metrics(loss, by_family, entropy_L, share_LE)

    gradients, metrics = jax.grad(objective, has_aux=True)(state.parameters)
    updates, optimizer_state = optimizer(recipe).update(gradients, state.optimizer, state.parameters)
    return State(optax.apply_updates(state.parameters, updates), optimizer_state), metrics
