"""The bar on the terminal, for long work."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def bar(total: int, unit: str, shown: bool = True, done: float = 0) -> Iterator[Callable[[float], Any]]:
    """A bar with rate and time left; it shows nothing where standard error is no terminal.

    What it yields is called with the amount that was finished since the last call.
    """
    from tqdm import tqdm  # imported late, so that --help answers at once

    hidden = None if shown else True
    with tqdm(total=total, initial=done, unit=unit, unit_scale=True, disable=hidden, dynamic_ncols=True) as shown_bar:
        yield shown_bar.update
