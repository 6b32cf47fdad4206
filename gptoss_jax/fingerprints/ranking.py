"""Rankings of experts by how much the answers of a domain use them. Letters: see `config`."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

import numpy as np
from jaxtyping import Bool, Float

from ..selection.origin import UNKNOWN, Origin
from ..selection.ranking import Ranking
from .specificity import Specificity, shares
from .summaries import Summary
from .usage import usage

NEVER = "never chosen"  # the reason beside an expert that none of the answers chose


@dataclass(frozen=True)
class Way:
    """How experts are ranked. Each field is the option of that name."""

    by: str = "frequency"
    mode: str = "pure"
    weight: str = "sample"
    reverse: bool = False


def rank(
    own: Sequence[Summary], every: Sequence[Summary], special: Specificity | None, way: Way, origin: Origin = UNKNOWN
) -> Ranking:
    """Experts of each layer by falling score; ties by id; those that were never chosen last, by id.

    `own` are the summaries of a domain among `every`, and `special` is their specificity, where there is a domain.
    Each expert has its share as the reason, and NEVER where neither the domain nor, interleaved, all answers chose it.
    Counts are known where tokens are weighted.
    """
    used_LE = usage(own, way.weight)
    score_LE = special.ratio if special is not None and way.by == "specificity" else used_LE
    layers = order(score_LE, used_LE > 0)
    if way.mode == "interleaved":
        of_all_LE = usage(every, way.weight)
        layers = interleaved(layers, order(of_all_LE, of_all_LE > 0))
    if way.reverse:
        layers = [experts[::-1] for experts in layers]
    seen, shares_LE = layers, shares(used_LE)
    layers = [[*dict.fromkeys([*experts, *range(used_LE.shape[1])])] for experts in seen]

    def reason(layer: int, expert: int) -> str:
        if expert not in seen[layer]:
            return NEVER
        return f"{shares_LE[layer, expert]:.2%} of choices" if special is None else special.words(layer, expert)

    reasons: list[list[str | None]] = [[reason(layer, e) for e in experts] for layer, experts in enumerate(layers)]
    counts = None
    if way.weight == "token":
        counts = np.take_along_axis(used_LE, np.array(layers), axis=1).astype(np.int64).tolist()
    return Ranking(layers, origin, counts, reasons)


def order(score_LE: Float[np.ndarray, "L E"], seen_LE: Bool[np.ndarray, "L E"]) -> list[list[int]]:
    """The experts of each layer that were seen, by falling score; ties by id."""
    ordered = np.argsort(-score_LE, axis=1, kind="stable")
    return [[e for e in experts if seen_E[e]] for experts, seen_E in zip(ordered.tolist(), seen_LE, strict=True)]


def interleaved(own: Sequence[Sequence[int]], every: Sequence[Sequence[int]]) -> list[list[int]]:
    """Of each layer one of the domain, one of all, and so on, repeats skipped; the longer list runs on."""
    layers = zip(own, every, strict=True)
    return [[e for e in dict.fromkeys(chain(*zip_longest(*pair))) if e is not None] for pair in layers]
