"""What is compared: a model in some variants, and a baseline. Letters: see `config`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..errors import OptionError
from ..files.paths import AnyPath
from ..network.source import Source
from ..run.judging import Judging
from ..run.options import Data, Placing
from ..run.reading import Wanted
from ..selection.keep_sets import KeepSets, are_kept
from .baseline import StoredBaseline
from .passes import Variants

OpenSource = Callable[[str], Source]


@dataclass(frozen=True)
class Request:
    """What is asked of the job."""

    model: str
    """The model's name, as the user gave it."""
    keep_sets: Mapping[str, KeepSets]
    """Of the model, by names for people."""
    data: Data
    judging: Judging
    placing: Placing
    baseline: str | AnyPath | None = None
    """Another model's name, or a file that `write_baseline` made; by default the model with all its experts."""
    write_baseline: AnyPath | None = None
    """The file for what comparisons need of the model, which is then compared with nothing."""
    command: str = ""
    wanted: Wanted | None = None
    """Says of each row whether it may be taken; by default all may."""

    def __post_init__(self) -> None:
        if self.write_baseline is None and not self.keep_sets and self.baseline is None:
            raise OptionError("nothing is compared: give --keep-sets, or --baseline with another model")
        if self.write_baseline is not None and (self.keep_sets or self.baseline is not None or self.judging.replies):
            raise OptionError("--write-baseline is of the model alone: leave out --keep-sets, --baseline and --replies")


class Sides(NamedTuple):
    """The models that are compared."""

    variants: Variants
    """The model: with all its experts first where it is the baseline, then with each of the keep-sets."""
    places: dict[str, int]
    """The variant of each that is compared with the baseline, by its name: of keep-sets, or of the model."""
    baseline: Source | StoredBaseline | None
    """Another model, or what is kept of one."""


def sides(request: Request, open_source: OpenSource) -> Sides:
    """Open the models; RankingError where keep-sets do not fit."""
    source = open_source(request.model)
    everything = np.ones((source.config.num_layers, source.config.num_experts), bool)
    wanted = {}
    for name, keep_sets in request.keep_sets.items():
        keep_sets.check(source.config, name)
        wanted[name] = are_kept(keep_sets.layers, source.config.num_experts)
    baseline: Source | StoredBaseline | None = None
    if request.baseline is not None:
        baseline = StoredBaseline.open(request.baseline) or open_source(str(request.baseline))
        wanted = wanted or {request.model: everything}
    variants, places = [everything] if baseline is None else [], {}
    for name, kept_LE in wanted.items():
        # What keeps all is the model itself, and what keeps the same is computed once.
        same = (number for number, other in enumerate(variants) if (other == kept_LE).all())
        places[name] = next(same, len(variants))
        variants += [kept_LE] if places[name] == len(variants) else []
    is_plain = len(variants) == 1 and variants[0].all()
    return Sides(Variants(source, None if is_plain else np.array(variants)), places, baseline)
