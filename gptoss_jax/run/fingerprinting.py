"""The options of the commands about fingerprints. As `options`, it imports no large package."""

from dataclasses import dataclass

from ..errors import OptionError
from .kinds import KEEP, SWITCH, TEXT, one_of
from .options import Options, option


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
