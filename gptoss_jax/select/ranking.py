"""From statistics to rankings and keep-sets. Letters: see `config`."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..config import Config
from ..errors import ProfileError, RankingError, reason
from ..statistics.tables import Columns
from .criteria import CRITERIA

Ranking = list[list[int]]
"""For each layer all experts, best first."""

RANKING = "ranking_by_layer.json"


def rank(columns: Columns, criterion: str = "reap", seed: int = 0) -> Ranking:
    """Experts of each layer by falling score; ties by id; those never chosen last, by id."""
    try:
        scores = CRITERIA[criterion](columns, seed)
    except KeyError as missing:
        raise ProfileError(
            f"criterion {criterion!r} needs the column {missing}, which this profile lacks: profile again"
            + (" with --eaft" if criterion == "eaft_reap" else "")
        ) from None
    never = columns["count"] == 0
    scores = np.where(never, 0, scores)
    ids = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    return np.lexsort((ids, -scores, never), axis=1).tolist()


def read_ranking(path: Path, config: Config) -> Ranking:
    """A ranking file: L lists, or {"layer_0": list, …}; each list holds all experts once, best first."""
    lists = _read_lists(path, config)
    for layer, experts in enumerate(lists):
        missing = sorted(set(range(config.num_experts)) - set(experts))
        if missing:
            raise RankingError(
                f"{path}: layer {layer} lacks expert {missing[0]}: a ranking holds all experts, best first"
            )
    return lists


def _read_lists(path: Path, config: Config) -> list[list[int]]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RankingError(f"{path}: no such file: `gptoss-jax rank` writes one") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RankingError(f"{path}: not a JSON file ({reason(error)})") from None
    if isinstance(raw, dict) and "keep" in raw:
        raw = raw["keep"]
    if isinstance(raw, dict):
        names = [f"layer_{i}" for i in range(len(raw))]
        if set(names) != set(raw):
            raise RankingError(f"{path}: expected the keys layer_0 … layer_{len(raw) - 1}, found {', '.join(raw)}")
        raw = [raw[name] for name in names]
    if not isinstance(raw, list) or not all(isinstance(experts, list) for experts in raw):
        raise RankingError(f'{path}: expected a list for each layer, or {{"layer_0": [...], ...}}')
    if len(raw) != config.num_layers:
        raise RankingError(f"{path}: has {len(raw)} layers, the model has {config.num_layers}")
    for layer, experts in enumerate(raw):
        _check_experts(experts, f"{path}: layer {layer}", config.num_experts)
    return raw


def _check_experts(experts: Sequence[object], where: str, num_experts: int) -> None:
    for expert in experts:
        if not isinstance(expert, int) or isinstance(expert, bool) or not 0 <= expert < num_experts:
            raise RankingError(f"{where} names expert {expert!r}, the model has experts 0 to {num_experts - 1}")
    if len(set(experts)) < len(experts):
        twice = next(e for e in experts if list(experts).count(e) > 1)
        raise RankingError(f"{where} names expert {twice} twice")
