"""The families of keep-sets: 20b's published one by its real rankings, and the arithmetic of nano's report."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments.families import results
from experiments.families.published import SIZES, family
from gptoss_jax.config import GPT_OSS_20B
from gptoss_jax.evaluation.by_row import SCHEMA


def test_the_published_family_has_its_names_and_sizes(shared: Path) -> None:
    """By the formula of the published parameters."""
    members = list(family(shared / "data" / "fingerprint" / "topical_analytics"))
    assert len(members) == 8 * 29 and len({member.name for member in members}) == 8 * 29
    for member in members:
        n = len(member.keep_sets.layers[0])
        expert = 2880 * 5760 + 5760 + 2880**2 + 2880 + 2880 + 1
        assert member.parameters == 1_795_611_456 + 24 * n * expert
        size = f"{member.parameters / 1e9:.1f}b"
        assert member.name == f"gpt-oss-{size}-specialized-{member.domain}-pruned-moe-only-{n}-experts"
        member.keep_sets.check(GPT_OSS_20B)
    science = [member for member in members if member.domain == "science"]
    assert [m.name.split("-")[2] for m in (science[0], science[-1])] == ["4.2b", "20.9b"]
    for small, large in pairwise(science):
        assert all(set(a) < set(b) for a, b in zip(small.keep_sets.layers, large.keep_sets.layers, strict=True))
    assert [len(member.keep_sets.layers[0]) for member in science] == list(SIZES)


def test_results_are_paired_by_question(tmp_path: Path) -> None:
    """Sums by hand, of questions that come in any order; rows that were not asked count nowhere."""
    rng, entries = np.random.default_rng(1), []
    for row in rng.permutation(12).tolist():
        for model in (None, "a", "b"):
            kl = float(rng.exponential()) * (model is not None)
            base = {"model": model, "row": row, "id": f"q{row:02}", "domain": "xy"[row % 2]}
            entries.append(base | {"seq_len": 512, "tokens": row + 1, "kl": kl})
            if row < 10:
                entries.append(base | {"seq_len": None, "tokens": 5, "correct": bool(rng.random() < 0.5)})
    pq.write_table(pa.Table.from_pylist(entries, SCHEMA), tmp_path / "rows.parquet")
    found = results.Results.read(tmp_path)
    assert found.ids == [f"q{row:02}" for row in range(10)] and {*found.answers} == {"a", "b"}
    assert found.domains.tolist() == ["x", "y"] * 5

    def of(model: str | None, name: str) -> list[float]:
        asked = [e for e in entries if e["model"] == model and (e["seq_len"] is None) == (name == "correct")]
        return [float(e[name]) for e in sorted(asked, key=lambda e: e["row"]) if e["row"] < 10]

    difference = np.array(of("a", "correct")) - np.array(of("b", "correct"))
    ids = [np.array(found.ids)]
    estimate = results.exact_difference([found.answers["a"]], [found.answers["b"]], ids)
    assert estimate.value == pytest.approx(difference.mean())
    more = (np.array(of("a", "kl")) - np.array(of("b", "kl"))).sum() / np.sum(of("a", "tokens"))
    estimate = results.divergence_difference([found.answers["a"]], [found.answers["b"]], ids)
    assert estimate.value == pytest.approx(more) and estimate.low < more < estimate.high
    # The same questions in two settings are no more questions.
    twice = results.exact_difference([found.answers["a"]] * 2, [found.answers["b"]] * 2, ids * 2)
    assert twice.value == pytest.approx(difference.mean())
    once = results.exact_difference([found.answers["a"]], [found.answers["b"]], ids)
    assert twice.error == pytest.approx(once.error)
