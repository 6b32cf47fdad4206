"""The jobs that rank and choose experts, as functions with the names and defaults of the command line.

They import no JAX where they read a saliency table: a ranking takes less time than that would."""

from typing import Any

from ..errors import InputError
from ..files import atomic
from ..files.paths import AnyPath, is_path, place
from ..selection import ranking as rankings
from ..selection.keep_sets import KeepSets
from ..selection.origin import profile_origin
from ..selection.ranking import Ranking
from ..statistics.tables import read_columns


def rank(
    profile: Any,
    criterion: str = "reap",
    domain: str | None = None,
    seed: int = 0,
    min_count: int = 0,
    *,
    out: str | AnyPath | None = None,
    overwrite: bool = False,
) -> Ranking:
    """Rank the experts of each layer, best first, by a criterion over all rows of a profile or one domain.

    `profile` is an open one, its folder, or a saliency.parquet. Experts that fewer than `min_count` tokens chose stand
    behind all others, by falling reap_sum. With `out` the ranking is written to that file.
    ProfileError where the criterion or the domain does not exist, or the profile lacks what is needed.

    Example:
        >>> import gptoss_jax as gj
        >>> profile = gj.profile("nano", [{"text": "2 + 2 = 4"}], keep="all", max_seq_length=64)
        >>> len(gj.rank(profile, "frequency").layers)
        6
    """
    target = None if out is None else place(out)
    if target is not None:
        atomic.check_free(target, overwrite)
    if is_path(profile):
        path = place(profile)
        if target is not None:
            atomic.check_apart(target, path)
        ranking = rankings.rank(read_columns(path, domain), criterion, seed, profile_origin(path, domain), min_count)
    elif hasattr(profile, "rank"):
        ranking = profile.rank(criterion, domain, seed, min_count)
    else:
        raise InputError(f"a profile is {type(profile).__name__}: give an open one, its folder or a saliency.parquet")
    if target is not None:
        ranking.write(target, overwrite)
    return ranking


def select(
    chosen_from: Any,
    keep: int | str,
    criterion: str = "reap",
    domain: str | None = None,
    seed: int = 0,
) -> KeepSets:
    """Keep the best experts of each layer: from a ranking, or from a profile as `rank` takes it.

    `keep` is their number, or a per cent of the experts as "50%", of which a part of an expert is left out.
    RankingError where there are not so many experts.

    Example:
        >>> import gptoss_jax as gj
        >>> profile = gj.profile("nano", [{"text": "2 + 2 = 4"}], keep="all", max_seq_length=64)
        >>> [len(kept) for kept in gj.select(profile, keep=12).layers]
        [12, 12, 12, 12, 12, 12]
    """
    ranking = chosen_from if isinstance(chosen_from, Ranking) else rank(chosen_from, criterion, domain, seed)
    return ranking.keep(keep)
