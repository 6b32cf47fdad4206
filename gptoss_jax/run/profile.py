"""A finished profile: its sums, what profile.json says of it, and what follows from them. Letters: see `config`."""

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ProfileError, reason
from ..files import atomic
from ..files.paths import AnyPath, place, storage_errors
from ..selection.evidence import Evidence
from ..selection.intervals import Intervals, intervals, unsettled
from ..selection.mixes import Mix, mixed, mixed_folds, weights_of
from ..selection.origin import Origin, profile_origin, rows_as_text
from ..selection.ranking import Ranking, number_kept
from ..statistics.counted import STORE
from ..statistics.store import LARGEST_COUNT, Sums, read_sums
from ..statistics.sums import DECLARED
from ..statistics.tables import Columns, check_domains, columns
from . import artifacts
from .artifacts import INFO
from .options import PROFILE, declared_options

# What profile.json must hold for its profile to be used.
TEXTS = ("model", "model_fingerprint", "command", "engine", "prompts_hash")
NUMBERS = (
    "rows",
    "truncated_rows",
    "empty_rows",
    "total_tokens",
    "kept_tokens",
    "seconds",
    "compile_seconds",
    "peak_rss_bytes",
)
# Options that say how sums came about: without them nobody can say whether they add to others.
NEEDED = tuple(name for kind in PROFILE for name, o in declared_options(kind).items() if o.merging != "free")
NEWER = {
    field.name: field.default for kind in PROFILE for field in fields(kind) if declared_options(kind)[field.name].newer
}


@dataclass(frozen=True)
class Profile:
    """Statistics of a model's experts over some rows.

    Example:
        >>> import gptoss_jax as gj
        >>> rows = [{"text": "2 + 2 = 4", "kind": "sum"}, {"text": "2 * 2 = 4", "kind": "product"}]
        >>> profile = gj.profile("nano", rows, domain_column="kind", keep="all", max_seq_length=64)
        >>> int(profile.columns("sum")["count"].sum())  # tokens · layers · experts a token
        168
    """

    info: dict[str, Any]
    """profile.json: every option, versions, fingerprint, warnings."""
    sums: Sums
    """Statistics [L, G, …], float64 and int64, and of which domains and rows they are."""
    folder: AnyPath | None = None
    """Where it lies; None where it is not saved."""

    @classmethod
    def open(cls, folder: str | AnyPath) -> "Profile":
        """Read a profile's folder; ProfileError where it is none, or is damaged."""
        path = place(folder)
        file = path / INFO
        try:
            with storage_errors(path):
                data = file.read_bytes()
            info = json.loads(data.decode("utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise ProfileError(f"{path}: is no finished profile: it holds no {INFO}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise ProfileError(f"{file}: not a JSON file ({reason(error)}): profile its rows again") from None
        if not (path / STORE).exists():
            raise ProfileError(
                f"{path}: holds no {STORE}: a version that could not merge made it; profile its rows again"
            )
        sums = read_sums(path / STORE)
        try:
            _check_info(info, sums)
        except ValueError as error:
            raise ProfileError(f"{file}: {error}: profile its rows again") from None
        return cls(info, sums, path)

    @property
    def domains(self) -> list[str]:
        """The names of its domains; empty where rows have none."""
        return [name for name in self.sums.domains if name]

    def columns(self, domain: Mix = None) -> Columns:
        """The saliency table of all rows, of one domain or of a mix of several: a dictionary of arrays [L, E]."""
        return self.evidence(domain).columns

    def evidence(self, domain: Mix = None) -> Evidence:
        """What a choice of experts rests on: the table of all rows, or of the domains that are named, and the others.

        ProfileError where a domain is not there.
        """
        weights = weights_of(domain)
        by_domain = {name: columns(*sums) for name, sums in sorted(self.sums.by_domain().items())}
        check_domains(weights, by_domain)
        return Evidence(
            mixed(by_domain, weights) if weights else columns(*self.sums.total()),
            by_domain,
            self._origin(weights),
            self.info,
            mixed_folds(self.sums, weights),
        )

    def _origin(self, weights: dict[str, float]) -> Origin:
        if self.folder is not None:
            return profile_origin(self.folder, weights or None)
        rows = rows_as_text(self.sums.row_hashes)
        return Origin(domains=weights, model_fingerprint=self.info["model_fingerprint"], calibration_rows=rows)

    def intervals(self, criterion: str = "reap", domain: Mix = None, seed: int = 0) -> Intervals:
        """The scores [L, E] by a criterion over all rows, one domain or a mix, with their 95 % intervals.

        They say how scores vary with the rows: `selection.intervals` has the method. ProfileError as `rank`, and where
        the profile is of a version that kept no folds of its rows.

        Example:
            >>> import gptoss_jax as gj
            >>> rows = [{"text": f"{n} + {n} = {2 * n}"} for n in range(40)]
            >>> found = gj.profile("nano", rows, keep="all", max_seq_length=64).intervals("gate")
            >>> bool((found.low <= found.score).all() and (found.score <= found.high).all())
            True
        """
        return intervals(self._by_fold(domain), criterion, seed)

    def unsettled(self, keep: int | str, criterion: str = "reap", domain: Mix = None, seed: int = 0) -> list[list[int]]:
        """The experts of each layer whose side of the cut may be chance, where so many stay or a per cent as "50%".

        An expert is settled where the 95 % interval of its score minus the cut does not hold 0. ProfileError as
        `intervals`, RankingError where `keep` is neither.

        Example:
            >>> import gptoss_jax as gj
            >>> profile = gj.profile("nano", [{"text": f"{n} + 1"} for n in range(40)], keep="all", max_seq_length=64)
            >>> len(profile.unsettled("50%", "frequency"))
            6
        """
        by_fold = self._by_fold(domain)
        return unsettled(by_fold, number_kept(keep, by_fold["count"].shape[-1]), criterion, seed)

    def _by_fold(self, domain: Mix) -> dict[str, np.ndarray]:
        found = self.evidence(domain).by_fold
        if found is None:
            raise ProfileError(
                f"{self.folder or 'this profile'}: keeps no folds of its rows, so that nobody knows how scores vary: "
                "profile its rows again, in fewer domains where there are hundreds"
            )
        return found

    def rank(self, criterion: str = "reap", domain: Mix = None, seed: int = 0, min_count: int = 0) -> Ranking:
        """All experts of each layer, best first, by a criterion over all rows, one domain or several with weights.

        Those that fewer than `min_count` tokens chose stand behind all others, by falling reap_sum. ProfileError
        where there is no such criterion or domain, or the profile lacks what the criterion needs.
        """
        return self.evidence(domain).rank(criterion, seed, min_count)

    def write(self, folder: Path) -> None:
        """Write all artifacts into a folder that is there."""
        artifacts.write(folder, self.info, self.sums)

    def save(self, out: str | AnyPath, overwrite: bool = False) -> "Profile":
        """Write all artifacts to a new folder, which appears when it is complete; OutputError where it exists."""
        path = place(out)
        with atomic.new_folder(path, overwrite, last=INFO) as folder:
            self.write(folder)
        return Profile(self.info, self.sums, path)


def _check_info(info: Any, sums: Sums) -> None:
    """ValueError where profile.json lacks what is needed of it, or is not that of these sums."""
    if not isinstance(info, dict) or not isinstance(info.get("options"), dict):
        raise ValueError("lists no options")
    info["options"] = NEWER | info["options"]
    if missing := {*NEEDED} - {*info["options"]}:
        raise ValueError(f"lacks the option {min(missing)!r}")
    for name in TEXTS:
        if not isinstance(info.get(name), str):
            raise ValueError(f"{name!r} is no text")
    for name in NUMBERS:
        value = info.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= LARGEST_COUNT:
            raise ValueError(f"{name!r} is no number that a run gives")
    if not info["seconds"]:
        raise ValueError("'seconds' is 0")
    if not re.fullmatch("[0-9a-f]{64}", info["prompts_hash"]):
        raise ValueError("'prompts_hash' is no SHA-256")
    if info["options"]["eaft"] != ("eaft" in sums.weighted):
        raise ValueError(f"the option 'eaft' is not that of {STORE}")
    statistics = sums.statistics
    for name, statistic in DECLARED.items():
        if statistic.asked and info["options"][statistic.asked] != (getattr(statistics, name) is not None):
            raise ValueError(f"the option {statistic.asked!r} is not that of {STORE}")
    measured = {
        "rows": len(sums.row_hashes),
        "total_tokens": statistics.computed[0].sum() / statistics.gate_rank_sum.shape[-1],
        "kept_tokens": statistics.tokens[0].sum(),
    }
    for name, value in measured.items():
        if info[name] != value:
            raise ValueError(f"{name!r} is {info[name]}, {STORE} is of {value:.0f}")
