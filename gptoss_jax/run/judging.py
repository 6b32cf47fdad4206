"""The options of `eval`. As `options`, it imports no large package."""

from dataclasses import dataclass
from typing import Any

from ..data.answers import ANSWER_KINDS
from ..errors import OptionError
from .kinds import COUNTED, SWITCH, TEXT, one_of, whole
from .options import Data, Options, Placing, declared_options, option, taken


@dataclass(frozen=True)
class Judging(Options):
    """What is compared with a baseline, and how."""

    seq_len: tuple[int, ...] = option(
        (1024,), whole(1), "The length of blocks, in tokens; given several times, each is measured.", several=0
    )
    blocks: int | None = option(None, whole(1), "The most blocks of each length.", otherwise="all")
    keep: str = option("assistant", COUNTED, "Which tokens are scored, as `profile` counts them.")
    cross_document: bool = option(False, SWITCH, "Attention crosses from row to row of a block.")
    whole_rows: bool = option(
        False,
        SWITCH,
        "Cuts no row: blocks hold whole rows, and are filled up; of a row that is longer its last --seq-len tokens "
        "go through. Otherwise a block may begin inside a reply, which then lacks its prompt.",
    )
    exclude_calibrated: bool = option(
        False, SWITCH, "Leaves out rows that the keep-sets were chosen by; otherwise such rows are an error."
    )
    replies: int = option(0, whole(0), "Answers the first so many rows, of which the replies are compared.")
    answer_column: str | None = option(
        None, TEXT, "The column with the right answer.", otherwise="the final message of the row's own reply"
    )
    answer_kind: str = option(
        "exact",
        one_of(*ANSWER_KINDS),
        f"How replies are judged: {'; '.join(f'{name}: {kind.help}' for name, kind in ANSWER_KINDS.items())}.",
    )
    max_new_tokens: int = option(512, whole(1), "The most tokens that a reply has.")

    def check(self) -> None:
        if len(set(self.seq_len)) < len(self.seq_len):
            raise OptionError("--seq-len is given twice with the same value: leave one out")
        if self.whole_rows and self.cross_document:
            raise OptionError("--whole-rows does not go with --cross-document: leave one out")
        if self.answer_column is not None and not self.replies:
            raise OptionError("--answer-column needs --replies: say how many rows are answered")


# What `eval` takes of other options.
OF_DATA = (
    "data",
    "split",
    "subset",
    "text_column",
    "id_column",
    "domain_column",
    "domain",
    "keep_thinking",
    "skip_bad_rows",
    "part",
    "num_rows",
    "seed",
)
OF_PLACING = ("batch_size", "engine", "memory_gib", "activation_gib", "mesh", "weights", "dtype")


def judged(**values: Any) -> tuple[Data, Judging, Placing]:
    """The option types of `eval` from values by their names; OptionError where it has no option of a name."""
    known = [*OF_DATA, *declared_options(Judging), *OF_PLACING]
    if unknown := sorted({*values} - {*known}):
        raise OptionError(f"there is no option {unknown[0]!r}: there are {', '.join(known)}")
    data = {name: values.pop(name) for name in OF_DATA if name in values}
    return taken(Data, data), taken(Judging, values), taken(Placing, values)
