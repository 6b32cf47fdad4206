"""Reads the text of a compiled program: what it multiplies, and what its devices tell one another.

XLA's own cost analysis counts the body of a loop once, so loops are followed here: an instruction counts as
often as the loops around it run.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "f32": 4}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_OPERAND = re.compile(r"%([\w.\-]+)")


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    op: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    """dtype and dimensions of each result."""
    operands: tuple[str, ...]
    attributes: str
    """The rest of the line."""

    @property
    def nbytes(self) -> list[int]:
        """Of each result."""
        return [ITEM_BYTES.get(dtype, 0) * math.prod(dims) for dtype, dims in self.shapes]

    def called(self, attribute: str) -> list[str]:
        """The computations that an attribute names."""
        found = re.search(rf"\b{attribute}=(?:\{{([^}}]*)\}}|(%[\w.\-]+))", self.attributes)
        return _OPERAND.findall(found[0]) if found else []


@dataclass
class Program:
    """The computations of a compiled program."""

    computations: dict[str, dict[str, Instruction]] = field(default_factory=dict)
    entry: str = ""

    def walk(self, name: str = "", times: int = 1) -> Iterator[tuple[Instruction, dict[str, Instruction], int]]:
        """Every instruction with its computation and how often it runs; all branches of a conditional count."""
        computation = self.computations[name or self.entry]
        for instruction in computation.values():
            yield instruction, computation, times
            if instruction.op == "while":
                (condition,), (body,) = instruction.called("condition"), instruction.called("body")
                yield from self.walk(body, times * self._trips(condition))
            elif instruction.op == "conditional":
                for branch in instruction.called("branch_computations"):
                    yield from self.walk(branch, times)
            elif instruction.op in ("fusion", "call", "call-start", "async-start"):
                for called in instruction.called("calls") or instruction.called("to_apply"):
                    yield from self.walk(called, times)

    def _trips(self, condition: str) -> int:
        """How often a loop runs: `lax.scan` counts from 0 to a constant."""
        constants = [
            int(value[1])
            for instruction in self.computations[condition].values()
            if instruction.op == "constant" and (value := re.match(r"(\d+)\)", instruction.attributes))
        ]
        assert len(constants) == 1, f"{condition}: no loop with one bound"
        return constants[0]


def parse(text: str) -> Program:
    """The program of `compiled.as_text()`."""
    program = Program()
    current: dict[str, Instruction] = {}
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = program.computations[head[2]] = {}
            program.entry = head[2] if head[1] else program.entry
        elif found := _INSTRUCTION.match(line):
            name, result, op, rest = found.groups()
            shapes = tuple((t, tuple(int(n) for n in dims.split(",") if n)) for t, dims in _SHAPE.findall(result))
            operands = tuple(_OPERAND.findall(rest.split(")", 1)[0]))
            current[name] = Instruction(name, op, shapes, operands, rest)
    return program


def dot_flops(program: Program) -> int:
    """Floating-point operations of all matrix products of one device, kernels left out."""
    return sum(
        times * _flops(instruction, computation)
        for instruction, computation, times in program.walk()
        if instruction.op in ("dot", "convolution")
    )


def _flops(instruction: Instruction, computation: dict[str, Instruction]) -> int:
    outputs = math.prod(instruction.shapes[0][1])
    left, right = (computation[name].shapes[0][1] for name in instruction.operands)
    if instruction.op == "dot":
        contracting = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        assert contracting, instruction.name
        return 2 * outputs * math.prod(left[int(d)] for d in contracting[1].split(",") if d)
    # TPUs write products as convolutions: `i` is what is summed over, digits are a window.
    labels = re.search(r"dim_labels=\w+_(\w+)->", instruction.attributes)
    assert labels and "pad=" not in instruction.attributes, f"{instruction.name}: a convolution with padding"
    return 2 * outputs * math.prod(n for n, label in zip(right, labels[1], strict=True) if label != "o")


def kernel_flops(program: Program, name: str) -> int:
    """What the kernels whose name begins with `name` say that they cost, in the whole of one device's program."""
    return sum(
        times * int(cost[1])
        for instruction, _, times in program.walk()
        if instruction.op == "custom-call"
        and instruction.name.startswith(name)
        and (cost := re.search(r'"flops":"?(\d+)', instruction.attributes))
    )


def copies(program: Program) -> list[Instruction]:
    """Instructions that only move data in memory: copies, transposes and gathers outside of fusions.

    A `copy-start` is none of them: it fetches into the chip's fast memory what the next kernel reads.
    """
    fused = {
        name
        for computation in program.computations.values()
        for instruction in computation.values()
        if instruction.op == "fusion"
        for name in instruction.called("calls")
    }
    return [
        instruction
        for name, computation in program.computations.items()
        if name not in fused
        for instruction in computation.values()
        if instruction.op in ("copy", "transpose", "all-gather", "all-gather-start")
    ]


@dataclass(frozen=True)
class Collective:
    """What devices tell one another at one place of the program."""

    op: str
    result_bytes: int
    """Of one device and one run."""
    group: int
    """Devices that take part in one exchange."""
    times: int

    @property
    def moved_bytes(self) -> float:
        """That one device sends in one run, along a ring: an all-reduce passes every byte twice."""
        part = (self.group - 1) / self.group
        match self.op:
            case "all-reduce":
                return 2 * part * self.result_bytes
            case "reduce-scatter":
                return (self.group - 1) * self.result_bytes
            case _:
                return part * self.result_bytes


def collectives(program: Program) -> list[Collective]:
    """All exchanges between devices, in the order of the text."""
    found = []
    for instruction, _, times in program.walk():
        op = instruction.op.removesuffix("-start")
        if op in COLLECTIVES:
            # The start of an asynchronous one returns its operands too.
            nbytes = (max if instruction.op.endswith("-start") else sum)(instruction.nbytes)
            found.append(Collective(op, nbytes, _group(instruction.attributes), times))
    return found


def _group(attributes: str) -> int:
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if listed:
        return len(listed[1].split(","))
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", attributes)
    return int(iota[1]) if iota else 1
