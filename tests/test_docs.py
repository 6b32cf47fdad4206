"""The commands that documents show are commands of this program."""

import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from gptoss_jax.cli import cli
from gptoss_jax.devices.topologies import SLICES

from .commands import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```\w*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# A command ends where its line does, or the quotes or the backticks around it, or where a shell goes on.
COMMAND = re.compile(r"gptoss-jax +([a-z-][^\n'`]*?)(?= *(?:[\n'`]| [>|&] ?| 2>|$))")


def commands(file: str) -> Iterator[str]:
    """What stands behind gptoss-jax: in blocks, and of a whole command in the text."""
    text = (ROOT / file).read_text(encoding="utf-8")
    for block in BLOCK.findall(text):
        yield from COMMAND.findall(block.replace("\\\n", " ") + "\n")
    for inline in re.findall(r"`(?:\S+=\S+ )*(gptoss-jax [a-z][^`]*)`", BLOCK.sub("", text)):
        yield from COMMAND.findall(inline + "\n")


FILES = ("README.md", "docs/pods.md", "docs/fingerprints.md", "docs/traces.md")
ALL = [(file, command) for file in FILES for command in commands(file)]


def test_commands_are_found() -> None:
    """The reader itself: in blocks, over several lines, in quotes, in the background and in sentences."""
    found = {" ".join(command.split()) for _, command in ALL}
    assert {command.split()[0] for command in found} == {*cli.commands, "--version"} - {"merge"}
    for end in (
        "--out gs://BUCKET/profile",
        "--process-id 1 --out profile",
        "--tokens 1000000000",
        "-20b --topology v5e:2x4",
    ):
        assert any(command.endswith(end) for command in found), end


@pytest.mark.parametrize(("file", "command"), ALL, ids=[f"{file}: {command[:60]}" for file, command in ALL])
def test_commands_are_parsed(file: str, command: str) -> None:
    # Packages of storages are no part of the tests: their addresses are parsed as those of memory.
    name, *words = shlex.split(command.replace("gs://", "memory://"), comments=True)
    if name == "fingerprint":  # a group: its commands have two words
        name = f"{name} {words.pop(0)}"
    if not words and name in COMMANDS:
        return  # the command's name alone, in a sentence
    try:
        if name.startswith("-"):
            cli.make_context("gptoss-jax", [name])
        else:
            COMMANDS[name].make_context(name, [*words]).close()
    except click.exceptions.Exit:
        assert {"--help", "--version"} & {name, *words}


def test_every_slice_that_is_named_exists_and_can_be_created() -> None:
    text = (ROOT / "docs/pods.md").read_text(encoding="utf-8")
    named = {*re.findall(r"\b((?:v\d\w|tpu7x):\d+(?:x\d+)+)", text)}
    assert named <= {f"{family}:{shape}" for family, shapes in SLICES.items() for shape in shapes}
    created = {*re.findall(r"^\| (\S+) \| (?:v[\w-]+ \| v2-alpha-\S+|through GKE)", text, re.MULTILINE)}
    assert created == named
    kinds = re.findall(r"^\| (\w+):(\S+) \| (v[\w-]+) \|", text, re.MULTILINE)
    for family, shape, kind in kinds:
        chips = math.prod(int(size) for size in shape.split("x"))
        # Of v5p the number counts cores, two a chip.
        assert kind == {"v5e": f"v5litepod-{chips}", "v6e": f"v6e-{chips}", "v5p": f"v5p-{2 * chips}"}[family]
