"""Training batches: a step's rows are decided by the seed and the step's number alone, so that a resumed run sees what
an unbroken one does. Letters: see `gptoss_jax.config`."""

import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_jax.data.batching import Document, stack
from gptoss_jax.data.spellings import harmony_of
from gptoss_jax.data.template import Template
from gptoss_jax.data.tokens import load_tokenizer
from gptoss_jax.network.batch import Batch

from .families import ENGLISH, FAMILIES, Instance, draw

LOW_EFFORT = 8  # of so many conversations one is without its reasoning, and says so in the system message


def prompt_and_reply(instance: Instance, tokenizer: Any, effort: str = "medium") -> tuple[str, str]:
    """The text up to where the model speaks, and what it is to say; the chat template makes both."""
    messages = instance.messages()
    if effort == "low":
        messages[-1].pop("thinking", None)
    template = Template(tokenizer)

    def text(count: int, generate: bool) -> str:
        return harmony_of(messages[:count], template, warnings.warn, effort, generate).text

    prompt = text(-1, generate=True)
    return prompt, text(len(messages), generate=False).removeprefix(prompt)


def plain_text(instance: Instance) -> str:
    """A conversation without harmony's marks: what the tokenizer's merges are learnt from."""
    speech = f"assistant\nanalysis\n{instance.thinking}\nassistant\nfinal\n{instance.answer}"
    return f"system\nYou are a small model.\nReasoning: medium\nuser\n{instance.question}\n{speech}"


class Corpus:
    """Conversations of all families in equal numbers, and plain English among them."""

    def __init__(self, folder: Path, rows: int, length: int, seed: int = 0):
        self.tokenizer, self.shape, self.seed = load_tokenizer(folder), (rows, length), seed
        self.families = [*FAMILIES, ENGLISH]

    def document(self, instance: Instance, effort: str = "medium") -> Document:
        """Tokens; those of the reply have weight 1."""
        prompt, reply = (
            self.tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in prompt_and_reply(instance, self.tokenizer, effort)
        )
        weights = np.repeat(np.array([0, 1], np.float32), [len(prompt), len(reply)])
        return Document(np.array(prompt + reply, np.int32), weights, self.families.index(instance.family))

    def batch(self, step: int) -> Batch:
        """The rows of a step: whole conversations, side by side."""
        rng = random.Random(f"{self.seed}/{step}")
        count, length = self.shape
        rows: list[list[Document]] = [[] for _ in range(count)]
        free = np.full(count, length)
        for instance in draw(rng, "train", self.families):
            document = self.document(instance, "low" if rng.randrange(LOW_EFFORT) == 0 else "medium")
            if len(document.token_ids) > length:
                continue
            fitting = np.flatnonzero(free >= len(document.token_ids))
            if not len(fitting):
                break
            rows[fitting[0]].append(document)
            free[fitting[0]] -= len(document.token_ids)
        return stack(rows, *self.shape, num_groups=len(self.families))
