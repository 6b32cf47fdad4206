"""The options of the commands about fingerprints. As `options`, it imports no large package."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..errors import OptionError
from .kinds import KEEP, SWITCH, TEXT, one_of
from .options import Options, option

if TYPE_CHECKING:
    from ..data.rows import Row


# What of `Data` means something where questions are read: the seed of a sample is that of the answers.
RECORDED = ("data", "split", "subset", "text_column", "id_column", "num_rows", "part", "skip_bad_rows")
ANSWERED = ("reasoning_effort", "max_new_tokens")  # and of `Answering`: a row's own reply is never kept


@dataclass(frozen=True)
class Asked(Options):
    """Of which benchmark and category questions are."""

    benchmark: str | None = option(
        None, TEXT, "The benchmark that all questions are of.", otherwise="what --benchmark-column holds"
    )
    benchmark_column: str = option("benchmark", TEXT, "The column with the benchmark of a question.")
    category_column: str = option("category", TEXT, "The column with its category.")

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns whose values, joined by a slash, become a row's domain."""
        return (self.category_column,) if self.benchmark is not None else (self.benchmark_column, self.category_column)

    def named(self, row: "Row") -> "Row":
        """The row whose domain is BENCHMARK/CATEGORY."""
        return row if self.benchmark is None else replace(row, domain=f"{self.benchmark}/{row.domain}")

    def check(self) -> None:
        if self.benchmark is not None and "/" in self.benchmark:
            raise OptionError(f"--benchmark is {self.benchmark!r}: give a name without a slash")


@dataclass(frozen=True)
class Used(Options):
    """Whose use of experts is ranked, and how it is counted."""

    domain: str | None = option(None, TEXT, "Ranks by the answers of this domain.", otherwise="all answers")
    category: tuple[str, ...] = option(
        (),
        TEXT,
        "In the place of --domain, ranks by the answers of BENCHMARK/CATEGORY, in which * stands for any text; may be "
        "given several times.",
        several=0,
    )
    segment: str = option("both", one_of("think", "answer", "both"), "Which part of the answers counts.")
    weight: str = option(
        "sample",
        one_of("sample", "token"),
        "Whether each answer or each token has the same say. By tokens needs counts, which published summaries lack.",
    )
    by: str = option(
        "frequency",
        one_of("frequency", "specificity"),
        "The score: how much the answers use an expert, or how many times as much as all answers of the dataset do.",
    )
    mode: str = option(
        "pure",
        one_of("pure", "interleaved"),
        "Interleaved takes one expert of the domain, one of those that all answers use most, and so on, as the "
        "published rankings do.",
    )
    reverse: bool = option(False, SWITCH, "Ranks the other way round; experts that nobody chose stay last.")
    keep: int | str | None = option(
        None,
        KEEP,
        "Also writes keep.json beside the ranking: the best so many experts of each layer, or per cent as 50%.",
        otherwise="writes the ranking alone",
    )

    def check(self) -> None:
        if self.domain is not None and self.category:
            raise OptionError("--category goes in the place of --domain: leave one of them out")
        if self.by == "specificity" and self.domain is None and not self.category:
            raise OptionError("--by specificity compares with all answers: name a --domain or a --category")
