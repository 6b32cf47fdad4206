"""What was measured, by question: arrays of every choice, and differences that are paired."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_jax.evaluation.intervals import Estimate, clusters, estimates
from gptoss_jax.evaluation.replies import wilson
from gptoss_jax.files.parquet import read_parquet

Answers = dict[str, np.ndarray]
"""By the name of a choice: [questions, 3], right or wrong, Σ KL and the number of scored tokens of the right reply."""


@dataclass(frozen=True)
class Results:
    """One evaluation."""

    ids: list[str]
    """Of the questions."""
    domains: np.ndarray
    baseline: np.ndarray
    """[questions, 3]"""
    answers: Answers

    @classmethod
    def read(cls, folder: Path) -> "Results":
        """From an evaluation's rows.parquet."""
        table = read_parquet((folder / "rows.parquet").read_bytes()).to_pylist()
        asked = [row for row in table if row["seq_len"] is None]
        ids = sorted({row["id"] for row in asked})
        places = {name: number for number, name in enumerate(ids)}
        found: dict[Any, np.ndarray] = {row["model"]: np.zeros((len(ids), 3)) for row in asked}
        domains = np.empty(len(ids), object)
        for row in table:
            at = places.get(row["id"])
            if at is None:
                continue
            domains[at] = row["domain"]
            own = found[row["model"]][at]
            if row["seq_len"] is None:
                own[0] = row["correct"]
            else:
                own[1:] = row["kl"], row["tokens"]
        return cls(ids, domains, found.pop(None), found)


def mean(answers: Sequence[np.ndarray]) -> np.ndarray:
    """Of several choices, as those of five seeds: [questions, 3]."""
    return np.mean(answers, axis=0)


def exact(answers: np.ndarray) -> Estimate:
    """The share of right answers, with Wilson's interval; of a mean over seeds it is too wide."""
    return wilson(_shares([answers[:, 0]], [np.arange(len(answers))]), len(answers))


def divergence(answers: np.ndarray) -> Estimate:
    """Nats a token."""
    return _divergences([answers], [np.arange(len(answers))])


def exact_difference(one: Sequence[np.ndarray], other: Sequence[np.ndarray], ids: Sequence[np.ndarray]) -> Estimate:
    """The share of right answers over several settings, less that of others; paired and clustered by question."""
    return _shares([a[:, 0] - b[:, 0] for a, b in zip(one, other, strict=True)], ids)


def divergence_difference(
    one: Sequence[np.ndarray], other: Sequence[np.ndarray], ids: Sequence[np.ndarray]
) -> Estimate:
    """Nats a token over several settings, less those of others; paired and clustered by question."""
    differences = [np.stack([a[:, 0], a[:, 1] - b[:, 1], a[:, 2]], 1) for a, b in zip(one, other, strict=True)]
    return _divergences(differences, ids)


def _shares(values: Sequence[np.ndarray], ids: Sequence[np.ndarray]) -> Estimate:
    of = clusters(np.concatenate(ids), [np.concatenate(values)])
    return estimates(of, [lambda means: means[..., 0]], studentised=False)[0]


def _divergences(values: Sequence[np.ndarray], ids: Sequence[np.ndarray]) -> Estimate:
    whole = np.concatenate(values)
    of = clusters(np.concatenate(ids), [whole[:, 1], whole[:, 2]])
    return estimates(of, [lambda means: means[..., 0] / means[..., 1]])[0]


def points(of: Estimate) -> str:
    """A difference of shares, in points of per cent, with its interval."""
    return f"{100 * of.value:+.1f} ({100 * of.low:.1f} to {100 * of.high:.1f})"


def p_value(value: float) -> str:
    """Rounded; what rounding of float64 decides is not shown."""
    return f"{value:.2g}" if value >= 1e-15 else "< 1e-15"
