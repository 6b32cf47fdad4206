"""Harmony text → tokens and what each of them counts, by a checkpoint's own tokenizer.

A token is kept when it is part of the content of a message by `assistant`, in any channel.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import TokenizerError, reason
from .batching import Document
from .groups import Groups
from .harmony import START, HarmonyText, Part, Piece, channel_of, marks_of, messages_of, pieces, role_of, standings
from .rows import Row

Keep = Literal["assistant", "reply", "all"]
"""Which tokens count: the contents of the assistant's messages, these with their headers and marks, or all."""
ROWS_AT_ONCE = 256  # the tokenizer gives offsets as Python tuples, some 300 bytes a token


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's own tokenizer, as transformers reads it."""
    from transformers import PreTrainedTokenizerFast  # GPT-OSS's class; to find a class out would load PyTorch

    if not (folder / "tokenizer.json").exists():
        raise TokenizerError(f"{folder}: holds no tokenizer.json: copy the tokenizer of the original model there")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:
        raise TokenizerError(f"{folder}: the tokenizer cannot be read: {reason(error)}") from error
    if "auto_map" in tokenizer.init_kwargs:
        raise TokenizerError(f"{folder}: the tokenizer has code of its own, which is never run: copy the original's")
    return tokenizer


def runs_in_ids(token_ids: Sequence[int], tokenizer: Any) -> list[tuple[Piece, int]]:
    """The pieces of a text in tokens, each with the number of its tokens: its marks are known by their ids, whatever
    text looks like one."""
    marks = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    found: list[tuple[Piece, int]] = []
    for is_mark, ids in groupby(token_ids, key=marks.__contains__):
        run = list(ids)
        if is_mark:
            found += ((Piece(tokenizer.convert_ids_to_tokens(number), True), 1) for number in run)
        else:
            found.append((Piece(tokenizer.decode(run), False), len(run)))
    return found


def written_in_ids(token_ids: Sequence[int], tokenizer: Any) -> list[Piece]:
    """The pieces of what a model wrote."""
    return [piece for piece, _ in runs_in_ids(token_ids, tokenizer)]


def messages_in_ids(token_ids: Sequence[int], tokenizer: Any) -> list[Part]:
    """The messages of a reply, which begins behind the assistant's name."""
    begun = [Piece(START, True), Piece("assistant", False)]
    found, _ = messages_of([*begun, *written_in_ids(token_ids, tokenizer)])
    return found


def encode(
    rows: Sequence[Row],
    tokenizer: Any,
    groups: Groups,
    vocab_size: int,
    max_length: int | None,
    truncate: str = "left",
    keep: Keep = "assistant",
    channel_weights: Mapping[str, float] | None = None,
) -> list[Document]:
    """Tokens and weights of each row; no special tokens are added.

    A row longer than `max_length` tokens loses its head (truncate "left", so that the tail, where the
    assistant speaks, stays) or its tail ("right"). A token with an empty character range is never kept.
    """
    marks, documents = marks_of(tokenizer), []
    for first in range(0, len(rows), ROWS_AT_ONCE):
        some = rows[first : first + ROWS_AT_ONCE]
        cut = [list(pieces(row.harmony, marks)) for row in some]
        for group, run, tokens in zip(groups.of(some), cut, _tokens(cut, tokenizer), strict=True):
            each = weights_of(run, keep, channel_weights)
            ids = np.concatenate([np.zeros(0, np.int32), *(ids for ids, _ in tokens)])
            kept = [np.where(empty, 0, weight) for (_, empty), weight in zip(tokens, each, strict=True)]
            weights = np.concatenate([np.zeros(0), *kept]).astype(np.float32)
            part = slice(None)
            if max_length is not None and len(ids) > max_length:
                part = slice(-max_length, None) if truncate == "left" else slice(max_length)
            truncated = part != slice(None)
            _check(ids, vocab_size)
            before = ids[: -len(ids[part])] if truncated and truncate == "left" else ids[:0]
            documents.append(Document(ids[part].copy(), weights[part].copy(), group, truncated, before.copy()))
    return documents


def weights_of(
    pieces: Sequence[Piece], keep: Keep = "assistant", channel_weights: Mapping[str, float] | None = None
) -> list[float]:
    """What the tokens of each piece count: 1 where it is kept, and of the assistant's contents the weight of their
    channel where weights are given."""
    if keep == "all":
        return [1.0] * len(pieces)
    weights: list[float] = []
    begun = 0
    for standing, header in standings(pieces):
        if standing == "header" and pieces[len(weights)] == (START, True):
            begun = len(weights)
        is_reply = role_of(header) == "assistant"
        weight = 1.0 if channel_weights is None else channel_weights.get(channel_of(header), 0.0)
        weights.append(weight if is_reply and (standing == "content" or keep == "reply") else 0.0)
        if standing == "begin" and is_reply and keep == "reply":
            # What the header says is known at its end.
            weights[begun:] = [weight] * (len(weights) - begun)
    return weights


def token_ids(written: HarmonyText, tokenizer: Any, vocab_size: int) -> np.ndarray:
    """Tokens of a text, int32; no special tokens are added."""
    (tokens,) = _tokens([list(pieces(written, marks_of(tokenizer)))], tokenizer)
    ids = np.concatenate([np.zeros(0, np.int32), *(ids for ids, _ in tokens)])
    _check(ids, vocab_size)
    return ids


def _tokens(cut: Sequence[Sequence[Piece]], tokenizer: Any) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """For each piece of each text its token ids, int32, and which of them have an empty character range."""
    # Headers are few and come again and again: each text is tokenised once.
    distinct = dict.fromkeys(piece for run in cut for piece in run)
    texts = [piece.text for piece in distinct if not piece.is_mark]
    encoded: Any = {"input_ids": [], "offset_mapping": []}
    if texts:
        # What is text stays text, whatever it looks like.
        encoded = tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )
    ids, offsets = iter(encoded["input_ids"]), iter(encoded["offset_mapping"])

    def tokens(piece: Piece) -> tuple[np.ndarray, np.ndarray]:
        if piece.is_mark:
            return np.array([tokenizer.convert_tokens_to_ids(piece.text)], np.int32), np.zeros(1, bool)
        ranges = np.array(next(offsets), np.int64).reshape(-1, 2)
        return np.array(next(ids), np.int32), ranges[:, 0] == ranges[:, 1]

    known = {piece: tokens(piece) for piece in distinct}
    return [[known[piece] for piece in run] for run in cut]


def _check(ids: np.ndarray, vocab_size: int) -> None:
    if ids.max(initial=0) >= vocab_size:
        raise TokenizerError(
            f"the tokenizer gives token {ids.max()}, the model's vocab_size is {vocab_size}: "
            "tokenizer and model do not belong together"
        )
