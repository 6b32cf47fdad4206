"""Finished profiles over different rows, added into one: all statistics are sums over tokens, or maxima.

Letters: see `config`.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..errors import ProfileError, reason
from ..files.paths import AnyPath
from ..statistics.store import LARGEST_COUNT, Sums, read_sums
from ..statistics.sums import MAX_DOMAINS, STATISTICS
from . import artifacts
from .artifacts import INFO, Measured

# Settings that say which tokens count and for how much: under different ones, sums do not add.
COUNTING = ("keep", "channel_weights", "skip_first", "eaft")
EAFT = ("eaft_quantiles", "eaft_weights")
# Settings that change what a token sees, or how precisely: sums add, and the reader is told.
SEEING = ("max_seq_length", "truncate", "pack", "cross_document", "dtype")
SEVERAL = "several"  # in place of an option's value, where the merged profiles differ in it

# What profile.json must hold for its profile to be added.
TEXTS = ("model", "model_fingerprint", "command", "engine", "prompts_hash")
ADDED = ("rows", "truncated_rows", "empty_rows", "total_tokens", "seconds", "compile_seconds")
NUMBERS = (*ADDED, "kept_tokens", "peak_rss_bytes")


@dataclass(frozen=True)
class Part:
    """A finished profile."""

    folder: AnyPath
    info: dict[str, Any]
    """profile.json."""
    sums: Sums


def read_parts(folders: Sequence[AnyPath]) -> list[Part]:
    """Profiles that can be added, in an order that does not depend on that of `folders`.

    ProfileError names folders and reason where they cannot.
    """
    parts = [Part(folder, *_read(folder)) for folder in folders]
    for part in parts[1:]:
        _check_alike(parts[0], part)
    for one, other in combinations(parts, 2):
        _check_apart(one, other)
    domains = {name for part in parts for name in part.sums.domains}
    if len(domains) > MAX_DOMAINS:
        raise ProfileError(f"the profiles hold {len(domains)} domains together, at most {MAX_DOMAINS}: merge fewer")
    return sorted(parts, key=lambda part: part.info["prompts_hash"])


def write(folder: Path, parts: Sequence[Part], info: dict[str, Any]) -> None:
    """Write all artifacts of the parts' sum into `folder`. `info`, completed, becomes profile.json."""
    domains = sorted({name for part in parts for name in part.sums.domains})
    statistics, eaft = _among(parts[0], domains)
    for part in parts[1:]:
        more, more_eaft = _among(part, domains)
        statistics = statistics.merge(more)
        eaft = None if eaft is None else eaft + more_eaft
    added = {name: sum(part.info[name] for part in parts) for name in ADDED}
    peak = max(part.info["peak_rss_bytes"] for part in parts)
    measured = Measured(
        statistics, eaft, added["total_tokens"], added["seconds"], added["compile_seconds"], peak_rss_bytes=peak
    )
    row_hashes = np.sort(np.concatenate([part.sums.row_hashes for part in parts]))
    artifacts.write(folder, measured, domains, row_hashes, {**_info(parts, added), **info})


def _among(part: Part, domains: Sequence[str]) -> Any:
    """The part's statistics [L, G, …] and sums of EAFT, G the domains of all parts: 0 in those it lacks."""
    places = [domains.index(name) for name in part.sums.domains]

    def spread(own: np.ndarray) -> np.ndarray:
        wide = np.zeros((len(own), len(domains), *own.shape[2:]), own.dtype)
        wide[:, places] = own
        return wide

    return jax.tree.map(spread, (part.sums.statistics, part.sums.eaft_gate_norm_sum))


def _info(parts: Sequence[Part], added: dict[str, Any]) -> dict[str, Any]:
    """What profile.json says of the merged profiles before their statistics."""
    first = parts[0].info
    hashes = sorted(part.info["prompts_hash"] for part in parts)
    rows, truncated, empty = (added[name] for name in ("rows", "truncated_rows", "empty_rows"))
    return {
        "model": first["model"],
        "model_fingerprint": first["model_fingerprint"],
        "options": {name: _common(parts, name) for part in parts for name in part.info["options"]},
        "engine": ", ".join(sorted({engine for part in parts for engine in part.info["engine"].split(", ")})),
        "rows": rows,
        "truncated_rows": truncated,
        "empty_rows": empty,
        "prompts_hash": hashlib.sha256("\n".join(hashes).encode()).hexdigest(),
        "merged": [
            {"folder": str(part.folder)} | {name: part.info[name] for name in ("rows", "prompts_hash", "command")}
            for part in parts
        ],
        "warnings": [*artifacts.data_warnings(rows, truncated, empty), *_differences(parts)],
    }


def _common(parts: Sequence[Part], name: str) -> Any:
    values = [part.info["options"].get(name) for part in parts]
    return values[0] if all(value == values[0] for value in values) else SEVERAL


def _differences(parts: Sequence[Part]) -> Iterator[str]:
    """What a reader of the sums should know of how they came about."""
    for name in SEEING:
        if _common(parts, name) == SEVERAL:
            values = sorted({str(part.info["options"][name]) for part in parts})
            yield f"{_flag(name)} is not the same in all merged profiles: {', '.join(values)}"
    if parts[0].sums.eaft_gate_norm_sum is not None:
        yield "the quantiles of --eaft are over the tokens of each merged profile, not over all together"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check_alike(one: Part, other: Part) -> None:
    """ProfileError where sums are of different things, and do not add."""
    if _model(one) != _model(other):
        raise ProfileError(
            f"{other.folder} is a profile of another model than {one.folder}: merge profiles of the same weights"
        )
    for name in (*COUNTING, *(EAFT if one.info["options"]["eaft"] else ())):
        theirs, ours = (part.info["options"][name] for part in (other, one))
        if theirs != ours:
            raise ProfileError(
                f"{other.folder} has {_flag(name)} {theirs}, {one.folder} has {ours}: such sums do not add: "
                "profile the rows of one of them again"
            )


def _model(part: Part) -> tuple[str, int, int, int]:
    """Fingerprint, L, E and k."""
    L, _, E = part.sums.statistics.count.shape
    return part.info["model_fingerprint"], L, E, part.sums.statistics.gate_rank_sum.shape[-1]


def _check_apart(one: Part, other: Part) -> None:
    """ProfileError where rows would count twice."""
    resolved = [p.folder.resolve() if isinstance(p.folder, Path) else p.folder for p in (one, other)]
    if resolved[0] == resolved[1]:
        raise ProfileError(f"{other.folder} is named twice: name each profile once")
    if shared := len(np.intersect1d(one.sums.row_hashes, other.sums.row_hashes)):
        raise ProfileError(
            f"{one.folder} and {other.folder} share {shared:,} row{'s' * (shared > 1)}, which would count twice: "
            "merge profiles of different rows"
        )


def _read(folder: AnyPath) -> tuple[dict[str, Any], Sums]:
    file = folder / INFO
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ProfileError(f"{folder}: is no finished profile: it holds no {INFO}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ProfileError(f"{file}: not a JSON file ({reason(error)}): profile its rows again") from None
    if not (folder / STATISTICS).exists():
        raise ProfileError(
            f"{folder}: holds no {STATISTICS}: a version that could not merge made it; profile its rows again"
        )
    sums = read_sums(folder / STATISTICS)
    try:
        _check_info(info, sums)
    except ValueError as error:
        raise ProfileError(f"{file}: {error}: profile its rows again") from None
    return info, sums


def _check_info(info: Any, sums: Sums) -> None:
    """ValueError where profile.json lacks what is needed of it, or is not that of these sums."""
    if not isinstance(info, dict) or not isinstance(info.get("options"), dict):
        raise ValueError("lists no options")
    if missing := {*COUNTING, *EAFT, *SEEING} - {*info["options"]}:
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
    if info["options"]["eaft"] != (sums.eaft_gate_norm_sum is not None):
        raise ValueError(f"the option 'eaft' is not that of {STATISTICS}")
    statistics = sums.statistics
    measured = {
        "rows": len(sums.row_hashes),
        "total_tokens": statistics.computed[0].sum() / statistics.gate_rank_sum.shape[-1],
        "kept_tokens": statistics.tokens[0].sum(),
    }
    for name, value in measured.items():
        if info[name] != value:
            raise ValueError(f"{name!r} is {info[name]}, {STATISTICS} is of {value:.0f}")
