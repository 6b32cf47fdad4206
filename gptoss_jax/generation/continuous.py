"""Prompts through a decoder's rows: those that end make room for those that wait. Letters: see `config`."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..config import Config
from ..errors import DataError
from ..run.steps import Chosen
from .decoder import Advanced, Decoder, Prompt


@dataclass
class Growing:
    """A prompt whose reply grows."""

    prompt: Prompt
    token_ids: list[int] = field(default_factory=list)
    """The reply so far."""
    routed: list[Chosen] = field(default_factory=list)
    """What tokens chose, [n, L, k] each, the prompt's first; empty where routing is not asked for."""
    done: bool = False

    @property
    def chosen(self) -> Chosen:
        """What the tokens of prompt and reply chose, [m, L, k]; the reply's last one has not passed the network."""
        return Chosen(*map(np.concatenate, zip(*self.routed, strict=True)))

    @property
    def part(self) -> float:
        """How much of its reply there is, at least: tokens of the most that it may have; 1 where it is done."""
        return 1.0 if self.done else len(self.token_ids) / (self.prompt.limit - len(self.prompt.token_ids))

    def grow(self, advanced: Advanced, row: int) -> None:
        """Take in what a call gave of its row."""
        said = advanced.tokens[:, row]
        said = said[said >= 0]
        self.token_ids += said.tolist()
        self.done = bool(advanced.done[row])
        if advanced.chosen is not None:
            passed = len(said) - (self.done and len(said) > 0)
            self.routed.append(Chosen(*(x[:passed, :, row] for x in advanced.chosen)))


def generate(decoder: Decoder, prompts: Sequence[Prompt]) -> Iterator[list[Growing]]:
    """The replies that grew, after each call of the decoder. Nothing is kept of those that are done.

    A reply ends with a stop of the decoder's or at its prompt's limit. Prompts begin in their order.
    """
    waiting = deque(prompts)
    rows: list[Growing | None] = [None] * decoder.batch_size
    while waiting or any(rows):
        free = [row for row in _spread(decoder) if rows[row] is None]
        admitted = [(row, waiting.popleft()) for row in free[: len(waiting)]]
        advanced = decoder.advance(admitted)
        for (row, prompt), chosen in zip(admitted, advanced.prompts, strict=True):
            rows[row] = Growing(prompt, routed=[] if chosen is None else [chosen])
        grown = [(row, growing) for row, growing in enumerate(rows) if growing is not None]
        for row, growing in grown:
            growing.grow(advanced, row)
            if growing.done:
                rows[row] = None
        yield [growing for _, growing in grown]


def watched(steps: Iterator[list[Growing]], advance: Callable[[float], Any]) -> Iterator[list[Growing]]:
    """What `generate` gives; `advance` is told by how many replies, or parts of them, there are more."""
    ended, told = 0, 0.0
    for grown in steps:
        there = ended + sum(growing.part for growing in grown)
        advance(there - told)
        ended, told = ended + sum(growing.done for growing in grown), there
        yield grown


def replies(decoder: Decoder, prompts: Sequence[Prompt]) -> list[list[int]]:
    """The token ids of all replies, whole."""
    found: list[list[int]] = [[] for _ in prompts]
    places = {prompt.number: place for place, prompt in enumerate(prompts)}
    for grown in generate(decoder, prompts):
        for growing in grown:
            found[places[growing.prompt.number]] = growing.token_ids
    return found


def _spread(decoder: Decoder) -> list[int]:
    """All rows, in an order that loads the devices evenly."""
    per_share = decoder.batch_size // decoder.shares
    return sorted(range(decoder.batch_size), key=lambda row: row % per_share)


def prompts_of(token_ids: Sequence[np.ndarray], config: Config, max_new_tokens: int) -> list[Prompt]:
    """Prompts whose replies have at most so many tokens, or end where the context is full; DataError where one is empty
    or leaves no room."""
    check_room(token_ids, config)
    limits = [min(len(ids) + max_new_tokens, config.max_position) for ids in token_ids]
    return [Prompt(n, ids, limit) for n, (ids, limit) in enumerate(zip(token_ids, limits, strict=True))]


def check_room(prompts: Sequence[np.ndarray], config: Config) -> None:
    """DataError where a prompt is empty or fills the context."""
    for number, prompt in enumerate(prompts, 1):
        if not 0 < len(prompt) < config.max_position:
            raise DataError(
                f"prompt {number} has {len(prompt)} tokens, the model's context is {config.max_position}: give at "
                "least one token, and leave room for what is generated"
            )
