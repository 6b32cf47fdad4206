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
FALLING = "falling score"  # the rule of a ranking


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
        said = self.origin.rule or ""
        rule = f"best {num_kept}" + (said.removeprefix(FALLING) if said.startswith(FALLING) else "")
        reasons: list[str | None] = [f"place {place} of {num_experts}{by}" for place in range(1, num_kept + 1)]
        return KeepSets(
            [experts[:num_kept] for experts in self.layers],
            replace(self.origin, rule=rule),
            None if self.counts is None else [counts[:num_kept] for counts in self.counts],
            [reasons] * len(self.layers),
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
    chance, and such a sum is small.
    `columns` are those of a saliency table, each [L, E]; `origin` says where they are from, as `profile_origin` knows.
    Criterion, rule and seed are added to it. ProfileError where a column is missing that the criterion needs.

        ranking = rank(read_columns(profile, "science"), "reap", origin=profile_origin(profile, "science"))
        keep_sets = ranking.keep(12)
    """
    count = columns["count"]
    never, thin = count == 0, count < min_count
    by_score = np.where(never, 0, scores(columns, criterion, seed))
    if min_count:
        by_score = np.where(thin & ~never, scores(columns, "reap_sum", seed), by_score)
    ids = np.broadcast_to(np.arange(count.shape[1]), count.shape)
    order = np.lexsort((ids, -by_score, thin, never), axis=1)
    rule = FALLING + (f", behind them those of fewer than {min_count} tokens by falling reap_sum" if min_count else "")
    return Ranking(
        order.tolist(),
        replace(origin, criterion=criterion, rule=rule, seed=seed),
        np.take_along_axis(count, order, axis=1).astype(np.int64).tolist(),
    )
