"""The bar on the terminal, for long work."""

import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from statistics import median
from typing import Any

from ..reports.rates import rate

MEGABYTE = 10**6
FORM = "{l_bar}{bar}| {done} of {whole} {unit} [{elapsed}<{left}, {speed} {unit}/s]"
PARTS, MOST = 8, 2  # of what is finished, and how many times the usual time a part counts at most
REDRAWN = 0.5  # seconds: what changes oftener cannot be read


class Pace:
    """How fast work goes on: a mean over all that was finished behind its first part, which is calm.

    What is compiled does not come again, and may take as long as all else: the time of each eighth of the work counts
    as twice the eighths' median at most; a look at held-out rows every few steps is less than that, and counts."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._times: list[float] = []
        self._amounts: list[float] = []

    def advanced(self, done: float | int) -> None:
        """So much is finished."""
        self._times.append(self._clock())
        self._amounts.append(done)

    def __call__(self) -> float | None:
        """The amount of a second; None as long as nobody knows."""
        if len(self._times) < 2 or self._amounts[-1] == self._amounts[0]:
            return None
        first, done = self._amounts[0], self._amounts[-1] - self._amounts[0]
        parts = min(PARTS, len(self._times) - 1)
        edges = [*(self._time_of(first + done * n / parts) for n in range(parts)), self._clock()]
        took = [end - start for start, end in pairwise(edges)]
        usual = median(took)
        return done / max(sum(min(one, MOST * usual) for one in took), 1e-9)

    def _time_of(self, amount: float) -> float:
        """When so much was finished, as if what was told at once had come evenly."""
        at = max(1, bisect_left(self._amounts, amount))
        (low, high), (start, end) = self._amounts[at - 1 : at + 1], self._times[at - 1 : at + 1]
        return start + (end - start) * (amount - low) / (high - low) if high > low else end


def is_watched() -> bool:
    """Whether standard error is a terminal, or the output of a notebook's cell."""
    return sys.stderr is not None and (sys.stderr.isatty() or type(sys.stderr).__module__.startswith("ipykernel"))


@contextmanager
def bar(total: int, unit: str, shown: bool = True, done: float | int = 0) -> Iterator[Callable[..., Any]]:
    """A bar with rate and time left; it shows nothing where nobody watches.

    What it yields is called with the amount that was finished since the last call, which may be a part of one, and
    with what to say before the bar. Whole ones are counted; bytes, whose unit is "B", as megabytes.
    """
    from tqdm import tqdm  # imported late, so that --help answers at once

    size, pace, exact = MEGABYTE if unit == "B" else 1, Pace(), float(done)

    class Bar(tqdm):
        @property
        def format_dict(self) -> dict[str, Any]:
            said, known = super().format_dict, pace()
            mean = (self.n - self.initial) / max(said["elapsed"], 1e-3)
            return said | {
                "done": f"{self.n / size:,.0f}",
                "whole": f"{total / size:,.0f}",
                "left": tqdm.format_interval((total - self.n) / known) if known else "?",
                "speed": rate((known or mean) / size, ","),
            }

    words = {"unit": "MB" if unit == "B" else unit, "bar_format": FORM, "dynamic_ncols": True, "mininterval": REDRAWN}
    with Bar(total=total, initial=round(done), disable=not (shown and is_watched()), **words) as drawn:

        def advance(amount: float | int, saying: str = "") -> None:
            nonlocal exact
            exact += amount
            pace.advanced(exact)
            if saying:
                drawn.set_description_str(saying, refresh=False)
            drawn.update(round(exact) - drawn.n)

        yield advance
