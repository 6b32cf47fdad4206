"""The faults: places of the code, drawn with a seed, and what cosmic-ray makes of each."""

import ast
import hashlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names
from parso.tree import NodeOrLeaf

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ("network", "kernels", "statistics", "selection", "data")
ROOMS = (*(f"gptoss_jax/{room}" for room in LIBRARY), "convert")


class Mutant(NamedTuple):
    """One fault."""

    file: str
    line: int
    operator: str
    occurrence: int
    before: str  # the line as it is
    after: str  # and with the fault

    @property
    def name(self) -> str:
        """What names the fault while lines move: the file, and both lines."""
        return f"{self.file}: {self.before} => {self.after}"


def _rank(seed: int, *parts: object) -> str:
    """A place in an order that the seed draws, and that no other mutant changes."""
    return hashlib.sha256(repr((seed, *parts)).encode()).hexdigest()


class _Bare(ast.NodeTransformer):
    """Leaves out annotations, which no computation reads."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.returns = None
        self.generic_visit(node)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AnnAssign:
        node.annotation = ast.Constant(None)
        self.generic_visit(node)
        return node


def _meaning(source: str) -> str:
    return ast.dump(_Bare().visit(ast.parse(source)))


def _sites(source: str, seed: int) -> list[tuple[str, int]]:
    """One operator and occurrence for each place that can be mutated, in the drawn order."""
    nodes = [*ast_nodes(get_ast(source))]
    sites = defaultdict(list)
    for name in operator_names():
        operator, occurrence = get_operator(name), -1
        if operator.arguments():
            continue
        for node in nodes:
            for start, _ in operator().mutation_positions(node):
                occurrence += 1
                if not _inside_raise(node):
                    # Eleven operators can stand for a `+`: a place has one mutant, not eleven.
                    sites[start, name.partition("_")[0]].append((name, occurrence))
    lines = source.splitlines()
    chosen = {key: min(ways, key=lambda way: _rank(seed, way)) for key, ways in sites.items()}
    drawn = sorted(chosen, key=lambda key: _rank(seed, lines[key[0][0] - 1], key[0][1], key[1]))
    return [chosen[key] for key in drawn]


def _inside_raise(node: NodeOrLeaf) -> bool:
    return node.type == "raise_stmt" or (node.parent is not None and _inside_raise(node.parent))


def code(source: str, operator: str, occurrence: int) -> str:
    return mutate_code(source, get_operator(operator)(), occurrence) or source


def drawn(file: str, seed: int) -> Iterator[Mutant]:
    """The mutants of a file in the drawn order: those that mean something else and can be compiled."""
    source = (ROOT / file).read_text(encoding="utf-8")
    meaning, lines = _meaning(source), source.splitlines()
    for operator, occurrence in _sites(source, seed):
        try:
            faulty = code(source, operator, occurrence)
            if _meaning(faulty) == meaning:
                continue
        except (SyntaxError, AttributeError):  # the second where an exception's name has a dot
            continue
        changed = faulty.splitlines()
        at = next(i for i, (old, new) in enumerate(zip(lines, changed, strict=False)) if old != new)
        yield Mutant(file, at + 1, operator, occurrence, lines[at].strip(), changed[at].strip())


def sample(size: int, seed: int) -> list[Mutant]:
    """So many mutants, from each file in proportion to its places, in an order that mixes the files."""
    files = [str(f.relative_to(ROOT)) for room in ROOMS for f in sorted((ROOT / room).glob("*.py"))]
    counts = {file: len(_sites((ROOT / file).read_text(encoding="utf-8"), seed)) for file in files}
    total, taken = sum(counts.values()), []
    for file, count in counts.items():
        quota = -(-size * count // total)
        taken += [mutant for mutant, _ in zip(drawn(file, seed), range(quota), strict=False)]
    return sorted(taken, key=lambda mutant: _rank(seed, mutant.name))
