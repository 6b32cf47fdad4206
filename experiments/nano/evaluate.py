"""What a GPT-OSS can do of nano's tasks, by family, on instances that it was never trained on: exact match, by
generating, and how well it expects the right replies."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from convert.hf import Checkpoint
from gptoss_jax.data import batching
from gptoss_jax.data.groups import Groups
from gptoss_jax.data.harmony import MARKS, START, HarmonyText, messages_of, pieces
from gptoss_jax.data.rows import Row
from gptoss_jax.data.tokens import encode, load_tokenizer, token_ids
from gptoss_jax.devices.placement import here
from gptoss_jax.generation import choose
from gptoss_jax.generation.answer import read_stop_ids
from gptoss_jax.generation.continuous import prompts_of
from gptoss_jax.generation.continuous import replies as all_replies
from gptoss_jax.generation.steps import How
from gptoss_jax.network.model import GptOss
from gptoss_jax.network.source import Source, load
from gptoss_jax.run.options import Placing, Sampling
from gptoss_jax.run.steps import Asked, network_step

from .corpus import prompt_and_reply
from .families import FAMILIES, Instance

GREEDY = Sampling(temperature=0.0)
LONGEST_REPLY = 192  # tokens
ROWS_AT_ONCE = 64

scored_step = jax.jit(network_step, static_argnums=(2, 3))


class Score(NamedTuple):
    """On some questions."""

    right: int
    """Answers that are right to the letter."""
    asked: int
    nats: float
    """Σ −ln p of the tokens of the right replies, reasoning and answer, each from the logits before it."""
    tokens: int

    @property
    def accuracy(self) -> float:
        """Exact match."""
        return self.right / self.asked

    @property
    def perplexity(self) -> float:
        """Completion-only."""
        return math.exp(self.nats / self.tokens)


def total(scores: Iterable[Score]) -> Score:
    """On the questions of all."""
    return Score(*map(sum, zip(*scores, strict=True)))


def score(folder: Path, examples: Sequence[Instance]) -> dict[str, Score]:
    """A checkpoint's, in float32, by family."""
    source = Checkpoint(folder)
    said = replies(source, folder, examples)
    expected = surprise(load(source, "float32"), folder, examples)
    table = {}
    for family, (nats, tokens) in expected.items():
        right = [final(r) == e.answer for e, r in zip(examples, said, strict=True) if e.family == family]
        table[family] = Score(sum(right), len(right), nats, tokens)
    return table


def replies(source: Source, folder: Path, examples: Sequence[Instance]) -> list[str]:
    """What the model says to each, greedily, in float32."""
    tokenizer, config = load_tokenizer(folder), source.config
    texts = [prompt_and_reply(example, tokenizer)[0] for example in examples]
    token_ids_of = [token_ids(HarmonyText(text), tokenizer, config.vocab_size) for text in texts]
    prompts = prompts_of(token_ids_of, config, LONGEST_REPLY)
    how = How(config, GREEDY, tuple(read_stop_ids(folder, tokenizer)))
    decoder = choose.decoder(source, Placing(engine="resident", dtype="float32"), prompts, how)
    return [tokenizer.decode(ids) for ids in all_replies(decoder, prompts)]


def final(reply: str) -> str:
    """The answer: the content of the first final channel."""
    parts, _ = messages_of(list(pieces(HarmonyText(f"{START}assistant{reply}"), MARKS)))
    return next((part.content for part in parts if part.channel == "final"), "")


def surprise(network: GptOss, folder: Path, examples: Sequence[Instance]) -> dict[str, tuple[float, int]]:
    """`nats` and `tokens` of the right replies, by family; tokens count where a profile keeps them."""
    names, config = [f for f in FAMILIES if any(e.family == f for e in examples)], network.config
    tokenizer = load_tokenizer(folder)
    rows = [Row("".join(prompt_and_reply(example, tokenizer)), domain=example.family) for example in examples]
    documents = encode(rows, tokenizer, Groups(names), config.vocab_size, max_length=None)
    table = dict.fromkeys(names, (0.0, 0))
    for batch in batching.padded(documents, ROWS_AT_ONCE, config.max_position):
        probability = np.asarray(
            scored_step(network, batch, here(), Asked(statistics=False, scores=True)).scores.probability
        )
        for index, name in enumerate(names):
            kept = probability[(batch.weights > 0) & (batch.groups == index)]
            nats, tokens = table[name]
            table[name] = nats - float(np.log(kept, dtype=np.float64).sum()), tokens + len(kept)
    return table
