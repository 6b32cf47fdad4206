"""The job `plan`: compile the profile step for devices that are not at hand, and say what it takes there.

Letters: see `config`. T counts the tokens of one step over all devices; the axes of the mesh are `data` and
`expert`. Bytes are of one device, which on all chips but TPU7x is a chip; FLOPs are of all devices.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..config import SLIDING, Config, Form
from ..devices import mesh as sharding
from ..devices import topologies
from ..devices.placement import Placement
from ..errors import MeshError
from ..kernels import grouped, splash
from ..network.batch import Batch, Tokens
from ..network.source import abstract
from ..run.steps import Asked, mapped
from . import hlo

ITEM_BYTES = 2  # of activations: bfloat16
SOUGHT_UP_TO = 1 << 20  # tokens a step: more of a small model's tell nothing
MOST_COMPILED = 3  # steps, to find the largest batch: each takes half a minute or more
# A step that leaves less than a tenth of memory free may fit, but the compiler tries for minutes to make it do so.
AIMED_AT = 0.9
# What a token takes of memory, in hidden states of its own: seven for 120b on v5e. It says only where to look.
HIDDEN_STATES = 8
GIB = 1 << 30
# What is larger is not compiled: eight times the memory of the largest device, and tokens of a device's rows of which
# the hidden states of 20b alone would fill that memory.
MOST_BYTES = 8 * 96 * GIB
MOST_TOKENS = 1 << 24


@dataclass(frozen=True)
class Case:
    """One step on one slice."""

    config: Config
    topology: str
    data: int
    expert: int
    weights: Form
    batch: int
    seq_len: int

    @property
    def tokens(self) -> int:
        """T."""
        return self.batch * self.seq_len

    def mesh(self) -> Mesh:
        """The compile-only mesh; MeshError where anything does not divide or exist, or is far too large.

        The compiler says by how much a step does not fit, but of one that is far too large it knows no end: it ends
        the process.
        """
        if self.seq_len > self.config.max_position:
            raise MeshError(f"--max-seq-length is above the model's context of {self.config.max_position}")
        sharding.check_batch(self.batch, self.data)
        mesh = sharding.make(self.config, self.data, self.expert, topologies.devices(self.topology))
        self._check_size()
        return mesh

    def _check_size(self) -> None:
        if self.tokens // self.data > MOST_TOKENS:
            raise MeshError(
                f"a step of {self.batch} × {self.seq_len} tokens has {self.tokens // self.data:,} on each of data="
                f"{self.data}, and more than {MOST_TOKENS:,} are not compiled: make --batch-size or --max-seq-length "
                "smaller"
            )
        for what, size, advice in (
            ("weights", self.least_weight_bytes, "take a slice with more chips, or a smaller model"),
            ("tokens", self.least_token_bytes, "make --batch-size or --max-seq-length smaller"),
        ):
            if size > MOST_BYTES:
                much = f"{size / GIB:,.0f}" if size < 1 << 80 else "more than a million million"
                raise MeshError(
                    f"a step of {self.batch} × {self.seq_len} tokens on {self.topology} needs {much} GiB for {what} on "
                    f"each chip, which none has by far: {advice}"
                )

    @property
    def least_weight_bytes(self) -> int:
        """Bytes that a device's weights need at least: with four bits each, and none held twice."""
        return self.config.num_parameters() // 2 // self.expert

    @property
    def least_token_bytes(self) -> int:
        """Bytes that a device's tokens need at least: their hidden states and router logits."""
        each = self.config.hidden_size * ITEM_BYTES + self.config.num_experts * 4
        return self.tokens // self.data * each


@dataclass(frozen=True)
class Compiled:
    """What the compiler said of a case."""

    case: Case
    needed_bytes: int
    """Weights, rows, temporaries and results of one device."""
    memory_bytes: int
    seconds: float
    weight_bytes: int = 0
    temp_bytes: int = 0
    output_bytes: int = 0
    program: hlo.Program = hlo.NOTHING
    """Of one device; NOTHING where the step does not fit."""

    @property
    def fits(self) -> bool:
        """Whether the step runs within the memory of each device."""
        return self.program is not hlo.NOTHING and self.needed_bytes <= self.memory_bytes


def compile_step(case: Case) -> Compiled:
    """Compile the step that `profile` runs, as it runs it, for the case's devices; CompilerError where what was
    compiled cannot be read."""
    mesh = case.mesh()
    memory = topologies.memory_bytes(mesh.devices.flat[0])
    model = abstract(case.config, mesh, jnp.bfloat16, case.weights)
    shape, split = (case.batch, case.seq_len), sharding.rows(mesh)
    whole, real = (jax.ShapeDtypeStruct(shape, kind, sharding=split) for kind in (jnp.int32, jnp.float32))
    batch = Batch(Tokens(whole, whole, whole), real, whole)
    start = time.perf_counter()
    try:
        compiled = mapped(Asked(), mesh).step.lower(model, batch).compile()
    except Exception as error:
        amounts = topologies.does_not_fit(error)
        if not amounts:
            raise
        return Compiled(case, amounts[0], memory, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    usage = compiled.memory_analysis()
    # The step has no unembedding, which lies in memory all the same.
    unembedding: Any = model.unembedding.get_value()
    unused = math.prod(unembedding.sharding.shard_shape(unembedding.shape)) * unembedding.dtype.itemsize
    weight_bytes = usage.argument_size_in_bytes + unused
    needed = weight_bytes + usage.temp_size_in_bytes + usage.output_size_in_bytes
    return Compiled(
        case,
        needed,
        memory,
        seconds,
        weight_bytes,
        usage.temp_size_in_bytes,
        usage.output_size_in_bytes,
        hlo.parse(compiled.as_text()),
    )


@dataclass(frozen=True)
class Largest:
    """The largest batch, as far as compiling a few steps can tell."""

    tried: tuple[Compiled, ...]
    """What was compiled, in this order."""

    @property
    def batch(self) -> int:
        """The most rows that were compiled and fit; where none of them fit, the most that should, which may be 0."""
        return self.fit or self.expected

    @property
    def compiled(self) -> bool:
        """Whether that was compiled; for 0, whether one row for each of `data` was, and does not fit."""
        return bool(self.fit) or not self.batch

    @property
    def fit(self) -> int:
        """The most rows that were compiled and fit; 0 where none do."""
        return max((step.case.batch for step in self.tried if step.fits), default=0)

    @property
    def over(self) -> int | None:
        """The fewest rows that were compiled and do not fit."""
        return min((step.case.batch for step in self.tried if not step.fits), default=None)

    @property
    def expected(self) -> int:
        """The rows that should fit well, on a line of memory over rows that goes through the last step.

        Its slope is the closed one or that of the last two steps, whichever promises less. The rows that were asked
        for are doubled or halved to come next to that: of other numbers a row takes more memory and longer to compile.
        The answer lies between what is known to fit and what is known not to, and within SOUGHT_UP_TO.
        """
        last, case = self.tried[-1], self.tried[-1].case
        a_row = case.seq_len * HIDDEN_STATES * case.config.hidden_size * ITEM_BYTES / case.data
        if len(self.tried) > 1:
            before = self.tried[-2]
            slope = (last.needed_bytes - before.needed_bytes) / (case.batch - before.case.batch)
            a_row = max(a_row, slope) if last.fits else min(a_row, max(slope, 1))
        room = AIMED_AT * last.memory_bytes - last.needed_bytes
        rows, asked = max(case.batch + room / a_row, 1), self.tried[0].case.batch
        most = min(SOUGHT_UP_TO // case.seq_len, math.inf if self.over is None else self.over - 1)

        def doubled(times: int) -> int:
            return max(1, int(asked // case.data * 2.0**times)) * case.data

        times = round(math.log2(rows / asked))
        while doubled(times) > max(most, case.data):
            times -= 1
        return max(doubled(times) if doubled(times) <= most else 0, self.fit)

    def how(self) -> str:
        """How it was found, for a reader: what was compiled, and what was not."""
        *before, last = [str(step.case.batch) for step in self.tried]
        said = "compiled at " + (f"{', '.join(before)} and {last}" if before else last) + " rows: "
        if not self.fit:
            return f"{said}none fits" + (f"; {self.batch} are extrapolated, not compiled" if self.batch else "")
        if self.over is None:
            return f"{said}{self.fit} fit, more were not compiled"
        between = "; nothing between was compiled" if self.over > self.fit + self.tried[0].case.data else ""
        return f"{said}{self.fit} fit, {self.over} do not{between}"


def largest_batch(first: Compiled, compile_step: Callable[[Case], Compiled] = compile_step) -> Largest:
    """Look for the most rows that fit by compiling at most MOST_COMPILED steps, `first` among them."""
    found = Largest((first,))
    while len(found.tried) < MOST_COMPILED and (rows := found.expected) > found.fit:
        found = Largest((*found.tried, compile_step(replace(first.case, batch=rows))))
    return found


def active_matmul_flops(case: Case) -> float:
    """The work of all products that the statistics need: attention, router and the chosen experts of each token."""
    c = case.config
    heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    a_token = 2 * c.hidden_size * (2 * heads + 2 * kv + c.num_experts)
    a_token += c.top_k * 6 * c.hidden_size * c.expert_hidden_size
    return float(case.tokens * a_token * c.num_layers + _attention_flops(case, _keys_seen))


def _attention_flops(case: Case, scores: Callable[[int, int | None], int]) -> int:
    """The work of all layers' scores and of what they weigh; `scores` counts those of a head and row, of a length and
    window."""
    c = case.config
    seen = sum(scores(case.seq_len, c.sliding_window if kind == SLIDING else None) for kind in c.layer_types)
    return case.batch * seen * 4 * c.num_heads * c.head_dim


def _keys_seen(length: int, window: int | None) -> int:
    """Keys that the queries of a row see, together."""
    window = min(length, window or length)
    return window * (window + 1) // 2 + (length - window) * window


def compiled_matmul_flops(compiled: Compiled) -> float:
    """The work of all products in the compiled text, over all devices; experts are taken as evenly chosen.

    The kernels' work depends on the tokens: grouped products visit the blocks that hold any, attention those
    that its mask shows. Both are counted by whole blocks, with all columns of their tiles.
    """
    case = compiled.case
    dots = hlo.dot_flops(compiled.program) * case.data * case.expert
    return float(dots + _expert_flops(compiled) + _attention_flops(case, splash.visited_scores))


def _expert_flops(compiled: Compiled) -> float:
    """The work of the grouped products: what the text has room for, times the share of it that is visited."""
    case, c = compiled.case, compiled.case.config
    pairs, experts = case.tokens // case.data * c.top_k, c.num_experts // case.expert
    per_expert = -(-pairs // c.num_experts)
    kernel = grouped.choose(Placement("tpu"), per_expert, experts)
    pieces, per_piece = kernel.pieces(pairs, experts)
    visited = experts * grouped.visited_rows(per_expert, kernel.tile) / (pieces * per_piece * kernel.tile)
    named = computed = 0
    for inputs, outputs in ((c.hidden_size, 2 * c.expert_hidden_size), (c.expert_hidden_size, c.hidden_size)):
        tile = grouped.tile_width(outputs, inputs * ITEM_BYTES)
        named += inputs * outputs
        computed += inputs * -(-outputs // tile) * tile
    return hlo.kernel_flops(compiled.program, "gmm") * case.data * case.expert * visited * computed / named


def expected_collective_bytes(case: Case) -> float:
    """The bytes that one device sends in a layer, along rings: the sums of attention and experts, the router's scores.

    2 · 2·(M−1)/M · (T/N)·D·2  +  (M−1)/M · (T/N)·E·4        for a mesh of N data and M expert
    """
    c, tokens = case.config, case.tokens // case.data
    part = (case.expert - 1) / case.expert
    return 4 * part * tokens * c.hidden_size * ITEM_BYTES + part * tokens * c.num_experts * 4


def collective_bytes(compiled: Compiled) -> tuple[float, float]:
    """The bytes that one device sends in a layer and in a step, by the compiled text."""
    found = hlo.collectives(compiled.program)
    layers = compiled.case.config.num_layers
    a_layer = sum(c.moved_bytes * c.times for c in found if c.times >= layers) / layers
    return a_layer, sum(c.moved_bytes * c.times for c in found)


def moved_weights(compiled: Compiled) -> list[str]:
    """Instructions that copy or gather experts' kernels, in whichever form: none should."""
    D, F = compiled.case.config.hidden_size, compiled.case.config.expert_hidden_size
    kernels = {(F, D), (2 * F, D), (D, F), (D // 2, 2 * F), (D, 2 * F), (F // 2, D)}
    return [
        instruction.name
        for instruction in hlo.copies(compiled.program)
        for _, dims in instruction.shapes
        if len(dims) > 2 and dims[-2:] in kernels
    ]


def roofline(compiled: Compiled, flops: float, step_collectives: float) -> tuple[float, list[str]]:
    """Tokens a second at most, and what that assumes."""
    case = compiled.case
    device = topologies.devices(case.topology)[0]
    chip = topologies.CHIPS[device.device_kind]
    compute = flops / (case.data * case.expert) / chip.bf16_flops
    # A layer's experts are read once for each pass of the grouped product; what it makes is written and read.
    c = case.config
    rows = case.tokens * c.top_k / (case.data * case.expert)
    made = rows * c.num_layers * (2 * 4 * 2 * c.expert_hidden_size + 4 * 2 * c.hidden_size)
    memory = (compiled.weight_bytes + made) / chip.memory_bandwidth
    links = step_collectives / chip.link_bandwidth
    return case.tokens / (max(compute, memory) + links), [
        "a roofline: real runs reach a part of it, and no TPU was at hand to say which",
        f"{chip.bf16_flops / 1e12:g} TFLOP/s, {chip.memory_bandwidth / 1e9:g} GB/s of memory and "
        f"{chip.link_bandwidth / 1e9:g} GB/s of links for each device ({device.device_kind}), all at their peak",
        "products overlap with memory, exchanges with nothing; gathers and scatters cost nothing",
        "all positions hold tokens, and all experts are chosen equally often",
    ]


def figures(compiled: Compiled, largest: Largest) -> dict[str, Any]:
    """What `plan` says of a case; the keys are those of `plan --json`. A step that does not fit has no program, and
    with it no figures of what it would do."""
    case = compiled.case
    said = {
        "topology": case.topology,
        "chips": case.data * case.expert,
        "mesh": {"data": case.data, "expert": case.expert},
        "weights": case.weights,
        "batch": case.batch,
        "seq_len": case.seq_len,
        "tokens_per_step": case.tokens,
        "needed_bytes_per_chip": compiled.needed_bytes,
        "memory_bytes_per_chip": compiled.memory_bytes,
        "fits": compiled.fits,
        "largest_batch": largest.batch,
        "largest_batch_compiled": largest.compiled,
        "largest_batch_found": largest.how(),
        "batches_compiled": [step.case.batch for step in largest.tried],
        "active_matmul_flops": active_matmul_flops(case),
        "expected_collective_bytes_per_layer": expected_collective_bytes(case),
        "compile_seconds": compiled.seconds,
    }
    if compiled.program is hlo.NOTHING:
        return said
    flops = compiled_matmul_flops(compiled)
    a_layer, a_step = collective_bytes(compiled)
    rate, assumptions = roofline(compiled, flops, a_step)
    return said | {
        "weight_bytes_per_chip": compiled.weight_bytes,
        "temp_bytes_per_chip": compiled.temp_bytes,
        "output_bytes_per_chip": compiled.output_bytes,
        "compiled_matmul_flops": flops,
        "collective_bytes_per_layer": a_layer,
        "collective_bytes_per_step": a_step,
        "moved_weights": moved_weights(compiled),
        "estimated_tokens_per_s": rate,
        "assumptions": assumptions,
    }
