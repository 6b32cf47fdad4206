"""Passes of a model over blocks, and what is kept of those that are finished. Letters: see `config`."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax.sharding import Mesh, NamedSharding

from ..devices import hosts
from ..devices import mesh as sharding
from ..devices.hosts import Share
from ..network.source import Source
from ..run.engine import Engine, Unit
from ..run.progress import Progress
from ..run.steps import Asked
from .blocks import Blocks
from .compare import Baseline, Expected, Other, Top, mapped

FINALS, TOP = "finals", "top"
Arrays = dict[str, np.ndarray]
"""What a pass gives: `nats`, `entropy` and `kl`, float32, and `best`, int32, of each scored position, [B, v, N]; with
`finals` what the unembedding takes, [B, N, D], and with a stored top `top/…`."""


@dataclass(frozen=True)
class Variants:
    """One model, in some variants."""

    source: Source
    kept_vLE: np.ndarray | None = None
    """bool: the experts that each variant may choose; None for one that may choose all."""

    @property
    def number(self) -> int:
        """v."""
        return 1 if self.kept_vLE is None else len(self.kept_vLE)


@dataclass
class State:
    """How far a pass is."""

    units: int = 0
    tokens: float = 0.0
    seconds: float = 0.0
    compile_seconds: float = 0.0
    batches: list[Arrays] = field(default_factory=list)

    def to_bytes(self) -> bytes:
        """Write the state as a file's bytes."""
        numbers = {name: getattr(self, name) for name in NUMBERS}
        arrays = {f"{number}/{name}": x for number, batch in enumerate(self.batches) for name, x in batch.items()}
        return safetensors.numpy.save(arrays, {"numbers": json.dumps(numbers)})

    @classmethod
    def from_bytes(cls, data: bytes) -> "State":
        """Read what `to_bytes` writes."""
        arrays = safetensors.numpy.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        batches: list[Arrays] = []
        for number in range(len({name.partition("/")[0] for name in arrays})):
            ours = {name: x for name, x in arrays.items() if name.startswith(f"{number}/")}
            batches.append({name.partition("/")[2]: x for name, x in ours.items()})
        return cls(**json.loads(header["__metadata__"]["numbers"]), batches=batches)

    def whole(self, blocks: int) -> Arrays:
        """The arrays of all batches, without the empty blocks behind the last."""
        return {name: np.concatenate([batch[name] for batch in self.batches])[:blocks] for name in self.batches[0]}


NUMBERS = ("units", "tokens", "seconds", "compile_seconds")


@dataclass(frozen=True)
class Place:
    """Where passes run, and what is kept of them."""

    mesh: Mesh
    share: Share
    blocks_each: int
    """Blocks of a batch, over all processes."""
    dtype: Any
    progress: Progress

    def put(self, rows: np.ndarray) -> jax.Array:
        """An array [B, …] of a whole batch, on the devices."""
        own = NamedSharding(self.mesh, sharding.split("B"))
        return jax.make_array_from_process_local_data(own, self.share.own(rows))


def unembedding(source: Source, mesh: Mesh, dtype: Any) -> jax.Array:
    """The model's unembedding, [V, D], split over the mesh."""
    shape = source.config.vocab_size, source.config.hidden_size
    wanted = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=NamedSharding(mesh, sharding.split("V D")))
    return source.load({"unembedding": wanted})["unembedding"]


def run(
    name: str,
    engine: Engine,
    variants: Variants,
    blocks: Blocks,
    place: Place,
    baseline: Callable[[slice], Baseline] = lambda numbers: None,
    keep: Sequence[str] = (),
    advance: Callable[[Unit], Any] = lambda unit: None,
) -> tuple[Arrays, State]:
    """All blocks through all variants, from where `place.progress` left the pass of this name.

    Args:
        baseline: gives that of some blocks; by default it is the first variant.
        keep: FINALS for what the unembedding takes, TOP for the most probable tokens.
    """
    state = place.progress.kept(State.from_bytes, name) or State()
    # The steps of an earlier pass, which are compiled, keep this clock.
    engine.clock.seconds, engine.clock.compile_seconds = state.seconds, state.compile_seconds
    advance(Unit(0, state.tokens))
    batches = blocks.batches(variants.kept_vLE, place.blocks_each, place.share)
    score = _Score(variants, blocks, place, baseline, TOP in keep)
    for unit in engine.run(batches, Asked(statistics=False, finals=True), state.units):
        if unit.finals is not None:
            found = score(len(state.batches), unit.finals)
            if FINALS in keep:
                found[FINALS] = unit.finals.astype(np.float32)
            state.batches.append(found)
        state.units += 1
        state.tokens += unit.tokens
        state.seconds, state.compile_seconds = engine.clock.seconds, engine.clock.compile_seconds
        if hosts.is_first():
            place.progress.save(state, always=engine.keeps_units, name=name)
        advance(unit)
    if hosts.is_first():
        place.progress.save(state, always=True, name=name)
    return state.whole(len(blocks)), state


class _Score:
    """Finals of a batch become what is expected at its scored positions."""

    def __init__(
        self,
        variants: Variants,
        blocks: Blocks,
        place: Place,
        baseline: Callable[[slice], Baseline],
        keep_top: bool,
    ):
        self.variants, self.blocks, self.place, self.baseline = variants, blocks, place, baseline
        self.unembedding: jax.Array | None = None  # of a streamed model it is read when its layers are done
        self.keep_top = keep_top

    def __call__(self, batch: int, finals: np.ndarray) -> Arrays:
        """`finals` are [B·v, N, D], of the batch with that number."""
        place, each = self.place, self.place.blocks_each
        numbers = slice(batch * each, (batch + 1) * each)
        if self.unembedding is None:
            self.unembedding = unembedding(self.variants.source, place.mesh, place.dtype)
        base = self.baseline(numbers)
        targets = _padded(self.blocks.scored.targets[numbers], each)
        by_variant = finals.reshape(each, self.variants.number, *finals.shape[1:])
        kind: Any = type(base)
        compare = mapped(place.mesh, self.variants.source.config.vocab_size, kind, self.keep_top)
        found = hosts.gather(compare(place.put(by_variant), place.put(targets), self.unembedding, self._put(base)))
        return _arrays(found)

    def _put(self, base: Baseline) -> Baseline:
        each = self.place.blocks_each
        if isinstance(base, Other):
            return Other(self.place.put(_padded(base.finals, each)), base.unembedding)
        if isinstance(base, Top):
            return Top(*(self.place.put(_padded(np.asarray(x), each)) for x in base))
        return None


def _padded(rows: np.ndarray, each: int) -> np.ndarray:
    """As many rows as a batch has; behind the last block are zeros."""
    wide = np.zeros((each, *rows.shape[1:]), rows.dtype)
    wide[: len(rows)] = rows
    return wide


def _arrays(found: Expected) -> Arrays:
    arrays = {name: np.asarray(x) for name, x in found._asdict().items() if x is not None and name != "top"}
    if found.top is not None:
        arrays |= {f"top/{name}": np.asarray(x) for name, x in found.top._asdict().items()}
    return arrays


def top_of(arrays: Mapping[str, np.ndarray], numbers: slice) -> Top:
    """What a pass kept of some blocks' most probable tokens."""
    return Top(*(arrays[f"top/{name}"][numbers, 0] for name in Top._fields))
