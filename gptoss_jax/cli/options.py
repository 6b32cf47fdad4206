"""What several commands share: options from their declarations, values of options, what was called, and last words."""

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import click

from ..errors import OptionError, UserError
from ..files.paths import place
from ..run.kinds import SWITCH
from ..run.options import Option, Options, declared_options, flag_of, wrong

F = TypeVar("F", bound=Callable[..., Any])


class Place(click.ParamType):
    """A path of this machine or of a remote storage. Every option that takes a path has this type."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path; the line that refuses it names the option."""
        try:
            return place(value)
        except UserError as error:
            named = param.opts[0] if isinstance(param, click.Option) else getattr(param, "human_readable_name", "")
            raise type(error)(f"{named} {error}") from error


class ModelName(Place):
    """A path as well, or the name of a model; it stays as it was given, since reports and cards have it so."""

    name = "model"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The name; one that is no path, as a hub id, is found when it is opened."""
        if value:
            super().convert(value, param, ctx)
        return value


PATH, MODEL = Place(), ModelName()


SOFT = "A keep.json: what the experts that it keeps leave of MODEL, which nothing is written of."


def soft_prune(command: F) -> F:
    """The option of commands that take keep-sets for a soft prune."""
    return click.option("--keep-sets", type=PATH, help=SOFT)(command)


class Value(click.ParamType):
    """The values of an option: what it cannot be is refused in the words in which Python refuses it."""

    def __init__(self, declared: Option, flag: str):
        self.declared, self.flag, self.name = declared, flag, declared.kind.metavar

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The value of a word of the command line."""
        if not isinstance(value, str):
            return value  # a default
        try:
            read = self.declared.kind.read(value)
        except ValueError:
            raise wrong(self.flag, value, self.declared) from None
        if not self.declared.kind.accepts(read):
            raise wrong(self.flag, read, self.declared)
        return read


def options_of(*kinds: type[Options]) -> Callable[[F], F]:
    """All options of some option types, for a command."""

    def decorate(command: F) -> F:
        for kind in reversed(kinds):
            command = some_of(kind, *declared_options(kind))(command)
        return command

    return decorate


def some_of(kind: type[Options], *names: str) -> Callable[[F], F]:
    """Some options of an option type, for a command."""

    def decorate(command: F) -> F:
        for name in reversed(names):
            command = option_of(kind, name)(command)
        return command

    return decorate


def option_of(kind: type[Options], name: str) -> Callable[[F], F]:
    """One option of an option type, for a command."""
    declared: Option = declared_options(kind)[name]
    (default,) = (field.default for field in fields(kind) if field.name == name)
    flag = flag_of(kind, name)
    help = f"{declared.help}  [default: {declared.otherwise}]" if declared.otherwise else declared.help
    if declared.kind is SWITCH:
        return click.option(flag, name, is_flag=True, default=default, help=help)
    kept: dict[str, Any] = {"multiple": True} if not declared.several else {"nargs": declared.several}
    if declared.kind.join:
        kept = {"multiple": True, "callback": lambda _, __, words: _joined(words, declared, flag)}
    kept |= {"required": True} if declared.required else {"default": default, "show_default": not declared.otherwise}
    value = Value(declared, flag)
    return click.option(flag, name, type=value, metavar=declared.kind.metavar, help=help, **kept)


def _joined(words: Sequence[Any], declared: Option, flag: str) -> Any:
    """The value that Python would be given for several words."""
    assert declared.kind.join
    try:
        return declared.kind.join(words)
    except ValueError as error:
        raise OptionError(f"{flag} {error}: give each once") from None


def command_line() -> str:
    """The words that make an output again: a run that went on is made again without --resume."""
    return shlex.join(["gptoss-jax", *(word for word in sys.argv[1:] if word != "--resume")])
