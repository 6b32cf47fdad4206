"""What is left of a model, brought near the whole one layer by layer, before it is trained end to end.

A pass goes from the first layer to the last: what a layer is fitted to takes what those before it give with their new
values. A layer at a time is in memory, whichever engine trains. A layer's distance can fall while the model's
expectations get worse: a pass counts only where these come nearer on rows that are held out. Letters: see `config`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from ..config import Config
from ..devices import hosts
from ..devices.mesh import put
from ..devices.placement import here
from ..errors import StatisticsError
from ..network.batch import Batch
from ..network.model import Layer
from ..network.source import ROUTER_BIAS, Source
from ..run.bar import bar
from ..run.distilling import PASSES
from ..run.progress import Progress
from ..run.steps import STEPS_KEPT
from ..run.streamed import Layers
from .layerwise import Grams, Sums, fitted_router, grams_step, shifts, sums_step
from .steps import layer_forward
from .trained import Trained, joined, of_layer, stacked, written

ROUTER_KERNEL, DOWN_BIAS = "moe/router/kernel", "moe/experts/down_bias"
KL = "kl"  # beside the values of a pass that is kept


@dataclass(frozen=True)
class Pass:
    """What a pass over all layers was worth."""

    what: str
    """As the option names it."""
    before: float
    """The mean KL of the rows that are held out, in nats a token."""
    after: float

    @property
    def is_kept(self) -> bool:
        """Whether it lowered that; else its values are left out."""
        return self.after < self.before

    @property
    def least(self) -> float:
        """The KL behind the pass."""
        return self.after if self.is_kept else self.before


def reconstruct(
    sweeps: "Sweeps", whats: Sequence[str], first: Trained, held: Callable[[Trained], float], kept: Progress
) -> tuple[Trained, list[Pass]]:
    """Values as `first` has them, of which passes have changed some, and what each was worth; `kept` holds those that
    are finished. `held` gives the mean KL of the rows that are held out."""
    values, passes = first, list[Pass]()
    for what in PASSES:
        if what not in whats:
            continue
        name = f"reconstruction-{what}"
        found = kept.kept(safetensors.numpy.load, name)
        if found is None:
            before = passes[-1].least if passes else held(values)
            gathered = hosts.gather(values)
            # One process sweeps: to the last bit others might find something else.
            swept = safetensors.numpy.save(sweeps.run(what, gathered)) if hosts.is_first() else b""
            found = safetensors.numpy.load(hosts.from_first(swept))
            after = held(_placed(found, values))
            if not np.isfinite(after):
                raise _not_finite(f"--reconstruct {what}")
            found[KL] = np.array([before, after])
            if hosts.is_first():
                kept.write(name, safetensors.numpy.save(found))
        before, after = found.pop(KL).tolist()
        passes.append(Pass(what, before, after))
        values = _placed(found, values) if passes[-1].is_kept else values
    return values, passes


class Sweeps:
    """The learnt rows, through the whole model and through what is left of it, side by side."""

    def __init__(self, source: Source, dtype: Any, batches: Sequence[Batch], keep_sets: Sequence[Sequence[int]]):
        self.layers, self.config = Layers(source, dtype), source.config
        self.batches, self.keep_sets = batches, keep_sets
        self._forward, self._grams, self._sums = _jitted(self.config)

    def run(self, what: str, values: Trained) -> dict[str, np.ndarray]:
        """What a pass finds, rounded to BF16, in float32, by its paths in the model."""
        fit = {"routers": self._router, "biases": self._biases}[what]
        host = {path: np.asarray(x) for path, x in values.items()}
        whole = [jnp.asarray(self.layers.embed(batch)) for batch in self.batches]
        pruned, found = whole, list[Trained]()
        with bar(self.config.num_layers, "layers", shown=hosts.is_first()) as advance:
            for index, layer in self.layers.each(range(self.config.num_layers)):
                in_layer = of_layer(host, index)
                whole = self._through(layer, {}, whole, index, is_whole=True)
                found.append(written(fit(layer, in_layer, whole, pruned, index)))
                pruned = self._through(layer, in_layer | found[-1], pruned, index)
                advance(1, f"{what}: ")
        return {path: np.asarray(x) for path, x in joined(stacked(found), {}).items()}

    def _through(
        self, layer: Layer, values: Trained, xs: list[jax.Array], index: int, is_whole: bool = False
    ) -> list[jax.Array]:
        batches = [replace(batch, kept=None) if is_whole else batch for batch in self.batches]
        return [
            self._forward(layer, values, x_BSD, batch, np.asarray(index))
            for x_BSD, batch in zip(xs, batches, strict=True)
        ]

    def _router(self, layer: Layer, values: Trained, whole: Any, pruned: Any, index: int) -> Trained:
        kept_N, parts = np.asarray(self.keep_sets[index]), list[Grams]()
        for batch, behind, before in zip(self.batches, whole, pruned, strict=True):
            found = self._grams(layer, values, behind, before, batch, np.asarray(index), kept_N)
            counts_T = batch.weights.reshape(-1) != 0
            parts.append(Grams(*(np.asarray(x)[counts_T] for x in found)))
        grams = Grams(*map(np.concatenate, zip(*parts, strict=True)))
        of_all = {"kernel": values[ROUTER_KERNEL], "bias": values[ROUTER_BIAS]}
        rows = {name: jnp.asarray(x[kept_N]) for name, x in of_all.items()}
        best, losses = fitted_router(rows, grams, self.config.top_k)
        if not np.isfinite(losses[0]):
            raise _not_finite(f"--reconstruct routers: layer {index}")
        new = {name: jnp.asarray(x).at[kept_N].set(best[name]) for name, x in of_all.items()}
        return {ROUTER_KERNEL: new["kernel"], ROUTER_BIAS: new["bias"]}

    def _biases(self, layer: Layer, values: Trained, whole: Any, pruned: Any, index: int) -> Trained:
        parts = [
            jax.device_get(self._sums(layer, values, behind, before, batch, np.asarray(index)))
            for batch, behind, before in zip(self.batches, whole, pruned, strict=True)
        ]
        sums = Sums(*(np.sum(of_all, axis=0, dtype=np.float64) for of_all in zip(*parts, strict=True)))
        if not all(np.isfinite(x).all() for x in sums):
            raise _not_finite(f"--reconstruct biases: layer {index}")
        kept_N = np.asarray(self.keep_sets[index])
        new_ED = values[DOWN_BIAS].astype(np.float64)
        new_ED[kept_N] += shifts(sums, self.keep_sets[index])
        return {DOWN_BIAS: jnp.asarray(new_ED, jnp.float32)}


@lru_cache(STEPS_KEPT)
def _jitted(config: Config) -> tuple[Any, ...]:
    """`layer_forward`, `grams_step` and `sums_step`."""
    return tuple(jax.jit(partial(step, config=config, place=here())) for step in (layer_forward, grams_step, sums_step))


def _placed(found: Mapping[str, np.ndarray], values: Trained) -> Trained:
    """The values with what was found, lying on devices as they do."""
    return values | {path: put(x, values[path].sharding) for path, x in found.items()}


def _not_finite(where: str) -> StatisticsError:
    return StatisticsError(f"{where}: the loss is not finite: check the model's weights")
