"""Where rankings and keep-sets come from."""

import base64
import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ProfileError, reason
from ..files.paths import AnyPath, storage_errors
from ..statistics.counted import STORE, counted_rows
from ..statistics.tables import SALIENCY
from .criteria import CRITERIA, ELIMINATIONS
from .mixes import Mix, weights_of

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
        calibration_rows: The hashes of the rows that the profile counted, as `rows_as_text` writes them.
        answers_hash: In the place of a profile, SHA-256 of the summaries.parquet of an activation dataset; domains are
            then those of its answers.
    """

    criterion: str | None = None
    domains: dict[str, float] | None = None
    rule: str | None = None
    seed: int | None = None
    profile_hash: str | None = None
    model_fingerprint: str | None = None
    calibration_rows: str | None = None
    answers_hash: str | None = None

    @property
    def row_hashes(self) -> np.ndarray | None:
        """Those of the rows that the profile counted, uint64 [rows], sorted, as `rows.row_hashes` gives them."""
        return None if self.calibration_rows is None else rows_of_text(self.calibration_rows)

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
        rows, of = ("rows", "profile") if self.answers_hash is None else ("answers", "activation dataset")
        if self.criterion in ELIMINATIONS:
            of = "data"
        if not self.domains:
            return f"all {rows} of the {of}"
        if self.domain is not None:
            return f"the {of}'s domain {quoted(self.domain)}"
        weighted = [f"{quoted(name)} (weight {weight:g})" for name, weight in sorted(self.domains.items())]
        return f"the {of}'s domains {', '.join(weighted)}"


UNKNOWN = Origin()


def quoted(text: str) -> str:
    """A text of a file as code in Markdown. It cannot end the code or the line that it stands in."""
    return f"`{''.join(c if c.isprintable() and c != '`' else ' ' for c in text)}`"


def rows_as_text(hashes: np.ndarray) -> str:
    """Sorted hashes, uint64 [rows], as base64 of their little-endian bytes."""
    return base64.b64encode(hashes.astype("<u8").tobytes()).decode()


def rows_of_text(text: str) -> np.ndarray:
    """The hashes that `rows_as_text` wrote; ValueError where it wrote no such text."""
    hashes = np.frombuffer(base64.b64decode(text.encode(), validate=True), "<u8")
    if (hashes[1:] < hashes[:-1]).any():
        raise ValueError("its hashes are not sorted")
    return hashes


def profile_origin(profile: AnyPath, domain: Mix = None) -> Origin:
    """What a profile's folder, or a saliency table alone, says of a ranking of all its rows or of some domains.

    Its hash is that of the bytes of saliency.parquet. ProfileError where profile.json is no JSON.
    """
    with storage_errors(profile):
        is_folder = profile.is_dir()
        table = profile / SALIENCY if is_folder else profile
        rows = counted_rows(profile / STORE) if is_folder else None
        fingerprint = profile_info(profile).get("model_fingerprint")
        return Origin(
            domains=weights_of(domain),
            profile_hash=_digest(table) if table.exists() else None,
            model_fingerprint=fingerprint if isinstance(fingerprint, str) else None,
            calibration_rows=None if rows is None else rows_as_text(rows),
        )


def profile_info(profile: AnyPath) -> dict[str, Any]:
    """What profile.json of a profile's folder says; empty where there is none. ProfileError where it is no JSON."""
    info = profile / INFO
    try:
        said = json.loads(info.read_text(encoding="utf-8")) if profile.is_dir() else {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ProfileError(f"{info}: not a JSON file ({reason(error)}): profile its rows again") from None
    return said if isinstance(said, dict) else {}


def _digest(file: AnyPath) -> str:
    stream: Any  # those of fsspec can be read into a buffer too
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
