"""The families of tasks that nano learns. reasoning-gym makes the instances; the short reasoning is written here, from
what the generator says of each.

An instance is for training, calibration or evaluation by the SHA-256 of its question, so that none is in two of them.
"""

import hashlib
import json
import pydoc_data.topics
import random
import re
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

SPLITS = ("train", "calibration", "evaluation")
HELD_OUT = 16  # of so many instances one is for calibration and one for evaluation
SEEN_AGAIN = 1000  # draws one after the other without a new question, after which a family is said to have no more
ENGLISH = "english"
PARAGRAPH = 80, 160  # characters that a paragraph has at least, and that are taken of it at most


class Instance(NamedTuple):
    """A question and what is to be learnt of it."""

    family: str
    question: str
    thinking: str
    """The reasoning; empty where there is none."""
    answer: str

    @property
    def split(self) -> str:
        """train, calibration or evaluation."""
        number = int.from_bytes(hashlib.sha256(self.question.encode()).digest()[:8], "big") % HELD_OUT
        return {0: "calibration", 1: "evaluation"}.get(number, "train")

    def messages(self) -> list[dict[str, str]]:
        """The conversation, as the chat template takes it."""
        reply = {"role": "assistant", "content": self.answer}
        return [
            {"role": "user", "content": self.question},
            reply | ({"thinking": self.thinking} if self.thinking else {}),
        ]


class Family(NamedTuple):
    """One generator of reasoning-gym at a level that nano can learn."""

    dataset: str
    options: dict[str, Any]
    think: Callable[[dict[str, Any]], str]
    """The reasoning, from an entry."""


def chain_steps(entry: dict[str, Any]) -> str:
    """12 + 34 - 5 → 12 + 34 = 46; 46 - 5 = 41"""
    first, *rest = entry["metadata"]["expression"].split()
    total, steps = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        after = total + int(term) * (1 if sign == "+" else -1)
        steps.append(f"{total} {sign} {term} = {after}")
        total = after
    return "; ".join(steps)


def equation_steps(entry: dict[str, Any]) -> str:
    """7 - 3*x = -5 → -3*x = -5 - 7 = -12; x = -12 / -3 = 4"""
    left, right = entry["metadata"]["equation"].split(" = ")
    x = entry["metadata"]["variable"]
    before, factor, behind = re.fullmatch(rf"(?:(\d+) (?=- ))?((?:- ?)?(?:\d+\*)?){x}((?: [+-] \d+)?)", left).groups()  # type: ignore[union-attr]
    factor = factor.replace(" ", "")
    constant = before or behind.replace(" ", "").removeprefix("+")
    total, steps = int(right), []
    if constant:
        total -= int(constant)
        sign = "-" if int(constant) > 0 else "+"
        steps.append(f"{factor}{x} = {right} {sign} {abs(int(constant))} = {total}")
    if factor:
        by = -1 if factor == "-" else int(factor[:-1])
        steps.append(f"{x} = {total} / {by} = {total // by}")
    return "; ".join(steps) or f"{x} = {right}"


def form_of_syllogism(entry: dict[str, Any]) -> str:
    """The statements with letters in the place of terms, and whether the third follows."""
    meta = entry["metadata"]
    letters: dict[str, str] = {}
    forms = []
    for statement in (meta["premise1"], meta["premise2"], meta["conclusion"]):
        quantifier, subject, negated, predicate = re.fullmatch(r"(\w+) (\w+) are (not )?(\w+)", statement).groups()  # type: ignore[union-attr]
        for term in (subject, predicate):
            letters.setdefault(term, chr(ord("A") + len(letters)))
        forms.append(f"{quantifier} {letters[subject]} are {negated or ''}{letters[predicate]}")
    return f"{forms[0]}. {forms[1]}. {forms[2]}? {'It follows' if meta['is_valid'] else 'It does not follow'}."


def countdown(entry: dict[str, Any]) -> str:
    """The words with their numbers, from the last: 3 cat, 2 the, 1 of"""
    words = entry["metadata"]["words"]
    return ", ".join(f"{number} {word}" for number, word in reversed(list(enumerate(words, 1))))


def interval(entry: dict[str, Any]) -> str:
    """Hours and minutes apart, then borrowed."""
    (h1, m1), (h2, m2) = (
        tuple(map(int, entry["metadata"][key].split()[1].split(":")[:2])) for key in ("start_time", "end_time")
    )
    h2 += 24 * (h2 < h1)  # midnight
    steps = f"{h2} - {h1} = {h2 - h1} h, {m2} - {m1} = {m2 - m1} min"
    return steps + (f"; {h2 - h1 - 1} h, {m2 - m1 + 60} min" if m2 < m1 else "")


def legs(entry: dict[str, Any]) -> str:
    """Legs of each kind, then running sums."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    products = [(count, ANIMALS[name]) for name, count in entry["metadata"]["animals"].items()]
    total, *rest = (count * each for count, each in products)
    sums = []
    for value in rest:
        sums.append(f"{total} + {value} = {total + value}")
        total += value
    return "; ".join([f"{count} * {each} = {count * each}" for count, each in products] + sums)


def euclid(entry: dict[str, Any]) -> str:
    """94 and 28 → 94 - 3 * 28 = 94 - 84 = 10; 28 - 2 * 10 = 28 - 20 = 8; 10 - 8 = 2; 8 - 4 * 2 = 8 - 8 = 0"""
    a, b = sorted(entry["metadata"]["numbers"], reverse=True)
    steps = []
    while b:
        times, rest = divmod(a, b)
        steps.append(f"{a} - {b} = {rest}" if times == 1 else f"{a} - {times} * {b} = {a} - {times * b} = {rest}")
        a, b = b, rest
    return "; ".join(steps)


def kin(entry: dict[str, Any]) -> str:
    """Couples and their children with the number of their generation, the two who are asked about, and the way from
    the one to the other: Bob 1, Eve 1: Tom 2. Tom 2, Ann 2: Kai 3. Ann 2, Bob 1: Ann married to Tom; Tom child of Bob
    """
    told: dict[str, dict[str, str]] = defaultdict(dict)
    generation: dict[str, int] = {}

    def numbered(*names: str) -> str:
        return ", ".join(f"{name} {generation[name]}" for name in names)

    couples = []
    for one, other, named in re.findall(
        r"(\w+) is married to (\w+)\.(?: They have (?:a child|children) called ([^.]*))?", entry["question"]
    ):
        children = re.findall(r"[A-Z]\w+", named)
        told[one][other] = told[other][one] = "married to"
        for child, parent in product(children, (one, other)):
            told[child][parent], told[parent][child] = "child of", "parent of"
        generation[one] = generation[other] = generation.get(one, 1)  # the elder are told of first
        generation.update(dict.fromkeys(children, generation[one] + 1))
        couples.append(": ".join(numbered(*names) for names in ((one, other), children) if names))

    first, last = entry["metadata"]["person1"], entry["metadata"]["person2"]
    ways = deque([[first]])
    while (way := ways.popleft())[-1] != last:
        ways.extend([*way, after] for after in told[way[-1]] if after not in way)
    steps = "; ".join(f"{a} {told[a][b]} {b}" for a, b in pairwise(way))
    return f"{'. '.join(couples)}. {numbered(first, last)}: {steps}"


FAMILIES = {
    "arithmetic": Family("chain_sum", {"min_terms": 2, "max_terms": 3, "max_digits": 2}, chain_steps),
    "algebra": Family("simple_equations", {"max_terms": 2, "max_value": 20}, equation_steps),
    "logic": Family("syllogism", {"invalid_ratio": 0.5, "inversion_probability": 0.3}, form_of_syllogism),
    "lists": Family("word_sequence_reversal", {"min_words": 3, "max_words": 5}, countdown),
    "times": Family("time_intervals", {"task_types": ["time"]}, interval),
    "legs": Family("leg_counting", {"min_animals": 2, "max_animals": 3, "max_instances": 9}, legs),
    "divisors": Family("gcd", {"max_value": 99}, euclid),
    "kinship": Family("family_relationships", {"min_family_size": 4, "max_family_size": 6}, kin),
}


@cache
def generator(family: str) -> Any:
    """The generator of reasoning-gym; its entries depend on their number alone."""
    import reasoning_gym

    return reasoning_gym.create_dataset(FAMILIES[family].dataset, seed=0, size=1, **FAMILIES[family].options)


def instance(family: str, number: int) -> Instance:
    """One of a family's instances by its number; equal on every machine."""
    if family == ENGLISH:
        return _paragraph(number)
    entry = generator(family)[number]
    return Instance(family, entry["question"].strip(), FAMILIES[family].think(entry), entry["answer"])


def draw(rng: random.Random, split: str, families: list[str]) -> Iterator[Instance]:
    """Instances of one split without end, families in turn; their order is decided by `rng` alone."""
    while True:
        for family in families:
            found = None
            while found is None or found.split != split:
                found = instance(family, rng.randrange(1 << 40))
            yield found


def pick(split: str, families: list[str], count: int, seed: int = 0) -> list[Instance]:
    """So many different instances of each family, always the same for a seed. ValueError where there are fewer."""
    found: dict[str, Instance] = {}
    for family in families:
        first, drawn = len(found), 0
        for example in draw(random.Random(f"{split}/{family}" + (f"/{seed}" if seed else "")), split, [family]):
            drawn = 0 if example.question not in found else drawn + 1
            found.setdefault(example.question, example)
            if len(found) == first + count:
                break
            if drawn == SEEN_AGAIN:
                raise ValueError(f"{family} has hardly more than {len(found) - first} questions: ask for fewer")
    return list(found.values())


def write(file: Path, examples: Sequence[Instance]) -> None:
    """One object a line."""
    file.write_text("".join(json.dumps(example._asdict()) + "\n" for example in examples), encoding="utf-8")


def read(file: Path) -> list[Instance]:
    """What `write` wrote."""
    return [Instance(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


@cache
def _paragraphs() -> list[tuple[str, str]]:
    """Plain English that comes with every interpreter: topics of Python's reference and their paragraphs."""
    shortest, longest = PARAGRAPH
    return [
        (topic, " ".join(paragraph.split())[:longest])
        for topic, text in sorted(pydoc_data.topics.topics.items())
        for paragraph in text.split("\n\n")
        if len(paragraph) >= shortest and paragraph[0].isalpha()
    ]


def _paragraph(number: int) -> Instance:
    paragraphs = _paragraphs()
    topic, text = paragraphs[number % len(paragraphs)]
    # To be repeated: every token shows that what was said before can be looked up, which all families need.
    return Instance(ENGLISH, f"Repeat what Python's reference says of {topic}: {text}", "", text)
