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
    pruned: Estimate
    healed: Estimate
    difference: Estimate
    """healed less pruned, paired by row."""

    @property
    def is_better(self) -> bool:
        """Whether chance alone does not explain that it is less."""
        return self.rows > 1 and self.difference.high < 0

    @property
    def written(self) -> Estimate:
        """Of what is written: where it is not better, the pruned model."""
        return self.healed if self.is_better else self.pruned


def change(pruned: Loss, healed: Loss, of: np.ndarray) -> Change:
    """Of the rows for which `of`, bool [rows], is true; rows in which nothing counts are left out."""
    counts = of & (pruned.weight > 0)
    weight_D = pruned.weight[counts].astype(np.float64)
    before_D, after_D = pruned.kl[counts].astype(np.float64), healed.kl[counts].astype(np.float64)
    columns_D3 = np.stack([before_D, after_D, after_D - before_D], axis=1)
    if counts.sum() < 2:  # one row says nothing of how far others are
        of_one = [float(value) for value in columns_D3.sum(0) / max(weight_D.sum(), 1)]
        return Change(int(counts.sum()), float(weight_D.sum()), *(Estimate(x, x, x, 0.0, 1.0) for x in of_one))
    # By percentiles of draws: of a few rows, of which one may have most of the divergence, a studentised interval has
    # hardly an end.
    quantities = [lambda means, at=at: means[..., at] for at in range(3)]
    found = estimates(Clusters(columns_D3, weight_D), quantities, studentised=False)
    return Change(int(counts.sum()), float(weight_D.sum()), *found)
