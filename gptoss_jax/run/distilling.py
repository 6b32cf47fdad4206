"""The options of `heal`. As `options`, it imports no large package."""

from dataclasses import dataclass
from typing import Any

from ..errors import OptionError
from .kinds import COUNTED, one_of, real, whole
from .options import Data, Options, Placing, declared_options, option, taken

HEAL = "heal.json"  # what a healing leaves beside its checkpoint
# Where none is given: what was found best for nano, by what is trained, and nano's hidden_size.
RATES, NANO_WIDTH = {"router": 1e-2, "small": 3e-3}, 160
PASSES = ("routers", "biases")  # of --reconstruct, in their order


@dataclass(frozen=True)
class Distilling(Options):
    """How what is left of a model learns to expect what the whole model expects."""

    steps: int = option(
        60, whole(0), "Steps of Adam, whose rate falls to zero as a cosine; with --reconstruct there may be none."
    )
    rate: float | int | None = option(
        None,
        real(above=0.0),
        f"The rate of learning of the first step, for a model as wide as nano, {NANO_WIDTH}: the wider a model, the "
        "less rows of routers learn by it, since a logit sums over them.",
        otherwise=", ".join(f"{rate:g} of {kind}" for kind, rate in RATES.items()),
    )
    train: str = option(
        "router",
        one_of(*RATES),
        "What is trained. router: the routers' rows and biases of the experts that stay. small: these, and norms, "
        "attention's biases and sinks, and experts' biases.",
    )
    reconstruct: tuple[str, ...] = option(
        (),
        one_of(*PASSES),
        "Before the training, layer by layer, brings what is left of a layer near what the whole model has there. "
        "routers: their rows and biases, by a short Adam. biases: those that the experts add last, in closed form. May "
        "be given several times; of both the routers come first. What does not lower the KL on rows that are held out "
        "is left out.",
        several=0,
    )
    teacher: str = option(
        "hidden",
        one_of("hidden", "top"),
        "What is kept of the whole model. hidden: its last hidden states, from which all probabilities follow. top: "
        "those of its 64 most probable tokens and of the rest together, which takes less room.",
    )
    tokens: str = option("reply", COUNTED, "Which tokens are learnt, as --keep of profile says.")
    check_every: int = option(
        10,
        whole(1),
        "After so many steps rows that are held out are looked at: the state that does best there is kept, and three "
        "looks without a better one end the training.",
    )

    @property
    def first_rate(self) -> float:
        """The rate of the first step."""
        return RATES[self.train] if self.rate is None else self.rate

    def check(self) -> None:
        if not self.steps and not self.reconstruct:
            raise OptionError("nothing is to be trained: give --steps of at least 1, or --reconstruct")


# What `heal` takes of other options.
OF_DATA = (
    *("data", "split", "subset", "text_column", "id_column", "domain_column", "domain", "keep_thinking"),
    *("skip_bad_rows", "part", "num_rows", "seed", "max_seq_length", "truncate"),
)
OF_PLACING = (
    *("batch_size", "engine", "memory_gib", "mesh", "weights", "dtype"),
    *("coordinator", "num_processes", "process_id"),
)


def distilled(**values: Any) -> tuple[Data, Distilling, Placing]:
    """The option types of `heal` from values by their names; OptionError where it has no option of a name."""
    known = [*OF_DATA, *declared_options(Distilling), *OF_PLACING]
    if unknown := sorted({*values} - {*known}):
        raise OptionError(f"there is no option {unknown[0]!r} of heal: there are {', '.join(known)}")
    data = taken(Data, {name: values.pop(name) for name in OF_DATA if name in values})
    distilling = taken(Distilling, values)
    return data, distilling, taken(Placing, values)
