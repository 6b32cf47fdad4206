"""Replies of a model, and of what keep-sets leave of it, to the questions of rows. Letters: see `config`."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from ..data import tokens as tokenizing
from ..data.harmony import Part, marks_of, question_and_reply
from ..data.rows import Row
from ..devices import hosts
from ..errors import DataError
from ..files.paths import local_folder
from ..generation import choose
from ..generation.answer import read_stop_ids
from ..generation.continuous import check_room, generate, prompts_of, watched
from ..generation.steps import How
from ..network.source import Source
from ..run.options import Placing, Sampling
from ..run.progress import Progress

GREEDY = Sampling(temperature=0)


class Questions(NamedTuple):
    """What is asked, and what is known of the answers."""

    prompts: list[np.ndarray]
    """Token ids, [length] each."""
    rows: list[int]
    """The number of each one's row."""
    replies: list[list[Part]]
    """What the assistant says in the rows themselves."""


class Said(NamedTuple):
    """A reply."""

    token_ids: list[int]
    parts: list[tuple[str, str]]
    """Channel and content of each message."""
    ended: bool


def questions(rows: Sequence[Row], most: int, tokenizer: Any, source: Source) -> Questions:
    """Those of the first rows that ask something; DataError where none does, or one leaves no room for a reply."""
    marks, found = marks_of(tokenizer), Questions([], [], [])
    for number, row in enumerate(rows):
        if len(found.rows) == most:
            break
        asked = question_and_reply(row.harmony, marks)
        if asked is not None:
            written, reply = asked
            found.prompts.append(tokenizing.token_ids(written, tokenizer, source.config.vocab_size))
            found.rows.append(number)
            found.replies.append(reply)
    if len(found.rows) < 2:
        raise DataError(f"--replies: {len(found.rows)} rows ask something in harmony: give at least 2 conversations")
    check_room(found.prompts, source.config)
    return found


@dataclass
class Kept:
    """Replies that are whole, by the numbers of their prompts."""

    replies: dict[int, list[int]] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Write them as a file's bytes."""
        return json.dumps(self.replies).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Kept":
        """Read what `to_bytes` writes."""
        return cls({int(n): [int(i) for i in reply] for n, reply in json.loads(data).items()})


class Answerer:
    """A model that answers, with all its experts or with some."""

    def __init__(self, source: Source, tokenizer: Any, placing: Placing, max_new_tokens: int, progress: Progress):
        self.source, self.tokenizer, self.progress = source, tokenizer, progress
        # The batch size is that of the blocks: a row of these has other sizes.
        self.max_new_tokens, self.placing = max_new_tokens, replace(placing, batch_size=None)
        with local_folder(source.folder) as folder:
            self.stop_ids = read_stop_ids(folder, tokenizer)

    def answer(
        self,
        name: str,
        token_ids: Sequence[np.ndarray],
        among_vLE: Sequence[np.ndarray | None],
        advance: Callable[[float], Any],
    ) -> list[list[Said]]:
        """The most probable reply to each prompt of the model with some experts, for each such choice of them, which
        all run side by side; those that `progress` has under this name are not asked again."""
        kept = self.progress.kept(Kept.from_bytes, name) or Kept()
        advance(len(kept.replies))
        config, number = self.source.config, len(token_ids)
        masked = any(among_LE is not None for among_LE in among_vLE)
        everything = np.ones((config.num_layers, config.num_experts), bool)
        prompts = [
            prompt._replace(number=v * number + prompt.number, kept_LE=_mask(among_LE, everything) if masked else None)
            for v, among_LE in enumerate(among_vLE)
            for prompt in prompts_of(token_ids, config, self.max_new_tokens)
        ]
        # Prompts of like length go through the network together.
        waiting = sorted((p for p in prompts if p.number not in kept.replies), key=lambda p: len(p.token_ids))
        if waiting:
            how = How(config, GREEDY, tuple(self.stop_ids), masked=masked)
            decoder = choose.decoder(self.source, self.placing, waiting, how)
            for grown in watched(generate(decoder, waiting), advance):
                done = {growing.prompt.number: growing.token_ids for growing in grown if growing.done}
                kept.replies |= done
                if done and hosts.is_first():
                    self.progress.save(kept, always=len(kept.replies) == len(prompts), name=name)
        return [[self._said(kept.replies[v * number + n]) for n in range(number)] for v in range(len(among_vLE))]

    def _said(self, token_ids: list[int]) -> Said:
        parts = tokenizing.messages_in_ids(token_ids, self.tokenizer)
        return Said(
            token_ids, [(p.channel, p.content) for p in parts], bool(token_ids) and token_ids[-1] in self.stop_ids
        )


def _mask(among_LE: np.ndarray | None, everything_LE: np.ndarray) -> np.ndarray:
    return everything_LE if among_LE is None else among_LE
