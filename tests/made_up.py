"""Profiles of made-up numbers, which are finished as soon as they are asked for."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_jax.run import artifacts
from gptoss_jax.statistics.store import Sums
from gptoss_jax.statistics.sums import DECLARED, GATE_BINS, Statistics

L, E, K = 2, 5, 2
OPTIONS = {
    "keep": "assistant",
    "channel_weights": None,
    "skip_first": 0,
    "eaft": False,
    "eaft_quantiles": [0.15, 0.15],
    "eaft_weights": [1.0, -2.0, 0.25],
    "max_seq_length": 64,
    "truncate": "left",
    "pack": False,
    "cross_document": False,
    "dtype": "float32",
    "data": "rows.jsonl",
    "split": "train",
    "text_column": "text",
    "domain": [],
    "batch_size": 4,
}

Finished = Callable[..., Path]
"""Writes a profile by its name and a seed, with domains, rows, folds and options; gives its folder."""


def some_sums(
    seed: int,
    domains: list[str],
    rows: range,
    eaft: bool = False,
    swap: bool = False,
    shape: tuple[int, int] = (L, E),
    folds: int = 1,
) -> Sums:
    """Of so many layers and experts."""
    rng = np.random.default_rng(seed)
    L, E = shape
    sizes = {"L": L, "G": len(domains) * folds, "J": len(domains), "E": E, "k": K, "b": GATE_BINS}
    shapes = {name: (L, *(sizes[x] for x in statistic.axes.split())) for name, statistic in DECLARED.items()}
    numbers: dict[str, Any] = {
        name: rng.integers(1, 99, shape) if DECLARED[name].integer else rng.exponential(size=shape)
        for name, shape in shapes.items()
    }
    numbers["tokens"] = np.tile(np.arange(sizes["G"]) + 3, (L, 1))
    numbers["computed"] = numbers["tokens"] * K * 2
    numbers |= {} if swap else {"swap_sum": None}
    weighted = {"eaft": rng.normal(size=shapes["count"])} if eaft else {}
    return Sums(Statistics(**numbers), weighted, domains, np.array(rows, np.uint64), folds)


def write_profile(
    folder: Path,
    name: str,
    seed: int,
    domains: Any = ("",),
    rows: range | None = None,
    shape: tuple[int, int] = (L, E),
    folds: int = 1,
    **options: Any,
) -> Path:
    """A profile in `folder`; each has rows of its own unless told."""
    asked = {name: options.get(name, False) for name in ("eaft", "swap")}
    sums = some_sums(seed, list(domains), rows or range(9 * seed, 9 * seed + 4), **asked, shape=shape, folds=folds)
    tokens = int(sums.statistics.tokens[0].sum()) * 2
    measured = artifacts.Measured(
        tokens, 1 + len(sums.weighted), seconds=seed + 1.0, compile_seconds=2.0, peak_rss_bytes=seed
    )
    info = {
        "model": "model",
        "model_fingerprint": "f",
        "command": f"profile {name}",
        "options": OPTIONS | options,
        "engine": "resident",
        "rows": 4,
        "truncated_rows": 1,
        "empty_rows": 1,
        "prompts_hash": hashlib.sha256(name.encode()).hexdigest(),
        "warnings": [],
    }
    (folder / name).mkdir()
    artifacts.write(folder / name, artifacts.completed(info, sums, measured), sums)
    return folder / name
