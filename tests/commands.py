"""The commands of the program by the words that call them, those of groups too."""

from collections.abc import Iterator

import click

from gptoss_jax.cli import cli


def _walk(group: click.Group, before: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from _walk(command, f"{before}{name} ")
        else:
            yield before + name, command


COMMANDS = dict(_walk(cli))
FINGERPRINTS = tuple(name for name in COMMANDS if name.startswith("fingerprint "))
