"""Where weights come from, and how they get into the network. Letters: see `config`."""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from ..config import Config, Form
from ..devices import mesh as sharding
from ..errors import RankingError
from ..files.paths import AnyPath
from .model import GptOss

Weights = Mapping[str, Any]
"""Arrays by the path of their parameter in `GptOss`, attributes joined by '/'; layers' are stacked [L, …]."""

ALL = "all"  # layers, where a path names the stack of them
ROUTER_BIAS = "moe/router/bias"  # of each layer


@runtime_checkable  # annotations are checked in tests
class Source(Protocol):
    """A checkpoint, from which the engines take weights: the readers of `convert` implement it, and `Masked`."""

    @property
    def config(self) -> Config: ...

    @property
    def config_json(self) -> dict[str, Any]:
        """config.json as it stands, with the keys that `config` leaves out."""
        ...

    @property
    def folder(self) -> AnyPath:
        """Where it lies, with its tokenizer and its other files."""
        ...

    def fingerprint(self) -> str:
        """A digest that tells one model from another, by what is quickly read of it."""
        ...

    @property
    def quantized(self) -> bool:
        """Whether the experts' kernels are stored in four bits."""
        ...

    @property
    def four_bits(self) -> Form:
        """The form of `Experts` that four bits are read into without being rearranged."""
        ...

    def load(self, wanted: Weights) -> Weights:
        """Arrays for shapes, dtypes and shardings; each process reads what its devices hold, and no more.

        The path of a parameter of one layer alone has the layer's number in it: layers/3/attention/q_kernel."""
        ...

    def rows(self, path: str, ids: np.ndarray) -> np.ndarray:
        """Rows of a parameter outside the layers, in its stored form."""
        ...


def split_path(path: str) -> tuple[str, str]:
    """The layer of a parameter's path in the model ("" outside layers, ALL of the stack), and its path in there."""
    match = re.fullmatch(r"layers/(?:(\d+)/)?(.*)", path)
    return (match[1] or ALL, match[2]) if match else ("", path)


class Masked:
    """A source whose routers never choose what the L keep-sets drop: the model that pruning leaves, with no file
    written. Experts keep their numbers; the logits of those that are dropped are −∞ before top-k.

    RankingError where the keep-sets do not fit the model, or a layer's has fewer experts than each token uses.
    """

    def __init__(self, source: Source, keep_sets: Sequence[Collection[int]]):
        self.source, self.config, self.config_json = source, source.config, source.config_json
        self.folder, self.quantized, self.four_bits = source.folder, source.quantized, source.four_bits
        self.dropped_LE = _dropped(keep_sets, source.config)

    def load(self, wanted: Weights) -> Weights:
        """The source's arrays, with −∞ in routers' biases."""
        arrays = dict(self.source.load(wanted))
        for path, array in arrays.items():
            layer, inner = split_path(path)
            if inner == ROUTER_BIAS:
                arrays[path] = _masked(array, self.dropped_LE if layer == ALL else self.dropped_LE[int(layer)])
        return arrays

    def rows(self, path: str, ids: np.ndarray) -> np.ndarray:
        """The source's: nothing outside the layers is masked."""
        return self.source.rows(path, ids)

    def fingerprint(self) -> str:
        """SHA-256 over the source's and what is dropped."""
        dropped = [np.flatnonzero(dropped_E).tolist() for dropped_E in self.dropped_LE]
        return hashlib.sha256(f"{self.source.fingerprint()} without {json.dumps(dropped)}".encode()).hexdigest()


def _dropped(keep_sets: Sequence[Collection[int]], config: Config) -> np.ndarray:
    """bool [L, E]: what is in no keep-set."""
    if len(keep_sets) != config.num_layers:
        raise RankingError(
            f"keep-sets of {len(keep_sets)} layers: the model has {config.num_layers}, give one for each"
        )
    kept_LE = np.zeros((config.num_layers, config.num_experts), bool)
    for layer, kept in enumerate(keep_sets):
        if unknown := sorted(set(kept) - set(range(config.num_experts))):
            raise RankingError(
                f"layer {layer} keeps expert {unknown[0]}: the model has experts 0 to {config.num_experts - 1}"
            )
        kept_LE[layer] = np.isin(np.arange(config.num_experts), list(kept))
        if kept_LE[layer].sum() < config.top_k:
            raise RankingError(
                f"layer {layer} keeps {kept_LE[layer].sum()} experts, and each token uses {config.top_k}: a masked "
                f"model would choose dropped ones: keep at least {config.top_k}"
            )
    return ~kept_LE


def _masked(array: jax.Array, dropped: np.ndarray) -> jax.Array:
    """The array with −∞ where `dropped`, lying on devices as it did; each process changes what its devices hold."""
    parts = []
    for shard in array.addressable_shards:
        part = np.array(shard.data)
        part[dropped[shard.index]] = -np.inf
        parts.append(jax.device_put(part, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)


def abstract(config: Config, mesh: Mesh, dtype: Any = jnp.bfloat16, form: Form = "bf16") -> GptOss:
    """The model with shapes, dtypes and shardings in the place of arrays; bytes of MXFP4 stay bytes."""

    shapes = nnx.eval_shape(lambda: GptOss(config, form, rngs=nnx.Rngs(0)))
    return sharding.sharded(_typed(shapes, dtype), mesh)


def _typed(shapes: Any, dtype: Any) -> Any:
    def typed(leaf: Any) -> Any:
        return leaf if leaf.dtype == jnp.uint8 else jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype))

    return jax.tree.map(typed, shapes)


def load(source: Source, dtype: Any, mesh: Mesh | None = None, form: Form = "bf16") -> GptOss:
    """The model with all weights resident, split over `mesh`, or all on the default device."""
    mesh = sharding.make(source.config, 1, 1, jax.devices()[:1]) if mesh is None else mesh
    shapes = abstract(source.config, mesh, dtype, form)
    return filled(source, shapes)


def load_part(source: Source, make: Callable[[], Any], dtype: Any, prefix: str = "", mesh: Mesh | None = None) -> Any:
    """A part of the model, split over `mesh`, or on the default device: the module that `make` makes, with the weights
    at `prefix`."""
    return filled(source, abstract_part(make, dtype, mesh), prefix)


def abstract_part(make: Callable[[], Any], dtype: Any, mesh: Mesh | None = None) -> Any:
    """The part that `make` makes, with shapes, dtypes and shardings in the place of arrays."""
    shapes = _typed(nnx.eval_shape(make), dtype)
    if mesh is not None:
        return sharding.sharded(shapes, mesh)
    device = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), shapes)


def filled(source: Source, shapes: Any, prefix: str = "") -> Any:
    """The abstract part of a model with the weights at `prefix`."""
    wanted = {prefix + path: leaf for path, leaf in sharding.by_path(shapes).items()}
    arrays = source.load(wanted)
    return jax.tree.unflatten(jax.tree.structure(shapes), [arrays[path] for path in wanted])
