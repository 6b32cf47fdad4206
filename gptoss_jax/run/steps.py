"""The steps, and the two ways to map them over devices. What a step does not return, the compiler removes:
one model serves them all."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from ..config import Config
from ..devices import mesh as sharding
from ..devices.mesh import DATA
from ..devices.placement import Placement, here, over
from ..network import rope
from ..network.batch import Batch
from ..network.model import GptOss, Head, Layer, Output
from ..statistics.sums import Statistics
from .scores import TokenScores, token_scores

# Operands of float32 stay float32 on TPU and GPU too, where the default rounds them to bfloat16 or
# TF32; for bfloat16 operands the setting changes nothing.
float32_is_float32 = jax.default_matmul_precision("highest")


class Profiled(NamedTuple):
    """What a profile step returns."""

    statistics: Statistics
    """Of every layer, [L, G, …]."""
    scores: TokenScores | None = None


Step = Callable[[GptOss, Batch, Placement], Profiled]


@jax.jit
@float32_is_float32
def forward_step(model: GptOss, batch: Batch) -> Output:
    """Logits [B, S, V] and, stacked over layers, hidden states, routing and statistics; on one device."""
    return model(batch, here())


@float32_is_float32
def profile_step(model: GptOss, batch: Batch, place: Placement) -> Profiled:
    """The statistics; no unembedding is computed."""
    return Profiled(model(batch, place).layers.statistics)


@float32_is_float32
def scored_profile_step(model: GptOss, batch: Batch, place: Placement) -> Profiled:
    """The statistics, and the scores of every token; [B, S, V] never exists."""
    output = model(batch, place)
    scores = token_scores(model.logits, model.config.vocab_size, output.final, batch, place)
    return Profiled(output.layers.statistics, scores)


@float32_is_float32
def layer_step(
    layer: Layer, x_BSD: Float[Array, "B S D"], batch: Batch, sliding: Bool[Array, ""], config: Config, place: Placement
) -> tuple[Float[Array, "B S D"], Statistics]:
    """One layer alone: its output and statistics, [G, …]."""
    x_BSD, output = layer(x_BSD, batch, rope.tables(config, batch.positions), sliding, place)
    return x_BSD, output.statistics


@float32_is_float32
def score_step(head: Head, x_BSD: Float[Array, "B S D"], batch: Batch, place: Placement) -> TokenScores:
    """What `scored_profile_step` adds, from the last layer's output."""
    return token_scores(head.logits, len(head.unembedding[...]), head.final_norm(x_BSD), batch, place)


class Mapped(NamedTuple):
    """A step mapped over devices."""

    step: Any
    """Jitted; takes the model and what `put` gives, returns `Profiled` with the statistics of all rows."""
    put: Callable[[np.ndarray], Any]
    """Takes an array [B, …] of the batch, of the rows that this process feeds, to the devices."""


def mapped(step: Step, mesh: Mesh) -> Mapped:
    """The step over a mesh: weights and rows split by the table of `mesh`, statistics summed over `data`."""
    local, rows = _summed(step, over(mesh)), sharding.rows(mesh)

    def whole(model: GptOss, batch: Batch) -> Profiled:
        # Shapes alone, for which any placement does: on one device nothing is split.
        shapes = jax.eval_shape(lambda m, b: step(m, b, Placement("cpu")), model, batch)
        in_specs, out_specs = (sharding.specs(model), rows.spec), sharding.specs(shapes)
        # check_vma: the kernels do not say over which axes their results vary.
        split = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return split(model, batch)

    return Mapped(jax.jit(whole), partial(jax.make_array_from_process_local_data, rows))


def pmapped(step: Step, mesh: Mesh) -> Mapped:
    """The step in the classic form of the mapping: one program a core, all weights on each, rows split.

    For the cores of one host, each of which holds the whole model: the mesh has `expert` = 1.
    """
    devices = list(mesh.devices.flat)
    local = _summed(step, Placement(devices[0].platform))
    whole = jax.pmap(local, DATA, in_axes=(None, 0), out_axes=Profiled(None, 0), devices=devices)  # type: ignore
    return Mapped(whole, lambda rows: rows.reshape(len(devices), -1, *rows.shape[1:]))


def _summed(step: Step, place: Placement) -> Callable[[GptOss, Batch], Profiled]:
    """What each device runs in either map: the step on its rows, and the sum over those of all."""

    def local(model: GptOss, batch: Batch) -> Profiled:
        result = step(model, batch, place)
        return result._replace(statistics=result.statistics.sum_over(DATA))

    return local
