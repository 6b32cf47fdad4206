"""From statistics to rankings, and from these to keep-sets. Letters: see `config`."""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np

from ..config import Config
from ..errors import RankingError
from ..statistics.tables import Columns
from .by_layer import ByLayer
from .criteria import scores
from .keep_sets import KeepSets
from .origin import UNKNOWN, Origin

RANKING = "ranking_by_layer.json"  # in a profile's folder: bare lists
FALLING = "falling score"  # the rule of a ranking


@dataclass(frozen=True)
class Ranking(ByLayer):
    """A ranking holds all experts of each layer, best first."""

    kind: ClassVar[str] = "ranking"
    written_by: ClassVar[str] = "rank"

    def check(self, config: Config, where: str = "the ranking") -> None:
        """RankingError, which begins with `where`, if the ranking does not fit the model."""
        super().check(config, where)
        for layer, experts in enumerate(self.layers):
            if missing := sorted(set(range(config.num_experts)) - set(experts)):
                raise RankingError(
                    f"{where}: layer {layer} lacks expert {missing[0]}: a ranking holds all experts, best first"
                )

    def keep(self, keep: int | str, protected: Mapping[tuple[int, int], str] | None = None) -> KeepSets:
        """The best experts of each layer, each with its place as the reason; so many, or a per cent of them as "50%".

        `protected` experts, by layer and id, stay before all others, with the reasons that are given.
        RankingError where the layers have fewer experts, none is to be kept, or more are protected.
        """
        num_experts, protected = len(self.layers[0]), protected or {}
        num_kept = checked_number(keep, num_experts)
        check_protected(protected, num_kept)
        by = "" if self.origin.criterion is None else f" by {self.origin.criterion}"
        layers: list[list[int]] = []
        reasons: list[list[str | None]] = []
        for layer, (experts, ordered) in enumerate(zip(self.layers, self.order(protected), strict=True)):
            layers.append(ordered[:num_kept])
            places = {expert: f"place {place} of {num_experts}{by}" for place, expert in enumerate(experts, 1)}
            reasons.append([protected.get((layer, expert), places[expert]) for expert in layers[-1]])
        counts, losses = (_of_kept(self.layers, beside, layers) for beside in (self.counts, self.losses))
        said = self.origin.rule or ""
        rule = f"best {num_kept}" + (f", {len(protected)} protected" if protected else "")
        rule += said.removeprefix(FALLING) if said.startswith(FALLING) else ""
        return KeepSets(layers, replace(self.origin, rule=rule), counts, reasons, losses)

    def order(self, protected: Collection[tuple[int, int]]) -> list[list[int]]:
        """The experts of each layer, protected ones before the others, and best first among either."""
        return [
            sorted(experts, key=lambda expert, layer=layer: (layer, expert) not in protected)  # type: ignore[misc]
            for layer, experts in enumerate(self.layers)
        ]


def _of_kept(layers: list[list[int]], beside: list[list[Any]] | None, kept: list[list[int]]) -> Any:
    """What stands beside the experts of each layer, of those that are kept."""
    if beside is None:
        return None
    of_layers = [dict(zip(*pair, strict=True)) for pair in zip(layers, beside, strict=True)]
    return [[of[expert] for expert in some] for of, some in zip(of_layers, kept, strict=True)]


def checked_number(keep: int | str, num_experts: int) -> int:
    """How many of a layer's experts are meant; RankingError where the layer has fewer, or it is none."""
    num_kept = number_kept(keep, num_experts)
    if not 1 <= num_kept <= num_experts:
        raise RankingError(f"--keep {keep}: the model has {num_experts} experts a layer: keep 1 to that many")
    return num_kept


def most_protected(protected: Collection[tuple[int, int]]) -> tuple[int, int]:
    """The layer with the most protected experts, which are given by layer and id, and how many it has."""
    of_layers = Counter(layer for layer, _ in protected)
    return max(of_layers.items(), key=lambda item: item[1], default=(0, 0))


def check_protected(protected: Collection[tuple[int, int]], num_kept: int) -> None:
    """RankingError where a layer has more protected experts, given by layer and id, than it keeps."""
    layer, most = most_protected(protected)
    if most > num_kept:
        raise RankingError(
            f"{num_kept} experts a layer are fewer than the {most} that --protect-outliers holds in layer {layer}: "
            "protect fewer, or keep as many"
        )


def number_kept(keep: int | str, num_experts: int, flag: str = "--keep") -> int:
    """How many of a layer's experts are meant: a number, or a per cent, of which a part of an expert is left out.

    RankingError where it is neither.
    """
    if not isinstance(keep, str):
        return keep
    if not re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,6})?%", keep):
        raise RankingError(f"{flag} is {keep!r}: give a whole number of experts, or a per cent of them as 50%")
    return int(Fraction(keep.removesuffix("%")) * num_experts / 100)  # exact: 33.3 of a hundred has no float


def rank(
    columns: Columns, criterion: str = "reap", seed: int = 0, origin: Origin = UNKNOWN, min_count: int = 0
) -> Ranking:
    """Experts of each layer by falling score; ties by id; those never chosen last, by id.

    Experts that fewer than `min_count` tokens chose stand behind all others, by falling Σg·n: a mean over few tokens is
    chance, and such a sum is small. `columns` are those of a saliency table, or what a criterion of the weights alone
    needs, each [L, E]; `origin` says where they are from, as `profile_origin` knows. Criterion, rule and seed are added
    to it. ProfileError where a column is missing that the criterion needs.

        ranking = rank(read_columns(profile, "science"), "reap", origin=profile_origin(profile, "science"))
        keep_sets = ranking.keep(12)
    """
    score, count = scores(columns, criterion, seed), columns.get("count")
    rule = FALLING + (f", behind them those of fewer than {min_count} tokens by falling reap_sum" if min_count else "")
    origin = replace(origin, criterion=criterion, rule=rule, seed=seed)
    ids = np.broadcast_to(np.arange(score.shape[1]), score.shape)
    if count is None:
        return Ranking(np.lexsort((ids, -score), axis=1).tolist(), origin)
    never, thin = count == 0, count < min_count
    by_score = np.where(never, 0, score)
    if min_count:
        by_score = np.where(thin & ~never, scores(columns, "reap_sum", seed), by_score)
    order = np.lexsort((ids, -by_score, thin, never), axis=1)
    return Ranking(order.tolist(), origin, np.take_along_axis(whole_counts(columns), order, axis=1).tolist())


def whole_counts(columns: Columns) -> np.ndarray:
    """How many tokens chose each expert, int64 [L, E]: of a mix the nearest whole number, and at least 1 for any."""
    count = columns["count"]
    return np.maximum(np.rint(count), count > 0).astype(np.int64)
