"""What a page has of experts: their scores by domain and criterion, who they run with, which of them stay."""

from typing import Any

import numpy as np

from ..evaluation.replies import COLUMNS
from ..reports.markdown import THIN
from ..run.profile import Profile
from ..selection.criteria import CRITERIA
from ..selection.intervals import LEVEL, intervals
from ..selection.keep_sets import KeepSets, are_kept
from ..selection.origin import UNKNOWN
from ..selection.ranking import Ranking, rank
from ..statistics.tables import Columns
from .packing import Packed, known

PARTNERS = 8  # of an expert, those that ran most often on the same tokens


def criteria_of(profile: Profile) -> list[str]:
    """Those by which a profile can rank; `random` says nothing of experts, and others none of a profile."""
    columns = {*profile.columns()}
    return [
        name
        for name, criterion in CRITERIA.items()
        if name != "random" and not criterion.of_weights and {*criterion.needs} <= columns
    ]


def profile_of(name: str, profile: Profile, packed: Packed) -> dict[str, Any]:
    """A profile: scores [C, G, L, E] with the half widths of their intervals, the experts of each layer in the order of
    `rank`, and counts [G, L, E]; G are all rows together, whose name is empty, and the domains, which are its `parts`:
    no token is of two of them. Where nobody knows how sure a score is, its half width is ∞."""
    groups, criteria = ["", *profile.domains], criteria_of(profile)
    evidence = [profile.evidence(group or None) for group in groups]
    found = np.zeros((2, len(criteria), len(groups), *evidence[0].columns["count"].shape))
    for c, g in np.ndindex(len(criteria), len(groups)):
        of = evidence[g]
        found[0, c, g] = CRITERIA[criteria[c]].score(of.columns, 0)
        if of.by_fold is None:
            found[1, c, g] = np.inf
        else:
            low, high = intervals(of.by_fold, criteria[c])[1:]
            found[1, c, g] = (high - low) / 2
    order = [[rank(of.columns, criterion).layers for of in evidence] for criterion in criteria]
    statistics, _ = profile.sums.total()
    tokens = [int(profile.info["kept_tokens"]), *(int(one.tokens[0]) for one, _ in profile.sums.by_domain().values())]
    return {
        "name": name,
        "model": profile.info["model"],
        "fingerprint": profile.info["model_fingerprint"],
        "rows": profile.info["rows"],
        "counted": profile.info["options"]["keep"],
        "warnings": profile.info["warnings"],
        "command": profile.info["command"],
        "criteria": criteria,
        "mass": "Σ g·n",
        "groups": groups,
        "parts": [*range(1, len(groups))],
        "tokens": tokens,
        "scores": packed.add(found[0], "f4"),
        "order": packed.add_experts(order, found.shape[-1]),
        "halves": packed.add(found[1], "b2"),
        "counts": packed.add([one.columns["count"] for one in evidence], "u4"),
        "masses": packed.add([one.columns["gate_norm_sum"] for one in evidence], "f4"),
        **_leads([one.columns for one in evidence], packed),
        **_partners(statistics.coactivation, packed),
    }


def _leads(columns: list[Columns], packed: Packed) -> dict[str, Any]:
    """How many tokens each expert led, [G, L, E]; nothing of a profile of a version that did not count them."""
    return {"leads": packed.add([of["lead_count"] for of in columns], "u4")} if "lead_count" in columns[0] else {}


def _partners(coactivation: np.ndarray | None, packed: Packed) -> dict[str, Any]:
    """Of each expert the others that its tokens chose most often, and how many of its tokens did: [L, E, partners]."""
    if coactivation is None:
        return {}
    few = min(PARTNERS, coactivation.shape[-1] - 1)
    order = np.argsort(-coactivation, axis=-1, kind="stable")[..., :few]
    times = np.take_along_axis(coactivation, order, -1)
    return {"partners": packed.add_experts(order, len(coactivation[0])), "together": packed.add(times, "u4")}


def keep_sets_of(name: str, sets: KeepSets, num_experts: int, packed: Packed) -> dict[str, Any]:
    """Keep-sets: which stay, [L, E], where they are from, why each stays, what was tried, what is lost elsewhere, and
    their file."""
    return {
        "name": name,
        "kept": packed.add(are_kept(sets.layers, num_experts), "u1"),
        "numbers": [*map(len, sets.layers)],
        "origin": str(sets.origin),
        "reasons": sets.reasons,
        "tried": [one | {of: known(one[of]) for of in ("kl", "match") if of in one} for one in sets.tried or ()],
        "elsewhere": {domain: known(kl) for domain, kl in (sets.elsewhere or {}).items()},
        "file": sets.to_json() if sets.origin != UNKNOWN else None,
    }


def ranking_of(name: str, ranking: Ranking, packed: Packed) -> dict[str, Any]:
    """A ranking: the experts of each layer, best first, [L, E]; of an elimination also what a layer loses where so many
    stay: the losses [L, N] of 1, 2, … E − 1 experts."""
    order = packed.add_experts(ranking.layers, len(ranking.layers[0]))
    found = {"name": name, "origin": str(ranking.origin), "order": order}
    if ranking.losses is not None:
        found["losses"] = packed.add([of_layer[1:] for of_layer in ranking.losses], "f4")
    return found


def words() -> dict[str, Any]:
    """What the page says of replies, of intervals and of few tokens."""
    of_replies = {name: label for name, (label, is_share) in COLUMNS.items() if is_share}
    return {"of_replies": of_replies, "level": LEVEL, "thin": THIN}
