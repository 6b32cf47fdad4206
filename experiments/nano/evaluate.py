"""What nano can do: exact match by family on instances that it was never trained on, by generating."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from convert.from_hf import Checkpoint
from gptoss_jax import generate, harmony
from gptoss_jax.config import Config
from gptoss_jax.generate import Network, Sampling

from .corpus import prompt_and_reply
from .families import Instance

GREEDY = Sampling(temperature=0.0)
LONGEST_REPLY = 192  # tokens
ROWS_AT_ONCE = 64


def replies(network: Network, config: Config, folder: Path, examples: Sequence[Instance]) -> list[str]:
    """What the model says to each, greedily."""
    tokenizer = harmony.load_tokenizer(folder)
    stop_ids = generate.read_stop_ids(folder, tokenizer)
    texts = [prompt_and_reply(example, tokenizer)[0] for example in examples]
    prompts = [harmony.token_ids(text, tokenizer, config.vocab_size) for text in texts]
    said = []
    for first in range(0, len(prompts), ROWS_AT_ONCE):
        batch = prompts[first : first + ROWS_AT_ONCE]
        chunks = list(generate.generate(network, config, batch, LONGEST_REPLY, GREEDY, stop_ids))
        said += [tokenizer.decode(row[row >= 0]) for row in np.concatenate(chunks, axis=1)]
    return said


def final(reply: str) -> str:
    """The answer: the content of the first final channel."""
    return next((content for channel, content in harmony.reply_parts(reply) if channel == "final"), "")


def accuracy(folder: Path, examples: Sequence[Instance]) -> dict[str, tuple[int, int]]:
    """Right answers, to the letter, and how many were asked, by family."""
    source = Checkpoint(folder)
    network = generate.load(source, "float32")
    table: dict[str, tuple[int, int]] = {}
    for example, reply in zip(examples, replies(network, source.config, folder, examples), strict=True):
        right, asked = table.get(example.family, (0, 0))
        table[example.family] = right + (final(reply) == example.answer), asked + 1
    return table
