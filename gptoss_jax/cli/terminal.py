"""What the program says on the terminal. Texts of files pass through here: none moves the cursor, none is endless."""

import errno
import io
import os
import re
import signal
import sys

import click

from ..errors import OutputError, refusal

MOST = 2000  # characters of a message
UNWRITTEN = "standard output cannot be written: {}: what was asked for is not all there"
# Controls, among them those that begin escape sequences; line separators; what turns the direction of writing; and
# bytes that are no text. A terminal obeys the first, and no encoding has the last.
UNSHOWN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def begin() -> None:
    """Have both outputs escape what their encoding lacks, in the place of an error; those that are closed refuse.

    The next file to be opened would take the number of a closed one, and get what libraries print there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)  # this takes the lowest number that is free
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or io.StringIO()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def cleaned(text: str, most: int | None = MOST) -> str:
    """The text with escapes as \\x1b in the place of controls, its middle left out where it is longer than `most`.

    Line breaks and tabs stay.
    """
    if most and len(text) > most:
        end = most // 4
        text = f"{text[: most - end]} … {text[-end:]}"
    return UNSHOWN.sub(lambda found: found[0] if found[0] in "\n\t" else _escape(found[0]), text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def line(text: str) -> str:
    """The text in one line."""
    return " ".join(cleaned(text).split())


def complain(text: str) -> None:
    """Say in one line what is wrong or worth knowing, on standard error."""
    try:
        click.echo(f"gptoss-jax: {line(text)}", err=True)
    except OSError:
        mute(2)  # nobody listens


def report(text: str) -> None:
    """Say in one line what is done, on standard output. What is done stays done where that is closed or full."""
    try:
        click.echo(line(text))
    except OSError:
        mute()


def show(text: str, nl: bool = True) -> None:
    """Print what a command is asked for. OutputError where it cannot be had; a reader that has enough ends the
    program."""
    try:
        click.echo(text, nl=nl)
    except OSError as error:
        mute()
        if error.errno == errno.EPIPE:
            sys.exit(128 + signal.SIGPIPE)
        raise OutputError(UNWRITTEN.format(refusal(error))) from error


def mute(stream: int = 1) -> None:
    """Let what standard output, or another stream, still holds go nowhere: Python would try again to write it when it
    ends, and fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
