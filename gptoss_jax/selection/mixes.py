"""Tables of several domains as one: their mix, in which each domain has the share that its weight says.

Letters: see `config`.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..errors import OptionError
from ..statistics.tables import Columns

if TYPE_CHECKING:  # with the sums comes JAX, without which tables are mixed
    from ..statistics.store import Sums

Mix = str | Mapping[str, float | int] | None
"""Domains as users name them: one, several with their weights, or None for all rows."""


def weights_of(domain: Mix) -> dict[str, float]:
    """The weight of each domain; empty where all rows count. OptionError where none is above 0."""
    if domain is None:
        return {}
    weights = {domain: 1.0} if isinstance(domain, str) else {name: float(weight) for name, weight in domain.items()}
    if not any(weights.values()):
        raise OptionError("--domain: no weight is above 0: give one of them more than that")
    return weights


def mixed(by_domain: Mapping[str, Columns], weights: Mapping[str, float]) -> Columns:
    """The columns [L, E] of a mix; those of one domain alone are its own.

    Each domain's sums are divided by its kept tokens, weighted and added, so that weights are shares of the mix,
    whatever the domains' sizes. Then they are scaled to the kept tokens of all named domains. A maximum is the largest
    of those of domains with a weight above 0. A mean follows from sums, and is left out.
    """
    if len(weights) == 1:
        return by_domain[next(iter(weights))]
    # A kept token chooses as many experts as any other, so that counts stand for tokens.
    pairs = {name: by_domain[name]["count"].sum() for name in weights}
    largest = max(weights.values())  # by which the sum of any weights is finite
    scale = sum(pairs.values()) / sum(weight / largest for weight in weights.values())
    factors = {name: weight / largest * scale / pairs[name] for name, weight in weights.items() if weight}
    tables = {name: by_domain[name] for name in factors}
    shared = [name for name in next(iter(tables.values())) if all(name in table for table in tables.values())]

    def one(column: str) -> np.ndarray:
        if column.endswith("_max"):
            return np.maximum.reduce([table[column] for table in tables.values()])
        return np.sum([factors[name] * table[column] for name, table in tables.items()], axis=0)

    return {column: one(column) for column in shared if not column.endswith("_mean")}


def mixed_folds(sums: "Sums", weights: Mapping[str, float]) -> Columns | None:
    """The columns by fold, [L, folds, E], of a mix, or of all rows where no domain is named; None without folds."""
    if sums.folds == 1:
        return None
    if not weights:
        return sums.by_fold()
    return mixed({name: sums.by_fold(name) for name in weights}, weights)
