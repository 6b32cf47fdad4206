"""From statistics to rankings and keep-sets. Letters: see `config`."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .config import Config
from .errors import ProfileError, RankingError, reason

Columns = dict[str, np.ndarray]
"""The columns of a saliency table, each [L, E]."""

Ranking = list[list[int]]
"""For each layer all experts, best first."""

SALIENCY = "saliency.parquet"
SALIENCY_BY_DOMAIN = "saliency_by_domain.parquet"
USAGE = "usage.parquet"
USAGE_BY_DOMAIN = "usage_by_domain.parquet"
RANKING = "ranking_by_layer.json"


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


def read_columns(profile: Path, domain: str | None = None) -> Columns:
    """The saliency table of a profile's folder, or of a Parquet file; of one domain if given."""
    file = profile
    if profile.is_dir():
        file = profile / (SALIENCY if domain is None else SALIENCY_BY_DOMAIN)
    if not file.exists():
        what = "was made without --domain-column" if profile.is_dir() and domain is not None else "is no profile"
        raise ProfileError(f"{file}: no such file: {profile} {what}")
    try:
        return _columns(pq.read_table(file), file, domain)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise ProfileError(f"{file}: not a saliency table: {reason(error)}") from None


def _columns(table: pa.Table, file: Path, domain: str | None) -> Columns:
    if domain is not None:
        known = sorted(set(map(str, table["domain"].to_pylist())))
        if domain not in known:
            raise ProfileError(f"{file}: no domain {domain!r}: there are {', '.join(known)}")
        table = table.filter(np.array(table["domain"]) == domain)
    flat = {name: table[name].to_numpy() for name in table.column_names if name != "domain"}
    for name, column in flat.items():
        if not np.issubdtype(column.dtype, np.number) or not np.isfinite(column).all():
            raise ValueError(f"column {name!r} holds what is no number")
    layers, experts = flat.pop("layer"), flat.pop("expert")
    E = int(experts.max(initial=-1)) + 1
    if not E or any(not np.array_equal(x, y) for x, y in zip((layers, experts), _grid(len(table), E), strict=True)):
        raise ValueError("its rows are not every expert of every layer, in order")
    if (flat["count"] < 0).any():
        raise ValueError("a count is negative")
    if not flat["count"].any():
        raise ProfileError(f"{file}: no token {f'of domain {domain!r} ' if domain else ''}was kept: nothing to rank")
    return {name: column.reshape(-1, E) for name, column in flat.items()}


def _grid(rows: int, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Layer and expert of each row, layer-major; unequal to any table's where the last layer is not whole."""
    if rows % num_experts:
        return np.empty(0), np.empty(0)
    return np.divmod(np.arange(rows), num_experts)


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


def read_keep_sets(path: Path, config: Config) -> Ranking:
    """A keep-set file: L lists of equal length in the forms of a ranking, or an object with these as "keep"."""
    keep_sets = _read_lists(path, config)
    if len({len(kept) for kept in keep_sets}) > 1:
        sizes = ", ".join(str(len(kept)) for kept in keep_sets)
        raise RankingError(f"{path}: layers keep {sizes} experts: a checkpoint has the same number in every layer")
    if not keep_sets[0]:
        raise RankingError(f"{path}: keeps no expert: keep at least 1 in each layer")
    return [sorted(kept) for kept in keep_sets]


def keep_best(ranking: Ranking, keep: int, config: Config) -> Ranking:
    """The `keep` best experts of each layer, in order of id."""
    if not 1 <= keep <= config.num_experts:
        raise RankingError(f"--keep {keep}: the model has {config.num_experts} experts a layer: keep 1 to that many")
    return [sorted(experts[:keep]) for experts in ranking]


def check_active(num_kept: int, config: Config, lower_top_k: bool) -> None:
    """RankingError where fewer experts stay than a token uses, and that was not asked for."""
    if num_kept < config.top_k and not lower_top_k:
        raise RankingError(
            f"keeping {num_kept} experts is below the {config.top_k} that each token uses: the model would use "
            f"{num_kept} a token (num_experts_per_tok {config.top_k} → {num_kept}); ask for it with --lower-top-k"
        )


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
