"""From the routing of an answer's tokens to its segments' sums. Letters: see `config`; T are routed tokens.

What runs through the network is a token, and what comes out chooses the next one: entry i of the routing of a reply
belongs to its token i, and its last token, which never runs, has none. `docs/fingerprints.md` says how that was seen in
what is published, and a test sees it again.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Integer

from .summaries import SEGMENTS

HEADER = 2  # <|start|>assistant, with which a prompt ends, is the beginning of a reply's first message
ENDS = ("<|end|>", "<|return|>", "<|call|>")


class Message(NamedTuple):
    """A message of a reply. Its tokens are `first` up to `end`, where its end mark stands or the reply is cut."""

    channel: str
    first: int
    content: int
    end: int


class Segment(NamedTuple):
    """Tokens `first` up to `stop` of a reply; those below 0 stand in the prompt."""

    first: int
    stop: int

    @property
    def tokens(self) -> int:
        """How many tokens it has, also those without routing."""
        return self.stop - self.first


def messages(reply: Sequence[str]) -> list[Message]:
    """The messages of a reply, given as its tokens, that have come to their contents."""
    starts = [at for at, token in enumerate(reply) if token == "<|start|>"]
    found = []
    for first, stop in zip([-HEADER, *starts], [*starts, len(reply)], strict=True):
        begin = max(0, first)
        tokens = reply[begin:stop]
        if "<|message|>" not in tokens:
            continue
        content = begin + tokens.index("<|message|>") + 1
        header = reply[begin : content - 1]
        channel = "".join(header[header.index("<|channel|>") + 1 :]) if "<|channel|>" in header else ""
        ends = [at for at in range(content, stop) if reply[at] in ENDS]
        found.append(Message(channel, first, content, ends[0] if ends else stop))
    return found


def contents(reply: Sequence[str]) -> dict[str, str]:
    """The text of a reply's thoughts and of its answer; empty where it has none."""
    found = messages(reply)
    thought = next((one for one in found if one.channel == "analysis"), None)
    answer = next((one for one in reversed(found) if one.channel == "final"), None)
    texts = ["" if one is None else "".join(reply[one.content : one.end]) for one in (thought, answer)]
    return dict(zip(SEGMENTS, texts, strict=True))


def published_segments(reply: Sequence[str], finished: bool) -> dict[str, Segment]:
    """The segments of a reply as the published summaries count them.

    Thoughts are the first message by the analysis channel, with its header and without its end mark; the answer is the
    last one by the final channel, with both. All of a reply that is not finished is thought.
    """
    if not finished:
        return {"think": Segment(-HEADER, len(reply))}
    found = messages(reply)
    segments = {}
    if thought := next((one for one in found if one.channel == "analysis"), None):
        segments["think"] = Segment(thought.first, thought.end)
    if answer := next((one for one in reversed(found) if one.channel == "final"), None):
        segments["answer"] = Segment(answer.first, min(answer.end + 1, len(reply)))
    return segments


def segment_sums(
    experts_TLk: Int[np.ndarray, "T L k"], gates_TLk: Float[np.ndarray, "T L k"], segment: Segment, num_experts: int
) -> tuple[Int[np.ndarray, "L E"], Float[np.ndarray, "L E"]]:
    """How many of a segment's routed tokens chose each expert, and the sums of their gates."""
    routed = slice(max(0, segment.first), segment.stop)
    return sums_of(experts_TLk[routed], gates_TLk[routed], num_experts)


def sums_of(
    experts_TLk: Integer[np.ndarray, "T L k"], gates_TLk: Float[np.ndarray, "T L k"], num_experts: int
) -> tuple[Int[np.ndarray, "L E"], Float[np.ndarray, "L E"]]:
    """How many tokens chose each expert, and the sums of their gates."""
    L = experts_TLk.shape[1]
    places = (experts_TLk + num_experts * np.arange(L)[:, None]).reshape(-1)
    count = np.bincount(places, minlength=L * num_experts)
    gate_sum = np.bincount(places, gates_TLk.reshape(-1), minlength=L * num_experts)
    return count.reshape(L, num_experts), gate_sum.reshape(L, num_experts)
