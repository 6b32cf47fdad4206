"""Replies with what their tokens chose, kept as they end: from them come traces. Letters: see `config`."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..devices import hosts
from ..files.parquet import parquet_bytes, read_parquet
from ..routing.segments import of_reply
from ..routing.tables import About, Routed, prompts_of, table_of
from ..routing.traces import PART_TOKENS
from ..run.progress import Progress
from .continuous import Growing
from .decoder import Prompt

SECONDS = 20.0  # between two looks at what has ended: a killed run repeats no more than these
OPEN_FILES = 4  # replies end nearly in the order of their prompts, so that few files are read at a time


class Recording:
    """Replies that are whole, in files of the progress: a run that goes on asks only for the others."""

    def __init__(self, asked: Sequence[Prompt], kept: Progress, about: About, tokenizer: Any):
        self.asked, self.kept, self.about, self.tokenizer = asked, kept, about, tokenizer
        self.files: list[list[int]] = []
        """The numbers of the prompts in each file."""
        self._waiting: list[Routed] = []
        self._due = time.monotonic() + SECONDS
        self._open: dict[int, dict[int, Routed]] = {}
        while hosts.exchange(self._has_next())[0]:
            self.files.append(hosts.exchange([*self._read(len(self.files))] if hosts.is_first() else [])[0])

    def missing(self) -> list[Prompt]:
        """The prompts without a whole reply."""
        there = {number for numbers in self.files for number in numbers}
        return [prompt for prompt in self.asked if prompt.number not in there]

    def token_ids(self) -> Iterator[tuple[int, list[int]]]:
        """The numbers of the prompts whose replies are whole, and these replies."""
        for file in range(len(self.files)):
            replies = self._read(file) if hosts.is_first() else {}
            mine = [(number, reply.token_ids[reply.generated].tolist()) for number, reply in replies.items()]
            yield from hosts.exchange(mine)[0]

    def take(self, grown: Sequence[Growing]) -> None:
        """Take in replies that have ended, and write some of these."""
        for growing in grown:
            if growing.done:
                self._waiting.append(routed(growing, self.tokenizer))
        if time.monotonic() >= self._due or sum(map(len, self._waiting)) >= PART_TOKENS:
            self.save()

    def save(self) -> None:
        """Write what has ended and is not written yet."""
        if self._waiting:
            if hosts.is_first():
                self.kept.write(_name(len(self.files)), _bytes(self._waiting, self.about))
            self.files.append([int(prompt.prompt_id) for prompt in self._waiting])
            self._waiting = []
        self._due = time.monotonic() + SECONDS

    def replies(self) -> Iterator[Routed]:
        """All replies in the order of their prompts, whose numbers are their ids, with few files in memory."""
        file_of = {number: file for file, numbers in enumerate(self.files) for number in numbers}
        for prompt in self.asked:
            file = file_of[prompt.number]
            if file not in self._open:
                while len(self._open) >= OPEN_FILES:
                    self._open.pop(next(iter(self._open)))
                self._open[file] = self._read(file)
            yield self._open[file][prompt.number]

    def _has_next(self) -> bool:
        return hosts.is_first() and self.kept.read(_name(len(self.files))) is not None

    def _read(self, file: int) -> dict[int, Routed]:
        """The replies of a file by the numbers of their prompts."""
        data = self.kept.read(_name(file))
        if data is None:
            raise self.kept.damaged(_name(file))
        table = read_parquet(data.tobytes())
        return {int(prompt.prompt_id): prompt for prompt in prompts_of(table, self.about)}


def routed(growing: Growing, tokenizer: Any) -> Routed:
    """A reply that has ended as traces have it, its prompt's number as id."""
    prompt, reply = growing.prompt.token_ids, np.array(growing.token_ids, np.int32)
    token_ids, chosen = np.concatenate([prompt, reply]), growing.chosen
    return Routed(
        prompt_id=str(growing.prompt.number),
        token_ids=token_ids,
        positions=np.arange(len(token_ids), dtype=np.int32),
        segments=of_reply(prompt, reply, tokenizer),
        generated=np.arange(len(token_ids)) >= len(prompt),
        experts=chosen.experts,
        gates=chosen.gates,
    )


def _name(file: int) -> str:
    return f"replies-{file}"


def _bytes(prompts: Sequence[Routed], about: About) -> memoryview:
    return memoryview(parquet_bytes(table_of(prompts, about)))
