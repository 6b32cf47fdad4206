"""Where rankings and keep-sets come from."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from ..errors import ProfileError, reason
from ..files.paths import AnyPath, storage_errors
from ..statistics.tables import SALIENCY
from .criteria import CRITERIA

INFO = "profile.json"


@dataclass(frozen=True)
class Origin:
    """How a ranking or keep-sets came about. None is what nobody has said: nothing is guessed.

    Args:
        criterion: Its name in CRITERIA, or another's that made the file.
        domains: Domains of the profile with their weights; empty where all its rows count. A criterion of the weights
            alone has none, and no profile.
        rule: How the choice follows from the scores.
        seed: The seed that the criterion was given; only some draw with it.
        profile_hash: SHA-256 of the profile's saliency.parquet, also where one domain alone was ranked.
        model_fingerprint: The fingerprint of the checkpoint that was profiled, or whose weights were scored.
    """

    criterion: str | None = None
    domains: dict[str, float] | None = None
    rule: str | None = None
    seed: int | None = None
    profile_hash: str | None = None
    model_fingerprint: str | None = None

    @property
    def domain(self) -> str | None:
        """The only domain, where there is one."""
        return next(iter(self.domains)) if self.domains and len(self.domains) == 1 else None

    @property
    def of_weights(self) -> bool:
        """Whether no profile stands behind it."""
        return self.domains is None and self.criterion in CRITERIA and CRITERIA[self.criterion].of_weights

    def __str__(self) -> str:
        """Criterion and data as part of a sentence: by `reap` over the profile's domain `science`."""
        if self.criterion is None and self.domains is None:
            return "of unknown origin"
        criterion = "an unknown criterion" if self.criterion is None else quoted(self.criterion)
        if self.of_weights:
            return f"by {criterion} of the weights alone"
        return f"by {criterion} over {self._data()}"

    def _data(self) -> str:
        if self.domains is None:
            return "unknown data"
        if not self.domains:
            return "all rows of the profile"
        if self.domain is not None:
            return f"the profile's domain {quoted(self.domain)}"
        weighted = [f"{quoted(name)} (weight {weight:g})" for name, weight in sorted(self.domains.items())]
        return f"the profile's domains {', '.join(weighted)}"


UNKNOWN = Origin()


def quoted(text: str) -> str:
    """A text of a file as code in Markdown. It cannot end the code or the line that it stands in."""
    return f"`{''.join(c if c.isprintable() and c != '`' else ' ' for c in text)}`"


def profile_origin(profile: AnyPath, domain: str | None = None) -> Origin:
    """What a profile's folder, or a saliency table alone, says of a ranking of all its rows or of one domain.

    Its hash is that of the bytes of saliency.parquet. ProfileError where profile.json is no JSON.
    """
    with storage_errors(profile):
        table = profile / SALIENCY if profile.is_dir() else profile
        return Origin(
            domains={} if domain is None else {domain: 1.0},
            profile_hash=_digest(table) if table.exists() else None,
            model_fingerprint=_fingerprint(profile / INFO) if profile.is_dir() else None,
        )


def _digest(file: AnyPath) -> str:
    stream: Any  # those of fsspec can be read into a buffer too
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fingerprint(info: AnyPath) -> str | None:
    try:
        said = json.loads(info.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ProfileError(f"{info}: not a JSON file ({reason(error)}): profile its rows again") from None
    fingerprint = said.get("model_fingerprint") if isinstance(said, dict) else None
    return fingerprint if isinstance(fingerprint, str) else None
