"""The keep-sets that are compared: by criterion, by what counts in the profile, and for all families together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import gptoss_jax as gj
from convert.sources import NANO
from gptoss_jax.selection.ranking import rank
from gptoss_jax.statistics.tables import Columns

CRITERIA = ("reap", "reap_sum", "frequency", "swap")
FROM_WEIGHTS = "aimer"
SEEDS = range(5)  # of `random`
KEEPS = ("all", "reply", "assistant")
# Beside these, what counts is weighed: questions and replies alike, and the final channel three times.
QUESTIONS_AND_REPLIES, FINALS = "questions and replies alike", "reply, final ×3"
FINAL_WEIGHTS = {"analysis": 1.0, "commentary": 1.0, "final": 3.0}
COUNTED = (*KEEPS, QUESTIONS_AND_REPLIES, FINALS)
# What is measured again on other questions, since the first ones decided what is said of it.
AFRESH = {
    *(("criterion", rule) for rule in ("reap", "swap", "random 0")),
    *(("counted", rule) for rule in KEEPS),
}
BLENDS = ("pooled", "equal weights", "maxmin")


@dataclass(frozen=True)
class Choice:
    """Keep-sets with what they are by."""

    kind: str
    """criterion, counted, or blend."""
    rule: str
    """As `reap`, or `random 3`."""
    keep: int
    keep_sets: gj.KeepSets

    @property
    def name(self) -> str:
        """What the evaluation calls it."""
        return f"{self.kind}: {self.rule}: {self.keep}"


def profiles(rows: Path, out: Path) -> dict[str, gj.Profile]:
    """nano's profiles of the calibration rows by family, for each of what may count."""
    found = {}
    options = {"domain_column": "family", "dtype": "float32", "batch_size": 32, "max_seq_length": 512}
    for name in (*KEEPS, FINALS):
        counted = {"keep": "reply", "channel_weights": FINAL_WEIGHTS} if name == FINALS else {"keep": name}
        folder = out / name.replace(" ", "-").replace("×", "x").replace(",", "")
        if (folder / "profile.json").exists():
            found[name] = gj.Profile.open(folder)
        else:
            more = {"swap": name == "all"}
            found[name] = gj.profile(NANO, rows, **options, **counted, **more, out=folder, resume=True)
    return found


def of_family(profiles: Mapping[str, gj.Profile], family: str, keeps: Sequence[int]) -> list[Choice]:
    """All that are compared on one family's questions."""
    every, rankings = profiles["all"], {}
    for criterion in CRITERIA:
        rankings["criterion", criterion] = every.rank(criterion, family)
    rankings["criterion", FROM_WEIGHTS] = gj.rank(NANO, FROM_WEIGHTS)
    for seed in SEEDS:
        rankings["criterion", f"random {seed}"] = every.rank("random", family, seed)
    for counted in (*KEEPS, FINALS):
        rankings["counted", counted] = profiles[counted].rank("reap", family)
    alike = _alike(profiles["all"].columns(family), profiles["reply"].columns(family))
    rankings["counted", QUESTIONS_AND_REPLIES] = rank(alike, "reap")
    return [Choice(*key, keep, ranking.keep(keep)) for key, ranking in rankings.items() for keep in keeps]


def _alike(every: Columns, replies: Columns) -> Columns:
    """Columns in which the tokens of replies have the weight of all others together."""
    share = every["count"].sum(1).mean() / (2 * replies["count"].sum(1).mean())
    rest = 1 / (2 - 1 / share)
    names = ("count", "gate_norm_sum")
    return {name: share * replies[name] + rest * (every[name] - replies[name]) for name in names}


def for_all(profile: gj.Profile, keeps: Sequence[int]) -> list[Choice]:
    """One model for all families."""
    equal = dict.fromkeys(profile.domains, 1.0)
    found = []
    for keep in keeps:
        sets = {
            "pooled": gj.select(profile, keep, "reap_sum"),
            "equal weights": gj.select(profile, keep, "reap_sum", equal),
            "maxmin": gj.select(profile, keep, "reap_sum", equal, blend="maxmin"),
        }
        found += [Choice("blend", name, keep, sets[name]) for name in BLENDS]
        found += [Choice("blend", f"random {n}", keep, gj.select(profile, keep, "random", seed=n)) for n in SEEDS]
    return found


def union(profile: gj.Profile, keep: int) -> np.ndarray:
    """How many experts of each layer the families' own best so many are together, [L]."""
    sets = [gj.select(profile, keep, "reap_sum", family).layers for family in profile.domains]
    return np.array([len(set().union(*layers)) for layers in zip(*sets, strict=True)])
