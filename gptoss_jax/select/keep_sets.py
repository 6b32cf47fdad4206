"""Which experts of each layer stay. Letters: see `config`."""

from pathlib import Path

from ..config import Config
from ..errors import RankingError
from .ranking import Ranking, _read_lists


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
