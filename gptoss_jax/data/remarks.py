"""What a user should know of data that was not taken as it stands: said once, counted."""

from dataclasses import dataclass, field

from ..errors import plain

FEW = 3  # so many examples are all named


@dataclass
class Remarks:
    """Remarks on rows and files, collected while they are read. Equal ones are one, counted, with its first examples.

    Example:
        >>> remarks = Remarks()
        >>> for number in range(1, 6):
        ...     remarks.say("taken for ShareGPT", f"rows.jsonl, line {number}")
        >>> remarks.lines()
        ['taken for ShareGPT: 5 rows, first rows.jsonl, line 1']
    """

    _counts: dict[tuple[str, str], int] = field(default_factory=dict)
    _examples: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def say(self, kind: str, example: str, noun: str = "row") -> None:
        """Remark `kind` on a row, or on what `noun` names; `example` says where that stands."""
        key = kind, noun
        self._counts[key] = self._counts.get(key, 0) + 1
        examples = self._examples.setdefault(key, [])
        if len(examples) < FEW:
            examples.append(plain(example))

    def lines(self) -> list[str]:
        """One line for each kind, in the order in which they were first said."""
        lines = []
        for (kind, noun), count in self._counts.items():
            examples = self._examples[kind, noun]
            named = "; ".join(examples) if count <= FEW else f"first {examples[0]}"
            lines.append(f"{plain(kind)}: {count:,} {noun}{'s' * (count > 1)}, {named}")
        return lines
