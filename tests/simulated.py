"""Scores of simulated models: logits that are drawn, and what `evaluation` is given of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptoss_jax.evaluation.replies import Judged
from gptoss_jax.evaluation.scored import Scored, ScoredTokens
from gptoss_jax.evaluation.summary import Candidate, Setting, Summary, summarise
from gptoss_jax.selection.keep_sets import KeepSets
from gptoss_jax.selection.origin import Origin

V = 40
LAYERS = 4  # of the tiny model, which has 7 experts
# The best experts are those of `bad_input.RANKING`.
KEPT = {
    "best": KeepSets([[3, 4, 5, 6]] * LAYERS, Origin("reap", {"science": 1.0}, "best 4")),
    "drawn": KeepSets([[0, 1, 3, 5]] * LAYERS, Origin("random", {}, "best 4", seed=5)),
    "more": KeepSets([[2, 3, 4, 5, 6]] * LAYERS, Origin("reap", {"science": 1.0}, "best 5")),
}
NOISE = {"best": 0.15, "drawn": 1.5, "more": 0.02}
"""How far each model's logits are from the baseline's."""


@dataclass(frozen=True)
class Logits:
    """The logits [N, V] of models, the true tokens and the documents of N tokens."""

    documents: np.ndarray
    true: np.ndarray
    baseline: np.ndarray
    others: Mapping[str, np.ndarray]


def logits(seed: int = 1, documents: int = 30, noise: Mapping[str, float] = NOISE) -> Logits:
    """Documents of skewed lengths, some of them harder than others."""
    rng = np.random.default_rng(seed)
    lengths = np.maximum(2, rng.lognormal(3, 0.6, documents)).astype(int)
    of_N = np.repeat(np.arange(documents, dtype=np.int32) * 3, lengths)  # some rows have no scored token
    baseline = rng.normal(size=(len(of_N), V)) * 3
    hard_N = np.repeat(rng.normal(size=documents), lengths)
    right = baseline.argmax(1)
    true = np.where(rng.random(len(of_N)) < 1 / (1 + np.exp(hard_N - 1)), right, rng.integers(0, V, len(of_N)))
    others = {name: baseline + scale * rng.normal(size=baseline.shape) for name, scale in noise.items()}
    return Logits(of_N, true, baseline, others)


def log_softmax(logits_NV: np.ndarray) -> np.ndarray:
    shifted = logits_NV - logits_NV.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def scored(of: Logits, logits_NV: np.ndarray) -> Scored:
    """What a model with these logits is scored."""
    log_p, log_base = log_softmax(logits_NV), log_softmax(of.baseline)
    top = log_softmax(np.sort(logits_NV, axis=1)[:, -20:])
    return Scored(
        nats=-log_p[np.arange(len(of.true)), of.true],
        entropy=(-(np.exp(top) * top).sum(1) / np.log(20)).astype(np.float32),
        best=logits_NV.argmax(1).astype(np.int32),
        kl=(np.exp(log_base) * (log_base - log_p)).sum(1),
    )


def scored_tokens(of: Logits) -> ScoredTokens:
    return ScoredTokens(of.documents, scored(of, of.baseline), {name: scored(of, x) for name, x in of.others.items()})


def replies(seed: int, rows: int, right: float = 0.8, looping: float = 0.05) -> list[Judged]:
    rng = np.random.default_rng(seed)
    return [
        Judged(
            loops=bool(rng.random() < looping),
            distinct_4=float(rng.uniform(0.5, 1)),
            ended=bool(rng.random() < 0.9),
            harmony=bool(rng.random() < 0.95),
            length=int(rng.integers(5, 60)),
            correct=bool(rng.random() < right),
        )
        for _ in range(rows)
    ]


def summary(rows: int = 0, seq_lens: tuple[int, ...] = (1024,), **setting: Any) -> Summary:
    """Of the three keep-sets; with replies where `rows` were asked."""
    made = {
        "model": "openai/gpt-oss-20b",
        "model_fingerprint": "f" * 64,
        "baseline": "openai/gpt-oss-20b",
        "data": "rows.jsonl",
        "rows": 90,
        "blocks": dict.fromkeys(seq_lens, 12),
        "prompts_hash": "5ca1ab1e",
        "calibration": "disjoint",
        "draws": 200,
    }
    tokens = {seq_len: scored_tokens(logits(seq_len)) for seq_len in seq_lens}
    said = {name: replies(7 + at, rows, 0.7 - 0.2 * at) for at, name in enumerate(KEPT)} if rows else None
    candidates = [Candidate(name, kept) for name, kept in KEPT.items()]
    return summarise(Setting(**made | setting), candidates, tokens, replies(6, rows), said)
