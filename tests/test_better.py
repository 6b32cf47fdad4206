"""The report of choosing together and healing: what stands in it is what was measured."""

from pathlib import Path

import numpy as np
import pytest

from experiments.better import page
from experiments.better.candidates import CRITERIA, SEEDS
from experiments.nano.families import pick

FAMILIES, QUESTIONS, KEEP = ("arithmetic", "legs"), 40, 8
RIGHT = {  # in per cent, of each family
    "full": (90, 100),
    **{f"{name}-8": (50, 50) for name in (*CRITERIA, "picked", "greedy_cosine")},
    "greedy-8": (60, 20),
    **{f"random {seed}-8": (10, 0) for seed in SEEDS},
    "reap-8-healed-0": (70, 80),
    "greedy_cosine-8-healed-0": (60, 60),
    "picked-8-healed-0": (90, 70),
    "picked-8-rebuilt-0": (90, 40),
    "picked-8-small-0": (100, 90),
}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    for number, family in enumerate(FAMILIES):
        results = tmp_path / "results" / family
        results.mkdir(parents=True)
        for name, right in RIGHT.items():
            found = np.ones((QUESTIONS, 3))
            found[:, 0] = np.arange(QUESTIONS) < right[number] * QUESTIONS // 100
            np.save(results / f"{name}.npy", found)
    return tmp_path


def test_rules_stand_beside_reap_and_beside_the_whole_model(work: Path) -> None:
    page.write(page.Found(work, FAMILIES, 1, "make page"), [KEEP], work / "better.md")
    text = (work / "better.md").read_text(encoding="utf-8")
    assert "| all experts | 95.0 |" in text and "| `reap` | 50.0 | 1.0000 |" in text
    assert "| `greedy` | 40.0 | 1.0000 | -10.0 (" in text
    assert "| `picked, healed` | 80.0 | 1.0000 | +30.0 (" in text
    assert "- keep 8, legs: `greedy` -30.0 (" in text and "arithmetic: `greedy`" not in text
    assert (work / "better.png").exists()


def test_a_family_without_so_many_questions_is_refused() -> None:
    with pytest.raises(ValueError, match="divisors has hardly more than"):
        pick("evaluation", ["divisors"], 800)
