"""Domains: which categories of benchmarks belong to them."""

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

from ..errors import FingerprintError, reason, refusal, shown
from ..files.paths import AnyPath, is_path, place, storage_errors

Domains = str | AnyPath | Mapping[str, Sequence[str]]
"""A file of domains, or the categories of each as BENCHMARK/CATEGORY."""

FORM = '{"law": ["BENCHMARK/CATEGORY", ...], ...}'


def domains_of(given: Domains) -> Mapping[str, Sequence[str]]:
    """Domains as {"law": ["mmlu_test/professional_law"]}, or those of a file; FingerprintError where there are none."""
    if not is_path(given):
        found = {name: [*some] for name, some in given.items()} if isinstance(given, Mapping) else None
        if not are_domains(found):
            raise FingerprintError(f"domains are {shown(given)}: give a file, or {FORM}")
        return found or {}
    file = place(given)
    try:
        with storage_errors(file):
            raw = json.loads(file.read_bytes().decode("utf-8"))
    except OSError as error:
        raise FingerprintError(f"{file}: {refusal(error)}: give a file of domains as {FORM}") from None
    except (ValueError, RecursionError) as error:
        raise FingerprintError(f"{file}: not valid JSON ({reason(error)}): expected {FORM}") from None
    if not are_domains(raw):
        raise FingerprintError(f"{file}: holds no domains: expected {FORM}")
    return cast(dict[str, list[str]], raw)


def are_domains(raw: Any) -> bool:
    """Whether a value names categories for each domain."""
    return isinstance(raw, dict) and bool(raw) and all(name and _are_names(value) for name, value in raw.items())


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) and "/" in name for name in value)


def of_domain(name: str, domains: Mapping[str, Sequence[str]], there: Sequence[str]) -> list[str]:
    """The domain's categories among those that are there.

    FingerprintError where there is no such domain, or none of its categories.
    """
    if name not in domains:
        known = f"there are {', '.join(domains)}" if domains else "no domains are given: name a file with --domains"
        raise FingerprintError(f"no domain {name!r}: {known}")
    if not (found := [one for one in there if one in {*domains[name]}]):
        raise FingerprintError(f"the dataset has none of the {len(domains[name])} categories of domain {name!r}")
    return found


def of_patterns(patterns: Sequence[str], there: Sequence[str]) -> list[str]:
    """The categories that match one of the patterns; FingerprintError where a pattern matches none."""
    for pattern in patterns:
        if not any(fnmatchcase(one, pattern) for one in there):
            benchmarks = ", ".join(sorted({one.partition("/")[0] for one in there}))
            raise FingerprintError(f"no category {pattern!r}: give BENCHMARK/CATEGORY; there are those of {benchmarks}")
    return [one for one in there if any(fnmatchcase(one, pattern) for pattern in patterns)]
