"""How differently families use the experts, against how differently two halves of one family do."""

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np

import gptoss_jax as gj
from gptoss_jax.data.tokens import load_tokenizer

from .corpus import prompt_and_reply
from .families import FAMILIES, Instance

HALVES = ("first half", "second half")


class Specialisation(NamedTuple):
    """Shares of the pairs that each expert of a layer gets; distances in the mean over layers."""

    families: list[str]
    shares: np.ndarray
    """[families, L, E], of both halves."""
    between: np.ndarray
    """[families, families]"""
    within: np.ndarray
    """[families], of one's halves."""

    @property
    def ratio(self) -> float:
        """The mean distance between two families, over that between the halves of one."""
        pairs = list(combinations(range(len(self.families)), 2))
        return float(np.mean([self.between[pair] for pair in pairs]) / self.within.mean())


def write_rows(file: Path, model: Path, examples: Sequence[Instance]) -> None:
    """Conversations as rows: text, family, and family and half, taken in turns."""
    tokenizer = load_tokenizer(model)
    lines = []
    for number, example in enumerate(examples):
        text = "".join(prompt_and_reply(example, tokenizer))
        half = f"{example.family}, {HALVES[number % 2]}"
        lines.append(json.dumps({"id": str(number), "text": text, "family": example.family, "half": half}))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def measure(model: Path, examples: Sequence[Instance], out: Path) -> Specialisation:
    """Profile by family and half, in a folder of `out`, and compare."""
    rows = out / "rows.jsonl"
    write_rows(rows, model, examples)
    options = {
        "keep": "assistant",
        "domain_column": "half",
        "dtype": "float32",
        "batch_size": 32,
        "max_seq_length": 512,
    }
    profile = gj.profile(str(model), rows, **options, out=out / "profile", overwrite=True)
    names = list(FAMILIES)
    counts = np.array([[profile.columns(f"{n}, {half}")["count"] for half in HALVES] for n in names])
    halves = shares_of(counts)
    families = shares_of(counts.sum(1))
    between = np.array([[distance(a, b) for b in families] for a in families])
    return Specialisation(names, families, between, np.array([distance(a, b) for a, b in halves]))


def shares_of(counts: np.ndarray) -> np.ndarray:
    """Of the pairs of a layer, those of each expert; the last axis is experts."""
    return counts / counts.sum(-1, keepdims=True)


def distance(p_LE: np.ndarray, q_LE: np.ndarray) -> float:
    """Jensen–Shannon distance: the root of the divergence with the natural logarithm; the mean over layers."""
    mean = (p_LE + q_LE) / 2

    def divergence(p: np.ndarray) -> np.ndarray:
        return np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / np.where(mean > 0, mean, 1)), 0).sum(-1)

    return float(np.sqrt(np.maximum(0, (divergence(p_LE) + divergence(q_LE)) / 2)).mean())
