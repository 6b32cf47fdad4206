"""Distillation on devices that hold all weights. Letters: see `config`."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array

from ..devices import hosts
from ..devices import mesh as sharding
from ..devices.placement import Placement, over
from ..evaluation.compare import Top
from ..network.batch import Batch
from ..network.model import GptOss, Interventions
from ..run.steps import STEPS_KEPT, float32_is_float32
from .engine import Found
from .loss import Finals, Loss, Teacher
from .steps import Where, head_backward, head_loss, head_teacher, layer_backward, where
from .trained import Trained, into, joined, of_head, of_layers, specs, summed, written


class Resident:
    """A batch passes all layers in one step over a mesh, forward and then backward; of the way there, each layer's
    input is kept. See `Engine`."""

    def __init__(self, model: GptOss, mesh: Mesh, kind: type[Finals] | type[Top] = Finals):
        """`kind` is that of the teachers."""
        self.model, self.kind = model, kind
        self._rows = sharding.rows(mesh)
        self._teach, self._gradients, self._losses = _jitted(mesh, kind)  # type: ignore[arg-type]  # a class is hashable

    def teach(self, batches: Sequence[Batch]) -> list[Teacher]:
        """See `Engine`."""
        return [self._teach(self.model, {}, self._placed(replace(batch, kept=None)), None) for batch in batches]

    def gradients(self, trained: Trained, batches: Sequence[Batch], teachers: Sequence[Teacher]) -> Found:
        """See `Engine`."""
        loss, weight, total = 0.0, 0.0, jax.tree.map(jnp.zeros_like, trained)
        for batch, teacher in zip(batches, teachers, strict=True):
            found, gradients = self._gradients(self.model, trained, self._placed(batch), teacher)
            kl_B, weight_B = hosts.gather(found)
            loss, weight = loss + float(kl_B.sum()), weight + float(weight_B.sum())
            total = jax.tree.map(jnp.add, total, gradients)
        return Found(loss, weight, total)

    def losses(self, trained: Trained, batches: Sequence[Batch], teachers: Sequence[Teacher]) -> Loss:
        """See `Engine`."""
        found = [
            hosts.gather(self._losses(self.model, trained, self._placed(batch), teacher))
            for batch, teacher in zip(batches, teachers, strict=True)
        ]
        return Loss(*map(np.concatenate, zip(*found, strict=True)))

    def _placed(self, batch: Batch) -> Batch:
        return jax.tree.map(lambda x: sharding.put(x, self._rows), batch)


Step = Callable[..., Any]


@lru_cache(STEPS_KEPT)
def _jitted(mesh: Mesh, kind: Any) -> tuple[Step, Step, Step]:
    """`_teach`, `_gradients` and `_losses` over a mesh."""
    run, rows = partial(_mapped, mesh=mesh), sharding.split("B")
    return (
        run(partial(_teach, kind=kind), lambda _: rows),
        run(_gradients, lambda trained: (rows, specs(trained))),
        run(_losses, lambda _: rows),
    )


def _mapped(step: Step, out_specs: Callable[[Trained], Any], mesh: Mesh) -> Step:
    """The step of (model, trained, batch, teacher) over a mesh, jitted: what it returns is split as `out_specs` says
    for what is trained."""
    local = float32_is_float32(partial(step, place=over(mesh)))
    rows: Any = sharding.split("B")

    def whole(model: GptOss, trained: Trained, batch: Batch, teacher: Teacher | None) -> Any:
        # check_vma: the kernels do not say over which axes their results vary.
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(sharding.specs(model), specs(trained), rows, rows),
            out_specs=out_specs(trained),
            check_vma=False,
        )(model, written(trained), batch, teacher)

    return jax.jit(whole)


def _hidden(model: GptOss, trained: Trained, batch: Batch, place: Placement) -> Array:
    """The residual stream before the first layer and behind each, [L + 1, B, S, D]."""
    kept_LBE = None if batch.kept is None else jnp.moveaxis(batch.kept, 1, 0)
    student = into(model, trained)
    layers = student(batch.tokens, place, lambda output: output.hidden, Interventions(kept=kept_LBE)).layers
    return jnp.concatenate([student.embed(batch.tokens.ids, place)[None], layers])


def _teach(model: GptOss, trained: Trained, batch: Batch, teacher: None, place: Placement, kind: Any) -> Teacher:
    return head_teacher(model, _hidden(model, trained, batch, place)[-1], batch, place, kind)


def _losses(model: GptOss, trained: Trained, batch: Batch, teacher: Teacher, place: Placement) -> Loss:
    return head_loss(model, of_head(trained), _hidden(model, trained, batch, place)[-1], batch, teacher, place)


def _gradients(
    model: GptOss, trained: Trained, batch: Batch, teacher: Teacher, place: Placement
) -> tuple[Loss, Trained]:
    """The loss of this device's rows, and the gradients of the sum over all.

    What all devices of a data index hold alike, as the residual stream, has a gradient on each of them, and these are
    parts of one sum: a device adds what its own experts, heads and tokens give.
    """
    hidden = _hidden(model, trained, batch, place)
    loss, change_BSD, of_final = head_backward(model, of_head(trained), hidden[-1], batch, teacher, place)
    scanned, layer_of = model.by_layer(place)

    def one_layer(change_BSD: Array, slices: tuple[Any, Trained, Array, Array]) -> tuple[Array, Trained]:
        states, in_layer, x_BSD, index = slices
        at: Where = where(batch, index, model.config)
        return layer_backward(layer_of(states), in_layer, x_BSD, change_BSD, at, place, index)

    per_layer = scanned, of_layers(trained), hidden[:-1], jnp.arange(model.config.num_layers)
    _, of_all_layers = lax.scan(one_layer, change_BSD, per_layer, reverse=True)
    return loss, summed(joined(of_all_layers, of_final))
