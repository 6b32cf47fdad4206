"""Where weights come from, and how they get into the network. Letters: see `config`."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from ..config import Config
from ..devices import mesh as sharding
from .model import GptOss

Weights = Mapping[str, Any]
"""Arrays by the path of their parameter in `GptOss`, attributes joined by '/'; layers' are stacked [L, …]."""


@runtime_checkable  # annotations are checked in tests
class Source(Protocol):
    """Where the engines take weights from: the checkpoint readers of `convert` implement it."""

    @property
    def config(self) -> Config: ...

    @property
    def quantized(self) -> bool:
        """Whether the experts' kernels are stored in four bits."""
        ...

    @property
    def four_bits(self) -> str:
        """The form of `Experts` that four bits are read into without being rearranged."""
        ...

    def load(self, wanted: Weights) -> Weights:
        """Arrays for shapes, dtypes and shardings; each process reads what its devices hold, and no more.

        The path of a parameter of one layer alone has the layer's number in it: layers/3/attention/q_kernel."""
        ...

    def rows(self, path: str, ids: np.ndarray) -> np.ndarray:
        """Rows of a parameter outside the layers, in its stored form."""
        ...


def abstract(config: Config, mesh: Mesh, dtype: Any = jnp.bfloat16, weights: str = "bf16") -> GptOss:
    """The model with shapes, dtypes and shardings in the place of arrays; bytes of MXFP4 stay bytes."""

    shapes = nnx.eval_shape(lambda: GptOss(config, weights, rngs=nnx.Rngs(0)))
    return sharding.sharded(_typed(shapes, dtype), mesh)


def _typed(shapes: Any, dtype: Any) -> Any:
    def typed(leaf: Any) -> Any:
        return leaf if leaf.dtype == jnp.uint8 else jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype))

    return jax.tree.map(typed, shapes)


def load(source: Source, dtype: Any, mesh: Mesh | None = None, weights: str = "bf16") -> GptOss:
    """The model with all weights resident, split over `mesh`, or all on the default device."""
    mesh = sharding.make(source.config, 1, 1, jax.devices()[:1]) if mesh is None else mesh
    shapes = abstract(source.config, mesh, dtype, weights)
    return _filled(source, shapes)


def load_part(source: Source, make: Callable[[], Any], dtype: Any, prefix: str = "") -> Any:
    """A part of the model on the default device: the module that `make` makes, with the weights at `prefix`."""
    return _filled(source, abstract_part(make, dtype), prefix)


def abstract_part(make: Callable[[], Any], dtype: Any) -> Any:
    """That part with shapes, dtypes and shardings in the place of arrays."""
    device = SingleDeviceSharding(jax.devices()[0])
    shapes = _typed(nnx.eval_shape(make), dtype)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), shapes)


def _filled(source: Source, shapes: Any, prefix: str = "") -> Any:
    wanted = {prefix + path: leaf for path, leaf in sharding.by_path(shapes).items()}
    arrays = source.load(wanted)
    return jax.tree.unflatten(jax.tree.structure(shapes), [arrays[path] for path in wanted])
