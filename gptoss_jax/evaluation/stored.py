"""eval.json: an evaluation's summary as JSON, and back.

The file is one object. Its numbers are finite, and its shares are parts of 1:

    kind        "eval"
    version     1
    setting     the fields of `summary.Setting`
    baseline    an entry, of the baseline beside itself
    entries     entries, one for each keep-sets or checkpoint beside the baseline

An entry has the fields of `summary.Entry`, and what `Entry.gate` says:

    name, layers_hash (null for a checkpoint), experts (a number for each layer; none for the baseline),
    origin (as in keep.json)
    quality     {sequence length: tokens, documents, estimates {name in QUANTITIES: estimate}, kl_percentiles,
                dp_percentiles, js2d}
    replies     null, or rows, estimates and differences {name in COLUMNS: estimate}, median_length
    corrected   {sequence length or "replies": {difference: p-value, Holm-corrected over all entries}}
    by_domain   {domain: quality at the first sequence length}
    gate        passed, and checks: a list of name, seq_len (null for replies), value, limit, passed
    estimate    value, low, high (the 95 % interval), error (the cluster-robust standard error), p_value
"""

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from ..errors import EvaluationError, StatisticsError, plain, reason, refusal, shown
from ..files.paths import AnyPath, place, storage_errors
from .quality import QUANTITIES
from .summary import Entry, Summary

EVAL = "eval.json"
VERSION = 1
NAMES: dict[Any, str] = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false"}


def to_dict(summary: Summary) -> dict[str, Any]:
    """The object of the file."""
    raw = dataclasses.asdict(summary)
    for entry, stored in zip((summary.baseline, *summary.entries), (raw["baseline"], *raw["entries"]), strict=True):
        stored["gate"] = {"passed": entry.passes, "checks": [dataclasses.asdict(check) for check in entry.gate]}
    return {"kind": "eval", "version": VERSION, **raw}


def to_json(summary: Summary) -> str:
    """The content of the file. StatisticsError where a number is not finite."""
    try:
        return json.dumps(to_dict(summary), indent=2, allow_nan=False) + "\n"
    except ValueError:
        broken = next(entry.name for entry in (summary.baseline, *summary.entries) if not _is_finite(entry))
        raise StatisticsError(
            f"{broken}: its perplexity is not finite: the model is damaged, or its experts do not belong to it"
        ) from None


def _is_finite(entry: Entry) -> bool:
    try:
        json.dumps(dataclasses.asdict(entry), allow_nan=False)
    except ValueError:
        return False
    return True


def read(file: str | AnyPath) -> Summary:
    """The summary in an eval.json, or in that of a folder. EvaluationError where it cannot be read."""
    path = place(file)
    try:
        with storage_errors(path):
            data = (path / EVAL if path.is_dir() else path).read_bytes()
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read ({refusal(error)}): `gptoss-jax eval` writes one") from None
    return parse(data, str(path))


def parse(data: bytes, where: str) -> Summary:
    """Reads what `read` does, from the bytes of a file that errors call `where`."""
    try:
        raw = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{where}: not a JSON file ({reason(error)})") from None
    if not isinstance(raw, dict) or raw.get("kind") != "eval":
        raise EvaluationError(f"{where}: is no evaluation: give the eval.json that `gptoss-jax eval` writes")
    if raw.get("version") != VERSION:
        raise EvaluationError(
            f"{where}: is of version {shown(raw.get('version'))}, this program reads version {VERSION}: take the "
            "gptoss-jax that wrote it"
        )
    found: Summary = _built(Summary, raw, where, "")
    for entry in (found.baseline, *found.entries):
        absent = [name for of in entry.quality.values() for name in QUANTITIES if name not in of.estimates]
        if absent:
            raise EvaluationError(f"{where}: {plain(entry.name)} lacks the estimate {absent[0]}: evaluate again")
        if [*entry.quality] != [*found.setting.blocks]:
            raise EvaluationError(
                f"{where}: {plain(entry.name)} has other sequence lengths than its setting: evaluate again"
            )
    return found


def _built(kind: Any, raw: Any, where: str, name: str) -> Any:
    """A value of an annotated type from JSON; EvaluationError names the place that is of another."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(raw, dict):
            raise _wrong(where, name, raw, "an object")
        return _object(kind, raw, where, name)
    if origin is types.UnionType:
        if raw is None and type(None) in inner:
            return None
        (some,) = (one for one in inner if one is not type(None))
        return _built(some, raw, where, name)
    if origin is Literal:
        if raw not in list(inner):
            raise _wrong(where, name, raw, f"one of {', '.join(inner)}")
        return raw
    if origin is tuple:
        if not isinstance(raw, list):
            raise _wrong(where, name, raw, "a list")
        return tuple(_built(inner[0], one, where, f"{name}[{at}]") for at, one in enumerate(raw))
    if origin in (dict, Mapping):
        if not isinstance(raw, dict):
            raise _wrong(where, name, raw, "an object")
        return {
            _key(inner[0], key, where, name): _built(inner[1], one, where, f"{name}.{key}") for key, one in raw.items()
        }
    return _plain(kind, raw, where, name)


def _object(kind: Any, raw: dict[str, Any], where: str, name: str) -> Any:
    kinds = typing.get_type_hints(kind)
    values = {}
    for field in dataclasses.fields(kind):
        full = f"{name}.{field.name}".lstrip(".")
        if field.name not in raw and field.name == "answers_hash":
            continue  # evaluations of before say nothing of it
        if field.name not in raw:
            raise EvaluationError(f"{where}: lacks {full}: evaluate again")
        values[field.name] = _built(kinds[field.name], raw[field.name], where, full)
    return kind(**values)


def _key(kind: Any, key: str, where: str, name: str) -> Any:
    if kind is int and not re.fullmatch("[0-9]{1,9}", key):
        raise _wrong(where, name, key, "whole numbers as names")
    return kind(key)


def _plain(kind: Any, raw: Any, where: str, name: str) -> Any:
    is_whole = type(raw) is int and abs(raw) < 1 << 53  # such a number is a float too
    fits = is_whole if kind is int else type(raw) is kind or (kind is float and is_whole)
    if not fits or (kind is float and not math.isfinite(raw)):
        raise _wrong(where, name, raw, NAMES[kind])
    return kind(raw)


def _wrong(where: str, name: str, raw: Any, wanted: str) -> EvaluationError:
    return EvaluationError(f"{where}: {name} is {shown(raw)}, expected {wanted}: evaluate again")
