"""What values options may have: kinds, each with its name in help, what it accepts, and how a word is read.

This module imports no large package, so that --help answers at once.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Kind:
    """What values an option may have."""

    metavar: str
    expected: str
    accepts: Callable[[Any], bool]
    read: Callable[[str], Any]
    """Reads a word of the command line; it raises ValueError where that is no such value."""
    join: Callable[[Sequence[Any]], Any] | None = None
    """Makes one value of those of several words, where the option may be given several times; of none it makes None.
    ValueError says why they do not go together."""


def whole(least: int, most: int | float = math.inf) -> Kind:
    """Whole numbers from `least` to `most`."""
    bounds = f"of at least {least}" + (f" and at most {most}" if most < math.inf else "")
    return Kind("INTEGER", f"a whole number {bounds}", lambda x: type(x) is int and least <= x <= most, int)


def real(least: float = -math.inf, above: float = -math.inf, most: float = math.inf) -> Kind:
    """Finite numbers from `least` to `most`, and above `above`."""
    bounds = [f"of at least {least:g}"] if least > -math.inf else []
    bounds += [f"above {above:g}"] if above > -math.inf else []
    bounds += [f"of at most {most:g}"] if most < math.inf else []

    def accepts(x: Any) -> bool:
        is_number = isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)
        return is_number and bool(least <= x <= most and x > above)  # a number of NumPy compares to one of its own

    return Kind("NUMBER", " ".join(["a finite number", " and ".join(bounds)]).strip(), accepts, float)


def one_of(*names: str) -> Kind:
    """One of some names."""
    return Kind(f"[{'|'.join(names)}]", f"one of {', '.join(names)}", lambda x: x in names, str)


COUNTED = one_of("assistant", "reply", "all")
FORMS, DTYPES = one_of("bf16", "mxfp4"), one_of("bfloat16", "float32")
TEXT = Kind("TEXT", "a text", lambda x: isinstance(x, str), str)
ROWS = Kind("PATH", "a path, a hub id, or in Python a list of records", lambda x: isinstance(x, str | Path | list), str)
SWITCH = Kind("", "true or false", lambda x: isinstance(x, bool), bool)
WHOLE = Kind("INTEGER", "a whole number", lambda x: type(x) is int, int)


def _mesh_of(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"data=(\d{1,9}),expert=(\d{1,9})", text.replace(" ", ""))
    if not match:
        raise ValueError
    return int(match[1]), int(match[2])


def _is_mesh(x: Any) -> bool:
    return isinstance(x, tuple) and len(x) == 2 and all(type(n) is int and n > 0 for n in x)


MESH = Kind("data=N,expert=M", "numbers of devices as in data=2,expert=4 (in Python a pair)", _is_mesh, _mesh_of)
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def _size_of(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([KMG]?i?B?)", text.strip(), re.IGNORECASE)
    if not match or match[2].upper() not in UNITS:
        raise ValueError
    return int(min(float(match[1]) * UNITS[match[2].upper()], float(1 << 63)))  # which is too large


SIZE = Kind(
    "SIZE",
    "a size as 5GB or 500MiB (in Python a number of bytes)",
    lambda x: type(x) is int and 1 <= x < 1 << 63,
    _size_of,
)
KEEP = Kind(
    "NUMBER|PERCENT",
    "a whole number of experts, or a per cent of them as 50%",
    lambda x: isinstance(x, int | str),
    lambda text: text if text.endswith("%") else int(text),
)


def _are_counts(x: Any) -> bool:
    return KEEP.accepts(x) or (isinstance(x, list | tuple) and bool(x) and all(map(KEEP.accepts, x)))


def _joined_counts(counts: Sequence[Any]) -> Any:
    return counts[0] if len(counts) == 1 else [*counts] or None


KEEPS = Kind(KEEP.metavar, f"{KEEP.expected}, or in Python a list of these", _are_counts, KEEP.read, _joined_counts)


def _weighted(text: str) -> dict[str, float]:
    """NAME, or NAME=WEIGHT: a name may itself hold the sign."""
    name, _, weight = text.rpartition("=")
    try:
        return {name: float(weight)} if name else {text: 1.0}
    except ValueError:
        return {text: 1.0}


def _at_least(text: str) -> dict[str, float]:
    name, _, share = text.rpartition("=")
    return {name: float(share)}


def _joined(entries: Sequence[Any]) -> Any:
    found: dict[str, float] = {}
    for entry in entries:
        if twice := found.keys() & entry.keys():
            raise ValueError(f"names {min(twice)!r} twice")
        found |= entry
    return found or None


def _by_name(x: Any, number: Kind) -> bool:
    return isinstance(x, Mapping) and bool(x) and all(isinstance(n, str) and number.accepts(v) for n, v in x.items())


DOMAINS = Kind(
    "NAME[=WEIGHT]",
    "a domain's name, or with a weight of at least 0 as law=2 (in Python a name, or names with their weights)",
    lambda x: isinstance(x, str) or _by_name(x, real(0.0)),
    _weighted,
    _joined,
)
SHARES = Kind(
    "NAME=SHARE",
    "a domain with a share above 0 and of at most 1 as law=0.9 (in Python names with their shares)",
    lambda x: _by_name(x, real(above=0.0, most=1.0)),
    _at_least,
    _joined,
)
CHANNELS = ("analysis", "commentary", "final")  # of harmony, the ones that GPT-OSS was trained with


def _channel_weights_of(text: str) -> dict[str, float]:
    pairs = [pair.split("=") for pair in text.split(",")]
    return {channel.strip(): float(weight) for channel, weight in pairs}


def _are_channel_weights(x: Any) -> bool:
    return isinstance(x, dict) and set(x) <= {*CHANNELS} and all(real(0.0).accepts(weight) for weight in x.values())


CHANNEL_WEIGHTS = Kind(
    "CHANNEL=WEIGHT,…",
    f"weights of at least 0 as in analysis=0.5,final=1, for the channels {', '.join(CHANNELS)}",
    _are_channel_weights,
    _channel_weights_of,
)


def _is_coordinator(x: Any) -> bool:
    if x == "auto":
        return True
    match = re.fullmatch(r"[^\s:/]+:(\d{1,5})", x) if isinstance(x, str) else None
    return bool(match) and 0 < int(match[1]) < 1 << 16  # type: ignore[index]


COORDINATOR = Kind("HOST:PORT", "an address as 10.0.0.1:1234, or auto", _is_coordinator, str)
