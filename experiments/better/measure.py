"""What a candidate answers: every question, right or wrong, and how far its expectations of the right replies are
from the whole model's."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from convert.changed import Changed
from convert.hf import Checkpoint
from gptoss_jax.data import batching, tokens
from gptoss_jax.data.groups import Groups
from gptoss_jax.data.rows import Row
from gptoss_jax.data.tokens import load_tokenizer
from gptoss_jax.healing.loss import Teacher
from gptoss_jax.healing.resident import Resident
from gptoss_jax.healing.rows import by_row
from gptoss_jax.healing.trained import Trained, read
from gptoss_jax.network.batch import Batch
from gptoss_jax.network.source import Masked, Source, load
from gptoss_jax.run.choose import resident_mesh
from gptoss_jax.run.options import Placing
from gptoss_jax.selection.keep_sets import are_kept

from ..nano import evaluate
from ..nano.corpus import prompt_and_reply
from ..nano.families import Instance

LENGTH, ROWS = 512, 64
DTYPE = "float32"
Values = Mapping[str, Any]
"""What is healed, by its paths; empty for a candidate that is pruned alone."""


def save(file: Path, found: np.ndarray) -> None:
    """Write an array under its final name when it is whole."""
    partial = file.with_suffix(".partial")
    with partial.open("wb") as stream:
        np.save(stream, found)
    partial.rename(file)


class Judge:
    """The questions of a family, with what the whole model expects of their right replies."""

    def __init__(self, model: Path, examples: Sequence[Instance]):
        self.source, self.model, self.examples = Checkpoint(model), model, examples

    @cached_property
    def batches(self) -> list[Batch]:
        """The right replies, by question."""
        model, examples = self.model, self.examples
        config, tokenizer = self.source.config, load_tokenizer(model)
        rows = [Row("".join(prompt_and_reply(example, tokenizer))) for example in examples]
        encoded = tokens.encode(rows, tokenizer, Groups([""]), config.vocab_size, LENGTH, keep="assistant")
        numbered = [replace(document, group=number) for number, document in enumerate(encoded)]
        return list(batching.padded(numbered, ROWS, LENGTH))

    @cached_property
    def engine(self) -> Resident:
        mesh = resident_mesh(self.source, Placing())
        return Resident(load(self.source, DTYPE, mesh), mesh)

    @cached_property
    def teachers(self) -> list[Teacher]:
        return self.engine.teach(self.batches)

    @cached_property
    def untrained(self) -> Trained:
        return read(self.source, "small", resident_mesh(self.source, Placing()))

    def of(self, keep_sets: Sequence[Sequence[int]] | None, values: Values) -> np.ndarray:
        """float64 [questions, 3]: right or wrong, Σ KL and the tokens of the right reply."""
        source: Source = Changed(self.source, values) if values else self.source
        found = np.zeros((len(self.examples), 3))
        if keep_sets is not None:
            source = Masked(source, keep_sets)
            found[:, 1:] = self._divergence(keep_sets, values)
        said = evaluate.replies(source, self.model, self.examples)
        found[:, 0] = [evaluate.final(reply) == e.answer for e, reply in zip(self.examples, said, strict=True)]
        return found

    def _divergence(self, keep_sets: Sequence[Sequence[int]], values: Values) -> np.ndarray:
        kept_LE = are_kept(keep_sets, self.source.config.num_experts)
        batches = [
            replace(batch, kept=np.broadcast_to(kept_LE, (batch.shape[0], *kept_LE.shape))) for batch in self.batches
        ]
        loss = self.engine.losses(self.untrained | dict(values), batches, self.teachers)
        return np.stack(by_row(loss, batches, len(self.examples)), axis=1)
