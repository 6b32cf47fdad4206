"""The jobs that rank and choose experts, as functions with the names and defaults of the command line.

They import no JAX where they read a saliency table: a ranking takes less time than that would."""

from typing import Any

from ..errors import InputError, OptionError, ProfileError
from ..files import atomic
from ..files.paths import AnyPath, is_path, place, storage_errors
from ..selection import ranking as rankings
from ..selection.criteria import CRITERIA, Criterion, named
from ..selection.keep_sets import KeepSets
from ..selection.origin import Origin, profile_origin
from ..selection.ranking import Ranking
from ..statistics.tables import SALIENCY, read_columns


def rank(
    profile: Any,
    criterion: str = "reap",
    domain: str | None = None,
    seed: int = 0,
    *,
    out: str | AnyPath | None = None,
    overwrite: bool = False,
    progress: Any = None,
) -> Ranking:
    """Rank the experts of each layer, best first, by a criterion over all rows of a profile or one domain.

    `profile` is an open one, its folder, or a saliency.parquet; for a criterion of the weights alone, as aimer, it is a
    model, open or by its name. With `out` the ranking is written to that file; `progress` makes a bar where weights are
    read. ProfileError where the domain does not exist, or the profile lacks what is needed.

    Example:
        >>> import gptoss_jax as gj
        >>> profile = gj.profile("nano", [{"text": "2 + 2 = 4"}], keep="all", max_seq_length=64)
        >>> len(gj.rank(profile, "frequency").layers)
        6
    """
    target = None if out is None else place(out)
    if target is not None:
        atomic.check_free(target, overwrite)
    declared, given_profile = named(criterion), _is_profile(profile)
    if declared.of_weights and not given_profile:
        ranking = _of_weights(profile, declared, domain, seed, target, progress)
    elif not given_profile and _is_model(profile):
        alone = ", ".join(name for name, other in CRITERIA.items() if other.of_weights)
        raise ProfileError(
            f"{getattr(profile, 'name', profile)} is a model, and {criterion!r} ranks by a profile of it: run "
            f"gptoss-jax profile first, or take a criterion of the weights alone: {alone}"
        )
    elif is_path(profile):
        path = place(profile)
        if target is not None:
            atomic.check_apart(target, path)
        ranking = rankings.rank(read_columns(path, domain), criterion, seed, profile_origin(path, domain))
    elif hasattr(profile, "rank"):
        ranking = profile.rank(criterion, domain, seed)
    else:
        raise InputError(f"a profile is {type(profile).__name__}: give an open one, its folder or a saliency.parquet")
    if target is not None:
        ranking.write(target, overwrite)
    return ranking


def _of_weights(
    model: Any, criterion: Criterion, domain: str | None, seed: int, target: AnyPath | None, progress: Any
) -> Ranking:
    """The ranking by a criterion that needs the weights alone."""
    from convert.cut import silent
    from convert.scores import columns_of_weights

    from .checkpoints import checkpoint_of
    from .model import as_model

    if domain is not None:
        raise OptionError(f"--domain means nothing to {criterion.name!r}, which is of the weights alone: leave it out")
    checkpoint = checkpoint_of(as_model(model))
    if target is not None:
        atomic.check_apart(target, checkpoint.folder, or_inside=True)
    columns = columns_of_weights(checkpoint, criterion.needs, progress or silent)
    return rankings.rank(columns, criterion.name, seed, Origin(model_fingerprint=checkpoint.fingerprint()))


def _is_profile(given: Any) -> bool:
    """Whether statistics are given: an open profile, a folder with a table, or a file."""
    if not is_path(given):
        return hasattr(given, "rank")
    path = place(given)
    with storage_errors(path):
        return bool(path.is_file() or (path / SALIENCY).exists())


def _is_model(given: Any) -> bool:
    """Whether a model is given: an open one, the one that ships with the project, or a folder that is configured."""
    if not is_path(given):
        return hasattr(given, "source")
    from convert.sources import NANO

    path = place(given)
    with storage_errors(path):
        return bool((path / "config.json").exists() or str(given) == NANO)


def select(
    chosen_from: Any,
    keep: int | str,
    criterion: str = "reap",
    domain: str | None = None,
    seed: int = 0,
) -> KeepSets:
    """Keep the best experts of each layer: from a ranking, or from a profile or model as `rank` takes it.

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
