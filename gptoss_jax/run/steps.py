"""The steps, and the two ways to map them over devices. What a step does not return, the compiler removes:
one network serves them all."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from ..config import SLIDING, Config
from ..devices import mesh as sharding
from ..devices.mesh import DATA
from ..devices.placement import Placement, over
from ..network import rope
from ..network.batch import Batch
from ..network.model import GptOss, Head, Interventions, Layer, LayerOutput
from ..network.moe import Further
from ..selection.greedy import Grams
from ..statistics.sums import Statistics, layer_statistics
from .scores import TokenScores, token_scores

# Operands of float32 stay float32 on TPU and GPU too, where the default rounds them to bfloat16 or
# TF32; for bfloat16 operands the setting changes nothing.
float32_is_float32 = jax.default_matmul_precision("highest")
# Jitted steps of a kind: a second run in a process traces and compiles nothing that one of these did.
STEPS_KEPT = 8
TINIEST = 1e-30  # squared norm that is divided by: a stream of zeros, as of an empty row of the embedding, stays one


class Asked(NamedTuple):
    """What a run asks of its steps; what it does not ask for is not computed."""

    statistics: bool = True
    scores: bool = False
    """How the model expected each token."""
    routing: bool = False
    """Which experts each token chose, and its gates."""
    finals: bool = False
    """What the unembedding takes, at the positions that the batch names."""
    swap: bool = False
    """Among the statistics, what dropping an expert changes: kept tokens then take k + 1 experts."""
    grams: bool = False
    """What `selection.greedy` needs to know of each token: kept ones then take all experts."""

    def further(self, batch: Batch) -> Further:
        """What layers are to show of kept tokens, beside their output."""
        kept_BS = batch.weights != 0
        return Further(kept_BS if self.swap else None, kept_BS if self.grams else None)


class Chosen(NamedTuple):
    """The experts of each token, best first, and their gates."""

    experts: Int[Any, "*L B S k"]
    gates: Float[Any, "*L B S k"]


class Results(NamedTuple):
    """What a step returns of what was asked for; the rest is None."""

    statistics: Statistics | None = None
    """They are [L, G, …] of every layer, and [G, …] of a single one."""
    routing: Chosen | None = None
    scores: TokenScores | None = None
    finals: Float[Array, "B N D"] | None = None
    grams: Grams | None = None
    """[L, B, S, …] of every layer, and [B, S, …] of a single one."""


def observe(output: LayerOutput, batch: Batch, place: Placement, asked: Asked) -> Results:
    """What is kept of one layer."""
    statistics, chosen, grams = None, None, None
    if asked.statistics:
        statistics = layer_statistics(output.routing, output.mixture, batch, place, _swaps(output))
    if asked.routing:
        chosen = Chosen(*(x.reshape(*batch.shape, -1) for x in (output.routing.experts_Tk, output.routing.gates_Tk)))
    if asked.grams:
        grams = jax.tree.map(lambda x: x.reshape(*batch.shape, *x.shape[1:]), _grams(output, batch))
    return Results(statistics, chosen, grams=grams)


def _grams(output: LayerOutput, batch: Batch) -> Grams:
    """What a token's squared change counts is relative to the residual stream behind the layer, as in `_swaps`."""
    assert output.products_TP is not None, "asked for"
    weights_T = batch.weights.reshape(-1) / _squared_stream(output)
    return Grams(output.routing.logits_TE, output.products_TP, weights_T, _turns(output), batch.groups.reshape(-1))


def _turns(output: LayerOutput) -> Float[Array, " T"]:
    """1 − cosine of the residual stream before and behind the layer, as half the squared distance of their directions:
    most layers turn it by little, and 1 − 0.9999 would be float32's rounding to a thousandth."""

    def direction(x_BSD: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        wide_BSD = x_BSD.astype(jnp.float32)
        return wide_BSD * lax.rsqrt(jnp.maximum((wide_BSD**2).sum(-1, keepdims=True), TINIEST))

    distances_BS = ((direction(output.hidden) - direction(output.before)) ** 2).sum(-1)
    return distances_BS.reshape(-1) / 2


def _swaps(output: LayerOutput) -> Float[Array, "T k"] | None:
    """The squared change of the layer's output, relative to the residual stream behind the layer."""
    if output.changes_Tk is None:
        return None
    return output.changes_Tk / _squared_stream(output)[:, None]


def _squared_stream(output: LayerOutput) -> Float[Array, " T"]:
    """‖h‖² of the residual stream behind the layer."""
    return jnp.sum(output.hidden.astype(jnp.float32) ** 2, axis=-1).reshape(-1)


@float32_is_float32
def network_step(model: GptOss, batch: Batch, place: Placement, asked: Asked) -> Results:
    """What is asked for of every layer, and the scores of every token; [B, S, V] never exists."""
    kept_LBE = None if batch.kept is None else jnp.moveaxis(batch.kept, 1, 0)
    observer = partial(observe, batch=batch, place=place, asked=asked)
    output = model(batch.tokens, place, observer, Interventions(kept=kept_LBE), asked.further(batch))
    results: Results = output.layers
    if asked.finals:
        results = results._replace(finals=_at(output.final, batch))
    if asked.scores:
        scores = token_scores(model.logits, model.config.vocab_size, output.final, batch.tokens, place)
        results = results._replace(scores=scores)
    return results


@float32_is_float32
def layer_step(
    layer: Layer,
    x_BSD: Float[Array, "B S D"],
    batch: Batch,
    index: Int[Array, ""],
    config: Config,
    place: Placement,
    asked: Asked,
) -> tuple[Float[Array, "B S D"], Results]:
    """The layer of that index alone: its output, and what is asked for of it."""
    tables = rope.tables(config, batch.tokens.positions)
    sliding = jnp.array([kind == SLIDING for kind in config.layer_types])[index]
    interventions = Interventions(kept=None if batch.kept is None else batch.kept[:, index])
    further = asked.further(batch)
    output = layer(x_BSD, batch.tokens, tables, sliding, place, interventions=interventions, further=further)
    return output.hidden, observe(output, batch, place, asked)


def final_step(head: Head, x_BSD: Float[Array, "B S D"], batch: Batch) -> Float[Array, "B N D"]:
    """The finals that `network_step` adds, from the last layer's output."""
    return _at(head.final_norm(x_BSD), batch)


def _at(final_BSD: Float[Array, "B S D"], batch: Batch) -> Float[Array, "B N D"]:
    assert batch.at is not None, "finals are asked for at positions"
    return jnp.take_along_axis(final_BSD, batch.at[..., None], axis=1)


@float32_is_float32
def score_step(head: Head, x_BSD: Float[Array, "B S D"], batch: Batch, place: Placement) -> TokenScores:
    """The scores that `network_step` adds, from the last layer's output."""
    return token_scores(head.logits, len(head.unembedding[...]), head.final_norm(x_BSD), batch.tokens, place)


class Mapped(NamedTuple):
    """A step mapped over devices."""

    step: Any
    """Jitted; takes the model and what `put` gives, returns `Results` with the statistics of all rows."""
    put: Callable[[np.ndarray], Any]
    """Takes an array [B, …] of the batch, of the rows that this process feeds, to the devices."""


def specs(asked: Asked) -> Results:
    """How what is asked for is split over a mesh."""
    chosen: Any = sharding.split("L B S k")
    scores: Any = sharding.split("B S")
    finals: Any = sharding.split("B N D")
    tokens: Any = sharding.split("L B S")
    return Results(
        Statistics.specs(("swap",) if asked.swap else ()) if asked.statistics else None,
        Chosen(chosen, chosen) if asked.routing else None,
        TokenScores(scores, scores) if asked.scores else None,
        finals if asked.finals else None,
        Grams(chosen, chosen, tokens, tokens, tokens) if asked.grams else None,
    )


@lru_cache(STEPS_KEPT)
def mapped(asked: Asked, mesh: Mesh) -> Mapped:
    """The step over a mesh: weights and rows split by the table of `mesh`, statistics summed over `data`."""
    local, rows = _summed(asked, over(mesh)), sharding.rows(mesh)

    def whole(model: GptOss, batch: Batch) -> Results:
        in_specs, out_specs = (sharding.specs(model), rows.spec), specs(asked)
        # check_vma: the kernels do not say over which axes their results vary.
        split = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return split(model, batch)

    return Mapped(jax.jit(whole), partial(jax.make_array_from_process_local_data, rows))


def pmapped(asked: Asked, mesh: Mesh) -> Mapped:
    """The step in the classic form of the mapping: one program a core, all weights on each, rows split.

    For the cores of one host, each of which holds the whole model: the mesh has `expert` = 1. The rows of results have
    the devices before them as a further axis.
    """
    devices = list(mesh.devices.flat)
    local, out_axes = _summed(asked, Placement(devices[0].platform)), Results(None, 1, 0, grams=1)  # type: ignore[arg-type]
    whole = jax.pmap(local, DATA, in_axes=(None, 0), out_axes=out_axes, devices=devices)
    return Mapped(whole, lambda rows: rows.reshape(len(devices), -1, *rows.shape[1:]))


def _summed(asked: Asked, place: Placement) -> Callable[[GptOss, Batch], Results]:
    """What each device runs in either map: the step on its rows, and the sum over those of all."""

    def local(model: GptOss, batch: Batch) -> Results:
        results = network_step(model, batch, place, asked)
        statistics = results.statistics
        return results._replace(statistics=None if statistics is None else statistics.sum_over(DATA))

    return local
