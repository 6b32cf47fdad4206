"""What models expected of the same tokens. N counts the scored tokens of all rows."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import StatisticsError


@dataclass(frozen=True)
class Scored:
    """How one model expected the scored tokens; the models of a comparison have the same tokens in the same order."""

    nats: np.ndarray
    """float64 [N]: −ln p of the true token."""
    entropy: np.ndarray
    """float32 [N]: that of the 20 largest logits, renormalised, over ln 20."""
    best: np.ndarray
    """int32 [N]: the most probable token."""
    kl: np.ndarray
    """float64 [N]: KL(baseline ‖ this model) in nats; zeros for the baseline."""

    def only(self, which_N: np.ndarray) -> "Scored":
        """Those of some tokens alone."""
        return Scored(self.nats[which_N], self.entropy[which_N], self.best[which_N], self.kl[which_N])

    def check(self, name: str) -> None:
        """StatisticsError, which calls the model `name`, where a number is not finite."""
        for what in ("nats", "entropy", "kl"):
            bad = ~np.isfinite(getattr(self, what))
            if bad.any():
                raise StatisticsError(
                    f"{name}: {what} of scored token {int(bad.argmax())} is {getattr(self, what)[bad.argmax()]}: "
                    "the model's logits are NaN or infinite there"
                )


@dataclass(frozen=True)
class ScoredTokens:
    """The scored tokens of an evaluation, for the baseline and every model beside it."""

    documents: np.ndarray
    """int32 [N]: the row of each token."""
    baseline: Scored
    others: Mapping[str, Scored]
    """The other models by their names."""
