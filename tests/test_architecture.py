"""The house: which way imports go, what stays out, and what starts fast."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("gptoss_jax", "convert", "experiments")

# Bottom up; a module imports only what stands in a line above its own.
NETWORK = [
    {"errors"},
    {"config"},
    {"mesh", "rope", "packed", "batching", "cache"},
    {"router", "grouped", "splash"},
    {"attention", "experts"},
    {"saliency"},
    {"moe"},
    {"model"},
    {"forward", "engine"},
    {"resume"},
    {"resident", "stream"},
]


def modules(room: str) -> dict[str, Path]:
    """The modules of a package by their full names; a package by that of its folder."""
    found = {}
    for file in sorted((ROOT / room).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = {name: file for room in ROOMS for name, file in modules(room).items()}


def imports(name: str, file: Path) -> set[str]:
    """Full names of all that a module imports, at its head or inside functions."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            # `from . import x` names a module or something that the package itself holds.
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {full if full in MODULES else base for full in names}
    return found


IMPORTS = {name: imports(name, file) for name, file in MODULES.items()}


def rooms(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def test_relative_imports_are_understood() -> None:
    """The reader itself, at three places whose imports are known."""
    assert "gptoss_jax.saliency" in IMPORTS["gptoss_jax.report.markdown"]
    assert {"gptoss_jax.errors", "gptoss_jax.outputs", "convert.prune"} <= IMPORTS["gptoss_jax.cli.prune"]
    assert "convert.mxfp4" in IMPORTS["convert.from_hf"]


@pytest.mark.parametrize("name", modules("gptoss_jax"))
def test_the_library_imports_no_other_room_and_no_torch(name: str) -> None:
    forbidden = {"experiments", "tests", "torch"} | (set() if name.startswith("gptoss_jax.cli") else {"convert"})
    assert not rooms(IMPORTS[name]) & forbidden


@pytest.mark.parametrize("name", modules("convert"))
def test_convert_imports_little_of_the_library_and_no_torch(name: str) -> None:
    library = {imported for imported in IMPORTS[name] if imported.startswith("gptoss_jax")}
    allowed = ("config", "errors", "mesh", "model", "outputs", "packed", "storage")
    assert library <= {f"gptoss_jax.{module}" for module in allowed}
    assert not rooms(IMPORTS[name]) & {"experiments", "tests", "torch"}


def test_nothing_imports_the_command_line() -> None:
    importers = {n for n, imported in IMPORTS.items() if any(i.startswith("gptoss_jax.cli") for i in imported)}
    assert all(name.startswith("gptoss_jax.cli") for name in importers)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_have_no_cycle(room: str) -> None:
    # A package's own `__init__` is imported with each of its modules and is no arrow.
    graph = {name: {i for i in IMPORTS[name] if i in MODULES and i not in ROOMS} for name in modules(room)}
    assert list(TopologicalSorter(graph).static_order())


def test_the_network_is_built_bottom_up() -> None:
    level = {f"gptoss_jax.{module}": n for n, line in enumerate(NETWORK) for module in line}
    present = level.keys() & MODULES.keys()
    wrong = {(a, b) for a in present for b in IMPORTS[a] & present if level[b] >= level[a]}
    assert len(present) > 10 and not wrong


def test_the_command_line_starts_without_the_large_packages() -> None:
    large = {"jax", "jaxlib", "flax", "numpy", "transformers", "datasets", "pyarrow", "torch", "convert"}
    code = f"import sys, gptoss_jax.cli; print(*({large!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_no_file_is_named_for_nothing_in_particular() -> None:
    files = [*MODULES.values(), *(ROOT / "tests").rglob("*.py")]
    assert not {file.stem for file in files} & {"utils", "util", "helpers", "helper", "common", "misc", "manager"}


@pytest.mark.parametrize("name", ["README.md", "LICENSE"])
def test_readme_and_licence_are_there(name: str) -> None:
    assert (ROOT / name).read_text(encoding="utf-8").strip()
