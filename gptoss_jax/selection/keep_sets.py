"""Which experts of each layer stay. Letters: see `config`."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from ..config import Config
from ..errors import RankingError
from .by_layer import ByLayer

Lost = dict[str, list[float]]
"""Of domains, by their names, the KL of the whole model, in nats a token, with the ends of its interval."""


def are_kept(layers: Sequence[Sequence[int]], num_experts: int) -> np.ndarray:
    """Whether each expert of each layer is among those that stay, bool [L, E]."""
    return np.array([np.isin(np.arange(num_experts), kept) for kept in layers])


@dataclass(frozen=True)
class KeepSets(ByLayer):
    """Keep-sets hold the experts of each layer that stay, in order of id; layers may keep different numbers.

    Args:
        tried: What they were picked of, and what each was worth: objects with a name, a number of experts, and the KL,
            and the share of right answers where there is one, each with the ends of its interval.
        elsewhere: What domains lose that they were not chosen for; None where nobody has looked.
    """

    tried: list[dict[str, Any]] | None = None
    elsewhere: Lost | None = None

    kind: ClassVar[str] = "keep_sets"
    written_by: ClassVar[str] = "select"

    def __post_init__(self) -> None:
        orders = [sorted(range(len(kept)), key=kept.__getitem__) for kept in self.layers]
        for name in ("layers", "counts", "reasons", "losses"):
            if (lists := getattr(self, name)) is not None:
                ordered = [[one[i] for i in order] for one, order in zip(lists, orders, strict=True)]
                object.__setattr__(self, name, ordered)

    def more(self) -> dict[str, Any]:
        """What the file has beside what rankings have."""
        found = {"tried": self.tried, "elsewhere": self.elsewhere}
        return {name: value for name, value in found.items() if value is not None}

    @classmethod
    def with_more(cls, found: "KeepSets", said: dict[str, Any], where: str) -> "KeepSets":
        """The keep-sets with what `more` gave; RankingError where it cannot be read."""
        tried = said.get("tried")
        is_list = isinstance(tried, list) and all(isinstance(one, dict) for one in tried)
        if tried is not None and not (is_list and all(_is_trial(one) for one in tried)):
            raise RankingError(f"{where}: its 'tried' is no list of what was tried: mend it or leave it out")
        elsewhere = said.get("elsewhere")
        if elsewhere is not None and not (isinstance(elsewhere, dict) and all(map(_is_interval, elsewhere.values()))):
            raise RankingError(f"{where}: its 'elsewhere' is no table of what domains lose: mend it or leave it out")
        return replace(found, tried=tried, elsewhere=elsewhere)

    @property
    def layers_hash(self) -> str:
        """The SHA-256 of the JSON of `layers`: what tells which keep-sets were evaluated, wherever they came from."""
        return hashlib.sha256(json.dumps(self.layers).encode()).hexdigest()

    def check(self, config: Config, where: str = "the keep-sets") -> None:
        """RankingError, which begins with `where`, if the sets do not fit the model."""
        super().check(config, where)
        if [] in self.layers:
            raise RankingError(f"{where}: layer {self.layers.index([])} keeps no expert: keep at least 1 in each layer")

    def check_active(self, config: Config, lower_top_k: bool) -> None:
        """RankingError where fewer experts stay in a layer than a token uses, and that was not asked for."""
        fewest = min(len(kept) for kept in self.layers)
        if fewest < config.top_k and not lower_top_k:
            raise RankingError(
                f"keeping {fewest} experts is below the {config.top_k} that each token uses: the model would use "
                f"{fewest} a token (num_experts_per_tok {config.top_k} → {fewest}); ask for it with --lower-top-k"
            )


def _is_trial(one: dict[str, Any]) -> bool:
    quantities = [one.get("kl"), *([one["match"]] if "match" in one else [])]
    return all(map(_is_interval, quantities)) and isinstance(one.get("name"), str) and isinstance(one.get("keep"), int)


def _is_interval(of: Any) -> bool:
    return isinstance(of, list) and len(of) == 3 and all(isinstance(x, int | float) for x in of)
