"""nano's sizes, its first weights, and one step of its training. Letters: see `gptoss_jax.config`."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from gptoss_jax import mesh as sharding
from gptoss_jax.batching import Batch
from gptoss_jax.config import FULL, SLIDING, Config, Yarn
from gptoss_jax.mesh import Placement
from gptoss_jax.model import GptOss, Output
from gptoss_jax.packed import round_to_mxfp4
from gptoss_jax.router import Routing, entropy

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


class Recipe(NamedTuple):
    """What decides the training, beside data and sizes."""

    steps: int = 8000
    rows: int = 16
    length: int = 256
    rate: float = 3e-3
    """Of learning, after the warm-up and until the last share of the steps, in which it falls to a fiftieth."""
    warmup: int = 200
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
    2·L such additions (Radford et al. 2019, GPT-2, section 2.3)."""
    model = GptOss(config, rngs=nnx.Rngs(seed))
    graph, parameters = nnx.split(model)

    def scaled(path: Any, x: Array) -> Array:
        name = sharding.path_of(path)
        if not name.endswith("kernel"):
            return x
        inputs = config.num_heads * config.head_dim if "o_kernel" in name else x.shape[-1]
        added = 2 * config.num_layers if name.endswith(("o_kernel", "down_kernel")) else 1
        return x / 0.02 / math.sqrt(inputs * added)  # the model draws them at 0.02

    return nnx.merge(graph, jax.tree.map_with_path(scaled, parameters))


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW behind clipping; kernels alone decay."""
    parts = [
        optax.linear_schedule(0, recipe.rate, recipe.warmup),
        optax.constant_schedule(recipe.rate),
        optax.linear_schedule(recipe.rate, recipe.rate / 50, recipe.steps - recipe.decay_from),
    ]
    rate = optax.join_schedules(parts, [recipe.warmup, recipe.decay_from])

    def decays(parameters: Any) -> Any:
        return jax.tree.map_with_path(lambda path, _: sharding.path_of(path).endswith("kernel"), parameters)

    adam = optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=recipe.weight_decay, mask=decays)
    return optax.chain(optax.clip_by_global_norm(1.0), adam)


def rounded(parameters: Any) -> Any:
    """Experts' kernels as MXFP4 will hold them; gradients pass as if they were not rounded."""

    def one(path: Any, x: Array) -> Array:
        if not sharding.path_of(path).endswith(("gate_up_kernel", "down_kernel")):
            return x
        return x + jax.lax.stop_gradient(round_to_mxfp4(x) - x)

    return jax.tree.map_with_path(one, parameters)


def reply_loss(output: Output, batch: Batch) -> tuple[Float[Array, ""], Float[Array, " G"]]:
    """Mean loss over the tokens of replies, each from the logits before it, and by family."""
    shifted = jax.tree.map(lambda x: jnp.roll(x, -1, axis=1), batch)
    inside = shifted.segment_ids == batch.segment_ids
    weights_BS = jnp.where(inside, shifted.weights, 0).at[:, -1].set(0)
    losses_BS = optax.softmax_cross_entropy_with_integer_labels(output.logits, shifted.token_ids)
    family_BSG = jax.nn.one_hot(batch.domains, batch.num_domains) * weights_BS[..., None]
    sums_G, counts_G = (family_BSG * losses_BS[..., None]).sum((0, 1)), family_BSG.sum((0, 1))
    return sums_G.sum() / counts_G.sum(), sums_G / jnp.maximum(counts_G, 1)


def load(routing: Routing, batch: Batch) -> tuple[Float[Array, "L E"], Float[Array, "L E"]]:
    """Share of the pairs, and mean probability, of each expert; padding left out."""
    valid_1T1 = (batch.segment_ids.reshape(1, -1, 1) > 0).astype(jnp.float32)
    E = routing.logits_TE.shape[-1]
    chosen_LTE = jax.nn.one_hot(routing.experts_Tk, E).sum(2)
    probability_LTE = jax.nn.softmax(routing.logits_TE, axis=-1)
    tokens = valid_1T1.sum()
    share_LE = (chosen_LTE * valid_1T1).sum(1) / (tokens * routing.experts_Tk.shape[-1])
    return share_LE, (probability_LTE * valid_1T1).sum(1) / tokens


@partial(jax.jit, static_argnames=("graph", "recipe", "round_experts"), donate_argnames="state")
def train_step(state: State, batch: Batch, graph: Any, recipe: Recipe, round_experts: bool) -> tuple[State, Metrics]:
    """One step of AdamW on the replies' loss and the routers' balance."""
    place = Placement(jax.default_backend(), differentiable=True)

    def objective(parameters: Any) -> tuple[Array, Metrics]:
        output = nnx.merge(graph, rounded(parameters) if round_experts else parameters)(batch, place)
        loss, by_family = reply_loss(output, batch)
        routing = output.layers.routing
        share_LE, probability_LE = load(routing, batch)
        # Fedus et al. 2021 (Switch Transformer), section 2.2: 1 where the load is even, E where one has all.
        uneven = share_LE.shape[1] * (jax.lax.stop_gradient(share_LE) * probability_LE).sum(1).mean()
        entropy_L = jax.vmap(entropy)(routing.logits_TE).mean(1)
        return loss + recipe.balance * uneven, Metrics(loss, by_family, entropy_L, share_LE)

    gradients, metrics = jax.grad(objective, has_aux=True)(state.parameters)
    updates, optimizer_state = optimizer(recipe).update(gradients, state.optimizer, state.parameters)
    return State(optax.apply_updates(state.parameters, updates), optimizer_state), metrics
