"""From statistics to rankings, and from these to keep-sets. Letters: see `config`."""

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

import numpy as np

from ..config import Config
from ..errors import RankingError
from ..statistics.tables import Columns
from .by_layer import ByLayer
from .criteria import scores
from .keep_sets import KeepSets
from .origin import UNKNOWN, Origin

RANKING = "ranking_by_layer.json"  # in a profile's folder: bare lists


@dataclass(frozen=True)
class Ranking(ByLayer):
    """A ranking holds all experts of each layer, best first."""

    kind: ClassVar[str] = "ranking"

    def check(self, config: Config, where: str = "the ranking") -> None:
        """RankingError, which begins with `where`, if the ranking does not fit the model."""
        super().check(config, where)
        for layer, experts in enumerate(self.layers):
            if missing := sorted(set(range(config.num_experts)) - set(experts)):
                raise RankingError(
                    f"{where}: layer {layer} lacks expert {missing[0]}: a ranking holds all experts, best first"
                )

    def keep(self, keep: int | str) -> KeepSets:
        """The best experts of each layer, each with its place as the reason; so many, or a per cent of them as "50%".

        RankingError where the layers have fewer experts, or none is to be kept.
        """
        num_experts = len(self.layers[0])
        num_kept = number_kept(keep, num_experts)
        if not 1 <= num_kept <= num_experts:
            raise RankingError(f"--keep {keep}: the model has {num_experts} experts a layer: keep 1 to that many")
        by = "" if self.origin.criterion is None else f" by {self.origin.criterion}"
        reasons: list[str | None] = [f"place {place} of {num_experts}{by}" for place in range(1, num_kept + 1)]
        return KeepSets(
            [experts[:num_kept] for experts in self.layers],
            replace(self.origin, rule=f"best {num_kept}"),
            None if self.counts is None else [counts[:num_kept] for counts in self.counts],
            [reasons] * len(self.layers),
        )


def number_kept(keep: int | str, num_experts: int) -> int:
    """How many of a layer's experts are meant: a number, or a per cent, of which a part of an expert is left out.

    RankingError where it is neither.
    """
    if not isinstance(keep, str):
        return keep
    if not re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,6})?%", keep):
        raise RankingError(f"--keep is {keep!r}: give a whole number of experts, or a per cent of them as 50%")
    return int(Fraction(keep.removesuffix("%")) * num_experts / 100)  # exact: 33.3 of a hundred has no float


def rank(columns: Columns, criterion: str = "reap", seed: int = 0, origin: Origin = UNKNOWN) -> Ranking:
    """Experts of each layer by falling score; ties by id; those never chosen last, by id.

    `columns` are those of a saliency table, or what a criterion of the weights alone needs, each [L, E]; `origin` says
    where they are from, as `profile_origin` knows. Criterion, rule and seed are added to it. ProfileError where a
    column is missing that the criterion needs.

        ranking = rank(read_columns(profile, "science"), "reap", origin=profile_origin(profile, "science"))
        keep_sets = ranking.keep(12)
    """
    count, score = columns.get("count"), scores(columns, criterion, seed)
    never = np.zeros(score.shape, bool) if count is None else count == 0
    by_score = np.where(never, 0, score)
    ids = np.broadcast_to(np.arange(score.shape[1]), score.shape)
    order = np.lexsort((ids, -by_score, never), axis=1)
    return Ranking(
        order.tolist(),
        replace(origin, criterion=criterion, rule="falling score", seed=seed),
        None if count is None else np.take_along_axis(count, order, axis=1).astype(np.int64).tolist(),
    )
