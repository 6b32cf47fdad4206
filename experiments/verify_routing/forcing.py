"""Answers through a model, and what their tokens choose there. Letters: see `config`."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from gptoss_jax.data.batching import Document, padded_lengths, stack
from gptoss_jax.network.source import Source
from gptoss_jax.run import choose
from gptoss_jax.run.options import Placing
from gptoss_jax.run.progress import Progress
from gptoss_jax.run.steps import Asked

from .recorded import Answer

ROUTING = Asked(statistics=False, routing=True)


class Choices(NamedTuple):
    """What the compared tokens of all answers chose, one answer behind the other."""

    experts_TLk: Int[np.ndarray, "T L k"]
    gates_TLk: Float[np.ndarray, "T L k"]


def recorded(answers: Sequence[Answer]) -> Choices:
    """What was recorded."""
    return Choices(
        np.concatenate([answer.experts_TLk for answer in answers]).astype(np.int32),
        np.concatenate([answer.gates_TLk for answer in answers]).astype(np.float32),
    )


def forced(source: Source, answers: Sequence[Answer], placing: Placing) -> Choices:
    """What the model chooses for the same tokens, by the engine that a profile would take."""
    longest = max(len(answer.token_ids) for answer in answers)
    engine = choose.choose(source, placing).engine
    place = choose.place(source, engine, placing, longest)
    B = place.placing.batch_size or 1
    order = sorted(range(len(answers)), key=lambda number: len(answers[number].token_ids))
    groups = [order[start : start + B] for start in range(0, len(order), B)]
    batches = []
    for numbers in groups:
        ids = [answers[number].token_ids.astype(np.int32) for number in numbers]
        documents = [Document(row, np.ones(len(row), np.float32)) for row in ids]
        (length,) = padded_lengths(documents, B, longest)
        batches.append(stack([[document] for document in documents], B, length, num_groups=1))
    by_layer: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in answers]  # [l, n, k] of each unit
    with tempfile.TemporaryDirectory() as name:
        running = choose.build(source, engine, place, Progress(Path(name) / "forced"))
        for unit_number, unit in enumerate(running.run(batches, ROUTING, 0)):
            assert unit.routing is not None, "asked for"
            # A layer at a time the engine takes all batches before the next layer.
            for row, number in enumerate(groups[unit_number % len(groups)]):
                first = answers[number].first
                tokens = slice(first, first + len(answers[number].experts_TLk))
                by_layer[number].append(
                    (unit.routing.experts[:, row, tokens].copy(), unit.routing.gates[:, row, tokens].copy())
                )
    found = [[np.concatenate(part).swapaxes(0, 1) for part in zip(*units, strict=True)] for units in by_layer]
    return Choices(*(np.concatenate(part) for part in zip(*found, strict=True)))


def in_both(source: Source, answers: Sequence[Answer], placing: Placing) -> dict[str, Choices]:
    """What the model chooses in each type of the computation, one after the other."""
    return {dtype: forced(source, answers, replace(placing, dtype=dtype)) for dtype in ("float32", "bfloat16")}
