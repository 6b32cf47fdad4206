"""The house: which way imports go, what stays out, and what starts fast."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import gptoss_jax as gj
from gptoss_jax.cli import cli

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("gptoss_jax", "convert", "experiments")

# The arrows of the house: what the modules of a room may import beside their own, room by room from the ground up.
# A room is a folder or a module directly below its package; `experiments` may import all of them.
GROUND = ("config", "config_keys", "errors", "files")
NETWORK = (*GROUND, "devices", "kernels", "network")
PROFILE = (*NETWORK, "data", "routing", "statistics", "selection", "reports", "run")
JOBS = (*PROFILE, "generation", "evaluation", "search", "healing", "pods", "fingerprints", "page")
ARROWS = {
    # The front door reaches what it names when it is first used; for type checkers it says so at once.
    "gptoss_jax": ("interface", "routing", "run", "selection"),
    "gptoss_jax.errors": (),
    "gptoss_jax.config_keys": ("errors",),
    "gptoss_jax.config": ("config_keys", "errors"),
    "gptoss_jax.files": ("errors",),
    "gptoss_jax.devices": GROUND,
    "gptoss_jax.kernels": (*GROUND, "devices"),
    "gptoss_jax.network": (*GROUND, "devices", "kernels"),
    "gptoss_jax.data": NETWORK,
    "gptoss_jax.routing": (*NETWORK, "data"),
    "gptoss_jax.statistics": NETWORK,
    "gptoss_jax.selection": (*NETWORK, "data", "statistics"),
    "gptoss_jax.reports": (*NETWORK, "data", "statistics", "selection"),
    "gptoss_jax.run": PROFILE[:-1],
    "gptoss_jax.generation": PROFILE,
    "gptoss_jax.evaluation": (*PROFILE, "generation"),
    "gptoss_jax.search": (*PROFILE, "generation", "evaluation"),
    "gptoss_jax.healing": (*PROFILE, "evaluation"),
    "gptoss_jax.pods": PROFILE,
    "gptoss_jax.fingerprints": (*PROFILE, "generation", "evaluation"),
    "gptoss_jax.page": (*PROFILE, "generation", "evaluation", "fingerprints"),
    "gptoss_jax.interface": (*JOBS, "convert"),
    "gptoss_jax.cli": (*JOBS, "interface", "convert"),
    "gptoss_jax.__main__": ("cli",),
    # Four bits have their layout from the kernels that unpack them: checkpoints are read into it.
    "convert": (*NETWORK, "selection"),
    "experiments": (*JOBS, "interface", "cli", "convert"),
}


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


def room(name: str) -> str:
    """The room of a module: `gptoss_jax.run` of gptoss_jax.run.engine, `convert` of all of convert."""
    return ".".join(name.split(".")[: 2 if name.startswith("gptoss_jax.") else 1])


def test_relative_imports_are_understood() -> None:
    """The reader itself, at three places whose imports are known."""
    assert "gptoss_jax.statistics.sums" in IMPORTS["gptoss_jax.reports.markdown"]
    assert {"gptoss_jax.errors", "gptoss_jax.interface.checkpoints", "gptoss_jax.run.bar"} <= IMPORTS[
        "gptoss_jax.cli.prune"
    ]
    assert "convert.mxfp4" in IMPORTS["convert.tensors"]


def test_every_room_has_its_arrows() -> None:
    assert {room(name) for name in MODULES} == {*ARROWS}


@pytest.mark.parametrize("name", MODULES)
def test_imports_follow_the_arrows(name: str) -> None:
    here = room(name)
    allowed = {here, *(other if other in ROOMS else f"gptoss_jax.{other}" for other in ARROWS[here])}
    reached = {room(imported) for imported in IMPORTS[name] if imported.partition(".")[0] in ROOMS}
    # A package's own `__init__` is imported with each of its modules and is no arrow.
    assert not reached - allowed - {"gptoss_jax"}
    assert not {imported.partition(".")[0] for imported in IMPORTS[name]} & {"torch", "tests"} or here == "experiments"


def test_arrows_have_no_cycle() -> None:
    graph = {name: {i for i in IMPORTS[name] if i in MODULES and i not in ROOMS} for name in MODULES}
    assert list(TopologicalSorter(graph).static_order())


def test_the_command_line_starts_without_the_large_packages() -> None:
    large = {"jax", "jaxlib", "flax", "numpy", "transformers", "datasets", "pyarrow", "torch", "convert"}
    code = f"import sys, gptoss_jax.cli; print(*({large!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_every_module_of_the_command_line_is_a_command_that_python_has_too() -> None:
    assert sorted(gj.PUBLIC) == gj.__all__
    files = {file.stem for file in (ROOT / "gptoss_jax" / "cli").glob("*.py")}
    assert {command.callback.__name__ for command in cli.commands.values() if command.callback} == files - {
        "__init__",
        "__main__",
        "options",
        "terminal",
    }


def test_no_file_is_named_for_nothing_in_particular() -> None:
    files = [*MODULES.values(), *(ROOT / "tests").rglob("*.py")]
    assert not {file.stem for file in files} & {"utils", "util", "helpers", "helper", "common", "misc", "manager"}


@pytest.mark.parametrize("name", ["README.md", "LICENSE"])
def test_readme_and_licence_are_there(name: str) -> None:
    assert (ROOT / name).read_text(encoding="utf-8").strip()
