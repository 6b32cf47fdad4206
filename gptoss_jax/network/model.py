"""The GPT-OSS network. Letters: see `config`; P are pairs of experts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ..config import SLIDING, Config, Form
from ..devices.placement import Placement
from . import rope
from .attention import Attention
from .batch import Tokens
from .cache import Cache
from .experts import Mixture
from .moe import NOTHING, Further, Mixed, MoE
from .router import Routing


class LayerOutput(NamedTuple):
    """What a layer shows to whoever observes it."""

    before: Float[Array, "B S D"]
    """The residual stream that the layer takes."""
    hidden: Float[Array, "B S D"]
    """The layer's output, the residual stream after it."""
    routing: Routing
    mixture: Mixture
    cache: Cache | None = None
    changes_Tk: Float[Array, "T k"] | None = None
    """The squared norm of the change of the mixture's output where a chosen expert is dropped; if it was asked for."""
    products_TP: Float[Array, "T P"] | None = None
    """The products of all experts' outputs, in the order of `products.pairs`; if they were asked for."""


Observe = Callable[[LayerOutput], Any]
"""What is kept of a layer: the scan stacks it over layers. What is not kept, a jitted caller does not compute."""


class Interventions(NamedTuple):
    """What takes the place of the network's own values, or is added to them; a layer gets its own part."""

    gates: Float[Array, "*L B S k"] | None = None
    """They take the place of the router's, for the experts that it chose."""
    steering: Float[Array, "*L B S D"] | None = None
    """It is added to the residual stream before each layer."""
    kept: Bool[Array, "*L B E"] | None = None
    """The experts that the tokens of each row may choose; the others' logits are −∞ before top-k."""


NONE = Interventions()


class Output(NamedTuple):
    """What the network returns."""

    final: Float[Array, "B S D"]
    """What the unembedding takes: the last layer's output behind the final norm."""
    layers: Any
    """What `observe` gave of each layer, stacked [L, …]."""


class RMSNorm(nnx.Module):
    """Scale to unit root mean square, in float32."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(nnx.initializers.ones(rngs.params(), (config.hidden_size,)))
        self.eps = config.rms_norm_eps

    def __call__(self, x: Float[Array, "*any D"]) -> Float[Array, "*any D"]:
        wide = x.astype(jnp.float32)
        wide = wide * lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
        return (scale * wide).astype(x.dtype)


class Layer(nnx.Module):
    """Attention and mixture of experts, each behind a norm and added to the residual stream."""

    def __init__(self, config: Config, form: Form = "bf16", *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.moe_norm = RMSNorm(config, rngs=rngs)
        self.moe = MoE(config, form, rngs=rngs)

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        tokens: Tokens,
        rope_tables: tuple[Float[Array, "B S half"], Float[Array, "B S half"]],
        sliding: Bool[Array, ""],
        place: Placement,
        index: Int[Array, ""] | None = None,
        cache: Cache | None = None,
        interventions: Interventions = NONE,
        further: Further = NOTHING,
        follows: bool = False,
    ) -> LayerOutput:
        """`index` is this layer's, where its experts' weights are left in the stack of all layers; `cache` holds what
        it keeps of the tokens before these, where these go on; `interventions` are those in this layer; `further` is
        what it shows beside its output; `follows`, that several tokens see what stands in the cache."""
        if interventions.steering is not None:
            x_BSD = x_BSD + interventions.steering.astype(x_BSD.dtype)
        before_BSD = x_BSD
        attended_BSD, cache = self.attend(x_BSD, tokens, rope_tables, sliding, place, cache, follows)
        x_BSD = x_BSD + attended_BSD
        mixed = self.mix(x_BSD, tokens, place, index, interventions, further)
        hidden = x_BSD + mixed.output_BSD
        return LayerOutput(before_BSD, hidden, mixed.routing, mixed.mixture, cache, mixed.changes_Tk, mixed.products_TP)

    def attend(
        self,
        x_BSD: Float[Array, "B S D"],
        tokens: Tokens,
        rope_tables: tuple[Float[Array, "B S half"], Float[Array, "B S half"]],
        sliding: Bool[Array, ""],
        place: Placement,
        cache: Cache | None = None,
        follows: bool = False,
    ) -> tuple[Float[Array, "B S D"], Cache | None]:
        """What attention adds to the residual stream, and the cache behind it."""
        return self.attention(self.attention_norm(x_BSD), rope_tables, tokens, sliding, place, cache, follows)

    def mix(
        self,
        x_BSD: Float[Array, "B S D"],
        tokens: Tokens,
        place: Placement,
        index: Int[Array, ""] | None = None,
        interventions: Interventions = NONE,
        further: Further = NOTHING,
    ) -> Mixed:
        """What the experts add to the residual stream behind attention, and how; see `MoE`."""
        valid_BS = tokens.segments > 0
        gates, kept = interventions.gates, interventions.kept
        return self.moe(self.moe_norm(x_BSD), valid_BS, place, index, gates, kept, further)


class GptOss(nnx.Module):
    """Embedding, a stack of layers, norm, unembedding. The layers' parameters are stacked [L, …].

    With `form="mxfp4"` the experts' kernels stay in four bits, and a layer's become floats when it runs.
    """

    def __init__(self, config: Config, form: Form = "bf16", *, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.hidden_size)
        self.config = config
        self.embedding = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), shape))
        self.layers = nnx.vmap(lambda r: Layer(config, form, rngs=r))(rngs.split(config.num_layers))
        self.final_norm = RMSNorm(config, rngs=rngs)
        self.unembedding = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), shape))

    def __call__(
        self,
        tokens: Tokens,
        place: Placement,
        observe: Observe,
        interventions: Interventions = NONE,
        further: Further = NOTHING,
    ) -> Output:
        """The final output, and what `observe` keeps of every layer; `logits` unembeds what is wanted of the former.
        `further` is what the layers show beside their outputs."""
        rope_tables = rope.tables(self.config, tokens.positions)
        # One compiled layer serves both kinds: the pattern is data.
        sliding_L = jnp.array([kind == SLIDING for kind in self.config.layer_types])

        scanned, layer_of = self.by_layer(place)

        def one_layer(x_BSD: Array, slices: tuple[list[nnx.State], Array, Array, Interventions]) -> tuple[Array, Any]:
            states, sliding, index, in_layer = slices
            number = None if place.differentiable else index
            output = layer_of(states)(x_BSD, tokens, rope_tables, sliding, place, number, None, in_layer, further)
            return output.hidden, observe(output)

        indices_L = jnp.arange(self.config.num_layers)
        per_layer = scanned, sliding_L, indices_L, interventions
        # Unrolled, what each layer keeps for its gradients is not copied into a stack of all layers' and out again.
        x_BSD, layers = lax.scan(one_layer, self.embed(tokens.ids, place), per_layer, unroll=place.differentiable)
        return Output(self.final_norm(x_BSD), layers)

    def by_layer(self, place: Placement) -> tuple[list[nnx.State], Callable[[list[nnx.State]], Layer]]:
        """What a scan over layers takes, stacked [L, …], and the layer that is made of a slice of it.

        A scan copies each layer's slice of what it scans. The experts' kernels are nearly all of the weights, and
        stay where they are: the layer picks from the whole stack the experts that its tokens chose, and is told its
        index. Where gradients of kernels are taken these are scanned: that of each layer would have the size of the
        stack.
        """
        graph, *states = nnx.split(self.layers, _is_kernel_of_experts, ...)
        in_place = 0 if place.differentiable else 1
        held, scanned = states[:in_place], states[in_place:]
        return scanned, lambda states: nnx.merge(graph, *held, *states)

    def embed(self, token_ids_BS: Int[Array, "B S"], place: Placement) -> Float[Array, "B S D"]:
        """Rows of the embedding."""
        return embed(token_ids_BS, self.embedding[...], self.config.vocab_size, place)

    def logits(self, final: Float[Array, "*any D"]) -> Float[Array, "*any V"]:
        """Unembed, in float32; where the vocabulary is split, the logits of the tokens here."""
        return unembed(final, self.unembedding[...])


def _is_kernel_of_experts(path: tuple[Any, ...], _: Any) -> bool:
    return "experts" in path and not str(path[-1]).endswith("_bias")


def embed(
    token_ids_BS: Int[Array, "B S"], embedding: Float[Array, "V D"], vocab_size: int, place: Placement
) -> Float[Array, "B S D"]:
    """Rows of the embedding; where its rows are split, each comes from the device that holds it."""
    first, count = place.local(vocab_size)
    local_BS = token_ids_BS - first
    local_BS = jnp.where((local_BS >= 0) & (local_BS < count), local_BS, count)
    return place.sum_experts(embedding.at[local_BS].get(mode="fill", fill_value=0))


def unembed(final: Float[Array, "*any D"], unembedding: Float[Array, "V D"]) -> Float[Array, "*any V"]:
    """Logits, in float32."""
    return jnp.einsum("...D,VD->...V", final, unembedding, preferred_element_type=jnp.float32)


class Head(nnx.Module):
    """What stands behind the layers, alone; names are those of `GptOss`."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.final_norm = RMSNorm(config, rngs=rngs)
        self.unembedding = nnx.Param(jnp.zeros((config.vocab_size, config.hidden_size)))

    def logits(self, final: Float[Array, "*any D"]) -> Float[Array, "*any V"]:
        return unembed(final, self.unembedding[...])
