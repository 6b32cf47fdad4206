"""All batches of a dataset through an engine, and every layer's elimination from what they gave.

A layer's tokens are kept in the run's progress until all batches have passed it. Letters: see `config`.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import safetensors.numpy

from ..data.dataset import Dataset
from ..devices import hosts
from ..errors import StatisticsError
from ..run.engine import Clock, Engine, Unit
from ..run.progress import Progress
from ..run.steps import Asked
from ..selection.greedy import Aim, Elimination, Grams, eliminate, weighted

ASKED = Asked(statistics=False, grams=True)


@dataclass
class State:
    """How far a run is."""

    units: int = 0
    tokens: float = 0.0
    seconds: float = 0.0
    compile_seconds: float = 0.0
    found: dict[str, list[Elimination]] = field(default_factory=dict)
    """Of each rule those of the first layers."""

    def to_bytes(self) -> bytes:
        """Write the state as a file's bytes."""
        return json.dumps(vars(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "State":
        """Read what `to_bytes` writes."""
        kept = json.loads(data)
        return cls(**kept | {"found": _of_lists(kept["found"])})


def _of_lists(found: Mapping[str, Any]) -> dict[str, list[Elimination]]:
    """What JSON keeps of them."""
    return {rule: [Elimination(tuple(gone), tuple(losses)) for gone, losses in of] for rule, of in found.items()}


def search(
    engine: Engine,
    dataset: Dataset,
    top_k: int,
    aim: Aim,
    rules: Sequence[str],
    progress: Progress,
    state: State,
    advance: Callable[[Unit], Any],
) -> dict[str, list[Elimination]]:
    """By each rule the elimination of each layer down to one expert, from `state` on, which `progress` keeps as the run
    goes.

    The model runs with all its experts: each layer is judged at the inputs of the full model. Process 0 keeps what
    layers give, and eliminates; all return the same. StatisticsError where a layer gives what is not finite.
    """
    engine.clock = Clock(state.seconds, state.compile_seconds)
    batches = list(dataset.batches())
    state.found = state.found or {rule: [] for rule in rules}

    def eliminate_whole() -> None:
        """Those layers that all batches have passed."""
        passed = state.units // len(batches)  # layers, or all of them
        whole = passed if engine.keeps_units else passed * engine.num_layers
        while hosts.is_first() and (layer := len(state.found[rules[0]])) < whole:
            _eliminate(layer, len(batches), top_k, aim, progress, state)

    for unit in engine.run(batches, ASKED, state.units):
        if hosts.is_first():
            assert unit.grams is not None, "asked for"
            for layer, grams in enumerate(_by_layer(unit.grams, dataset.groups.folds), unit.first_layer):
                progress.write(_name(layer, state.units % len(batches)), safetensors.numpy.save(grams._asdict()))
        state.units += 1
        state.tokens += unit.tokens
        state.seconds, state.compile_seconds = engine.clock.seconds, engine.clock.compile_seconds
        if hosts.is_first():
            progress.save(state, always=True)
        eliminate_whole()
        advance(unit)
    eliminate_whole()  # of a run that was stopped before the last one
    return _of_lists(hosts.exchange(state.found)[0])


def _by_layer(grams: Grams, folds: int) -> Iterator[Grams]:
    """Those of the tokens that count, a layer at a time, [T, …]; groups are folds of domains."""
    for of_layer in map(Grams._make, zip(*grams, strict=True)):
        counts_BS = of_layer.weights_T != 0
        of_layer = of_layer._replace(domains_T=(of_layer.domains_T // folds).astype(np.int32))
        yield Grams(*(np.ascontiguousarray(x[counts_BS]) for x in of_layer))


def _eliminate(layer: int, batches: int, top_k: int, aim: Aim, progress: Progress, state: State) -> None:
    """The layer's eliminations, after which nothing of its tokens is kept."""
    kept = [progress.read(_name(layer, batch)) for batch in range(batches)]
    for batch, data in enumerate(kept):
        if data is None:
            raise progress.damaged(_name(layer, batch))
    loaded = [safetensors.numpy.load(data.tobytes()) for data in kept if data is not None]
    grams = Grams(*(np.concatenate([of_batch[name] for of_batch in loaded]) for name in Grams._fields))
    for name, array in grams._asdict().items():
        if not np.isfinite(array).all():
            raise StatisticsError(f"layer {layer}: {name} of a token is not finite: check the checkpoint's weights")
    for rule, found in state.found.items():
        found.append(eliminate(weighted(grams, rule), top_k, aim=aim))
    progress.save(state, always=True)
    for batch in range(batches):
        progress.drop(_name(layer, batch))


def _name(layer: int, batch: int) -> str:
    return f"layer-{layer}.batch-{batch}.grams"
