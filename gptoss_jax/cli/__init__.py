"""The command line: the one place that joins the library and `convert`.

JAX and the other large packages are imported inside the commands, so that --help answers at once.
"""

import gc
import os
import signal
import sys
import traceback
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NoReturn

import click

from .. import PUBLIC, __version__, hindrance
from ..errors import UserError, refusal
from . import terminal

CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 110}


@click.group(context_settings=CONTEXT)
@click.version_option(__version__)
def cli() -> None:
    """Profile, understand and prune the experts of GPT-OSS in JAX.

    Every path may be one of this machine, or one that fsspec knows, as gs://BUCKET/FOLDER with the package gcsfs.
    """


# A command has the name of a function of the Python interface, and is in the module of this folder with that name.
for name in PUBLIC:
    if find_spec(f".{name}", __name__):
        cli.add_command(getattr(import_module(f".{name}", __name__), name))


class Stopped(SystemExit):
    """A signal ends the program. An exit lets temporary folders be removed, where the signal's own way would not."""


def main() -> None:
    """Entry point: exit status 0 done, 2 for what the user can mend, 1 for a fault of the program."""
    terminal.begin()
    if why := hindrance():
        _fail(why)
    # Standard error is for our own line: transformers remarks that PyTorch is missing, the hub on retries.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _stop)
    try:
        cli.main(prog_name="gptoss-jax", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        group: Any = error.ctx.command
        _fail(f"name a command: {', '.join(group.commands)}; see {error.ctx.command_path} --help")
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "gptoss-jax"
        _fail(f"{error.format_message().rstrip('.')}; see {command} --help")
    except UserError as error:
        _fail(str(error))
    except (click.Abort, KeyboardInterrupt) as stop:
        _stopped(stop.__cause__ or stop, 128 + signal.SIGINT)  # click turns Ctrl-C into an error of its own
    except Stopped as stop:
        _stopped(stop, stop.code)
    except SystemExit as stop:
        _exit(stop.code)
    except Exception as error:
        if isinstance(error, OSError) and _is_of_standard_output(error):
            terminal.mute()
            _fail(terminal.UNWRITTEN.format(refusal(error)))
        # JAX has a class of its own for memory that it cannot get; to import it here would load JAX.
        if isinstance(error, MemoryError) or str(error).startswith("RESOURCE_EXHAUSTED"):
            _fail("not enough memory: give a smaller --batch-size or --max-seq-length")
        if hosts := sys.modules.get("gptoss_jax.devices.hosts"):
            hosts.settle(error)
        click.echo(terminal.cleaned(traceback.format_exc(), most=10 * terminal.MOST), err=True)
        _exit(1)
    else:
        _exit(0)


def _is_of_standard_output(error: OSError) -> bool:
    """Whether what the program was asked for could not be printed: all that is printed goes through click.echo."""
    return traceback.extract_tb(error.__traceback__)[-1].name == click.echo.__name__


def _stop(received: int, _: Any) -> NoReturn:
    raise Stopped(128 + received)


def _stopped(stop: BaseException, status: Any) -> NoReturn:
    """End by a signal. What is kept stands in notes of the exception, from where it is known."""
    terminal.complain(f"stopped; {'; '.join(getattr(stop, '__notes__', ())) or 'nothing was written'}")
    _exit(status)


def _fail(message: str) -> NoReturn:
    terminal.complain(message)
    _exit(2)


def _exit(status: Any) -> NoReturn:
    if hosts := sys.modules.get("gptoss_jax.devices.hosts"):
        hosts.leave(status)
    gc.freeze()  # the interpreter would look a second long for garbage among what the packages hold, and then end
    sys.exit(status)
