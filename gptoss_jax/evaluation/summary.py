"""What an evaluation found: the object behind eval.json, eval.md and model cards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from ..selection.keep_sets import KeepSets
from ..selection.origin import UNKNOWN, Origin
from . import gate
from .intervals import DRAWS, Estimate, holm
from .quality import QUANTITIES, Quality, compare
from .replies import Judged, RepliesCompared, compare_replies
from .scored import Scored, ScoredTokens

CONTROL = "random"


@dataclass(frozen=True)
class Setting:
    """On what models were compared, and how."""

    model: str
    """What the user calls the model of the keep-sets."""
    model_fingerprint: str
    baseline: str
    data: str
    rows: int
    blocks: Mapping[int, int]
    """How many blocks there are of each sequence length, which is how many tokens of a block are predicted."""
    prompts_hash: str
    calibration: Literal["disjoint", "unknown"]
    """Whether the rows are known to be none of those that the keep-sets were chosen on."""
    seed: int = 0
    """Of the draws of documents."""
    draws: int = DRAWS
    answers: str = ""
    """The kind of answers that replies were read for; empty where no reply was."""
    command: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """A model beside the baseline: keep-sets of it, or another checkpoint, which has none."""

    name: str
    keep_sets: KeepSets | None = None
    experts: tuple[int, ...] = ()
    """How many experts each layer of a checkpoint without keep-sets has."""


@dataclass(frozen=True)
class Entry:
    """What was found of one model beside the baseline."""

    name: str
    quality: Mapping[int, Quality]
    """By sequence length."""
    replies: RepliesCompared | None = None
    layers_hash: str | None = None
    """That of its keep-sets; None for another checkpoint."""
    experts: tuple[int, ...] = ()
    """How many experts each layer has; empty for the baseline."""
    origin: Origin = UNKNOWN
    corrected: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """The p-values of `differences`, corrected for how many models were compared."""
    by_domain: Mapping[str, Quality] = field(default_factory=dict)
    """Of each domain with two documents or more, at the first sequence length."""

    @property
    def is_control(self) -> bool:
        """Whether its experts were drawn at random."""
        return self.origin.criterion == CONTROL

    @property
    def gate(self) -> tuple[gate.Check, ...]:
        """The thresholds of the near-lossless gate."""
        return gate.checks(self.quality, self.replies)

    @property
    def passes(self) -> bool:
        """Whether it passes all of them, at the sequence lengths of the evaluation."""
        return all(check.passed for check in self.gate)

    @property
    def differences(self) -> dict[str, Mapping[str, Estimate]]:
        """What equal models have zero of: by sequence length the QUANTITIES that are differences, and "replies"."""
        of_tokens: dict[str, Mapping[str, Estimate]] = {
            str(seq_len): {name: of.estimates[name] for name, what in QUANTITIES.items() if what.is_difference}
            for seq_len, of in self.quality.items()
        }
        return of_tokens | ({"replies": self.replies.differences} if self.replies else {})


@dataclass(frozen=True)
class Summary:
    """An evaluation: the baseline beside itself, and every model beside the baseline."""

    setting: Setting
    baseline: Entry
    entries: tuple[Entry, ...]

    def of(self, layers_hash: str) -> Entry | None:
        """The entry of keep-sets."""
        return next((entry for entry in self.entries if entry.layers_hash == layers_hash), None)

    def controls(self, entry: Entry) -> list[Entry]:
        """The random keep-sets with as many experts as those of an entry."""
        return [other for other in self.entries if other.is_control and other.experts == entry.experts]


def summarise(
    setting: Setting,
    candidates: Sequence[Candidate],
    tokens: Mapping[int, ScoredTokens],
    baseline_replies: Sequence[Judged] = (),
    replies: Mapping[str, Sequence[Judged]] | None = None,
    domains: Mapping[str, np.ndarray] | None = None,
) -> Summary:
    """All comparisons.

    Args:
        setting: On what they were made.
        candidates: The models beside the baseline.
        tokens: The scored tokens by sequence length; their `others` have the candidates' names.
        baseline_replies: The baseline's reply to each row that was asked.
        replies: Those of the candidates, by their names, to the same rows; without them none are compared.
        domains: Of each domain that is reported whether each row is of it, bool [rows].

    Raises:
        StatisticsError: A score is not finite.
        DataError: Fewer than two documents have scored tokens, or fewer than two rows were asked.
    """
    replies = replies or {}
    drawn, first = {"draws": setting.draws, "seed": setting.seed}, next(iter(tokens.values()))

    def entry(one: Candidate, scored: Mapping[int, Scored], said: Sequence[Judged]) -> Entry:
        name, kept = one.name, one.keep_sets
        return Entry(
            name,
            {n: compare(of.documents, of.baseline, scored[n], name, **drawn) for n, of in tokens.items()},
            compare_replies(baseline_replies, said, **drawn) if said else None,
            kept.layers_hash if kept else None,
            tuple(map(len, kept.layers)) if kept else one.experts,
            # Without the hashes of rows, which are long, and have been looked at.
            replace(kept.origin, calibration_rows=None) if kept else UNKNOWN,
            by_domain=_by_domain(first, scored[next(iter(tokens))], domains or {}, name, **drawn),
        )

    itself = entry(Candidate(setting.baseline), {n: of.baseline for n, of in tokens.items()}, baseline_replies)
    found = [
        entry(one, {n: of.others[one.name] for n, of in tokens.items()}, replies.get(one.name, ()))
        for one in candidates
    ]
    return Summary(setting, itself, tuple(with_corrected(found)))


def _by_domain(
    tokens: ScoredTokens, other: Scored, domains: Mapping[str, np.ndarray], name: str, **drawn: int
) -> dict[str, Quality]:
    found = {}
    for domain, is_of_rows in domains.items():
        of = is_of_rows[tokens.documents]
        documents = tokens.documents[of]
        if len(np.unique(documents)) > 1:
            found[domain] = compare(documents, tokens.baseline.only(of), other.only(of), name, **drawn)
    return found


def with_corrected(entries: Sequence[Entry]) -> list[Entry]:
    """The entries with p-values corrected over all of them, each difference by itself."""
    corrected: list[dict[str, dict[str, float]]] = [{} for _ in entries]
    names = {(of, name): None for entry in entries for of, found in entry.differences.items() for name in found}
    for of, name in names:
        having = [at for at, entry in enumerate(entries) if name in entry.differences.get(of, {})]
        p_values = holm([entries[at].differences[of][name].p_value for at in having])
        for at, p_value in zip(having, p_values, strict=True):
            corrected[at].setdefault(of, {})[name] = p_value
    return [replace(entry, corrected=found) for entry, found in zip(entries, corrected, strict=True)]
