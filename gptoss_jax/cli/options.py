"""What several commands share: values of options, what ran, and the bar of progress."""

import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from .. import __version__

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


weights_option = click.option(
    "--weights", type=click.Choice(["bf16", "mxfp4"]), default="bf16", help="Form of the experts in device memory."
)


def size(_: Any, __: Any, text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([KMG]?i?B?)", text.strip(), re.IGNORECASE)
    if not match or match[2].upper() not in UNITS or not 1 <= float(match[1]) * UNITS[match[2].upper()] < 1 << 63:
        raise click.BadParameter(f"{text!r} is no size: write for example 5GB or 500MiB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def mesh_sizes(_: Any, __: Any, text: str | None) -> tuple[int, int] | None:
    """data and expert of data=N,expert=M."""
    if text is None:
        return None
    match = re.fullmatch(r"data=(\d{1,9}),expert=(\d{1,9})", text.replace(" ", ""))
    if not match or not int(match[1]) or not int(match[2]):
        raise click.BadParameter(f"{text!r}: write for example data=2,expert=4")
    return int(match[1]), int(match[2])


def invocation() -> dict[str, Any]:
    """What profile.json says of any command line, and of what ran it."""
    from importlib.metadata import version

    # A run that went on is made again by the same words without it.
    words = [word for word in sys.argv[1:] if word != "--resume"]
    packages = ("jax", "flax", "transformers", "tokenizers", "datasets", "numpy")
    return {
        "command": shlex.join(["gptoss-jax", *words]),
        "versions": {"gptoss-jax": __version__, **{name: version(name) for name in packages}},
    }


@contextmanager
def progress(total: int, unit: str, shown: bool = True, done: float = 0) -> Iterator[Callable[[float], Any]]:
    """A bar on the terminal with rate and time left; nothing where standard error is no terminal."""
    from tqdm import tqdm

    hidden = None if shown else True
    with tqdm(total=total, initial=done, unit=unit, unit_scale=True, disable=hidden, dynamic_ncols=True) as bar:
        yield bar.update
