"""What a healing was worth: every row that is held out, before and after, by domain."""

from dataclasses import dataclass

import numpy as np

from ..evaluation.intervals import Clusters, Estimate, estimates
from .loss import Loss


@dataclass(frozen=True)
class Change:
    """The mean KL of the whole model from the pruned one over some rows, in nats a token, before and after."""

    rows: int
    tokens: float
    pruned: float
    healed: float
    difference: Estimate | None
    """healed less pruned, paired, with an interval over rows; None of a single row."""

    @property
    def is_better(self) -> bool:
        """Whether chance alone does not explain that it is less."""
        return self.difference is not None and self.difference.high < 0


def change(pruned: Loss, healed: Loss, of: np.ndarray) -> Change:
    """Of the rows for which `of`, bool [rows], is true; rows in which nothing counts are left out."""
    counts = of & (pruned.weight > 0)
    weight = pruned.weight[counts].astype(np.float64)
    before, after = pruned.kl[counts].astype(np.float64), healed.kl[counts].astype(np.float64)
    total = max(float(weight.sum()), 1)
    difference = None
    if counts.sum() > 1:
        (difference,) = estimates(Clusters((after - before)[:, None], weight), [lambda means: means[..., 0]])
    return Change(int(counts.sum()), float(weight.sum()), before.sum() / total, after.sum() / total, difference)
