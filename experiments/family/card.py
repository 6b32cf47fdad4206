"""What the cards and the table of the family say beyond the card of any pruned checkpoint."""

import json
from collections.abc import Sequence

import numpy as np

from gptoss_jax.evaluation.intervals import Estimate
from gptoss_jax.evaluation.markdown import interval, table
from gptoss_jax.evaluation.replies import widened
from gptoss_jax.generation.answer import Reply

from ..families import results
from ..families.results import Results
from .members import Member
from .questions import Asked

USAGE = "\n## Usage\n"  # of every card
HEAD = [
    *("model", "parameters", "full", "pruned", "random", "pruned less full", "pruned less random"),
    *("others: full", "others: pruned", "others: random"),
]


def sections(name: str, family: str, found: Results, answers: Sequence[tuple[Asked, Reply]]) -> str:
    """The comparison on the family's questions and on the others', the answers, and how to ask more."""
    return "\n\n".join([_compared(family, found), _answers(family, answers), _asking(name, answers[0][0].question)])


def extended(text: str, more: str) -> str:
    """A card with more sections before its usage."""
    head, usage, rest = text.partition(USAGE)
    assert usage, "the card of a pruned checkpoint has a section on usage"
    return f"{head}\n{more}\n{usage}{rest}"


def _exact(found: Results, family: str) -> dict[str, np.ndarray]:
    """Right or wrong, by question: of the full model, the family's own, and the mean of those drawn at random."""
    drawn = [answers for name, answers in found.answers.items() if name.startswith("random ")]
    return {"full": found.baseline, "pruned": found.answers[family], "random": results.mean(drawn)}


def _compared(family: str, found: Results) -> str:
    own, exact = found.domains == family, _exact(found, family)
    lines = [
        [
            name,
            interval(results.exact(answers[own]), True),
            "" if name == "pruned" else interval(_less(exact["pruned"], answers, own, found), True, True),
            interval(results.exact(answers[~own]), True) if (~own).any() else "",
        ]
        for name, answers in exact.items()
    ]
    head = ["", f"exact match of {family}", "pruned less that", "exact match of the others"]
    return "\n".join(
        [
            "## The family's own questions",
            "",
            f"Exact match of greedy replies to {own.sum()} held-out questions of `{family}` and {(~own).sum()} of "
            "other families. Questions are for choosing experts or for measuring by their SHA-256, and none is for "
            "both. In parentheses stand 95% intervals; differences are paired by question. `random` is the mean of "
            "keep-sets as large, drawn at random.",
            "",
            *table(head, lines),
        ]
    )


def _less(one: np.ndarray, other: np.ndarray, among: np.ndarray, found: Results) -> Estimate:
    difference = results.exact_difference([one[among]], [other[among]], [np.array(found.ids)[among]])
    return widened(difference, int(among.sum()))


def _answers(family: str, answers: Sequence[tuple[Asked, Reply]]) -> str:
    rule = (
        f"The held-out questions of `{family}` whose SHA-256 is lowest, with what this checkpoint says, greedily, "
        "right or wrong."
    )
    shown = [
        f"### Answer {number}\n\n{_block(asked.question)}\n\nIt says:\n\n{_block(reply.text)}\n\n"
        f"The right answer is `{asked.answer}`."
        for number, (asked, reply) in enumerate(answers, 1)
    ]
    return "\n\n".join([f"## {len(answers)} answers\n\n{rule}", *shown])


def _block(text: str) -> str:
    """Code by its indentation, which no text can end."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _asking(name: str, question: str) -> str:
    return f"""## Usage with gptoss-jax

```python
import gptoss_jax as gj

path = "{name}"  # the folder of this model
(reply,) = gj.generate(path, {json.dumps(question)}, temperature=0, max_new_tokens=128)
print(reply.text)
```"""


def family_table(made: Sequence[tuple[Member, Results]]) -> str:
    """README.md of the family."""
    lines = [_line(member, found) for member, found in made]
    return "\n".join(
        [
            "# Models of nano by family",
            "",
            "Experts are those that the thoughts of nano's own answers to a family's questions use more than its "
            "answers to all families do. Exact match of greedy replies "
            "to held-out questions, of the model's family and of the others, with 95% intervals; differences are "
            "paired by question. `random` is the mean of keep-sets as large, drawn at random.",
            "",
            *table(HEAD, lines),
            "",
        ]
    )


def _line(member: Member, found: Results) -> list[str]:
    own, exact = found.domains == member.family, _exact(found, member.family)
    differences = [interval(_less(exact["pruned"], exact[name], own, found), True, True) for name in ("full", "random")]
    return [
        f"[{member.name}](models/{member.name})",
        f"{member.parameters:,}",
        *(interval(results.exact(answers[own]), True) for answers in exact.values()),
        *differences,
        *(interval(results.exact(answers[~own]), True) if (~own).any() else "" for answers in exact.values()),
    ]
