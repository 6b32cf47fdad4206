"""What a choice of experts rests on: tables of a profile, by domain, and what it says of its model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import Config
from ..errors import ProfileError
from ..files.paths import AnyPath
from ..statistics.counted import STORE
from ..statistics.tables import SALIENCY_BY_DOMAIN, Columns, check_domains, read_by_domain, read_columns
from .mixes import Mix, mixed, mixed_folds, weights_of
from .origin import INFO, Origin, profile_info, profile_origin
from .ranking import Ranking, rank


@dataclass(frozen=True)
class Evidence:
    """Statistics over the rows that count, and of each domain."""

    columns: Columns
    """Of all rows, or of the mix that is asked for."""
    by_domain: Mapping[str, Columns]
    """Of every domain of the profile; empty where its rows have none."""
    origin: Origin
    info: Mapping[str, Any]
    """profile.json; empty where a table stands alone."""
    by_fold: Columns | None = None
    """The columns that add, [L, folds, E], of what `columns` is of; None where no folds are kept."""

    def rank(self, criterion: str, seed: int, min_count: int = 0) -> Ranking:
        """All experts of each layer, best first; those that fewer than `min_count` tokens chose behind all others."""
        return rank(self.columns, criterion, seed, self.origin, min_count)

    @property
    def top_k(self) -> int | None:
        """How many experts each token uses, where that is known."""
        found = self.info.get("top_k")
        return found if isinstance(found, int) else None


def stored_model(info: Mapping[str, Any]) -> tuple[Config, bool]:
    """By its profile.json the sizes of the model that was profiled, and whether its experts are stored in four bits.

    ProfileError where an older profile does not say so.
    """
    if not isinstance(info.get("config"), dict) or not isinstance(info.get("quantized"), bool):
        raise ProfileError("the profile does not say the sizes of its model: name the model with --model MODEL")
    return Config.from_json(info["config"], INFO), info["quantized"]


def read_evidence(profile: AnyPath, domain: Mix = None, whole: bool = False) -> Evidence:
    """What a profile's folder, or a saliency table alone, says of all its rows or of a mix of domains.

    It is `whole` with the tables of all domains, where none is named, and with folds. ProfileError where a domain is
    not there.
    """
    weights = weights_of(domain)
    by_domain = read_by_domain(profile) if weights or whole else {}
    if not weights:
        columns = read_columns(profile)
    elif not by_domain:
        columns = read_columns(profile, next(iter(weights)))  # which says what is missing
    else:
        file = profile / SALIENCY_BY_DOMAIN if profile.is_dir() else profile
        check_domains(weights, by_domain, f"{file}: ")
        columns = mixed(by_domain, weights)
    by_fold = None
    if whole and profile.is_dir() and (profile / STORE).exists():
        from ..statistics.store import read_sums  # with it comes JAX, which a ranking does without

        by_fold = mixed_folds(read_sums(profile / STORE), weights)
    return Evidence(columns, by_domain, profile_origin(profile, domain), profile_info(profile), by_fold)
