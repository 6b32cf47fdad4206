"""What is trained: a few parameters, in float32, by their paths in the model. Letters: see `config`."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ..devices import mesh as sharding
from ..devices.mesh import DATA, EXPERT
from ..network.source import Source, abstract

Trained = dict[str, Any]
"""float32 arrays, or what belongs to them, by their paths in `GptOss`; those of layers are stacked [L, …]."""
Kind = Literal["router", "small"]

ROUTER = "layers/moe/router/(kernel|bias)"
KINDS: dict[Kind, str] = {
    "router": ROUTER,
    "small": f"{ROUTER}|.*norm/scale|layers/attention/([qkvo]_bias|sinks)|layers/moe/experts/(gate_up|down)_bias",
}
"""The paths of each kind: rows and biases of routers, or these and all parameters that are no matrix."""
RECONSTRUCTED = {"routers": ROUTER, "biases": "layers/moe/experts/down_bias"}
"""The paths of what is reconstructed layer by layer."""
LAYERS = "layers/"
# Of bfloat16, in which checkpoints hold what is trained.
EXPONENT_BITS, MANTISSA_BITS = 8, 7

Part = TypeVar("Part")


def read(source: Source, kind: Kind, mesh: Mesh | None = None, reconstructed: Collection[str] = ()) -> Trained:
    """What is trained, or is reconstructed before, as the source has it, split over `mesh`, or on the first device."""
    mesh = sharding.make(source.config, 1, 1, jax.devices()[:1]) if mesh is None else mesh
    shapes = sharding.by_path(abstract(source.config, mesh, jnp.float32))
    wanted = "|".join([KINDS[kind], *(RECONSTRUCTED[what] for what in reconstructed)])
    return dict(source.load({path: shape for path, shape in shapes.items() if re.fullmatch(wanted, path)}))


def parted(values: Trained, kind: Kind) -> tuple[Trained, Trained]:
    """What is trained of these values, and what stays as it is."""
    trained = {path: x for path, x in values.items() if re.fullmatch(KINDS[kind], path)}
    return trained, {path: x for path, x in values.items() if path not in trained}


def written(trained: Trained) -> Trained:
    """The values that a checkpoint in bfloat16 will have, in float32. A step runs with these, and what it finds for
    them is the gradient of the values behind them, as if nothing had been rounded."""
    # Not by a conversion there and back, which XLA may leave out.
    return {path: lax.reduce_precision(x, EXPONENT_BITS, MANTISSA_BITS) for path, x in trained.items()}


def into(part: Part, trained: Mapping[str, Any]) -> Part:
    """A part of the model, with what is trained in the place of its own, by their paths in it. It stays in float32, so
    that its gradient is not rounded: in bfloat16 its values are the same."""
    missing = trained.keys() - sharding.by_path(part).keys()
    assert not missing, f"no parameter has the path {min(missing)}"
    return jax.tree_util.tree_map_with_path(lambda path, x: trained.get(sharding.path_of(path), x), part)


def of_layers(trained: Trained) -> Trained:
    """What is trained of the layers, stacked [L, …], by its paths in a layer."""
    return {path.removeprefix(LAYERS): x for path, x in trained.items() if path.startswith(LAYERS)}


def of_layer(trained: Trained, index: int) -> Trained:
    """What is trained of one layer, by its paths in there."""
    return {path: x[index] for path, x in of_layers(trained).items()}


def of_head(trained: Trained) -> Trained:
    """What is trained outside the layers."""
    return {path: x for path, x in trained.items() if not path.startswith(LAYERS)}


def joined(layers: Mapping[str, Any], head: Mapping[str, Any]) -> Trained:
    """The two parts of what is trained as one: those of layers are stacked."""
    return {LAYERS + path: x for path, x in layers.items()} | dict(head)


def stacked(layers: Sequence[Mapping[str, Any]]) -> Trained:
    """The layers' parts, first to last, as one array [L, …] of each."""
    return {path: jnp.stack([layer[path] for layer in layers]) for path in layers[0]}


def specs(trained: Mapping[str, Any]) -> dict[str, P]:
    """How it is split over a mesh."""
    return {path: sharding.spec(path, x.ndim) for path, x in trained.items()}


def summed(gradients: Trained) -> Trained:
    """The gradients that the devices of a mesh have found, each from its rows and its part of the weights, as one. What
    is split over `expert` is whole there."""
    return {
        path: lax.psum(x, DATA if EXPERT in sharding.spec(path, x.ndim) else (DATA, EXPERT))
        for path, x in gradients.items()
    }
