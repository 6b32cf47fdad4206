"""The GPT-OSS network. Letters: see `config`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from jaxtyping import Array, Float, Int

from . import rope
from .attention import Attention
from .batching import Batch
from .config import FULL, Config
from .moe import MoE
from .router import Routing
from .saliency import Statistics

ALIGNMENT = 64  # bytes, of XLA's CPU buffers

Weights = Mapping[str, Any]
"""A tree of arrays: attribute names of the modules below, down to one array per parameter."""


@runtime_checkable  # annotations are checked in tests
class LayerSource(Protocol):
    """Where the engines take weights from: the checkpoint readers of `convert` implement it."""

    @property
    def config(self) -> Config: ...

    def outer(self) -> Weights:
        """What lies outside the layers: embedding, final norm, unembedding."""
        ...

    def layer(self, index: int) -> Weights:
        """Layer `index` as a tree that `Layer` has."""
        ...


class LayerOutput(NamedTuple):
    """What a layer returns beside its output; stacked over layers by the scan."""

    hidden: Float[Array, "*layers B S D"]
    """The layer's output, the residual stream after it."""
    routing: Routing
    statistics: Statistics


class Output(NamedTuple):
    """What the model returns."""

    logits: Float[Array, "B S V"]
    final: Float[Array, "B S D"]
    """What the unembedding takes: the last layer's output behind the final norm."""
    layers: LayerOutput


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

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.moe_norm = RMSNorm(config, rngs=rngs)
        self.moe = MoE(config, rngs=rngs)

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        batch: Batch,
        rope_tables: tuple[Float[Array, "B S half"], Float[Array, "B S half"]],
        window: Int[Array, ""],
        index: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B S D"], LayerOutput]:
        """`index` is this layer's, where its experts' weights are left in the stack of all layers."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), rope_tables, batch.segment_ids, window)
        mixture, routing, statistics = self.moe(self.moe_norm(x_BSD), batch, index)
        x_BSD = x_BSD + mixture
        return x_BSD, LayerOutput(x_BSD, routing, statistics)


class GptOss(nnx.Module):
    """Embedding, a stack of layers, norm, unembedding. The layers' parameters are stacked [L, …]."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.hidden_size)
        self.config = config
        self.embedding = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), shape))
        self.layers = nnx.vmap(lambda r: Layer(config, rngs=r))(rngs.split(config.num_layers))
        self.final_norm = RMSNorm(config, rngs=rngs)
        self.unembedding = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), shape))

    def __call__(self, batch: Batch) -> Output:
        """Logits and every layer's outputs; what a jitted caller does not return is not computed."""
        rope_tables = rope.tables(self.config, batch.positions)
        # One compiled layer serves both kinds: the pattern is data, and a full layer's window is all.
        S = batch.token_ids.shape[1]
        windows_L = jnp.array([S if kind == FULL else self.config.sliding_window for kind in self.config.layer_types])

        # A scan copies each layer's slice of what it scans. The experts are nearly all of the weights, and
        # stay where they are: the layer picks from the whole stack the experts that its tokens chose.
        graph, *states = nnx.split(self.layers, nnx.PathContains("experts"), ...)
        experts, scanned = states

        def one_layer(x_BSD: Array, slices: tuple[nnx.State, Array, Array]) -> tuple[Array, LayerOutput]:
            state, window, index = slices
            layer = nnx.merge(graph, experts, state)
            return layer(x_BSD, batch, rope_tables, window, index)

        indices_L = jnp.arange(self.config.num_layers)
        x_BSD, layers = lax.scan(one_layer, self.embedding[batch.token_ids], (scanned, windows_L, indices_L))
        final_BSD = self.final_norm(x_BSD)
        return Output(self.logits(final_BSD), final_BSD, layers)

    def logits(self, final: Float[Array, "*any D"]) -> Float[Array, "*any V"]:
        """Unembed, in float32."""
        return jnp.einsum("...D,VD->...V", final, self.unembedding[...], preferred_element_type=jnp.float32)


def load(source: LayerSource, dtype: Any) -> GptOss:
    """The model with all weights resident, as `dtype`; at most one layer of the source beside it."""
    config = source.config
    graph, state = nnx.split(nnx.eval_shape(lambda: GptOss(config, rngs=nnx.Rngs(0))))
    layer_shapes = flatten_dict(nnx.to_pure_dict(state)["layers"])
    stacks = {path: _aligned(leaf.shape, dtype) for path, leaf in layer_shapes.items()}
    for index in range(config.num_layers):
        layer = flatten_dict(source.layer(index))
        for path in list(layer):
            stacks[path][index] = layer.pop(path)
    outer = flatten_dict(source.outer())
    weights = {("layers", *path): stack for path, stack in stacks.items()} | outer
    del stacks, outer
    # Handed over one by one: of what is not aligned, only one array is held twice.
    arrays = {path: jnp.asarray(weights.pop(path), dtype) for path in list(weights)}
    nnx.replace_by_pure_dict(state, unflatten_dict(arrays))
    return nnx.merge(graph, state)


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An empty array that JAX's CPU backend takes over, where it would copy a less aligned one."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    first = -raw.ctypes.data % ALIGNMENT
    return raw[first : first + nbytes].view(dtype).reshape(shape)


def mask_experts(model: GptOss, keep_sets: Sequence[Sequence[int]]) -> GptOss:
    """The model with the router logits of all experts outside the L keep-sets at −∞ before top-k."""
    dropped_LE = np.ones((model.config.num_layers, model.config.num_experts), bool)
    for layer, kept in enumerate(keep_sets):
        dropped_LE[layer, list(kept)] = False
    graph, state = nnx.split(model)
    bias: Any = state["layers"]["moe"]["router"]["bias"]
    bias[...] = jnp.where(dropped_LE, -jnp.inf, bias[...])
    return nnx.merge(graph, state)
