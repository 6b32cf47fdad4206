"""The bar on the terminal, for long work."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..reports.rates import rate

MEGABYTE = 10**6
FORM = "{l_bar}{bar}| {done} of {whole} {unit} [{elapsed}<{remaining}, {speed} {unit}/s]"


@contextmanager
def bar(total: int, unit: str, shown: bool = True, done: float | int = 0) -> Iterator[Callable[..., Any]]:
    """A bar with rate and time left; it shows nothing where standard error is no terminal.

    What it yields is called with the amount that was finished since the last call, which may be a part of one, and
    with what to say before the bar. Whole ones are counted; bytes, whose unit is "B", as megabytes.
    """
    from tqdm import tqdm  # imported late, so that --help answers at once

    size = MEGABYTE if unit == "B" else 1

    class Bar(tqdm):
        @property
        def format_dict(self) -> dict[str, Any]:
            said = super().format_dict
            speed = said["rate"] or (self.n - self.initial) / max(said["elapsed"], 1e-3)
            amounts = {"done": f"{self.n / size:,.0f}", "whole": f"{total / size:,.0f}"}
            return said | amounts | {"speed": rate(speed / size, ",")}

    exact = float(done)
    words = {"unit": "MB" if unit == "B" else unit, "bar_format": FORM, "dynamic_ncols": True}
    with Bar(total=total, initial=round(done), disable=None if shown else True, **words) as drawn:

        def advance(amount: float | int, saying: str = "") -> None:
            nonlocal exact
            exact += amount
            if saying:
                drawn.set_description_str(saying, refresh=False)
            drawn.update(round(exact) - drawn.n)

        yield advance
