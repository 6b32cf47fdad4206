"""The job `select --rule greedy`, and its like: rows and a model's source become a ranking, of which every number of
experts is a keep-set."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..data.dataset import Dataset
from ..data.rows import prompts_hash
from ..devices import hosts
from ..errors import DataError, MemoryLimitError, OptionError
from ..files import atomic
from ..files.paths import is_path, place
from ..network.products import pairs
from ..network.source import Source
from ..run import choose
from ..run.artifacts import versions
from ..run.bar import bar
from ..run.job import keeping
from ..run.options import Counting, Data, Placing, by_flag
from ..run.progress import Progress
from ..run.reading import Wanted, make_dataset, tokenizer_of
from ..selection.criteria import GREEDY, GREEDY_COSINE
from ..selection.greedy import Aim, Elimination
from ..selection.mixes import Mix, weights_of
from ..selection.origin import Origin, rows_as_text
from ..selection.ranking import Ranking
from .elimination import ASKED, State, search

FEWEST = 16  # tokens of a domain for each expert of a layer, below which what a choice rests on is chance

# Options that decide what a run computes, beside its rows.
DECIDING = (
    *("--rule", "--max-seq-length", "--truncate", "--tokens", "--domain", "--blend"),
    *("--engine", "--dtype", "--weights"),
)


@dataclass(frozen=True)
class Request:
    """What is asked of the job."""

    model: str
    """The model's name, as the user gave it."""
    data: Data
    counting: Counting
    placing: Placing
    rules: Sequence[str] = (GREEDY,)
    """Those of `ELIMINATIONS` by which experts are eliminated, in one run."""
    domain: Mix = None
    blend: str = "weights"
    """As the option of `select` has it."""
    wanted: Wanted | None = None
    """Says of each row whether it may be taken; by default all may."""

    def __post_init__(self) -> None:
        if self.domain is not None and not self.data.domain_column:
            raise OptionError("--domain needs --domain-column: name the column that holds the domain")
        if self.blend == "maxmin" and (not self.data.domain_column or len(weights_of(self.domain)) == 1):
            raise OptionError("--blend maxmin needs two domains or more: give --domain-column, or name more")
        if self.blend == "maxmin" and isinstance(self.domain, Mapping) and len({*self.domain.values()}) > 1:
            raise OptionError("--blend maxmin finds the weights of domains: name them without any")

    def by_flag(self) -> dict[str, Any]:
        """All options by the names that users know."""
        data = self.data.data
        given = by_flag(replace(self.data, data=data if isinstance(data, str) else "records"), self.placing)
        asked = {"--rule": list(self.rules), "--tokens": self.counting.keep}
        return {**given, **asked, "--domain": self.domain, "--blend": self.blend}


def run(
    request: Request,
    source: Source,
    kept: Progress,
    resume: bool = False,
    tell: Callable[[str], Any] = lambda line: None,
) -> dict[str, Ranking]:
    """Eliminate experts over the rows that the request names, by each rule; `kept` holds what is finished.

    `tell` is given what a user should know, line by line, before the first step.
    """
    if request.data.data and is_path(request.data.data):
        atomic.check_apart(kept.folder, place(str(request.data.data)))
    atomic.check_apart(kept.folder, source.folder, or_inside=True)
    choice = choose.choose(source, request.placing)
    given = choose.place(source, choice.engine, request.placing, request.data.max_seq_length, ASKED)
    tokenizer, counting = tokenizer_of(source), request.counting
    dataset = make_dataset(request.data, counting, source.config, tokenizer, choice.engine, given, request.wanted)
    aim = _aim(request, dataset, source.config.num_experts)
    _check_room(request.placing, dataset, source)
    if hosts.is_first():
        kept.begin(_settings(request, source, dataset, given), resume)
        for line in dataset.remarks:
            tell(line)
        counted = f"{len(dataset.rows):,} rows: {dataset.total_tokens:,} tokens, of which {dataset.kept:,} count"
        tell(f"{counted}; engine {choice.engine}: {choice.reason}; {choose.needs(source, choice, given)}")
    with keeping(kept):
        state = kept.kept(State.from_bytes, "state") or State()
        engine = choose.build(source, choice.engine, given, kept)
        top_k, rules = source.config.top_k, request.rules
        with bar(dataset.tokens_of_process, "tokens", shown=hosts.is_first(), done=state.tokens) as advance:
            found = search(engine, dataset, top_k, aim, rules, kept, state, lambda unit: advance(unit.tokens))
    return {rule: _ranking(rule, of_rule, request, source, dataset) for rule, of_rule in found.items()}


def _aim(request: Request, dataset: Dataset, num_experts: int) -> Aim:
    """Losses are means over the tokens of what is compared. DataError where a domain that decides has too few."""
    names, folds = list(dataset.groups.domains), dataset.groups.folds
    tokens_d, weight_d = np.zeros(len(names)), np.zeros(len(names))
    for batch in dataset.batches():
        counts = batch.weights != 0
        np.add.at(tokens_d, batch.groups[counts] // folds, 1)
        np.add.at(weight_d, batch.groups[counts] // folds, batch.weights[counts])
    tokens_d, weight_d = (np.sum(hosts.exchange(x.tolist()), axis=0) for x in (tokens_d, weight_d))
    shares = weights_of(request.domain)
    each = bool(shares) or request.blend == "maxmin"
    for name, tokens in zip(names, tokens_d, strict=True) if each else [("", tokens_d.sum())]:
        if tokens < FEWEST * num_experts and (not shares or shares.get(name)):
            of = f" of domain {name!r}" if name else ""
            raise DataError(
                f"{tokens:,.0f} tokens{of} count, too few to choose among {num_experts} experts by: give rows with "
                f"{FEWEST * num_experts:,} or more"
            )
    if not each:
        return Aim((1 / weight_d.sum(),) * len(names))
    total = sum(shares.values()) or 1
    factors = [
        shares.get(name, 0 if shares else 1) / total / weight for name, weight in zip(names, weight_d, strict=True)
    ]
    return Aim(tuple(factors), request.blend == "maxmin")


def _check_room(placing: Placing, dataset: Dataset, source: Source) -> None:
    """MemoryLimitError where what a layer's tokens need at once is more than the run may take."""
    E = source.config.num_experts
    needed = 2 * dataset.kept * (len(pairs(E)[0]) + E) * np.dtype(np.float32).itemsize / choose.GIB
    if placing.memory_gib and needed > placing.memory_gib / 2:
        raise MemoryLimitError(
            f"--memory-gib {placing.memory_gib:.3g} is too little: to choose by {dataset.kept:,} tokens takes "
            f"{needed:.2f} GiB of it, which may be half: give more, or fewer --num-rows"
        )


def _settings(request: Request, source: Source, dataset: Dataset, given: choose.Place) -> dict[str, Any]:
    """All that decides what the run computes, to the bit, by the names that users know."""
    return {
        "the model's fingerprint": source.fingerprint(),
        "the rows' hash": prompts_hash(dataset.rows),
        "the versions": {name: versions()[name] for name in ("gptoss-jax", "jax")},
        "the mesh": dict(given.mesh.shape),
        **{name: value for name, value in request.by_flag().items() if name in DECIDING},
        "--batch-size": given.placing.batch_size,
    }


def _ranking(rule: str, found: list[Elimination], request: Request, source: Source, dataset: Dataset) -> Ranking:
    """All experts, the last one to go first."""
    E = source.config.num_experts
    layers = [[*one.kept(E, 1), *reversed(one.gone)] for one in found]
    losses: list[list[float | None]] = [[None, *reversed(one.losses)] for one in found]
    reasons: list[list[str | None]] = [
        ["the last one" if loss is None else f"with {left} left: {loss:.4g}" for left, loss in enumerate(of_layer)]
        for of_layer in losses
    ]
    worst = "the worst domain's" if request.blend == "maxmin" else "the"
    of_tokens = ", of tokens by how far it turns their stream" if rule == GREEDY_COSINE else ""
    origin = Origin(
        criterion=rule,
        domains=weights_of(request.domain),
        rule=f"elimination by {worst} change of the layer's output{of_tokens}",
        model_fingerprint=source.fingerprint(),
        calibration_rows=rows_as_text(dataset.row_hashes),
    )
    return Ranking(layers, origin, None, reasons, losses)
