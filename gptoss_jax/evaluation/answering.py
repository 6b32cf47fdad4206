"""Replies of a model, and of what keep-sets leave of it, to the questions of rows. Letters: see `config`."""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..data import tokens as tokenizing
from ..data.harmony import Part, marks_of, question_and_reply
from ..data.rows import Row
from ..devices import hosts
from ..devices.mesh import path_of
from ..errors import DataError
from ..files.paths import local_folder
from ..generation import Network, check_room, generate, load, read_stop_ids
from ..network.source import ROUTER_BIAS, Source
from ..run.options import Sampling
from ..run.progress import Progress

ROWS_AT_ONCE = 64
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


class Answerer:
    """A model that answers, all of it in memory, with all its experts or with some."""

    def __init__(self, source: Source, tokenizer: Any, dtype: str, max_new_tokens: int, progress: Progress):
        self.source, self.tokenizer, self.progress = source, tokenizer, progress
        self.max_new_tokens, self.dtype = max_new_tokens, dtype
        with local_folder(source.folder) as folder:
            self.stop_ids = read_stop_ids(folder, tokenizer)
        self._network: Network | None = None

    def answer(
        self,
        name: str,
        prompts: Sequence[np.ndarray],
        kept_LE: np.ndarray | None,
        advance: Callable[[int], Any],
    ) -> list[Said]:
        """The most probable reply to each prompt; those that `progress` has under this name are not asked again."""
        kept = self.progress.kept(_parse, name) or []
        advance(len(kept))
        network = None
        # Prompts of like length share a batch.
        order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
        while len(kept) < len(order):
            network = network or _among(self._loaded(), kept_LE)
            batch = [prompts[n] for n in order[len(kept) : len(kept) + ROWS_AT_ONCE]]
            steps = generate(network, self.source.config, batch, self.max_new_tokens, GREEDY, self.stop_ids)
            ids = np.concatenate([*steps], axis=1)
            kept += [row[row >= 0].tolist() for row in ids]
            if hosts.is_first():
                self.progress.write(name, _bytes(kept))
            advance(len(batch))
        by_number = dict(zip(order, kept, strict=True))
        return [self._said(by_number[n]) for n in range(len(prompts))]

    def _loaded(self) -> Network:
        if self._network is None:
            self._network = load(self.source, self.dtype)
        return self._network

    def _said(self, token_ids: list[int]) -> Said:
        parts = tokenizing.messages_in_ids(token_ids, self.tokenizer)
        return Said(
            token_ids, [(p.channel, p.content) for p in parts], bool(token_ids) and token_ids[-1] in self.stop_ids
        )


def _among(network: Network, kept_LE: np.ndarray | None) -> Network:
    """The network with −∞ in the router's bias of all experts that are not kept."""
    if kept_LE is None:
        return network

    def masked(layer: Any, kept_E: np.ndarray) -> Any:
        def one(path: Any, x: jax.Array) -> jax.Array:
            return jnp.where(kept_E, x, -jnp.inf) if path_of(path) == ROUTER_BIAS else x

        return jax.tree_util.tree_map_with_path(one, layer)

    return network._replace(layers=tuple(map(masked, network.layers, kept_LE)))


def _bytes(replies: Sequence[Sequence[int]]) -> bytes:
    return json.dumps(replies).encode()


def _parse(data: bytes) -> list[list[int]]:
    return [[int(i) for i in reply] for reply in json.loads(data)]
