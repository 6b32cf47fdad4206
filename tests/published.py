"""Published fingerprints of made-up answers: what is known of each, and the files that a publisher makes of them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

L, E, K = 4, 7, 2  # layers and experts of the small model of the tests
PROMPT = ["<|start|>", "user", "<|message|>", "What", " is", " it", "?", "<|end|>", "<|start|>", "assistant"]
HEADER = ["<|channel|>", "analysis", "<|message|>"]
FINAL = ["<|start|>", "assistant", "<|channel|>", "final", "<|message|>"]
DOMAINS = {"law": ["quiz/law", "exam/law", "quiz/tax law"], "art": ["exam/art"], "gone": ["exam/chess"]}
# Benchmark, category, finished, repetition; how many answers. No answer chooses expert 6 of layer 1, and none about
# art expert 2 of layer 0.
GROUPS = {
    ("quiz", "law", True, False): 3,
    ("quiz", "law", False, True): 2,
    ("quiz", "tax law", True, False): 1,
    ("exam", "law", True, True): 1,
    ("exam", "art", True, False): 2,
    ("exam", "art", False, False): 1,
    ("quiz", "maths", True, False): 4,
}
Group = tuple[str, str, bool, bool]


@dataclass(frozen=True)
class Answer:
    """What a model said, and which experts each of its tokens but the last chose."""

    reply: list[str]
    experts: np.ndarray
    gates: np.ndarray
    thoughts: int
    """Tokens of the thoughts' contents."""
    finished: bool

    def parts(self) -> dict[str, tuple[range, int]]:
        """Of each segment the routed tokens, and how many tokens it has with those that have no routing."""
        if not self.finished:
            return {"think": (range(len(self.reply) - 1), len(self.reply) + 2)}
        end = len(HEADER) + self.thoughts
        return {
            "think": (range(end), end + 2),
            "answer": (range(end + 1, len(self.reply) - 1), len(self.reply) - end - 1),
        }


def answer(group: Group, rng: np.random.Generator) -> Answer:
    """An answer of a length of its own, whose gates are fractions of 256."""
    benchmark, category, finished, _ = group
    thoughts, said = (int(n) for n in rng.integers(2, 30, 2))
    reply = [*HEADER, *[f" think{i}" for i in range(thoughts)]]
    if finished:
        reply += ["<|end|>", *FINAL, *[f" say{i}" for i in range(said)], "<|return|>"]
    likes = np.random.default_rng([len(benchmark), *category.encode()]).gamma(0.7, size=(L, E)) + 1e-3
    likes[1, 6] = 0
    if category == "art":
        likes[0, 2] = 0
    T = len(reply) - 1
    draws = [[rng.choice(E, K, False, layer / layer.sum()) for layer in likes] for _ in range(T)]
    first = rng.integers(128, 250, (T, L)) / 256
    return Answer(reply, np.array(draws), np.stack([first, 1 - first], -1), thoughts, finished)


def answers(seed: int = 0) -> dict[Group, list[Answer]]:
    """The answers of all groups."""
    rng = np.random.default_rng(seed)
    return {group: [answer(group, rng) for _ in range(size)] for group, size in GROUPS.items()}


def means(group: Sequence[Answer], segment: str) -> dict[tuple[int, int], tuple[float, float]]:
    """Of each layer and expert that was seen the frequency and the density, by loops."""
    sums: dict[tuple[int, int], list[float]] = {}
    for one in group:
        routed, tokens = one.parts()[segment]
        own: dict[tuple[int, int], list[float]] = {}
        for t in routed:
            for layer in range(L):
                for rank in range(K):
                    cell = own.setdefault((layer, int(one.experts[t, layer, rank])), [0, 0.0])
                    cell[0] += 1
                    cell[1] += float(one.gates[t, layer, rank])
        for place, (count, gates) in own.items():
            cell = sums.setdefault(place, [0.0, 0.0])
            cell[0] += count / tokens
            cell[1] += gates / tokens
    return {place: (count / len(group), gates / len(group)) for place, (count, gates) in sums.items()}


def summary(group: Sequence[Answer]) -> dict[str, Any]:
    """The summary file of a group."""
    found: dict[str, Any] = {"sample_count": len(group)}
    for segment in group[0].parts():
        found[f"num_{segment}_tokens"] = sum(one.parts()[segment][1] for one in group) / len(group)
        layers: dict[str, Any] = {f"layer_{layer}": {} for layer in range(L)}
        for (layer, expert), (often, dense) in means(group, segment).items():
            layers[f"layer_{layer}"][str(expert)] = {"prob_density": dense, "count_frequency": often}
        found[f"{segment}_expert_analytics"] = layers
    return found


def example(group: Group, one: Answer, row_index: int = 5) -> dict[str, Any]:
    """The file of an answer of a group."""
    router_data = []
    for t, (experts, gates) in enumerate(zip(one.experts.tolist(), one.gates.tolist(), strict=True)):
        layers = {
            f"layer_{layer}": {"selected_experts": experts[layer], "selected_probs": gates[layer]} for layer in range(L)
        }
        router_data.append({f"token_{len(PROMPT) + t}": layers})
    names = ("dataset", "category", "finished_successfully", "has_repetition")
    return {
        "row_index": row_index,
        **dict(zip(names, group, strict=True)),
        "original_prompt": "What is it?",
        "full_text": [*PROMPT, *one.reply],
        "generated_only": one.reply,
        "router_data": router_data,
    }


def file_of(folder: Path, group: Group, ending: str = "") -> Path:
    """Where a group's file lies."""
    benchmark, category, finished, repetition = group
    return folder / "data" / benchmark / category / f"{finished}_{repetition}{ending}.json"


def write(folder: Path, summaries: bool = True, examples: bool = True, seed: int = 0) -> Path:
    """Write the files: of all groups summaries, and of all groups the first answer."""
    for number, (group, some) in enumerate(answers(seed).items()):
        made = {"": summary(some)} if summaries else {}
        made |= {"_examples": example(group, some[0], number)} if examples else {}
        for ending, raw in made.items():
            file = file_of(folder, group, ending)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(raw), encoding="utf-8")
    (folder / "data" / "map.json").write_text("{}")
    return folder
