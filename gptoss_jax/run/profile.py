"""The job `profile`: documents through the model, statistics summed. Letters: see `config`."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..data.batching import Document
from ..devices import hosts
from ..errors import DataError, StatisticsError
from ..network.batch import Batch
from ..statistics.eaft import EaftOptions, class_weights, cuts
from ..statistics.sums import Statistics
from .artifacts import Measured, peak_rss_bytes
from .engine import Clock, Engine
from .progress import Progress, State


def check_kept(batches: Iterable[Batch]) -> None:
    """DataError where no token of any batch counts."""
    if not any(hosts.exchange(sum(int((batch.weights != 0).sum()) for batch in batches))):
        raise DataError(
            "no token is kept: no row holds harmony text by the assistant within the limits; "
            "check --text-column and --skip-first, or use --keep all to count every token"
        )


def run(
    engine: Engine,
    make_batches: Callable[[], Iterable[Batch]],
    share: hosts.Share,
    progress: Progress,
    state: State,
    advance: Callable[[float], Any],
    eaft: EaftOptions | None = None,
) -> Measured:
    """Sum the statistics of all batches, from `state` on, which `progress` keeps as the run goes.

    `advance` gets the tokens of each unit. Processes of one run have batches of their own `share` of the
    rows, and all return the same. With `eaft` the batches pass twice: its weights rest on quantiles over all
    tokens. StatisticsError where a statistic is NaN or infinite.
    """
    own_tokens = sum(batch.num_tokens for batch in make_batches())
    total_tokens = sum(hosts.exchange(own_tokens if share.leads else 0))
    engine.clock = Clock(state.seconds, state.compile_seconds)
    if not state.weighing:
        _pass(engine, make_batches(), progress, state, advance, scored=eaft is not None)
        check_computed(state.statistics, total_tokens)
        if eaft:
            state.weighing, state.units = True, 0
    if eaft:
        weights = _class_weights(make_batches(), state.scores, eaft, share)
        _pass(engine, _weighted(make_batches(), weights), progress, state, advance)
    assert state.statistics is not None
    return Measured(
        state.statistics, state.weighted, total_tokens, state.seconds, state.compile_seconds, peak_rss_bytes()
    )


def _pass(
    engine: Engine,
    batches: Iterable[Batch],
    progress: Progress,
    state: State,
    advance: Callable[[float], Any],
    scored: bool = False,
) -> None:
    for unit in engine.run(batches, scored, state.units):
        unit.statistics.check_finite(unit.first_layer)
        state.add(unit, engine.num_layers)
        state.seconds, state.compile_seconds = engine.clock.seconds, engine.clock.compile_seconds
        if hosts.is_first():
            progress.save(state, always=engine.keeps_units)
        advance(unit.tokens)


def _class_weights(
    batches: Iterable[Batch], scores: Sequence[np.ndarray], eaft: EaftOptions, share: hosts.Share
) -> np.ndarray:
    """The weights of this process' kept tokens, in the order of its batches; the cuts are of all processes'."""
    own = np.concatenate([share.own(s)[batch.weights != 0] for batch, s in zip(batches, scores, strict=True)])
    every = np.concatenate(hosts.gather_rows(own if share.leads else own[:0]))
    if np.isnan(every).any():
        raise StatisticsError("the logits became NaN: check model.norm and lm_head in the checkpoint")
    return class_weights(own[:, 0], own[:, 1], cuts(every[:, 0], every[:, 1], eaft), eaft)


def check_computed(statistics: Statistics | None, total_tokens: int) -> None:
    """Every expert that a token chose has run, in every layer: no capacity limit, nothing dropped."""
    assert statistics is not None, "check_kept finds that there are batches"
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


def count_rows(documents: Sequence[Document]) -> tuple[int, int]:
    """Rows that were truncated, and rows without a kept token, of all processes."""
    own = [sum(d.truncated for d in documents), sum(not (d.weights > 0).any() for d in documents)]
    truncated, empty = np.sum(hosts.exchange(own), axis=0).tolist()
    return truncated, empty
