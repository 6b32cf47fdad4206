"""The options of all jobs, each declared once: its default, what it may be, its help, and what depends on it.

The command line and the Python interface are made from these declarations: an option's name there is the field's here,
and both refuse a value with the same line. This module imports no large package, so that --help answers at once.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from ..config import Form
from ..data.formats import KINDS
from ..data.parts import PARTS
from ..errors import OptionError
from .kinds import (
    CHANNEL_WEIGHTS,
    COORDINATOR,
    COUNTED,
    FORMS,
    KEEP,
    MESH,
    ROWS,
    SIZE,
    SWITCH,
    TEXT,
    WHOLE,
    Kind,
    one_of,
    real,
    whole,
)

T = TypeVar("T")
Merging = Literal["equal", "told", "free"]
"""What profiles that differ in an option become where they are merged: refused, told of in a warning, or neither."""


@dataclass(frozen=True)
class Option:
    """What is declared of an option beside its default."""

    kind: Kind
    help: str
    flag: str = ""
    """Its name on the command line where that is not the field's with dashes."""
    several: int = 1
    """How many values it takes; 0 for any number, each with the flag before it."""
    otherwise: str = ""
    """What --help calls the default where that depends on other things."""
    merging: Merging = "equal"
    required: bool = False
    beside: str = ""
    """The option without which it means nothing."""
    newer: bool = False
    """Whether older profiles say nothing of it: they were made as its default says."""
    resumed: bool = True
    """Whether a run that goes on must have the same value, as where it changes what is computed."""

    def accepts(self, value: Any) -> bool:
        """Whether the option may have this value: of several values a tuple."""
        if self.several == 1:
            return self.kind.accepts(value)
        is_whole = isinstance(value, tuple) and self.several in (0, len(value))
        return is_whole and all(map(self.kind.accepts, value))


def option(default: Any, kind: Kind, help: str, **declared: Any) -> Any:
    """A field of one of the classes below."""
    return dataclasses.field(default=default, metadata={"option": Option(kind, help, **declared)})


@dataclass(frozen=True)
class Options:
    """What the option types share: each checks its values when it is made. OptionError names the first wrong one."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, declared = getattr(self, field.name), declared_options(type(self))[field.name]
            if value is not field.default and not declared.accepts(value):
                raise wrong(flag_of(type(self), field.name), value, declared)
        self.check()

    def check(self) -> None:
        """OptionError where values do not go together."""


def wrong(flag: str, value: Any, declared: Option) -> OptionError:
    """What to raise where an option has a value that it cannot have."""
    each = "" if declared.several == 1 else f"{declared.several or 'any number of'} values (in Python a tuple), each "
    return OptionError(f"{flag} is {value!r}: give {each}{declared.kind.expected}")


def declared_options(kind: type) -> dict[str, Option]:
    """The options of an option type by their names."""
    return {f.name: f.metadata["option"] for f in dataclasses.fields(kind) if "option" in f.metadata}


def flag_of(kind: type, name: str) -> str:
    """The option's name on the command line."""
    return declared_options(kind)[name].flag or "--" + name.replace("_", "-")


@dataclass(frozen=True)
class Data(Options):
    """Which rows are read, and how they become sequences."""

    data: Any = option(
        "",
        ROWS,
        f"A file: {KINDS}; a folder of these, a pattern as data/*.jsonl, or a hub id.",
        required=True,
        merging="free",
        resumed=False,
    )
    split: str = option(
        "train",
        TEXT,
        "The split of a hub dataset, or of a folder with files or folders of such names.",
        merging="free",
    )
    subset: str | None = option(None, TEXT, "The subset of a hub dataset that has several.", merging="free")
    text_column: str | None = option(
        None,
        TEXT,
        "The column with harmony text, or with a conversation.",
        otherwise="that of the conversation, in whichever form",
        merging="free",
    )
    id_column: str = option("id", TEXT, "The column with the row's id; it may be absent.", merging="free")
    domain_column: str | None = option(
        None, TEXT, "The column with the row's domain: statistics are then also kept by domain.", merging="free"
    )
    domain: tuple[str, ...] = option(
        (), TEXT, "Takes only rows of this domain; may be given several times.", several=0, merging="free"
    )
    keep_thinking: bool = option(
        False,
        SWITCH,
        "Keeps the reasoning of earlier turns, which chat templates leave out.",
        merging="told",
        newer=True,
    )
    skip_bad_rows: bool = option(False, SWITCH, "Leaves out rows that cannot be read, and counts them.", merging="free")
    num_rows: int | None = option(
        None, whole(1), "Takes a sample of this many rows by their hashes.", otherwise="all", merging="free"
    )
    seed: int = option(0, WHOLE, "The seed of the row sample.", merging="free")
    part: str = option(
        "all",
        one_of(*PARTS),
        "Takes four fifths of the rows, by their hashes, to choose experts by, or the other fifth to judge the choice.",
        merging="told",
        newer=True,
    )
    until_stable: int | str | None = option(
        None,
        KEEP,
        "Stops when the experts that reap would keep, so many of each layer or per cent as 50%, stayed the same twice: "
        "it looks after 1/16, 1/8, 1/4 and 1/2 of the rows.",
        otherwise="takes all rows",
        merging="free",
    )
    max_seq_length: int = option(
        2048, whole(1), "The most tokens that a row has, or those of a packed block.", merging="told"
    )
    truncate: str = option(
        "left", one_of("left", "right"), "The side that longer rows lose; --pack cuts instead.", merging="told"
    )
    pack: bool = option(False, SWITCH, "Packs rows into full blocks, with EOS after each.", merging="told")
    cross_document: bool = option(False, SWITCH, "With --pack, attention crosses from row to row.", merging="told")

    def check(self) -> None:
        if self.domain and not self.domain_column:
            raise OptionError("--domain needs --domain-column: name the column that holds the domain")
        if self.cross_document and not self.pack:
            raise OptionError("--cross-document needs --pack: padded rows never see one another")


@dataclass(frozen=True)
class Counting(Options):
    """Which tokens count in the statistics, and for how much."""

    keep: str = option(
        "all",
        COUNTED,
        "Which tokens count: all, the assistant's messages with their headers and marks, or their contents alone.",
    )
    channel_weights: dict[str, float] | None = option(
        None, CHANNEL_WEIGHTS, "Weights of channels; others get 0. Sums are weighted, counts are not."
    )
    skip_first: int = option(0, whole(0), "How many first positions of each row or document do not count.")
    eaft: bool = option(False, SWITCH, "Also sums for the criterion eaft_reap, in a second pass over the rows.")
    eaft_quantiles: tuple[float, float] = option(
        (0.15, 0.15),
        real(0.0, most=1.0),
        "The quantiles of probability and entropy that cut the classes.",
        several=2,
        beside="eaft",
    )
    eaft_weights: tuple[float, float, float] = option(
        (1.0, -2.0, 0.25), real(), "The weights of right, of wrong and of other tokens.", several=3, beside="eaft"
    )
    swap: bool = option(
        False, SWITCH, "Also sums for the criterion swap: tokens that count take one expert more.", newer=True
    )

    def check(self) -> None:
        if self.channel_weights and self.keep == "all":
            raise OptionError(
                "--channel-weights goes with --keep reply or --keep assistant: messages of others have no channels"
            )


@dataclass(frozen=True)
class Placing(Options):
    """What the profile runs on, and how."""

    batch_size: int | None = option(
        None, whole(1), "The rows of a step.", otherwise="4 for each of the mesh's data", merging="free"
    )
    engine: str = option(
        "auto",
        one_of("auto", "resident", "streamed"),
        "Resident holds all weights, streamed one layer after the other; auto goes by memory.",
        merging="free",
    )
    memory_gib: float | int | None = option(
        None, real(above=0.0), "The most memory that the run may take.", otherwise="any", merging="free", resumed=False
    )
    activation_gib: float | int = option(
        2.0,
        real(0.0),
        "For the streamed engine: hidden states beyond this are not held in memory, but mapped from files of the "
        "progress.",
        merging="free",
        resumed=False,
    )
    mesh: tuple[int, int] | None = option(
        None, MESH, "How devices share rows and experts.", otherwise="all devices", merging="free"
    )
    mapping: str = option(
        "mesh",
        one_of("mesh", "pmap"),
        "Maps the step over a mesh, or with pmap over the cores of one host, with all weights on each.",
        flag="--map",
        merging="free",
    )
    weights: Form = option("bf16", one_of("bf16", "mxfp4"), "The form of the experts in device memory.", merging="free")
    dtype: str = option("bfloat16", one_of("bfloat16", "float32"), "The type of the computation.", merging="told")
    coordinator: str | None = option(
        None,
        COORDINATOR,
        "Joins many processes: the address of process 0, or auto where the platform knows.",
        merging="free",
        resumed=False,
    )
    num_processes: int | None = option(None, whole(1), "How many processes run this command.", merging="free")
    process_id: int | None = option(None, whole(0), "Which of them this one is.", merging="free", resumed=False)

    def check(self) -> None:
        coordinator, count, process = self.coordinator, self.num_processes, self.process_id
        if (coordinator in (None, "auto")) != (count is process is None) or (count is None) != (process is None):
            raise OptionError(
                "--coordinator host:port goes with --num-processes and --process-id, and auto without them"
            )
        if count is not None and process is not None and process >= count:
            raise OptionError(f"--process-id {process} is too large: of {count} processes the last is {count - 1}")


@dataclass(frozen=True)
class Sampling(Options):
    """How a token is chosen from its logits."""

    temperature: float | int = option(
        1.0, real(0.0), "Divides the logits before the choice; 0 takes the most probable token."
    )
    top_k: int = option(0, whole(0), "Chooses among so many of the most probable tokens; 0 among all.")
    top_p: float | int = option(
        1.0, real(above=0.0, most=1.0), "Chooses among the most probable tokens that together have this probability."
    )
    seed: int = option(0, whole(0, (1 << 32) - 1), "The seed of the choice.")


@dataclass(frozen=True)
class Answering(Options):
    """What is asked of replies."""

    reasoning_effort: str = option("medium", one_of("low", "medium", "high"), "For the chat template.")
    max_new_tokens: int = option(512, whole(1), "The most tokens that a reply has.")
    keep_reply: bool = option(
        False, SWITCH, "Keeps the reply with which a conversation ends, and asks for what comes after it."
    )


@dataclass(frozen=True)
class Writing(Options):
    """The form in which a checkpoint is written."""

    format: str = option("same", one_of("same", "mxfp4", "bf16"), "The form of the experts.")
    max_shard_size: int = option(5 * 10**9, SIZE, "The largest size of a file.", otherwise="5GB")


@dataclass(frozen=True)
class Slice(Options):
    """The step and the TPU slice that `plan` compiles for."""

    topology: str = option("", TEXT, "A TPU slice, e.g. v5e:2x4.", required=True)
    mesh: tuple[int, int] | None = option(
        None, MESH, "How devices share rows and experts.", otherwise="as profile chooses"
    )
    batch_size: int = option(16, whole(1), "The rows of a step.")
    max_seq_length: int = option(2048, whole(1), "The tokens of a row.")
    weights: Form = option("bf16", FORMS, "The form of the experts in device memory.")


PROFILE: tuple[type[Options], ...] = (Data, Counting, Placing)
# What of `Placing` means something where text is generated; the batch size is that of rows side by side.
SIDE_BY_SIDE = (
    *("batch_size", "engine", "memory_gib", "mesh", "weights", "dtype"),
    *("coordinator", "num_processes", "process_id"),
)


def check_together(data: Data, counting: Counting) -> None:
    """OptionError where options of different types do not go together."""
    if counting.skip_first >= data.max_seq_length:
        raise OptionError("--skip-first leaves no position of a row: make it less than --max-seq-length")
    if data.until_stable is not None and counting.eaft:
        raise OptionError(
            "--until-stable does not go with --eaft, whose weights rest on all rows: leave one of them out"
        )


def as_dict(*options: Options) -> dict[str, Any]:
    """All values by their names, as profile.json has them."""
    return {name: getattr(some, name) for some in options for name in declared_options(type(some))}


def by_flag(*options: Options) -> dict[str, Any]:
    """All values by their names on the command line."""
    return {flag_of(type(some), name): getattr(some, name) for some in options for name in declared_options(type(some))}


def taken(kind: type[T], values: dict[str, Any]) -> T:
    """The option type from values by their names, out of which its own are taken."""
    return kind(**{name: values.pop(name) for name in declared_options(kind) if name in values})


def named(**values: Any) -> tuple[Data, Counting, Placing]:
    """The option types from values by their names; OptionError where there is no option of a name."""
    data, counting, placing = taken(Data, values), taken(Counting, values), taken(Placing, values)
    if values:
        known = ", ".join(name for kind in PROFILE for name in declared_options(kind))
        raise OptionError(f"there is no option {min(values)!r}: there are {known}")
    check_together(data, counting)
    return data, counting, placing
