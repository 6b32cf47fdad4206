"""Where a step runs, as far as the layers inside it need to know. Letters: see `config`."""

from dataclasses import dataclass
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh

from .mesh import EXPERT

LANES = 128  # of a TPU's vector registers: kernels work on whole multiples


@dataclass(frozen=True)
class Placement:
    """Where a step runs, as far as the layers inside it need to know."""

    platform: str
    """The platform of the devices, as JAX names it: it decides which kernels run."""
    expert_axis: str | None = None
    """The mesh axis that heads and experts are split over; None where each device has all."""
    interpret: bool = False
    """Run the kernels of `platform` in Pallas' interpreter, on any device."""
    differentiable: bool = False
    """Whether gradients by all weights are taken: loops then run for the worst case, as those that end by data have
    none. Without it the kernels of experts and of attention have none, and all else has gradients made by hand."""

    def sum_experts(self, x: jax.Array, dtype: Any = None) -> jax.Array:
        """The sum of what the devices of the `expert` axis have, handed over as `dtype`."""
        if self.expert_axis is None:
            return x
        return lax.psum(x if dtype is None else x.astype(dtype), self.expert_axis).astype(x.dtype)

    def max_experts(self, x: jax.Array) -> jax.Array:
        """The largest of what the devices of the `expert` axis have."""
        return x if self.expert_axis is None else lax.pmax(x, self.expert_axis)

    def gather_experts(self, x: jax.Array) -> jax.Array:
        """What the devices of the `expert` axis have, joined along the last axis."""
        return x if self.expert_axis is None else lax.all_gather(x, self.expert_axis, axis=x.ndim - 1, tiled=True)

    def sum_to_share(self, x: jax.Array) -> jax.Array:
        """The sum of what the devices of the `expert` axis have, of which each gets its share of the first dimension.
        Zeros are added behind it, so that all shares have one size."""
        if self.expert_axis is None:
            return x
        return lax.psum_scatter(self._even(x), self.expert_axis, scatter_dimension=0, tiled=True)

    def share(self, x: jax.Array) -> jax.Array:
        """This device's share, as `sum_to_share` gives it, of what all devices of the `expert` axis have."""
        if self.expert_axis is None:
            return x
        size = len(self._even(x)) // lax.axis_size(self.expert_axis)
        return lax.dynamic_slice_in_dim(self._even(x), lax.axis_index(self.expert_axis) * size, size)

    def join_shares(self, x: jax.Array, total: int) -> jax.Array:
        """The shares of all devices of the `expert` axis, joined again to the `total` that they are of."""
        return x if self.expert_axis is None else lax.all_gather(x, self.expert_axis, tiled=True)[:total]

    def _even(self, x: jax.Array) -> jax.Array:
        more = -len(x) % lax.axis_size(self.expert_axis)
        return jax.numpy.pad(x, ((0, more), *((0, 0),) * (x.ndim - 1)))

    def local(self, total: int) -> tuple[jax.Array | int, int]:
        """The first id here, and how many there are, where `total` ids are split over the `expert` axis."""
        if self.expert_axis is None:
            return 0, total
        count = total // lax.axis_size(self.expert_axis)
        return lax.axis_index(self.expert_axis) * count, count


def mosaic_precision(dtype: Any) -> Any:
    """A context for TPU kernels: Mosaic refuses the highest precision, which steps ask for, for bfloat16."""
    return jax.default_matmul_precision("default" if dtype == jax.numpy.bfloat16 else "highest")


def here() -> Placement:
    """The placement of a step that runs on one device of the default platform."""
    return Placement(jax.default_backend())


def over(mesh: Mesh) -> Placement:
    """What the layers inside a step that is mapped over `mesh` are told."""
    return Placement(mesh.devices.flat[0].platform, EXPERT)
