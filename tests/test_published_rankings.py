"""The eight published rankings of gpt-oss-20b by domain, from its published routing summaries, by our own `rank`."""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gptoss_jax.config import GPT_OSS_20B
from gptoss_jax.selection.ranking import rank

pytestmark = pytest.mark.slow

L, E = GPT_OSS_20B.num_layers, GPT_OSS_20B.num_experts
SEGMENTS = ("think_expert_analytics", "answer_expert_analytics")


def summaries(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """For each summary its benchmark and category, and the use of experts in its answers, [L, E]."""
    with tarfile.open(file) as archive:
        for member in archive:
            parts = Path(member.name).parts
            if len(parts) < 3 or not member.isfile() or not member.name.endswith(".json"):
                continue
            opened = archive.extractfile(member)
            assert opened is not None
            said, used = json.load(opened), np.zeros((L, E))
            for segment in SEGMENTS:
                for layer, experts in said.get(segment, {}).items():
                    for expert, numbers in experts.items():
                        share = numbers["count_frequency"]
                        used[int(layer.removeprefix("layer_")), int(expert)] += said["sample_count"] * share / 2
            yield "/".join(parts[-3:-1]), used


def interleaved(own: list[int], every: list[int]) -> list[int]:
    """One of the domain, one of all, and so on, without repeats; the longer list runs on."""
    turns = [expert for pair in zip(own, every, strict=True) for expert in pair]
    return list(dict.fromkeys(turns))


def test_all_eight_come_out_exactly(shared: Path) -> None:
    folder = shared / "data" / "fingerprint"
    domains = json.loads((folder / "domains.json").read_text(encoding="utf-8"))
    sums = {name: np.zeros((L, E)) for name in (*domains, "all")}
    for category, used in summaries(folder / "summaries.tar.xz"):
        sums["all"] += used
        for name, categories in domains.items():
            sums[name] += used * (category in categories)
    ranked = {name: rank({"count": used}, "frequency").layers for name, used in sums.items()}
    found = {name: list(map(interleaved, layers, ranked["all"])) for name, layers in ranked.items()}
    found["unsafety"] = [experts[::-1] for experts in found["safety"]]
    published = sorted((folder / "topical_analytics").glob("*.json"))
    assert len(published) == 8 and {*found} == {file.stem for file in published}
    for file in published:
        theirs = json.loads(file.read_text(encoding="utf-8"))
        assert [theirs[f"layer_{layer}"] for layer in range(L)] == found[file.stem], file.stem
