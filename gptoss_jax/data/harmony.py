"""Harmony, GPT-OSS's conversation format: `<|start|>role<|channel|>c<|message|>content<|end|>`.

Its marks are tokens of their own. Whoever writes text remembers where something only looks like a mark: that is never
taken for one, neither where messages are told apart nor by the tokenizer.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

START, MESSAGE, CHANNEL = "<|start|>", "<|message|>", "<|channel|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
ENDS = (END, CALL, RETURN)
CONSTRAIN = "<|constrain|>"
MARKS = re.compile("|".join(map(re.escape, (START, MESSAGE, CHANNEL, *ENDS, CONSTRAIN))))
IN_HEADER = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")
RECIPIENT = re.compile(r"(?:^|\s)to=([^\s<]+)")


class HarmonyText(NamedTuple):
    """Text with harmony's marks."""

    text: str
    literals: tuple[int, ...] = ()
    """Where something begins that looks like a mark and is text, in ascending order."""


class Piece(NamedTuple):
    """A mark, or what stands between two."""

    text: str
    is_mark: bool


class Part(NamedTuple):
    """A message of harmony text."""

    header: str
    content: str
    end: str
    """The mark that ends it; empty where the text ends first."""

    @property
    def role(self) -> str:
        """Who speaks."""
        return role_of(self.header)

    @property
    def channel(self) -> str:
        """Its channel; empty where the header names none."""
        return channel_of(self.header)


def marks_of(tokenizer: Any) -> re.Pattern[str]:
    """Finds what is a mark: all special tokens of the tokenizer."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    # Of two that begin alike the longer one; a tokenizer without any gets a pattern that matches nowhere.
    return re.compile("|".join(map(re.escape, sorted(special, key=lambda mark: (-len(mark), mark)))) or r"(?!)")


def pieces(written: HarmonyText, marks: re.Pattern[str]) -> Iterator[Piece]:
    """The text, cut at its marks; what stands between two is never empty."""
    text, literals = written.text, frozenset(written.literals)
    last = 0
    for mark in marks.finditer(text):
        if mark.start() in literals:
            continue
        if mark.start() > last:
            yield Piece(text[last : mark.start()], False)
        yield Piece(mark[0], True)
        last = mark.end()
    if last < len(text):
        yield Piece(text[last:], False)


Standing = Literal["outside", "header", "begin", "content", "end"]


def standings(pieces: Iterable[Piece]) -> Iterator[tuple[Standing, str]]:
    """For each piece: where it stands, and from the begin of a content to its end the message's header.

    A content runs from behind `<|message|>`, its begin, to the first mark that ends a message, whatever marks stand
    between.
    """
    words: list[str] | None = None  # of the header, from behind <|start|>
    header: str | None = None  # of the message in whose content this is
    for text, is_mark in pieces:
        if header is not None:
            ends = is_mark and text in ENDS
            yield "end" if ends else "content", header
            header = None if ends else header
        elif is_mark and text == START:
            words = []
            yield "header", ""
        elif is_mark and text == MESSAGE and words is not None:
            header, words = "".join(words), None
            yield "begin", header
        elif words is not None:
            words.append(text)
            yield "header", ""
        else:
            yield "outside", ""


def messages_of(pieces: Sequence[Piece]) -> tuple[list[Part], str]:
    """The messages of a text, and what of it is part of none."""
    found: list[Part] = []
    rest: list[str] = []  # since the last message
    stray: list[str] = []
    content: list[str] = []
    for (text, _), (standing, header) in zip(pieces, standings(pieces), strict=True):
        if standing == "begin":
            # The header that stood here belongs to this message: what stands before its mark is stray.
            stray += rest[: max((n for n, word in enumerate(rest) if word == START), default=0)]
            found.append(Part(header, "", ""))
            content, rest = [], []
        elif standing == "content":
            content.append(text)
        elif standing == "end":
            found[-1] = Part(header, "".join(content), text)
        else:
            rest.append(text)
    if content and not found[-1].end:
        found[-1] = found[-1]._replace(content="".join(content))
    return found, "".join(stray + rest)


def question_and_reply(written: HarmonyText, marks: re.Pattern[str]) -> tuple[HarmonyText, list[Part]] | None:
    """The text up to where the assistant begins its last words, as it is given to a model, and these words.

    None where the text holds no message, or nothing stands before the reply."""
    cut = list(pieces(written, marks))
    starts = [n for n, piece in enumerate(cut) if piece == (START, True)]
    parts, _ = messages_of(cut)
    if len(starts) != len(parts) or not parts:
        return None
    said = len(parts)
    while said and parts[said - 1].role == "assistant":
        said -= 1
    if not said:
        return None
    until = starts[said] if said < len(parts) else len(cut)
    text = "".join(piece.text for piece in cut[:until])
    literals = tuple(at for at in written.literals if at < len(text))
    return HarmonyText(f"{text}{START}assistant", literals), parts[said:]


def role_of(header: str) -> str:
    """Who speaks, by a message's header."""
    return re.split(r"[\s<]", header, maxsplit=1)[0]


def channel_of(header: str) -> str:
    """The channel that a message's header names; empty where it names none."""
    channel = IN_HEADER.search(header)
    return channel[1] if channel else ""
