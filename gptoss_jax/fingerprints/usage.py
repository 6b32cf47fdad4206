"""How much the answers of some groups use each expert. Letters: see `config`.

What an expert scores in a layer is the sum over summaries, of one segment or both, of sample_count · ½ ·
count_frequency, so that each answer has the same say; or of counts, so that each token has it.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float

from ..errors import FingerprintError
from .summaries import SEGMENTS, Summary


def chosen(summaries: Iterable[Summary], names: Iterable[str], segment: str) -> list[Summary]:
    """The summaries of some categories and of one segment, or of both; FingerprintError where there are none."""
    of_names, segments = {*names}, SEGMENTS if segment == "both" else (segment,)
    of_categories = [one for one in summaries if one.group.name in of_names]
    if not (found := [one for one in of_categories if one.segment in segments]):
        there = " and ".join(sorted({one.segment for one in of_categories}))
        raise FingerprintError(f"--segment {segment}: the answers have no such segment: there is {there} alone")
    return found


def are_counted(summaries: Iterable[Summary]) -> bool:
    """Whether all hold counts of tokens, and not means over answers alone."""
    return all(one.count_LE is not None for one in summaries)


def usage(summaries: Sequence[Summary], weight: str) -> Float[np.ndarray, "L E"]:
    """How much the answers of some summaries use each expert.

    FingerprintError where tokens are to be weighted and a summary holds means alone: what they are means of are ratios,
    whose sums do not follow from them and a mean length, unless all answers are as long.
    """
    if weight == "sample":
        return np.sum([one.sample_count * one.count_frequency_LE / 2 for one in summaries], axis=0)
    if lacking := [one.group.name for one in summaries if one.count_LE is None]:
        raise FingerprintError(
            f"--weight token needs counts, and of {lacking[0]} the dataset holds means over answers alone "
            f"({len(lacking)} of {len(summaries)} summaries): take --weight sample"
        )
    return np.sum([one.count_LE for one in summaries if one.count_LE is not None], axis=0).astype(np.float64)
