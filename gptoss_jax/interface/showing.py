"""The page that people look at, as functions with the names and defaults of the command line."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

from .. import __version__
from ..errors import InputError, OptionError, TokenizerError
from ..evaluation import stored
from ..files import atomic
from ..files.paths import AnyPath, is_path, place
from ..page import artifacts, html, plots
from ..page.answers import check_tokenizer
from ..page.content import content
from ..page.packing import Packed
from ..routing.tables import tokenizer_hash
from ..routing.traces import Trace
from ..run.profile import Profile


def report(
    *things: Any,
    model: Any = None,
    out: str | AnyPath = "report.html",
    title: str = "",
    overwrite: bool = False,
    command: str = "gptoss_jax.report(…)",
) -> AnyPath:
    """Write one HTML file that shows what other commands wrote, and opens from disk without a network.

    Args:
        things: profiles, activation datasets, keep-sets, rankings, evaluations, traces, healed checkpoints, open or the
            paths of their folders and files; a profile or an activation dataset is among them.
        model: with traces, the model that was traced, open or by its name: its tokenizer says what tokens are.
        out: the file.
        title: what stands at its head; by default the names of the models.
        overwrite: replaces an existing file.
        command: what the page says that it was made by.

    Returns:
        The file.

    InputError where something is nothing that a page shows; ProfileError where no profile is given, or things are of
    models of different sizes; TokenizerError where traces are given, and no model.

    Example:
        >>> import gptoss_jax as gj
        >>> profile = gj.profile("nano", [{"text": "2 + 2 = 4"}], keep="all", max_seq_length=64)
        >>> gj.report(profile, profile.rank().keep(8), out="page.html").name
        'page.html'
    """
    target = place(out)
    atomic.check_free(target, overwrite)
    for one in things:
        if is_path(one):
            atomic.check_apart(target, place(one))
    atomic.write_file(target, _page(things, model, title, command), overwrite)
    return target


@dataclass(frozen=True)
class Shown:
    """A page, which a notebook shows where it is the value of a cell."""

    html: str
    height: int

    def _repr_html_(self) -> str:
        # As an address of its own, so that what is chosen can be in it, and apart from the notebook.
        page = base64.b64encode(self.html.encode()).decode()
        return (
            '<iframe sandbox="allow-scripts allow-downloads" style="width: 100%; border: 0" '
            f'height="{self.height}" src="data:text/html;base64,{page}"></iframe>'
        )


def show(*things: Any, model: Any = None, title: str = "", height: int = 900) -> Shown:
    """The page of `report` in a notebook.

    Args:
        things, model, title: as for `report`.
        height: in pixels.

    Example:
        >>> import gptoss_jax as gj
        >>> profile = gj.profile("nano", [{"text": "2 + 2 = 4"}], keep="all", max_seq_length=64)
        >>> gj.show(profile).html[:15]
        '<!doctype html>'
    """
    return Shown(_page(things, model, title, "gptoss_jax.show(…)"), height)


def plot(thing: Any, kind: str = "experts", **options: Any) -> Any:
    """A figure of matplotlib, for papers: `plot(profile, "experts").savefig("experts.pdf")`.

    Args:
        thing: an open profile, or what `evaluate` gives, or the path of its folder.
        kind: of a profile "experts", the heat map; "concentration"; "mass", what goes against how many stay. Of an
            evaluation "quality".
        **options: those of the kind: `criterion`, `domain`, `keep_sets`.

    Example:
        >>> import gptoss_jax as gj
        >>> profile = gj.profile("nano", [{"text": "2 + 2 = 4"}], keep="all", max_seq_length=64)
        >>> gj.plot(profile, "concentration").savefig("concentration.svg")
    """
    if kind not in plots.KINDS:
        raise InputError(f"there is no plot {kind!r}: there are {', '.join(plots.KINDS)}")
    of, draw = plots.KINDS[kind]
    if is_path(thing):
        thing = Profile.open(thing) if of is Profile else stored.read(thing)
    if not isinstance(thing, of):
        raise InputError(f"the plot {kind!r} is of a {of.__name__}, not of {type(thing).__name__}")
    known = [*signature(draw).parameters][1:]
    if unknown := sorted({*options} - {*known}):
        raise OptionError(
            f"there is no option {unknown[0]!r} of the plot {kind!r}: there are {', '.join(known) or 'none'}"
        )
    return draw(thing, **options)


def _page(things: Sequence[Any], model: Any, title: str, command: str) -> str:
    if not things:
        raise InputError("a page shows what other commands wrote: name a profile's folder, and more beside it")
    opened, packed = artifacts.opened(things), Packed()
    said = content(opened, _tokenizer(opened.traces, model), packed, title, command, __version__)
    return html.page(said["title"], said, packed)


def _tokenizer(traces: Mapping[str, Trace], model: Any) -> Any:
    """What says what the tokens of traces are. TokenizerError where there are traces, and no model is named."""
    if model is None:
        if not traces:
            return None
        name = next(iter(traces))
        raise TokenizerError(f"{name}: holds tokens by their numbers: name the model that was traced, --model")
    from .model import as_model

    opened = as_model(model)  # which refuses what is no model, whether its tokenizer is needed or not
    if not traces:
        return None
    check_tokenizer(traces, tokenizer_hash(opened.source.folder), opened.name)
    return opened.tokenizer
