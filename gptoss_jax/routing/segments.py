"""The segment of a conversation that each token is of, by token ids: no character is counted.

A token of `think` is of the content of an assistant's message in the channel analysis: it stands behind its
`<|message|>` and before the mark that ends it. One of `answer` is of such a content in the channel final. What else is
of an assistant's message is `other`: its header, all its marks, and contents in other channels or in none. What stands
outside the assistant's messages is `prompt`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..data.harmony import START, Piece, channel_of, role_of, standings
from ..data.tokens import runs_in_ids

SEGMENTS = ("prompt", "think", "answer", "other")
PROMPT, THINK, ANSWER, OTHER = range(len(SEGMENTS))
OF_CHANNEL = {"analysis": THINK, "final": ANSWER}


def of_row(token_ids: Sequence[int] | np.ndarray, tokenizer: Any) -> np.ndarray:
    """The segments of a whole row, uint8 [tokens].

    A row that begins inside a message is taken as it reads: what comes before its first `<|start|>` is `prompt`. Of a
    truncated row give all tokens, and take the last of what comes back: then nothing is lost but what was cut off.
    """
    runs = runs_in_ids(np.asarray(token_ids, np.int64).tolist(), tokenizer)
    codes, lengths = _codes([piece for piece, _ in runs]), [length for _, length in runs]
    return np.repeat(np.array(codes, np.uint8), np.array(lengths, np.int64))


def of_reply(
    prompt_ids: Sequence[int] | np.ndarray, reply_ids: Sequence[int] | np.ndarray, tokenizer: Any
) -> np.ndarray:
    """The segments of a prompt and of the reply that a model gave to it, uint8 [tokens of both].

    All of the prompt is `prompt`, also its last `<|start|>assistant`, with which the first message of the reply begins.
    Nothing of a reply is `prompt`: what a model writes outside its messages, or for others, is `other`.
    """
    found = of_row(np.concatenate([np.asarray(ids, np.int64) for ids in (prompt_ids, reply_ids)]), tokenizer)
    prompt, reply = found[: len(prompt_ids)], found[len(prompt_ids) :]
    prompt[:] = PROMPT
    reply[reply == PROMPT] = OTHER
    return found


def _codes(pieces: Sequence[Piece]) -> list[int]:
    """The segment of each piece."""
    codes: list[int] = []
    begun, standing = 0, ""  # the first piece of the last header; where the last piece stands
    for standing, header in standings(pieces):
        at = len(codes)
        if standing == "header" and pieces[at] == (START, True):
            begun = at
        is_reply = role_of(header) == "assistant"
        inside = OF_CHANNEL.get(channel_of(header), OTHER) if standing == "content" else OTHER
        codes.append(inside if is_reply else PROMPT)
        if standing == "begin" and is_reply:
            codes[begun:] = [OTHER] * (at + 1 - begun)  # what the header says is known at its end
    if standing == "header" and role_of("".join(piece.text for piece in pieces[begun + 1 :])) == "assistant":
        codes[begun:] = [OTHER] * (len(codes) - begun)  # a header that nothing follows says it as well
    return codes
