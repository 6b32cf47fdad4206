"""The job `profile`: documents through the model, statistics summed. Letters: see `config`."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from . import hosts
from .artifacts import Measured, peak_rss_bytes
from .batching import Batch, Document
from .eaft import EaftOptions, class_weights, cuts
from .errors import DataError, MeshError, StatisticsError
from .forward import Mapped, Profiled, Step, profile_step, scored_profile_step
from .model import GptOss
from .saliency import Statistics
from .topologies import does_not_fit


class _Timed:
    """A mapped step, compiled once a shape, with the time of compiling kept apart."""

    def __init__(self, mapped: Mapped, model: GptOss):
        self.mapped, self.model = mapped, model
        self.compiled: dict[tuple[int, ...], Any] = {}
        self.seconds = self.compile_seconds = 0.0

    def __call__(self, batch: Batch) -> Profiled:
        start = time.perf_counter()
        placed = jax.tree.map(self.mapped.put, batch)
        shape = batch.token_ids.shape
        if shape not in self.compiled:
            with _room_for(shape):
                self.compiled[shape] = self.mapped.step.lower(self.model, placed).compile()
        ready = time.perf_counter()
        result = jax.block_until_ready(self.compiled[shape](self.model, placed))
        self.compile_seconds += ready - start
        self.seconds += time.perf_counter() - ready
        return hosts.gather(result)


@contextmanager
def _room_for(shape: tuple[int, ...]) -> Iterator[None]:
    """MeshError where the compiler finds that a step does not fit into a device's memory."""
    try:
        yield
    except Exception as error:
        if not (amounts := does_not_fit(error)):
            raise
        needed, available = (amount / (1 << 30) for amount in amounts)
        raise MeshError(
            f"a step of {shape[0]} × {shape[1]} tokens needs {needed:.2f} GiB of {available:.2f} on each device, "
            f"{needed - available:.2f} too much: take a smaller --batch-size, a larger expert in --mesh, or --weights "
            "mxfp4; gptoss-jax plan finds what fits"
        ) from error


def check_kept(batches: Iterable[Batch]) -> None:
    """DataError where no token of any batch counts."""
    if not any(hosts.exchange(sum(int((batch.weights != 0).sum()) for batch in batches))):
        raise DataError(
            "no token is kept: no row holds harmony text by the assistant within the limits; "
            "check --text-column and --skip-first, or use --keep all to count every token"
        )


def run(
    model: GptOss,
    mapping: Callable[[Step], Mapped],
    make_batches: Callable[[], Iterable[Batch]],
    share: hosts.Share,
    progress: Callable[[int], Any],
    eaft: EaftOptions | None = None,
) -> Measured:
    """Sum the statistics of all batches, each step mapped over devices by `mapping`.

    `progress` gets the tokens of each batch. Processes of one run have batches of their own `share` of the
    rows, and all return the same. With `eaft` the batches pass twice: its weights rest on quantiles over all
    tokens. StatisticsError where a statistic is NaN or infinite.
    """
    step = _Timed(mapping(scored_profile_step if eaft else profile_step), model)
    statistics: Statistics | None = None
    scores: list[np.ndarray] = []
    own_tokens = 0
    for batch in make_batches():
        result = step(batch)
        if result.scores is not None:
            kept = batch.weights != 0
            own = [share.own(np.asarray(x), step.mapped.data_size)[kept] for x in result.scores]
            scores.append(np.stack(own, axis=-1))
        own_tokens += batch.num_tokens
        step_statistics = result.statistics.to_host()
        step_statistics.check_finite()
        statistics = step_statistics if statistics is None else statistics.merge(step_statistics)
        progress(batch.num_tokens)
    assert statistics is not None, "check_kept finds that there are batches"
    total_tokens = sum(hosts.exchange(own_tokens if share.leads else 0))
    check_computed(statistics, total_tokens)
    timed, weighted = [step], None
    if eaft:
        timed.append(_Timed(mapping(profile_step), model))
        weights = _class_weights(np.concatenate(scores), eaft, share)
        weighted = _weighted_pass(timed[1], make_batches(), weights, progress)
    return Measured(
        statistics,
        weighted,
        total_tokens,
        seconds=sum(t.seconds for t in timed),
        compile_seconds=sum(t.compile_seconds for t in timed),
        peak_rss_bytes=peak_rss_bytes(),
    )


def _class_weights(own: np.ndarray, eaft: EaftOptions, share: hosts.Share) -> np.ndarray:
    """The weights of this process' kept tokens, from their scores [n, 2]; the cuts are of all processes'."""
    every = np.concatenate(hosts.gather_rows(own if share.leads else own[:0]))
    if np.isnan(every).any():
        raise StatisticsError("the logits became NaN: check model.norm and lm_head in the checkpoint")
    return class_weights(own[:, 0], own[:, 1], cuts(every[:, 0], every[:, 1], eaft), eaft)


def check_computed(statistics: Statistics, total_tokens: int) -> None:
    """Every expert that a token chose has run, in every layer: no capacity limit, nothing dropped."""
    computed_L = statistics.computed.sum(1)
    expected = total_tokens * statistics.gate_rank_sum.shape[-1]
    assert (computed_L == expected).all(), f"{computed_L.tolist()} pairs were computed, {expected} were chosen"


def _weighted_pass(
    step: _Timed, batches: Iterable[Batch], weights: np.ndarray, progress: Callable[[int], Any]
) -> np.ndarray:
    """Σ w·g·n, float64 [L, G, E], with one weight for each kept token in the order of the batches."""
    total: Any = 0.0
    start = 0
    for batch in batches:
        kept = batch.weights != 0
        stop = start + int(kept.sum())
        weighted = np.array(batch.weights)
        weighted[kept] *= weights[start:stop]
        start = stop
        statistics = step(replace(batch, weights=weighted)).statistics.to_host()
        statistics.check_finite()
        total = total + statistics.gate_norm_sum
        progress(batch.num_tokens)
    return total


def count_rows(documents: Sequence[Document]) -> tuple[int, int]:
    """Rows that were truncated, and rows without a kept token, of all processes."""
    own = [sum(d.truncated for d in documents), sum(not (d.weights > 0).any() for d in documents)]
    truncated, empty = np.sum(hosts.exchange(own), axis=0).tolist()
    return truncated, empty
