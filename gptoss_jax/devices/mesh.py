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
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ..config import Config
from ..errors import MeshError

DATA, EXPERT = "data", "expert"

# What is split, by the end of its path. Axes are the last ones: parameters of layers may be stacked [L, …].
# What matches no rule is an error, so that nothing is replicated by oversight.
RULES: dict[str, tuple[str | None, ...]] = {
    "attention/[qkv]_kernel": (EXPERT, None, None),  # H or K, h, D
    "attention/[qkv]_bias": (EXPERT, None),  # H or K, h
    "attention/o_kernel": (None, EXPERT, None),  # D, H, h
    "attention/o_bias": (None,),  # D; added once, behind the sum over heads
    "attention/sinks": (EXPERT,),  # H
    "router/kernel": (EXPERT, None),  # E, D
    "router/bias": (EXPERT,),  # E
    "experts/gate_up_kernel": (EXPERT, None, None, None),  # E, c, F, D
    "experts/gate_up_(packed|scales)": (EXPERT, None, None),  # E, D / 2 or 32, c·F
    "experts/gate_up_bias": (EXPERT, None, None),  # E, c, F
    "experts/down_kernel": (EXPERT, None, None),  # E, D, F
    "experts/down_(packed|scales)": (EXPERT, None, None),  # E, F / 2 or 32, D
    "experts/down_bias": (EXPERT, None),  # E, D
    "norm/scale": (None,),  # D
    "(un)?embedding": (EXPERT, None),  # V, D
    "statistics/(count|gate_sum|norm_sum|gate_norm_sum|gate_norm_sq_sum|norm_sq_sum)": (EXPERT,),  # E
    "statistics/(norm_max|activation_max)": (EXPERT,),  # E
    "statistics/coactivation": (EXPERT, None),  # E, E
    "statistics/(tokens|computed|router_entropy_sum)": (),
    "statistics/(gate_rank_sum|gate_histogram)": (None,),
    "scores/(probability|entropy)": (DATA, None),  # B, S
    "batch": (DATA, None),  # B, S
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
    """The sizes that the `expert` axis may have for a model."""
    shared = math.gcd(*_split(config).values())
    return [size for size in range(1, shared + 1) if shared % size == 0]


def default_sizes(config: Config, num_devices: int) -> tuple[int, int]:
    """data and expert where the user names none: weights as widely split as the model allows."""
    expert = max(size for size in expert_sizes(config) if num_devices % size == 0)
    return num_devices // expert, expert


def check_batch(batch_size: int, data: int) -> None:
    """MeshError where rows cannot be shared out evenly."""
    if batch_size % data:
        raise MeshError(f"--batch-size {batch_size} does not divide over data={data}: make it a multiple of {data}")


def spec(path: str, ndim: int) -> P:
    """How the array of `ndim` axes at `path` is split."""
    for pattern, axes in RULES.items():
        if re.search(f"(^|[/_]){pattern}$", path):
            return P(*(None,) * (ndim - len(axes)), *axes)
    raise LookupError(f"{path}: no rule says how it is split")


def specs(tree: Any) -> Any:
    """The tree with a PartitionSpec in the place of each array."""
    return jax.tree_util.tree_map_with_path(lambda path, x: spec(path_of(path), len(x.shape)), tree)


def path_of(path: Any) -> str:
    """The names along a path of JAX's trees, joined by '/'; the last, that of a variable's value, is left out."""
    names = (getattr(key, "name", getattr(key, "key", None)) for key in path)
    return "/".join(str(name) for name in names if name != "value")


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths, in its order."""
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def sharded(tree: Any, mesh: Mesh) -> Any:
    """The abstract tree, each array with its sharding over `mesh`."""
    return jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, s)), tree, specs(tree)
    )


def rows(mesh: Mesh) -> NamedSharding:
    """How the arrays of a batch are split."""
    return NamedSharding(mesh, spec("batch", 2))
