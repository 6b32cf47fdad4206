"""What a page has of an activation dataset: a profile of what answers chose, by domain and by segment."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..fingerprints.folder import Activations
from ..fingerprints.summaries import SEGMENTS, Summary, sample_count
from ..fingerprints.usage import usage
from ..selection.ranking import rank
from .packing import Packed

CHOICES = "share of choices"  # of a layer, those of an expert: the criterion where nothing but choices is known


def fingerprint_of(name: str, given: Activations, packed: Packed) -> dict[str, Any]:
    """Like `experts.profile_of`, with the share of choices alone, in which each answer has the same say.

    Nobody knows how sure it is, nor is a mass of outputs known: the share is in its place. Where the dataset holds
    means alone, counts are what follows from them and the mean length of answers.
    """
    groups = dict(_groups(given))
    used = np.array([usage(summaries, "sample") for summaries in groups.values()])
    shares = used / np.maximum(used.sum(-1, keepdims=True), np.finfo(float).tiny)
    return {
        "name": name,
        "model": given.info.get("model") or name,
        "fingerprint": given.info.get("model_fingerprint") or "",
        "rows": sample_count(given.summaries),
        "counted": "thoughts and answers",
        "warnings": [f"no answer is of the domain {domain}" for domain in given.domains if domain not in groups],
        "command": "gptoss-jax fingerprint",
        "criteria": [CHOICES],
        "mass": "choices",
        "groups": [*groups],
        "parts": [n for n, name in enumerate(groups) if name in (given.domains or SEGMENTS)],
        "tokens": [int(sum(one.sample_count * one.tokens for one in summaries)) for summaries in groups.values()],
        "scores": packed.add(shares[None], "f4"),
        "order": packed.add_experts([[rank({"count": of}, "frequency").layers for of in used]], used.shape[-1]),
        "halves": packed.add(np.full_like(shares, np.inf)[None], "b2"),
        "counts": packed.add(
            [np.sum([_counts(one) for one in summaries], axis=0) for summaries in groups.values()], "u4"
        ),
        "masses": packed.add(shares, "f4"),
    }


def _groups(given: Activations) -> Iterator[tuple[str, list[Summary]]]:
    """All answers, under an empty name, their segments, the domains, and the segments of each."""
    found = {"": [*given.summaries]}
    for domain, names in given.domains.items():
        found[domain] = [one for one in given.summaries if one.group.name in {*names}]
    for name, summaries in found.items():
        if not summaries:
            continue  # a domain of which no answer was recorded
        yield name, summaries
        for segment in SEGMENTS:
            if some := [one for one in summaries if one.segment == segment]:
                yield f"{name}, {segment}".removeprefix(", "), some


def _counts(one: Summary) -> np.ndarray:
    if one.count_LE is not None:
        return one.count_LE
    return np.round(one.sample_count * one.tokens * one.count_frequency_LE)
