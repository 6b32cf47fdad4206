"""The near-lossless gate: what a pruned model must keep to be called as good as the one that it was cut from.

The thresholds are those of the published evaluation of gpt-oss-20b, whose 24 of 32 experts by `eaft_reap` passed (ΔPPL
0.212 at 1,024 tokens, 0.154 at 2,048) and whose 20 did not.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from .intervals import Estimate
from .quality import Quality
from .replies import RepliesCompared

MOST_PPL = 0.25
MOST_PPL_SHARE = 0.05  # of the baseline's perplexity; the smaller of both counts
MOST_CONFLICTS = 0.002
MOST_P = 0.02
MOST_JS2D = 0.02
SEQ_LENS = (1024, 2048)  # tokens: both must pass
SIGNIFICANT = 0.05  # the p-value below which replies loop more or end less often


@dataclass(frozen=True)
class Check:
    """One threshold of the gate."""

    name: str
    seq_len: int | None
    """The sequence length that it was measured at; None for replies."""
    value: float
    limit: float
    passed: bool


def checks(quality: Mapping[int, Quality], replies: RepliesCompared | None = None) -> tuple[Check, ...]:
    """Each threshold at each sequence length, and those of replies where there are some."""
    found = [check for seq_len, of in quality.items() for check in _of_tokens(of, seq_len)]
    if replies is not None:
        found += [
            _not_worse("p of a rise of loops", replies.differences["loops"], rise=True),
            _not_worse("p of a fall of natural ends", replies.differences["ended"], rise=False),
        ]
    return tuple(found)


def _of_tokens(quality: Quality, seq_len: int) -> list[Check]:
    found = {name: estimate.value for name, estimate in quality.estimates.items()}
    limited = (
        ("|ΔPPL|", abs(found["ppl_difference"]), min(MOST_PPL, MOST_PPL_SHARE * found["ppl_baseline"])),
        ("|Δ conflict rate|", abs(found["conflict_difference"]), MOST_CONFLICTS),
        ("|Δ mean p|", abs(found["p_difference"]), MOST_P),
        ("JS2D", quality.js2d, MOST_JS2D),
    )
    return [Check(name, seq_len, value, limit, value <= limit) for name, value, limit in limited]


def _not_worse(name: str, difference: Estimate, rise: bool) -> Check:
    """Whether a share of replies has not risen, or fallen, significantly. `limit` is the least p-value."""
    is_worse = difference.value > 0 if rise else difference.value < 0
    p_value = difference.p_value if is_worse else 1.0
    return Check(name, None, p_value, SIGNIFICANT, p_value >= SIGNIFICANT)
