"""All models over all blocks: what each expected of the scored tokens. Letters: see `config`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from ..devices import mesh as sharding
from ..errors import MemoryLimitError
from ..network.source import Source
from ..run import choose
from ..run.bar import bar
from ..run.engine import Unit
from ..run.options import Placing
from ..run.progress import Progress
from . import passes
from .baseline import StoredBaseline
from .blocks import Blocks
from .compare import Baseline, Other
from .passes import FINALS, TOP, Arrays, Variants
from .scored import Scored, ScoredTokens
from .sides import Sides


@dataclass(frozen=True)
class Measured:
    """What passes over the blocks of each length gave."""

    model: Mapping[int, Arrays]
    baseline: Mapping[int, Arrays]
    """The first variant's where the baseline is the model itself."""
    tokens: float
    seconds: float
    engine: str

    def scored(self, blocks: Blocks, places: Mapping[str, int]) -> ScoredTokens:
        """What each model expected of the scored tokens of these blocks."""
        real, length = blocks.scored.real, blocks.length
        others = {name: _scored(self.model[length], variant, real) for name, variant in places.items()}
        baseline = _scored(self.baseline[length], 0, real)
        return ScoredTokens(blocks.scored.rows[real].astype(np.int32), baseline, others)


def _scored(arrays: Arrays, variant: int, real: np.ndarray) -> Scored:
    taken = {name: arrays[name][:, variant][real] for name in ("nats", "entropy", "best", "kl") if name in arrays}
    nats = taken["nats"].astype(np.float64)
    # Of a baseline no divergence is measured where its most probable tokens are kept.
    kl = taken.get("kl", np.zeros_like(nats)).astype(np.float64)
    return Scored(nats, taken["entropy"], taken["best"].astype(np.int32), kl)


class _Beside(NamedTuple):
    """The baseline of the model's passes."""

    arrays: Mapping[int, Arrays]
    """What its own passes gave; empty where it is the model itself."""
    unembedding: jax.Array | None = None
    """That of another model; None where the most probable tokens are what is known of one."""

    def of(self, length: int, numbers: slice) -> Baseline:
        """The baseline of some blocks."""
        if not self.arrays:
            return None
        arrays = self.arrays[length]
        if self.unembedding is None:
            return passes.top_of(arrays, numbers)
        return Other(arrays[FINALS][numbers].astype(self.unembedding.dtype), self.unembedding)


def measure(
    sides: Sides, blocks: Mapping[int, Blocks], placing: Placing, kept: Progress, keep_top: bool = False
) -> Measured:
    """Run every pass that `kept` has not. With `keep_top` the model's most probable tokens are kept as well."""
    several = sides.variants.number + isinstance(sides.baseline, Source)
    with bar(sum(some.tokens for some in blocks.values()) * several, "tokens") as advance:
        run = _Run(blocks, placing, kept, lambda unit: advance(unit.tokens))
        if sides.baseline is None:
            beside = _Beside({})
        elif isinstance(sides.baseline, StoredBaseline):
            beside = _Beside({length: sides.baseline.of(some) for length, some in blocks.items()})
        else:
            theirs = run("baseline", Variants(sides.baseline), _Beside({}), (FINALS,))
            beside = _Beside(theirs, passes.unembedding(sides.baseline, run.mesh, placing.dtype))
        model = run("model", sides.variants, beside, (TOP,) if keep_top else ())
    return Measured(model, beside.arrays or model, run.tokens, run.seconds, run.engine)


class _Run:
    """Passes of one model after the other."""

    def __init__(self, blocks: Mapping[int, Blocks], placing: Placing, kept: Progress, advance: Callable[[Unit], Any]):
        self.blocks, self.placing, self.kept, self.advance = blocks, placing, kept, advance
        self.tokens = self.seconds = 0.0
        self.engine = ""
        self.mesh: Any = None

    def __call__(self, name: str, variants: Variants, beside: _Beside, keep: Sequence[str]) -> dict[int, Arrays]:
        choice = choose.choose(variants.source, self.placing)
        given = choose.place(variants.source, choice.engine, self.placing, max(self.blocks))
        each = _blocks_each(given, variants.number, max(self.blocks))
        engine = choose.build(variants.source, choice.engine, given, self.kept)
        where = passes.Place(given.mesh, given.share, each, self.placing.dtype, self.kept)
        found = {}
        for length, blocks in self.blocks.items():
            baseline = partial(beside.of, length)
            file = f"{name}-{length}"
            found[length], state = passes.run(file, engine, variants, blocks, where, baseline, keep, self.advance)
            self.tokens += state.tokens
            self.seconds += state.seconds
        self.engine, self.mesh = f"{choice.engine}: {choice.reason}", given.mesh
        return found


def _blocks_each(given: choose.Place, variants: int, length: int) -> int:
    """How many blocks a batch has, in which each is there for every variant."""
    data, rows, limit = given.mesh.shape[sharding.DATA], given.placing.batch_size or 1, given.placing.memory_gib
    if limit and rows < variants * data:
        raise MemoryLimitError(
            f"--memory-gib {limit:.3g} is too little for {variants} variants of a block of {length} tokens at once: "
            f"give at most {max(rows - 1, 0)} keep-sets, or a smaller --seq-len"
        )
    return max(1, rows // (variants * data)) * data
