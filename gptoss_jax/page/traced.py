"""What a page has of the choices that a trace holds: a profile of them by segment."""

from typing import Any

import numpy as np

from ..fingerprints.traces import sums_of
from ..routing.segments import SEGMENTS
from ..routing.traces import Trace
from ..selection.intervals import intervals
from ..selection.ranking import rank
from .fingerprints import CHOICES
from .packing import Packed

FOLDS = 10  # of prompts, over which intervals are
CRITERIA = {"frequency": CHOICES, "gate": "share of gates"}  # by their names on the page


def traced_of(name: str, trace: Trace, packed: Packed) -> dict[str, Any]:
    """Like `experts.profile_of`, of all prompts: the shares of a layer's choices and gates that an expert has, of all
    tokens and of each segment. A mass of outputs is not known: the share of choices is in its place."""
    count_SFLE, gate_SFLE = _sums(trace)
    there = [s for s in range(len(SEGMENTS)) if count_SFLE[s].any()]
    of_groups = [([*range(len(SEGMENTS))], ""), *(([s], SEGMENTS[s]) for s in there)]
    counts = np.array([count_SFLE[some].sum((0, 1)) for some, _ in of_groups])
    sums = [(count_SFLE[some].sum(0), gate_SFLE[some].sum(0)) for some, _ in of_groups]
    found = np.array([[_shares(*of, criterion) for of in sums] for criterion in CRITERIA])
    columns = [{"count": count_FLE.sum(0), "gate_sum": gate_FLE.sum(0)} for count_FLE, gate_FLE in sums]
    order = [[rank(of, criterion).layers for of in columns] for criterion in CRITERIA]
    return {
        "name": name,
        "model": str(trace.info.get("model", "")),
        "fingerprint": trace.about.model_fingerprint,
        "rows": len(trace),
        "counted": "all tokens",
        "warnings": [],
        "command": str(trace.info.get("command", "")),
        "criteria": [*CRITERIA.values()],
        "mass": "choices",
        "groups": [group for _, group in of_groups],
        "parts": [*range(1, len(of_groups))],
        "tokens": [int(count_LE[0].sum()) // trace.about.top_k for count_LE in counts],
        "scores": packed.add(found[:, :, 0], "f4"),
        "order": packed.add_experts(order, trace.about.num_experts),
        "halves": packed.add(found[:, :, 1], "b2"),
        "counts": packed.add(counts, "u4"),
        "masses": packed.add(found[0, :, 0], "f4"),
    }


def _sums(trace: Trace) -> np.ndarray:
    """How many tokens of each segment and fold of prompts chose each expert, and the sums of their gates,
    [2, S, F, L, E]."""
    of = trace.about
    sums = np.zeros((2, len(SEGMENTS), FOLDS, of.num_layers, of.num_experts))
    for n, prompt in enumerate(trace):
        segments = prompt.segments[: len(prompt.experts)]
        for s in np.unique(segments):
            own = segments == s
            sums[:, s, n % FOLDS] += sums_of(prompt.experts[own], prompt.gates[own].astype(np.float64), of.num_experts)
    return sums


def _shares(count_FLE: np.ndarray, gate_FLE: np.ndarray, criterion: str) -> np.ndarray:
    """The shares of each layer, and half of their intervals, [2, L, E]."""
    by_fold = {"count": count_FLE.swapaxes(0, 1), "gate_sum": gate_FLE.swapaxes(0, 1)}
    of = intervals(by_fold, criterion)
    whole_L = np.maximum(of.score.sum(-1, keepdims=True), np.finfo(float).tiny)
    return np.stack([of.score, (of.high - of.low) / 2]) / whole_L
