"""What experts are ranked by. Letters: see `config`."""

from collections.abc import Callable

import numpy as np

from ..statistics.tables import Columns


def _mean(column: str) -> Callable[[Columns, int], np.ndarray]:
    return lambda c, _: c[column] / np.maximum(1, c["count"])


# A criterion takes columns and a seed; a higher score stays. Letters: g gate, n norm of the output.
CRITERIA: dict[str, Callable[[Columns, int], np.ndarray]] = {
    "reap": _mean("gate_norm_sum"),
    "reap_sum": lambda c, _: c["gate_norm_sum"],
    "frequency": lambda c, _: c["count"],
    "gate": lambda c, _: c["gate_sum"],
    "ean_sum": lambda c, _: c["norm_sum"],
    "ean_mean": _mean("norm_sum"),
    "reap_l2": lambda c, seed: np.sqrt(_mean("gate_norm_sq_sum")(c, seed)),
    "eaft_reap": lambda c, _: c["eaft_gate_norm_sum"],
    "random": lambda c, seed: np.random.default_rng(seed).random(c["count"].shape),
}
