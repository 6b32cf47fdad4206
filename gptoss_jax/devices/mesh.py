"""Where a step runs: the axes of the mesh, and the one table that says what is split over which.

A mesh has the axes `data`, over which rows are split, and `expert`, over which experts, attention heads,
the router's rows and the vocabulary are. All devices of one `data` index see the same tokens, and no
product is computed on two of them. Letters: see `config`.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from ..config import Config
from ..errors import MeshError

DATA, EXPERT = "data", "expert"
MOST_DEVICES = 1 << 14  # of one mesh: the largest slices have fewer chips

# Which axis of the mesh splits a dimension, by its letter; of an array's dimensions the first that has one is split.
SPLIT = {"E": EXPERT, "H": EXPERT, "K": EXPERT, "V": EXPERT, "B": DATA}
# The dimensions of each parameter, by the end of its path: the last ones, since those of layers may be stacked [L, …].
# A size that is part of a letter's is written in small letters. A path that matches no rule is an error, so that
# nothing is replicated by oversight.
RULES = {
    "attention/q_kernel": "H h D",
    "attention/[kv]_kernel": "K h D",
    "attention/q_bias": "H h",
    "attention/[kv]_bias": "K h",
    "attention/o_kernel": "D H h",
    "attention/o_bias": "D",  # added once, behind the sum over heads
    "attention/sinks": "H",
    "router/kernel": "E D",
    "router/bias": "E",
    "experts/gate_up_kernel": "E c F D",
    "experts/gate_up_(packed|scales)": "E d cF",  # d: D / 2 or D / 32
    "experts/gate_up_bias": "E c F",
    "experts/down_kernel": "E D F",
    "experts/down_(packed|scales)": "E f D",  # f: F / 2 or F / 32
    "experts/down_bias": "E D",
    "norm/scale": "D",
    "(un)?embedding": "V D",
}


def make(config: Config, data: int, expert: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of data × expert devices; MeshError where that does not divide devices or model."""
    devices = jax.devices() if devices is None else devices
    if data * expert != len(devices):
        raise MeshError(
            f"mesh data={data},expert={expert} has {data * expert} places, and there are {len(devices)} devices: "
            "the product must be their number"
        )
    for what, count in _split(config).items():
        if count % expert:
            raise MeshError(
                f"mesh expert={expert} does not divide the model's {count} {what}: "
                f"expert may be {', '.join(map(str, expert_sizes(config)))}"
            )
    # On TPUs this order follows the links between chips; 8 experts on a square of 4 × 4 take two of its rows.
    ordered = mesh_utils.create_device_mesh((data, expert), devices, allow_split_physical_axes=True)
    return Mesh(ordered, (DATA, EXPERT), axis_types=(AxisType.Auto, AxisType.Auto))


def _split(config: Config) -> dict[str, int]:
    return {"experts": config.num_experts, "key/value heads": config.num_kv_heads, "tokens": config.vocab_size}


def expert_sizes(config: Config) -> list[int]:
    """The sizes that the `expert` axis may have for a model, up to MOST_DEVICES."""
    shared = math.gcd(*_split(config).values())
    return [size for size in range(1, min(shared, MOST_DEVICES) + 1) if shared % size == 0]


def default_sizes(config: Config, num_devices: int) -> tuple[int, int]:
    """data and expert where the user names none: weights as widely split as the model allows."""
    expert = math.gcd(*_split(config).values(), num_devices)
    return num_devices // expert, expert


def check_batch(batch_size: int, data: int) -> None:
    """MeshError where rows cannot be shared out evenly."""
    if batch_size % data:
        raise MeshError(f"--batch-size {batch_size} does not divide over data={data}: make it a multiple of {data}")


def split(axes: str, ndim: int | None = None) -> P:
    """How an array with these dimensions is split, with further ones before them up to `ndim`."""
    letters = axes.split()
    named = [SPLIT.get(letter) for letter in letters]
    first = next((i for i, axis in enumerate(named) if axis), len(named))
    before = 0 if ndim is None else ndim - len(letters)
    return P(*(None,) * before, *(axis if i == first else None for i, axis in enumerate(named)))


def spec(path: str, ndim: int) -> P:
    """How the parameter of `ndim` dimensions at `path` is split."""
    for pattern, axes in RULES.items():
        if re.search(f"(^|[/_]){pattern}$", path):
            return split(axes, ndim)
    raise LookupError(f"{path}: no rule says how it is split")


def specs(tree: Any) -> Any:
    """The tree of parameters with a PartitionSpec in the place of each array."""
    return jax.tree_util.tree_map_with_path(lambda path, x: spec(path_of(path), len(x.shape)), tree)


def path_of(path: Any) -> str:
    """The names along a path of JAX's trees, joined by '/'; the last, that of a variable's value, is left out."""
    names = (getattr(key, "name", getattr(key, "key", None)) for key in path)
    return "/".join(str(name) for name in names if name != "value")


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths, in its order."""
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def sharded(tree: Any, mesh: Mesh, how: Any = None) -> Any:
    """The abstract tree, each array with its sharding over `mesh`: by the specs in `how`, or as a parameter's."""
    return jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, s)),
        tree,
        specs(tree) if how is None else how,
    )


def put(x: np.ndarray, sharding: Sharding) -> jax.Array:
    """An array that every process has whole: each puts what its own devices hold."""
    return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)


def rows(mesh: Mesh) -> NamedSharding:
    """How the arrays of a batch are split."""
    return NamedSharding(mesh, split("B S"))
