"""The groups of rows whose statistics are kept apart: the folds of each domain."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import DataError
from .rows import Row, row_hash

MAX_DOMAINS = 1024  # an id column taken for domains has thousands
MAX_JOINT = 256  # domains whose co-activations, [E, E] for each, are kept apart; with more, those of all are together
FOLDS = 10
MAX_GROUPS = 1024  # statistics grow by groups, on the device and in the store


@dataclass(frozen=True)
class Groups:
    """Each domain's rows are in the same number of folds; group g is fold g % folds of domain g // folds.

    A row's fold follows from its id and text alone, so that it is the same in every profile.
    """

    domains: Sequence[str]
    folds: int = 1

    def __len__(self) -> int:
        """G."""
        return len(self.domains) * self.folds

    def of(self, rows: Sequence[Row]) -> list[int]:
        """The group of each row."""
        numbers = {name: number for number, name in enumerate(self.domains)}
        # One fold needs no hash.
        return [
            numbers[row.domain] * self.folds + (row_hash(row) % self.folds if self.folds > 1 else 0) for row in rows
        ]

    @property
    def joint(self) -> tuple[int, ...]:
        """As `Batch.joint`: co-activations are kept by domain, and of all domains together where these are many."""
        if len(self.domains) > MAX_JOINT:
            return (0,) * len(self)
        return tuple(group // self.folds for group in range(len(self))) if self.folds > 1 else ()


def domains_of(rows: Sequence[Row], column: str | None) -> list[str]:
    """The names of all domains, sorted; DataError where there are too many."""
    domains = sorted({row.domain for row in rows})
    if len(domains) > MAX_DOMAINS:
        raise DataError(f"column {column!r} holds {len(domains)} domains, at most {MAX_DOMAINS}")
    return domains


def folds_of(num_domains: int) -> int:
    """In how many folds the rows of so many domains are: fewer where there would be too many groups.

    Each of these numbers divides FOLDS, so that folds of more domains are those of fewer ones, added.
    """
    return next(folds for folds in (FOLDS, 5, 2, 1) if folds * num_domains <= MAX_GROUPS)
