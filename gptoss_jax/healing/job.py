"""The job `heal`: the routers of what keep-sets leave learn to expect what the whole model expects.

Letters: see `config`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..data.rows import prompts_hash
from ..devices import hosts
from ..devices import mesh as sharding
from ..errors import DataError, MemoryLimitError, OptionError
from ..evaluation.compare import Top
from ..files import atomic
from ..files.paths import is_path, place
from ..network.model import GptOss, Layer
from ..network.source import Source, load
from ..run import choose
from ..run.artifacts import peak_rss_bytes, versions
from ..run.bar import bar
from ..run.distilling import Distilling
from ..run.job import keeping
from ..run.memory import GIB, PROCESS_BYTES, STATES_A_TOKEN, weight_bytes
from ..run.options import Data, Placing, by_flag
from ..run.progress import Progress
from ..run.streamed import weights_form
from ..selection.keep_sets import KeepSets
from .deciding import Change, change
from .engine import Engine
from .layerwise import gram_bytes
from .loss import Finals, Loss
from .reconstruction import Pass, Sweeps, reconstruct
from .resident import Resident
from .rows import Rows, by_row, make_rows
from .states import States
from .streamed import Streamed
from .trained import Trained, parted, read
from .training import STATE, Curve, Taught, train

TEACHERS = {"hidden": Finals, "top": Top}


@dataclass(frozen=True)
class Request:
    """What is asked of the job."""

    model: str
    """The model's name, as the user gave it."""
    keep_sets: KeepSets
    data: Data
    distilling: Distilling
    placing: Placing
    command: str = ""

    def __post_init__(self) -> None:
        if self.data.domain and not self.data.domain_column:
            raise OptionError("--domain needs --domain-column: name the column that holds the domain")

    def by_flag(self) -> dict[str, Any]:
        """All options by the names that users know."""
        values = by_flag(self.data, self.distilling, self.placing)
        return values | {"--data": self.data.data if isinstance(self.data.data, str) else "records given in Python"}


@dataclass(frozen=True)
class Healing:
    """What a healing found."""

    values: Mapping[str, np.ndarray]
    """What is trained, by its paths in the model; empty where it was not worth it."""
    curve: Curve
    passes: Sequence[Pass]
    """Over all layers, before the training."""
    domains: Mapping[str, Change]
    """Of the rows that are held out, by domain; those that are healed for are under "" where no domain is named."""
    healed_for: tuple[str, ...]
    """The domains that are learnt."""
    overall: Change
    """Of all rows of these domains that are held out: what decides."""
    tokens: int
    """Tokens that are learnt."""
    rows: int
    request: Request
    engine: str
    peak_rss_bytes: int

    @property
    def is_kept(self) -> bool:
        """Whether it did better than chance explains; else nothing that was trained is written."""
        return self.overall.is_better

    def to_json(self) -> str:
        """The content of heal.json."""
        said = {
            "model": self.request.model,
            "command": self.request.command,
            "options": self.request.by_flag(),
            "engine": self.engine,
            "is_kept": self.is_kept,
            "learnt_rows": self.rows,
            "learnt_tokens": self.tokens,
            "reconstruction": [vars(one) | {"is_kept": one.is_kept} for one in self.passes],
            "curve": vars(self.curve),
            "overall": asdict(self.overall),
            "domains": {name: asdict(of) for name, of in self.domains.items()},
            "peak_rss_bytes": self.peak_rss_bytes,
            "versions": versions(),
        }
        return json.dumps(said, indent=2) + "\n"


def run(
    request: Request,
    source: Source,
    kept: Progress,
    resume: bool = False,
    tell: Callable[[str], Any] = lambda line: None,
) -> Healing:
    """Train, and say what it was worth; `kept` holds what is finished.

    `tell` is given what a user should know, line by line, in process 0, before the first step.
    """
    _check_apart(request, source, kept)
    placing, how = request.placing, request.distilling
    choice = choose.choose(source, placing)
    is_streamed = choice.engine == "streamed"
    if is_streamed:
        choose.check_streamed(placing)
    mesh = None if is_streamed else choose.resident_mesh(source, placing)
    rows = make_rows(
        request.data,
        how.tokens,
        source,
        request.keep_sets.layers,
        placing.batch_size,
        1 if mesh is None else mesh.shape[sharding.DATA],
    )
    if is_streamed or how.reconstruct:
        _check_room(request, source, rows, is_streamed)
    settings = _settings(request, source, rows, choice.engine)
    hosts.agree(settings)
    if hosts.is_first():
        kept.begin(settings, resume)
        told = f"{len(rows.learnt):,} rows are learnt, {rows.tokens:,} tokens of them; {len(rows.held):,} are held out"
        for line in [*rows.remarks, f"{told}; engine {choice.engine}: {choice.reason}"]:
            tell(line)
    with keeping(kept):
        kind = TEACHERS[how.teacher]
        if mesh is None:
            engine: Engine = Streamed(source, placing.dtype, kind)
        else:
            engine = Resident(load(source, placing.dtype, mesh, placing.weights), mesh, kind)
        first = read(source, how.train, mesh, how.reconstruct)  # type: ignore[arg-type]
        sweeps = Sweeps(source, placing.dtype, rows.batches, request.keep_sets.layers)
        return _healed(request, engine, sweeps, first, rows, kept, f"{choice.engine}: {choice.reason}")


def _healed(
    request: Request, engine: Engine, sweeps: Sweeps, first: Trained, rows: Rows, kept: Progress, ran: str
) -> Healing:
    """Teach, reconstruct, train, and look at every row that is held out."""
    how = request.distilling
    # Once, and again by a run that goes on, which takes about as long as a step does.
    held = Taught(rows.held_batches, engine.teach(rows.held_batches))
    is_ours = np.array([not request.data.domain or name in request.data.domain for name in rows.domains])

    def looked_at(trained: Trained) -> Loss:
        return by_row(engine.losses(trained, held.batches, held.teachers), rows.held_batches, len(rows.held))

    def mean(trained: Trained) -> float:
        found = looked_at(trained)
        return float(found.kl[is_ours].sum() / found.weight[is_ours].sum())

    values, passes = reconstruct(sweeps, how.reconstruct, first, mean, kept)
    begun, fixed = parted(values, how.train)  # type: ignore[arg-type]
    learnt = Taught(rows.batches, engine.teach(rows.batches)) if how.steps else Taught([], [])
    states = States(kept, STATE)
    with bar(how.steps, "steps", shown=hosts.is_first()) as advance:
        best, curve = train(
            engine, begun, fixed, learnt, lambda it: mean(fixed | it), how, request.data.seed, states, advance
        )
    best = fixed | best
    pruned, healed = looked_at(first), looked_at(best)
    overall = change(pruned, healed, is_ours)
    named = np.array(rows.domains)
    domains = {name: change(pruned, healed, named == name) for name in sorted({*rows.domains})}
    return Healing(
        {path: np.asarray(hosts.gather(x)) for path, x in best.items()} if overall.is_better else {},
        curve,
        passes,
        domains,
        tuple(sorted({row.domain for row in rows.learnt})),
        overall,
        rows.tokens,
        len(rows.learnt),
        request,
        ran,
        peak_rss_bytes(),
    )


def _check_room(request: Request, source: Source, rows: Rows, is_streamed: bool) -> None:
    """MemoryLimitError where a step of the streamed engine, or reconstruction, takes more than the run may."""
    placing = request.placing
    if placing.memory_gib is None:
        return
    config, dtype = source.config, np.dtype(jnp.dtype(placing.dtype))
    step = max(int(np.prod(batch.shape)) for batch in rows.batches)
    held = sum(int(np.prod(batch.shape)) for batch in rows.held_batches)
    # Each layer's input of a step, or the hidden states of all that is held out, and what a layer makes on its way.
    states = max(step * (config.num_layers + 2 * STATES_A_TOKEN), held + step * STATES_A_TOKEN)
    weights = 2 * weight_bytes(Layer, config, weights_form(source), dtype)
    if is_streamed:
        weights += config.vocab_size * config.hidden_size * dtype.itemsize
    else:
        weights += weight_bytes(GptOss, config, placing.weights, dtype)
    grams, at_once = 0, f"a step of {step:,} tokens"
    if request.distilling.reconstruct:
        # Both streams of all that is learnt, one of them before and behind a layer.
        learnt = step * len(rows.batches)
        states = max(states, held + 3 * learnt + step * STATES_A_TOKEN)
        grams, at_once = gram_bytes(config, len(request.keep_sets.layers[0]), rows.tokens, dtype), "reconstruction"
    model = "two layers, the unembedding" if is_streamed else "the model, two layers"
    needed = (PROCESS_BYTES + weights + states * config.hidden_size * dtype.itemsize + grams) / GIB
    if needed > placing.memory_gib:
        raise MemoryLimitError(
            f"--memory-gib {placing.memory_gib:.3g} is too little: {model} and {at_once} need {needed:.2f}: give more, "
            "or a smaller --batch-size, --num-rows or --max-seq-length"
        )


def _check_apart(request: Request, source: Source, kept: Progress) -> None:
    """OutputError where an output is or holds an input. DataError where there are no rows."""
    data = request.data.data
    if is_path(data):
        if not str(data):
            raise DataError("--data is empty: name a file, a folder or a hub id")
        atomic.check_apart(kept.folder, place(str(data)))
    atomic.check_apart(kept.folder, source.folder, or_inside=True)


def _settings(request: Request, source: Source, rows: Rows, engine: str) -> dict[str, Any]:
    """All that decides what a run computes, by the names that users know."""
    free = ("--data", "--split", "--subset", "--engine", "--memory-gib", "--command", "--coordinator", "--process-id")
    return {
        "the model's fingerprint": source.fingerprint(),
        "the keep-sets": request.keep_sets.layers,
        "the rows' hash": prompts_hash(rows.learnt + rows.held),
        "the versions": {name: versions()[name] for name in ("gptoss-jax", "jax")},
        **{flag: value for flag, value in request.by_flag().items() if flag not in free},
        "--engine": engine,
    }
