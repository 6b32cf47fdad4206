"""What both engines of distillation do. Letters: see `config`."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from ..network.batch import Batch
from .loss import Loss, Teacher
from .trained import Trained


class Found(NamedTuple):
    """What a step finds."""

    loss: float
    """Σ w·KL(teacher ‖ student) over all batches, in nats, w being what the predicted token counts."""
    weight: float
    """Σ w."""
    gradients: Trained
    """Those of `loss`, float32."""


@runtime_checkable  # annotations are checked in tests
class Engine(Protocol):
    """A model that teaches what is left of it: `resident.Resident`, or `streamed.Streamed`.

    Each batch says with `kept` which experts the student's tokens may choose; a teacher's may choose all.
    """

    def teach(self, batches: Sequence[Batch]) -> list[Teacher]:
        """What the whole model expects of each batch, on the devices."""
        ...

    def gradients(self, trained: Trained, batches: Sequence[Batch], teachers: Sequence[Teacher]) -> Found:
        """The loss of the model with what is trained, rounded as it will be written, and its gradients."""
        ...

    def losses(self, trained: Trained, batches: Sequence[Batch], teachers: Sequence[Teacher]) -> Loss:
        """The loss of each row of all batches, one batch after the other, on the host."""
        ...
