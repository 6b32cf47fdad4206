"""What both engines of generation are given, and give. Letters: see `config`."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from ..run.steps import Chosen
from .steps import Prompts

SHORTEST = 128  # tokens: prompts are padded to this times a power of two, so that few lengths are compiled
PREFILL_TOKENS = 8192  # of the prompts, padded, that go through the network at once


class Prompt(NamedTuple):
    """A prompt that becomes a row."""

    number: int
    """Its own, among all prompts."""
    token_ids: np.ndarray
    """int32 [length]"""
    limit: int
    """The position that its row must not reach."""
    kept_LE: np.ndarray | None = None
    """bool: the experts that its tokens may choose, where rows have such masks."""


class Advanced(NamedTuple):
    """What came of one call."""

    prompts: list[Chosen | None]
    """What the tokens of each new prompt chose, [length, L, k] each; None where routing is not asked for."""
    tokens: np.ndarray
    """int32 [N, B]: the next tokens of each row; −1 behind its end, and where there is none."""
    chosen: Chosen | None
    """What these chose, [N, L, B, k]; a row's last token, and −1, means nothing."""
    done: np.ndarray
    """bool [B]: rows that have ended, or are free."""


@runtime_checkable  # annotations are checked in tests
class Decoder(Protocol):
    """A model with a number of rows: `resident.Resident`, or `streamed.Streamed`."""

    batch_size: int
    """B: how many rows it has, which may be free."""
    shares: int
    """How many devices share them, evenly and in their order."""

    def advance(self, admitted: Sequence[tuple[int, Prompt]]) -> Advanced:
        """Put prompts into rows, given by their numbers, that are free, and say the next tokens of all rows."""
        ...


def padded(
    admitted: Sequence[tuple[int, Prompt]], batch_size: int, shares: int = 1
) -> Iterator[tuple[Prompts, list[tuple[int, int]]]]:
    """Prompts in batches of like length, and for each of a batch its number in `admitted` and its row of the batch.

    Rows of the decoder, and those of each batch, lie on `shares` devices, evenly and in their order: prompts come to
    the device that has their row.
    """
    per_share = batch_size // shares
    by_length: dict[int, list[int]] = {}
    for n, (_, prompt) in enumerate(admitted):
        by_length.setdefault(padded_length(len(prompt.token_ids)), []).append(n)
    for length, numbers in sorted(by_length.items()):
        most = max(1, PREFILL_TOKENS // (length * shares))  # of each share
        of_share: list[list[int]] = [[] for _ in range(shares)]
        for n in numbers:
            of_share[admitted[n][0] // per_share].append(n)
        for first in range(0, max(map(len, of_share)), most):
            yield _batch(admitted, [theirs[first : first + most] for theirs in of_share], length, per_share, most)


def _batch(
    admitted: Sequence[tuple[int, Prompt]], of_share: Sequence[Sequence[int]], length: int, per_share: int, most: int
) -> tuple[Prompts, list[tuple[int, int]]]:
    each = 1
    while each < max(map(len, of_share)):
        each *= 4  # few sizes to compile; rows that only fill the batch cost little beside their experts
    each = min(each, most)
    B = each * len(of_share)
    kept = [prompt.kept_LE for _, prompt in admitted]
    kept_BLE = None if kept[0] is None else np.ones((B, *kept[0].shape), bool)
    ids, numbers = np.zeros((B, length), np.int32), np.zeros((4, B), np.int32)
    lengths, slots, limits, own = numbers
    slots[:] = per_share
    places = []
    for share, theirs in enumerate(of_share):
        for row, n in enumerate(theirs, share * each):
            slot, prompt = admitted[n]
            ids[row, : len(prompt.token_ids)] = prompt.token_ids
            lengths[row], slots[row] = len(prompt.token_ids), slot % per_share
            limits[row], own[row] = prompt.limit, prompt.number
            if kept_BLE is not None:
                kept_BLE[row] = prompt.kept_LE
            places.append((n, row))
    return Prompts(ids, lengths, slots, limits, own, kept_BLE), places


def padded_length(tokens: int) -> int:
    """The length to which a prompt is padded."""
    length = SHORTEST
    while length < tokens:
        length *= 2
    return length


def of_prompts(chosen: Chosen, places: Sequence[tuple[int, int]], lengths: np.ndarray) -> dict[int, Chosen]:
    """What each prompt's tokens chose, [length, L, k], by its number, from [L, B, S, k] of their batch."""
    return {n: Chosen(*(np.moveaxis(x[:, row, : lengths[row]], 0, 1) for x in chosen)) for n, row in places}
