"""Reads the text of a compiled program: what it multiplies, and what its devices tell one another.

XLA's own cost analysis counts the body of a loop once, so loops are followed here: an instruction counts as
often as the loops around it run. The text has no promised form and changes between compilers, so it is read whole:
what is not understood is a CompilerError, for a line that is passed over would be counted as nothing.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from ..errors import CompilerError

ITEM_BYTES = {"token": 0, "pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s16": 2}
ITEM_BYTES |= {"u16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
# Whatever else is named like this tells other devices something, too.
_EXCHANGES = re.compile(r"all-|ragged-|collective-|reduce-scatter|send|recv")
# Computations of single elements, such as a sum's addition: they are called, and hold nothing that counts.
_OF_ELEMENTS = {"to_apply", "select", "scatter"}

_PREAMBLE = re.compile(r"HloModule |(FileNames|FunctionNames|FileLocations|StackFrames)$|\d+ [\"{]")
_HEAD = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\) -> .*\{$")
_END = re.compile(r'\}(, execution_thread="\w+")?$')
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$", re.DOTALL)
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{[^{}]*\})?")
_COMMENT = re.compile(r"/\*.*?\*/")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_BRACKET = re.compile(_STRING.pattern + r"|([(\[{])|([)\]}])")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALL = re.compile(r"([\w\-]+)=\{?((?:%[\w.\-]+(?:, ?)?)+)")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{}]*\))? \{([^}]*)\}")
_AXIS = re.compile(r"'(\w+)'(?:=(\d+)|:\(\d+\)(\d+))?")


def _unread(what: str) -> CompilerError:
    return CompilerError(
        f"the compiled text has something that is not understood, near {what.strip()[:160]!r}: no figure of it would "
        "be true; install the libtpu that jax[tpu] names, and report this line if that is installed"
    )


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    op: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    """dtype and dimensions of each result."""
    arguments: str
    """What stands in its parentheses."""
    operands: tuple[str, ...]
    attributes: str
    """The rest of the line."""
    called: dict[str, list[str]]
    """The computations that each attribute names."""

    @property
    def nbytes(self) -> list[int]:
        """The bytes of each result."""
        return [ITEM_BYTES[dtype] * math.prod(dims) for dtype, dims in self.shapes]

    @property
    def stem(self) -> str:
        """What it does, whether at once or as the start or the end of something asynchronous."""
        return re.sub(r"-(start|update|done)$", "", self.op)

    @property
    def ends(self) -> bool:
        """Whether it only waits for what another instruction has begun."""
        return self.op.endswith(("-update", "-done"))

    def not_understood(self) -> CompilerError:
        """The error that quotes this line."""
        return _unread(f"%{self.name} = {self.op}({self.arguments}){self.attributes}")


@dataclass(eq=False)
class Program:
    """The computations of a compiled program; equal to itself alone."""

    computations: dict[str, dict[str, Instruction]] = field(default_factory=dict)
    entry: str = ""

    def walk(self, name: str = "", times: int = 1) -> Iterator[tuple[Instruction, dict[str, Instruction], int]]:
        """Every instruction with its computation and how often it runs; all branches of a conditional count."""
        computation = self.computations[name or self.entry]
        for instruction in computation.values():
            yield instruction, computation, times
            if instruction.op == "while":
                (condition,), (body,) = instruction.called["condition"], instruction.called["body"]
                yield from self.walk(body, times * self._trips(condition))
            elif not instruction.ends:
                for attribute, names in instruction.called.items():
                    if attribute not in _OF_ELEMENTS or instruction.op == "call":
                        for called in names:
                            yield from self.walk(called, times)

    def _trips(self, condition: str) -> int:
        """How often a loop runs: `lax.scan` counts from 0 to a constant."""
        instructions = self.computations[condition].values()
        constants = [i for i in instructions if i.op == "constant" and i.arguments.isdecimal()]
        if len(constants) != 1:
            raise _unread(f"%{condition}: a loop without one bound")
        return int(constants[0].arguments)


NOTHING = Program()


def parse(text: str) -> Program:
    """The program of `compiled.as_text()`; CompilerError where any of it is not understood."""
    program = Program()
    current: dict[str, Instruction] | None = None
    for line in _statements(text):
        if current is None:
            if head := _HEAD.match(line):
                current = program.computations[head[2]] = {}
                program.entry = head[2] if head[1] else program.entry
            elif not _PREAMBLE.match(line):
                raise _unread(line)
        elif _END.match(line):
            current = None
        else:
            instruction = _instruction(line)
            if current.setdefault(instruction.name, instruction) is not instruction:
                raise _unread(line)
    if current is not None or not program.entry:
        raise _unread("its end: a computation without an end, or no ENTRY")
    _check_names(program)
    return program


def _statements(text: str) -> Iterator[str]:
    """Lines that are not blank; an instruction with open brackets goes on in the lines that follow."""
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith(" "):
            depth = _depth(line)
            while depth:
                following = next(lines, None)
                if following is None or depth < 0:
                    raise _unread(line)
                depth += _depth(following)
                line += "\n" + following
        if line.strip():
            yield line


def _depth(line: str) -> int:
    """Brackets that a line opens and does not close, outside of strings."""
    found = _BRACKET.findall(line)
    return sum(bool(opened) - bool(closed) for opened, closed in found)


def _instruction(line: str) -> Instruction:
    found = _INSTRUCTION.match(line)
    if not found:
        raise _unread(line)
    name, result, op, rest = found.groups()
    shapes = tuple((t, tuple(int(n) for n in dims.split(",") if n)) for t, dims in _ARRAY.findall(result))
    end = _closing(rest)
    arguments, attributes = rest[:end], rest[end + 1 :]
    operands: list[str] = []
    if op not in ("parameter", "constant"):
        # Operands may stand with their shapes, which have commas of their own.
        bare = (part.strip("() ") for part in _ARRAY.sub("", _COMMENT.sub("", arguments)).split(","))
        operands = [part for part in bare if part]
    called = {attribute: _OPERAND.findall(names) for attribute, names in _CALL.findall(_STRING.sub("", attributes))}
    called.pop("control-predecessors", None)  # instructions, which it does not call
    whole = (
        not _ARRAY.sub("", _COMMENT.sub("", result)).strip("(), ")
        and all(dtype in ITEM_BYTES for dtype, _ in shapes)
        and all(_OPERAND.fullmatch(operand) for operand in operands)
        and (op != "while" or {key: len(names) for key, names in called.items()} == {"condition": 1, "body": 1})
    )
    if not whole:
        raise _unread(line)
    return Instruction(name, op, shapes, arguments, tuple(operand[1:] for operand in operands), attributes, called)


def _closing(text: str) -> int:
    """Where the bracket closes that was opened just before the text."""
    depth = 1
    for bracket in _BRACKET.finditer(text):
        depth += bool(bracket[1]) - bool(bracket[2])
        if not depth:
            return bracket.start()
    raise _unread(text)


def _check_names(program: Program) -> None:
    """All that an instruction names must be there, and every computation is called: none is passed over."""
    called = {program.entry}
    for computation in program.computations.values():
        for instruction in computation.values():
            names = {name for names in instruction.called.values() for name in names}
            if not (names <= program.computations.keys() and set(instruction.operands) <= computation.keys()):
                raise instruction.not_understood()
            called |= names
    for name in program.computations.keys() - called:
        raise _unread(f"%{name}: a computation that nothing calls")


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
        if not contracting:
            raise instruction.not_understood()
        return 2 * outputs * math.prod(left[int(d)] for d in contracting[1].split(",") if d)
    # TPUs write products as convolutions: `i` is what is summed over, digits are a window.
    labels = re.search(r"dim_labels=\w+_(\w+)->", instruction.attributes)
    if not labels or "pad=" in instruction.attributes:
        raise instruction.not_understood()
    return 2 * outputs * math.prod(n for n, label in zip(right, labels[1], strict=True) if label != "o")


def kernel_flops(program: Program, name: str) -> int:
    """What the kernels whose name begins with `name` say that they cost, in the whole of one device's program;
    CompilerError where there is none, or one that does not say it."""
    total = 0
    for instruction, _, times in program.walk():
        if instruction.op == "custom-call" and instruction.name.startswith(name):
            cost = re.search(r'"flops":"?(\d+)', instruction.attributes)
            if not cost:
                raise instruction.not_understood()
            total += times * int(cost[1])
    if not total:
        raise _unread(f"its kernels: none is named {name}")
    return total


def copies(program: Program) -> list[Instruction]:
    """Instructions that only move data in memory: copies, transposes and gathers outside of fusions.

    A `copy-start` is none of them: it fetches into the chip's fast memory what the next kernel reads.
    """
    fused = {
        name
        for computation in program.computations.values()
        for instruction in computation.values()
        if instruction.op == "fusion"
        for name in instruction.called.get("calls", ())
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
    """The bytes of its results on one device, in one run."""
    group: int
    """Devices that take part in one exchange."""
    times: int

    @property
    def moved_bytes(self) -> float:
        """The bytes that one device sends in one run, along a ring: an all-reduce passes every byte twice."""
        part = (self.group - 1) / self.group
        match self.op:
            case "all-reduce":
                return 2 * part * self.result_bytes
            case "reduce-scatter":
                return float((self.group - 1) * self.result_bytes)
            case "collective-permute":
                return float(self.result_bytes)
            case _:
                return part * self.result_bytes


def collectives(program: Program) -> list[Collective]:
    """All exchanges between devices, in the order of the text; CompilerError for one that is not understood."""
    found = []
    for instruction, _, times in program.walk():
        if instruction.ends or not _EXCHANGES.match(instruction.op):
            continue
        if instruction.stem not in COLLECTIVES:
            raise instruction.not_understood()
        nbytes = instruction.nbytes
        if instruction.op in ("all-gather-start", "collective-permute-start"):
            # The start of these returns its operands, what it makes of them, and then what it remembers.
            count = len(instruction.operands)
            nbytes = nbytes[count : 2 * count]
        found.append(Collective(instruction.stem, sum(nbytes), _group(instruction), times))
    return found


def _group(instruction: Instruction) -> int:
    """Devices of one exchange: listed, as a shape, or as axes of a mesh, of which `'x':(1)2` is a part of two."""
    attributes = instruction.attributes
    if instruction.stem == "collective-permute" and "source_target_pairs={{" in attributes:
        return 2
    if listed := re.search(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}", attributes):
        sizes = {len(group.split(",")) for group in listed[1].split("},")}
        if len(sizes) == 1:
            return sizes.pop()
    elif iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=\[", attributes):
        return int(iota[1])
    elif mesh := _MESH.search(attributes):
        sizes_of = {name: size for name, size, _ in _AXIS.findall(mesh[1])}
        axes = _AXIS.findall(mesh[2])
        if axes and all(name in sizes_of for name, _, _ in axes):
            return math.prod(int(part or sizes_of[name]) for name, _, part in axes)
    raise instruction.not_understood()
