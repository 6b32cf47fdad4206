"""Answers: what kind a row's is, and how a reply is read for it. This module imports no large package."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from ..errors import DataError, shown

# A sign or a currency must touch the number, and a minus between two numbers is no sign. Digits behind a letter, as in
# H2O, and exponents behind ^ are no number of their own. Commas part groups of three digits alone.
NUMBER = re.compile(
    r"(?:(?<![\w)\]])(?P<sign>[-−]))?\\?(?:[$€£](?P<inside>[-−])?)?(?<![A-Za-z0-9_^])(?<!\^\{)"
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?P<power>[eE][-+]?[0-9]{1,3}\b)?"
)
FRACTION = re.compile(r"[0-9]\s*/\s*$")
LATEX_COMMAS = re.compile(r"\{,\}|\\,")

ALONE = re.compile(r"[\W_]*([A-Ja-j])[\W_]*")
BEHIND = r"(?:[\s*_(:\"'`$\\{]|boxed|text|(?i:option|choice)\b)*([A-J])(?![A-Za-z0-9'’])"
# The first of these that a text has says its letter.
SAID = (
    re.compile(r"\b(?i:answer|choice|option)\s*(?::|\b(?i:is|would be)\b)" + BEHIND),
    re.compile(r"\\boxed\{" + BEHIND),
    re.compile(r"\*\*\s*\(?([A-J])(?:[.):]*\s*\*\*|[.):][^*\n]*\*\*)"),
    re.compile(r"\A\s*\(?([A-J])[.):](?=\s|\Z)"),
)
NAMED = re.compile(r"\(([A-J])\)|\b(?i:answer|option|choice)\s+([A-J])(?![A-Za-z0-9'’])")


def last_number(text: str) -> Decimal | None:
    """The last number of a text: 1,000 and 1000.0 are equal, and units, currencies and % are left out."""
    found = [*NUMBER.finditer(LATEX_COMMAS.sub(",", text))]
    if not found:
        return None
    last = found[-1]
    number = Decimal(last["digits"].replace(",", "") + (last["power"] or ""))
    return -number if last["sign"] or last["inside"] else number


def _whole_number(text: str) -> Decimal | None:
    """The last number of a row's answer; None where it is the lower half of a fraction, which replies write in too many
    ways to be read."""
    found = [*NUMBER.finditer(text)]
    return None if not found or FRACTION.search(text[: found[-1].start()]) else last_number(text)


def letter(text: str) -> str | None:
    """The choice that a text makes, A to J, as people write it: B, (B), B., **B**, The answer is B."""
    if alone := ALONE.fullmatch(text):
        return alone[1].upper()
    for said in SAID:
        if found := said.findall(text):
            return str(found[-1])
    named = {one or other for one, other in NAMED.findall(text)}
    return named.pop() if len(named) == 1 else None


def exact(text: str) -> str | None:
    """The text without blanks around it; None where nothing is left."""
    return text.strip() or None


@dataclass(frozen=True)
class AnswerKind:
    """A kind of answer: how a reply and a row's answer are read, None where they cannot be."""

    help: str
    of_reply: Callable[[str], Any]
    of_row: Callable[[str], Any]
    wanted: str
    """What a row's answer must have."""


ANSWER_KINDS: dict[str, AnswerKind] = {
    "exact": AnswerKind("the whole final message equals the answer", exact, exact, "a text"),
    "last-number": AnswerKind(
        "the last number of the final message equals that of the answer, however both are written",
        last_number,
        _whole_number,
        "a number, which is no fraction",
    ),
    "letter": AnswerKind(
        "the final message chooses the letter A to J of the answer", letter, letter, "a letter A to J"
    ),
}


def read_answers(kind: str, answers: Sequence[Any], rows: Sequence[str]) -> list[Any]:
    """What each row's answer says, to be compared with `ANSWER_KINDS[kind].of_reply` of a reply's final message.

    `rows` are what errors call the rows. DataError names the first row whose answer cannot be read."""
    declared, found = ANSWER_KINDS[kind], []
    for answer, row in zip(answers, rows, strict=True):
        is_plain = isinstance(answer, str | int | float) and not isinstance(answer, bool)
        read = declared.of_row(str(answer)) if is_plain else None
        if read is None:
            others = ", ".join(other for other in ANSWER_KINDS if other != kind)
            raise DataError(
                f"{row}: its answer {shown(answer)} is not read as {kind}, which needs {declared.wanted}: mend it, or "
                f"take another kind ({others})"
            )
        found.append(read)
    return found
