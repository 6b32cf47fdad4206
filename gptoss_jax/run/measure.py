"""All batches of a dataset through an engine: sums, and what they took. Letters: see `config`."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from ..data.dataset import Dataset
from ..devices import hosts
from ..errors import StatisticsError
from ..network.batch import Batch
from ..statistics.eaft import EaftOptions
from ..statistics.store import Sums
from ..statistics.sums import Statistics
from ..statistics.weightings import WEIGHTINGS
from .artifacts import Measured, peak_rss_bytes
from .engine import Clock, Engine, Unit
from .progress import Progress, State
from .steps import Asked


def measure(
    engine: Engine,
    dataset: Dataset,
    progress: Progress,
    state: State,
    advance: Callable[[Unit], Any],
    eaft: EaftOptions | None = None,
    swap: bool = False,
) -> tuple[Sums, Measured]:
    """Sum the statistics of all batches, from `state` on, which `progress` keeps as the run goes.

    `advance` gets each unit when it is finished. Processes of one run have datasets of their own shares of the rows,
    and all return the same. With `eaft` the batches pass twice: its weights rest on quantiles over all tokens. With
    `swap` the statistics have what dropping an expert changes.
    StatisticsError where a statistic is NaN or infinite.
    """
    engine.clock = Clock(state.seconds, state.compile_seconds)
    if not state.weighting:
        one_pass(engine, dataset.batches(), progress, state, advance, Asked(scores=eaft is not None, swap=swap))
        check_computed(state.statistics, dataset.total_tokens)
        if eaft:
            state.weighting, state.units = "eaft", 0
    if eaft:
        weights = _token_weights("eaft", dataset, state, eaft)
        one_pass(engine, _weighted(dataset.batches(), weights), progress, state, advance, Asked())
    assert state.statistics is not None
    sums = Sums(state.statistics, state.weighted, dataset.groups.domains, dataset.row_hashes, dataset.groups.folds)
    took = Measured(dataset.total_tokens, 2 if eaft else 1, state.seconds, state.compile_seconds, peak_rss_bytes())
    return sums, took


def one_pass(
    engine: Engine,
    batches: Iterable[Batch],
    progress: Progress,
    state: State,
    advance: Callable[[Unit], Any],
    asked: Asked,
) -> None:
    """Add what is asked for of all batches but the first `state.units` units to the state, which `progress` keeps."""
    for unit in engine.run(batches, asked, state.units):
        assert unit.statistics is not None, "asked for"
        unit.statistics.check_finite(unit.first_layer)
        state.add(unit, engine.num_layers)
        state.seconds, state.compile_seconds = engine.clock.seconds, engine.clock.compile_seconds
        if hosts.is_first():
            progress.save(state, always=engine.keeps_units)
        advance(unit)


def _token_weights(weighting: str, dataset: Dataset, state: State, options: Any) -> np.ndarray:
    """The weights of this process' kept tokens, in the order of its batches; they rest on all processes' scores."""
    share = dataset.share
    pairs = zip(dataset.batches(), state.scores, strict=True)
    own = np.concatenate([share.own(scores)[batch.weights != 0] for batch, scores in pairs])
    every = np.concatenate(hosts.gather_rows(own if share.leads else own[:0]))
    if np.isnan(every).any():
        raise StatisticsError("the logits became NaN: check model.norm and lm_head in the checkpoint")
    return WEIGHTINGS[weighting](own, every, options)


def check_computed(statistics: Statistics | None, total_tokens: int) -> None:
    """Every expert that a token chose has run, in every layer: no capacity limit, nothing dropped."""
    assert statistics is not None, "a dataset has kept tokens, and so batches"
    computed_L = statistics.computed.sum(1)
    expected = total_tokens * statistics.gate_rank_sum.shape[-1]
    assert (computed_L == expected).all(), f"{computed_L.tolist()} pairs were computed, {expected} were chosen"


def _weighted(batches: Iterable[Batch], weights: np.ndarray) -> Iterator[Batch]:
    """The batches, with one more weight for each kept token in their order."""
    start = 0
    for batch in batches:
        kept = batch.weights != 0
        stop = start + int(kept.sum())
        weighted = np.array(batch.weights)
        weighted[kept] *= weights[start:stop]
        start = stop
        yield replace(batch, weights=weighted)
