"""TPU slices that are not at hand: their devices for the compiler, and what their makers say of them.

The compiler is libtpu's, which comes with `pip install "jax[tpu]"` and needs no TPU to compile for one.
"""

import os
import re
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from ..errors import MeshError, reason

# Slices that the compiler knows, smallest and largest among those that are rented.
_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
# Several programs may compile at once, and no metadata server is asked what TPU this is; without the last two
# the library remarks on both.
NO_TPU_HERE = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}
SLICES = {"v5e": _FLAT, "v5p": _CUBES, "v6e": _FLAT, "tpu7x": _CUBES}


@dataclass(frozen=True)
class Chip:
    """Peak rates of one device, which on TPU7x is one of a chip's two cores (cloud.google.com/tpu/docs)."""

    bf16_flops: float
    memory_bandwidth: float
    """Bytes a second, of HBM."""
    link_bandwidth: float
    """Bytes a second, of all links between chips together."""


CHIPS = {
    "TPU v5 lite": Chip(197e12, 819e9, 200e9),
    "TPU v5": Chip(459e12, 2765e9, 600e9),
    "TPU v6 lite": Chip(918e12, 1600e9, 400e9),
    "TPU7x": Chip(1153.5e12, 3690e9, 600e9),
}


def has_compiler() -> bool:
    """Whether libtpu is installed."""
    return find_spec("libtpu") is not None


def devices(topology: str) -> list[Any]:
    """Devices of a slice by its name, to compile for; MeshError lists the slices that exist."""
    family, _, shape = topology.partition(":")
    if shape not in SLICES.get(family, ()):
        known = "; ".join(f"{name}:{', '.join(shapes)}" for name, shapes in SLICES.items())
        raise MeshError(f"--topology {topology!r} does not exist; those that do are {known}")
    for name, value in NO_TPU_HERE.items():
        os.environ.setdefault(name, value)
    if not has_compiler():
        raise MeshError('the TPU compiler is not installed: pip install "jax[tpu]"')
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:  # of several classes, for a library that is missing or too old
        raise MeshError(
            f"--topology {topology}: the TPU compiler refuses it ({reason(error)}): install the libtpu that "
            'pip install "jax[tpu]" names'
        ) from error


def memory_bytes(device: Any) -> int:
    """What programs may use of a device's memory: as the compiler says when it is asked for far too much."""
    everything = jax.ShapeDtypeStruct((1 << 42,), jnp.int8, sharding=SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x + 1).lower(everything).compile()
    except Exception as error:
        if amounts := does_not_fit(error):
            return amounts[1]
        raise
    raise AssertionError("4 TiB fit into one device")


def does_not_fit(error: Exception) -> tuple[int, int] | None:
    """Bytes that the compiler needs and has, where that is what its error says."""
    found = re.search(r"\((\S+)([KMGT])\) exceeds available HBM \((\S+)([KMGT])\)", str(error))
    found = found or re.search(r"Used (\S+)([KMGT]) of (\S+)([KMGT]) hbm", str(error))
    if not found:
        return None
    units = {unit: 1 << 10 * (power + 1) for power, unit in enumerate("KMGT")}
    return int(float(found[1]) * units[found[2]]), int(float(found[3]) * units[found[4]])
