"""What keep-sets lose on domains that they were not chosen for: a fifth of these domains' rows, by their hashes, shows
it, in KL of the whole model, each keep-set as a soft prune."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..data.remarks import Remarks
from ..data.rows import Row, is_held_out
from ..errors import DataError
from ..evaluation.sides import Request as Judged
from ..evaluation.summary import Entry
from ..files.paths import AnyPath
from ..network.source import Source
from ..run.judging import Judging
from ..run.options import Data, Placing
from ..run.reading import read, tokenizer_of
from ..selection.keep_sets import KeepSets, Lost
from .pick import evaluated


@dataclass(frozen=True)
class Request:
    """What is asked: rows of `data` whose domains it does not name."""

    model: str
    data: Data
    judging: Judging
    placing: Placing

    def is_elsewhere(self, row: Row) -> bool:
        """Whether what is lost shows on it."""
        return row.domain not in self.data.domain and is_held_out(row)


def lost(
    sets: Mapping[str, KeepSets], request: Request, source: Source, folder: AnyPath, tell: Callable[[str], Any]
) -> dict[str, Lost]:
    """Of each of the keep-sets, by its name, what every other domain loses; empty where no row is of one.

    `folder` keeps what is finished. `tell` is given what cannot be measured, and why.
    """
    every = replace(request.data, domain=())
    try:
        rows = read(every, tokenizer_of(source), Remarks(), wanted=request.is_elsewhere)
    except DataError:  # there is none: the others have been read
        return {}
    domains = sorted({row.domain for row in rows})
    runs = {name: one for name, one in sets.items() if min(map(len, one.layers)) >= source.config.top_k}
    if left := sorted({*sets} - {*runs}):
        tell(f"what other domains lose by {', '.join(left)} is not measured: fewer experts stay than each token uses")
    if not runs:
        return {}
    asked = Judged(request.model, runs, every, request.judging, request.placing, wanted=request.is_elsewhere)
    try:
        summary = evaluated(asked, source, folder, tell)
    except DataError as error:
        tell(f"what other domains lose is not measured: {error}")
        return {}
    return {entry.name: _by_domain(entry, domains) for entry in summary.entries}


def _by_domain(entry: Entry, domains: list[str]) -> Lost:
    """The KL of each with its interval; of a single domain that of all rows. One of which a single row is held out is
    left out: it has no interval."""
    overall = next(iter(entry.quality.values()))
    of = entry.by_domain if len(domains) > 1 else {domains[0]: overall}
    kls = {name: quality.estimates["kl"] for name, quality in of.items()}
    return {name: [kl.value, kl.low, kl.high] for name, kl in kls.items()}
