"""The options of commands that choose experts. As `options`, it imports no large package."""

from dataclasses import dataclass
from typing import Any

from ..errors import OptionError
from ..selection.criteria import CRITERIA, ELIMINATIONS, LETTERS
from .kinds import COUNTED, DOMAINS, KEEPS, ROWS, SHARES, TEXT, one_of, real, whole
from .options import Options, option


@dataclass(frozen=True)
class Ranked(Options):
    """By what experts are ranked, and over which rows of a profile."""

    criterion: str = option(
        "reap",
        one_of(*CRITERIA),
        "\n".join(
            [
                f"The score; experts with a higher one stay. {LETTERS}\n\n\b",
                *(f"{criterion.name}: {criterion.help}" for criterion in CRITERIA.values()),
            ]
        ),
    )
    domain: Any = option(
        None,
        DOMAINS,
        "Counts the rows of this domain alone; given several times, a mix in which each has the share that its weight "
        "says, 1 where none is given.",
        otherwise="all rows",
    )
    seed: int = option(0, whole(0), "The seed of criteria that draw.")
    min_count: int = option(
        0,
        whole(0),
        "Ranks experts that fewer tokens chose behind all others, by falling reap_sum: a mean over a few tokens is "
        "chance. 0 ranks all by the criterion, as published rankings do.",
    )


RULES = ("score", *ELIMINATIONS)
# What a search takes of other options; --domain and --seed are those of `Ranked`.
OF_DATA = (
    *("split", "subset", "text_column", "id_column", "domain_column", "keep_thinking", "skip_bad_rows"),
    *("part", "num_rows", "max_seq_length", "truncate"),
)
OF_JUDGING = ("replies", "answer_column", "answer_kind", "max_new_tokens")  # with --pick
OF_PLACING = (
    *("batch_size", "engine", "memory_gib", "activation_gib", "mesh", "weights", "dtype"),
    *("coordinator", "num_processes", "process_id"),
)


@dataclass(frozen=True)
class Searching(Options):
    """How keep-sets are found by running the model."""

    rule: str = option(
        "score",
        one_of(*RULES),
        "How experts are chosen. score: the best by --criterion, from a profile. From a MODEL and --data: "
        + "; ".join(f"{name}: {help}" for name, help in ELIMINATIONS.items())
        + ".",
    )
    data: Any = option(
        "",
        ROWS,
        "With such a rule or --pick, the rows by which experts are chosen, as profile takes them. With --domain, a "
        "fifth of the rows of other domains shows what is lost there.",
    )
    tokens: str = option("all", COUNTED, "With such a rule or --pick, which tokens count, as --keep of profile says.")
    pick: tuple[str, ...] = option(
        (),
        TEXT,
        "Judges candidates on a fifth of the rows of --data, and takes the one with which MODEL's expectations move "
        f"least: {', '.join(ELIMINATIONS)}, a criterion, or a keep.json; may be given several times.",
        several=0,
    )
    scored: str = option(
        "assistant",
        COUNTED,
        "Which tokens judge: candidates of --pick, and what other domains lose than those that --domain names.",
    )


@dataclass(frozen=True)
class Keeping(Options):
    """How many experts stay, and what their choice is to hold."""

    keep: Any = option(
        None,
        KEEPS,
        "How many experts to keep in each layer, or how many per cent of them; given several times, sets of which each "
        "smaller one lies inside the larger, written as keep-16.json, keep-12.json beside --out.",
    )
    budget_gib: float | int | None = option(
        None,
        real(above=0.0),
        "Keeps as many experts as the pruned checkpoint's weights, in the form of --format, have room for in so many "
        "GiB; with --context, weights and KV cache together.",
    )
    coverage: float | int | None = option(
        None,
        real(above=0.0, most=1.0),
        "Keeps the fewest experts that hold this share of every layer's score; of its reap_sum where the criterion is "
        "a mean, since means do not add up.",
    )
    blend: str = option(
        "weights",
        one_of("weights", "maxmin"),
        "How domains become one choice: by their weights, or as the sets whose worst domain keeps the most of what "
        "its own best experts would hold.",
    )
    floor: Any = option(
        None,
        SHARES,
        "The least share of what its own best experts would hold that a domain keeps; may be given several times. The "
        "sets hold as much as they can of all rows, or of the mix of --domain.",
    )
    protect_outliers: int = option(
        0, whole(0), "Keeps so many experts of the whole model whatever they score: those with the largest activations."
    )
    context: int | None = option(
        None, whole(1), "With --budget-gib, counts the KV cache of rows of so many tokens, in bfloat16."
    )
    rows: int | None = option(None, whole(1), "With --context, of so many rows.", otherwise="1")
    max_kl: float | int | None = option(
        None,
        real(above=0.0),
        "With --pick, keeps the fewest experts with which the KL of all of MODEL, in nats a token, is at most this: "
        "the upper end of its interval.",
    )
    min_match: float | int | None = option(
        None,
        real(above=0.0, most=1.0),
        "With --pick and --replies, keeps the fewest experts with which at least this share of the answers is right: "
        "the lower end of its interval.",
    )

    @property
    def bounds(self) -> bool:
        """Whether what is measured decides how many stay."""
        return self.max_kl is not None or self.min_match is not None

    def check(self) -> None:
        given = [self.keep, self.budget_gib, self.coverage, True if self.bounds else None]
        if sum(value is not None for value in given) != 1:
            raise OptionError("select takes one of --keep, --budget-gib, --coverage, and --max-kl or --min-match")
        if self.context is not None and self.budget_gib is None:
            raise OptionError("--context goes with --budget-gib: it counts the KV cache in")
        if self.rows is not None and self.context is None:
            raise OptionError("--rows goes with --context: it is of a KV cache")
        if self.blend == "maxmin" and self.floor is not None:
            raise OptionError("--floor does not go with --blend maxmin, which raises the lowest share as far as it can")
        if self.coverage is not None and (self.blend == "maxmin" or self.floor is not None):
            raise OptionError("--coverage chooses by the ranking: it goes without --blend maxmin and --floor")
