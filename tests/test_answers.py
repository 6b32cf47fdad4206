"""Answers as people write them are read, and what cannot be read of the data is refused by its row."""

from decimal import Decimal
from typing import Any

import pytest

from gptoss_jax.data.answers import ANSWER_KINDS, letter, read_answers
from gptoss_jax.errors import DataError


def right(kind: str, answer: Any, reply: str) -> bool:
    (wanted,) = read_answers(kind, [answer], ["row 1"])
    return bool(ANSWER_KINDS[kind].of_reply(reply) == wanted)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,000", "1000"),
        ("1000", "1000"),
        ("1000.0", "1000"),
        ("The total is $1,234,567.50.", "1234567.5"),
        ("It is -5", "-5"),
        ("It is −5 °C", "-5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        (r"\$18", "18"),
        ("7-5", "5"),
        ("7 - 5", "5"),
        ("(3)-4", "4"),
        ("x = -0.25", "-0.25"),
        (".5", "0.5"),
        ("So 3 and 42.", "42"),
        ("42%", "42"),
        ("12 m2", "12"),
        ("12 m²", "12"),
        ("5 H2O", "5"),
        ("10^6", "10"),
        ("10^{6}", "10"),
        ("2e3", "2000"),
        ("1, 2, 3", "3"),
        ("1,2,3", "3"),
        ("12,34", "34"),
        (r"\boxed{1{,}000}", "1000"),
        ("1,0000", "0"),
        ("#### 18", "18"),
        ("**18**", "18"),
        ("no number", None),
        ("", None),
    ],
)
def test_the_last_number(text: str, number: str | None) -> None:
    assert ANSWER_KINDS["last-number"].of_reply(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize("answer", ["1,000", "1000", 1000, 1000.0, "$1000", "It is 1000.00 apples"])
@pytest.mark.parametrize("reply", ["1,000", "The answer is 1000.", "$1000.0", "3 + 997 = 1,000 apples"])
def test_numbers_are_equal_however_they_are_written(answer: Any, reply: str) -> None:
    assert right("last-number", answer, reply) and not right("last-number", answer, reply + " 7")


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("B", "B"),
        (" b \n", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("B)", "B"),
        ("**B**", "B"),
        ("**(B)**", "B"),
        ("**B. Paris**", "B"),
        ("The answer is B", "B"),
        ("The answer is: B", "B"),
        ("The correct answer is (B) Paris.", "B"),
        ("the answer is **B**.", "B"),
        ("Answer: B", "B"),
        ("**Answer: B**", "B"),
        ("ANSWER: B", "B"),
        ("The answer is option B.", "B"),
        ("The correct option is B, since A is wrong.", "B"),
        ("The answer is B, because option A is wrong.", "B"),
        ("Some say the answer is A. But the answer is C.", "C"),
        (r"The answer is $\boxed{\text{D}}$.", "D"),
        (r"\boxed{J}", "J"),
        ("B. Paris is the capital.", "B"),
        ("(B) Paris", "B"),
        ("I choose option B", "B"),
        ("It must be (B).", "B"),
        ("It is (A) or (B).", None),
        ("A good question.", None),
        ("I think so.", None),
        ("Paris", None),
        ("K", None),
        ("", None),
        ("The answer is Berlin", None),
    ],
)
def test_the_letter(text: str, choice: str | None) -> None:
    assert letter(text) == choice


def test_exact_is_the_whole_text() -> None:
    assert right("exact", "Paris", " Paris\n") and not right("exact", "Paris", "Paris.")
    assert right("exact", 12, "12") and not right("exact", "Paris", "")


@pytest.mark.parametrize(
    ("kind", "answer", "says"),
    [
        ("exact", "  ", "a text"),
        ("exact", None, "None"),
        ("exact", ["a"], "['a']"),
        ("exact", True, "True"),
        ("last-number", "twelve", "a number"),
        ("last-number", "it is 1/2", "no fraction"),
        ("letter", "Paris", "a letter A to J"),
        ("letter", 1, "a letter A to J"),
    ],
)
def test_an_answer_that_cannot_be_read_names_its_row(kind: str, answer: Any, says: str) -> None:
    good = {"exact": "x", "last-number": "4", "letter": "B"}[kind]
    with pytest.raises(DataError) as caught:
        read_answers(kind, [good, answer, good], ["a.jsonl, line 1", "a.jsonl, line 2", "a.jsonl, line 3"])
    error = str(caught.value)
    assert error.startswith("a.jsonl, line 2: ") and says in error and kind in error and "\n" not in error


def test_every_kind_has_help() -> None:
    assert [*ANSWER_KINDS] == ["exact", "last-number", "letter"] and all(kind.help for kind in ANSWER_KINDS.values())
