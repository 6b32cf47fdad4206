"""The steps of a healing: Adam on what is trained, and looks at rows that are held out. Letters: see `config`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from ..errors import StatisticsError
from ..network.batch import Batch
from ..run.distilling import NANO_WIDTH, Distilling
from .engine import Engine
from .loss import Teacher
from .states import States
from .trained import Trained

PATIENCE = 3  # looks without a better state, after which the training ends
STATE = "training"


class Taught(NamedTuple):
    """Batches with what the whole model expects of them."""

    batches: Sequence[Batch]
    teachers: Sequence[Teacher]


class Arrays(NamedTuple):
    """All that changes in a training."""

    trained: Trained
    moments: Any
    """The optimizer's."""
    best: Trained
    """What was trained at the best look."""


@dataclass
class Curve:
    """What looks found: after how many steps, and the mean KL of the rows that are held out, in nats a token."""

    steps: list[int] = field(default_factory=list)
    held: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """Of each step, the mean KL of the tokens that were learnt in it, before it."""

    @property
    def best(self) -> int:
        """The number of the best look; of equal ones the first."""
        return int(np.argmin(self.held))

    @property
    def is_done(self) -> bool:
        """Whether looks have not become better for so long that the training ends."""
        return len(self.held) - 1 - self.best >= PATIENCE


def train(
    engine: Engine,
    first: Trained,
    fixed: Trained,
    learnt: Taught,
    held: Callable[[Trained], float],
    how: Distilling,
    seed: int,
    states: States,
    advance: Callable[[int, str], Any],
) -> tuple[Trained, Curve]:
    """Train from `first` on, or from the state that is kept, beside values that are `fixed`; `held` gives the mean KL
    of the rows that are held out. What is returned is what was trained at the best look.

    `advance` is told of steps. StatisticsError where a loss is not finite, or a value is none of BF16's.
    """
    optimizer = optax.adam(optax.cosine_decay_schedule(how.first_rate, max(how.steps, 1)))
    arrays, curve, step = Arrays(first, optimizer.init(first), first), Curve(), 0
    if (line := states.line()) is not None:
        step, curve = line["number"], Curve(line["steps"], line["held"], line["losses"])
        arrays = states.load(step, arrays)
        advance(step, "")
    else:
        curve.steps, curve.held = [0], [held(first)]
    update = jax.jit(_update, static_argnums=0)
    while step < how.steps and not curve.is_done:
        number = _order(len(learnt.batches), step, seed)
        found = engine.gradients(fixed | arrays.trained, [learnt.batches[number]], [learnt.teachers[number]])
        curve.losses.append(_finite(found.loss / max(found.weight, 1), f"step {step + 1}"))
        trained, moments = update(optimizer, found.gradients, max(found.weight, 1), arrays.moments, arrays.trained)
        arrays, step = arrays._replace(trained=trained, moments=moments), step + 1
        looks = step % how.check_every == 0 or step == how.steps
        if looks:
            _check_range(trained)
            curve.steps.append(step)
            curve.held.append(_finite(held(trained), f"step {step}"))
            if curve.best == len(curve.held) - 1:
                arrays = arrays._replace(best=trained)
        states.save(step, arrays, vars(curve), always=looks)
        advance(1, f"KL {curve.losses[-1]:.4f}, held out {curve.held[-1]:.4f}: ")
    return arrays.best, curve


def _update(optimizer: Any, gradients: Trained, weight: Any, moments: Any, trained: Trained) -> tuple[Trained, Any]:
    mean = {path: gradients[path] / weight for path in trained}
    updates, moments = optimizer.update(mean, moments, trained)
    scaled = {path: of_width(path, update) for path, update in updates.items()}
    return optax.apply_updates(trained, scaled), moments


def of_width(path: str, update: Any) -> Any:
    """The update of a parameter, whose rate is that of nano. A step of Adam moves every value of a router's row by as
    much, and a logit sums over them: it moves by the more the wider the model is, unless the rate of the rows falls as
    one over the width (arXiv:2203.03466)."""
    return update * (NANO_WIDTH / update.shape[-1]) if path.endswith("router/kernel") else update


def _order(batches: int, step: int, seed: int) -> int:
    """The batch of a step: all in turn, each time in another order."""
    turn, place = divmod(step, batches)
    return int(np.random.default_rng([seed, turn]).permutation(batches)[place])


def _finite(value: float, where: str) -> float:
    if not np.isfinite(value):
        raise StatisticsError(f"{where}: the loss is not finite: give a smaller --rate, or check the model's weights")
    return value


def _check_range(trained: Trained) -> None:
    for path, value in trained.items():
        if not bool(jax.numpy.isfinite(value.astype(jax.numpy.bfloat16)).all()):
            raise StatisticsError(f"{path}: leaves the range of BF16, in which it is written: give a smaller --rate")
