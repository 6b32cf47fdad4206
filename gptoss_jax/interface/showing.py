"""The page that people look at, as a function with the names and defaults of the command line."""

from collections.abc import Mapping
from typing import Any

from .. import __version__
from ..errors import InputError, TokenizerError
from ..files import atomic
from ..files.paths import AnyPath, place
from ..page import artifacts, html
from ..page.answers import check_tokenizer
from ..page.content import content
from ..page.packing import Packed
from ..routing.tables import tokenizer_hash
from ..routing.traces import Trace


def report(
    *paths: str | AnyPath,
    model: Any = None,
    out: str | AnyPath = "report.html",
    title: str = "",
    overwrite: bool = False,
    command: str = "",
) -> AnyPath:
    """Write one HTML file that shows what other commands wrote, and opens from disk without a network.

    Args:
        paths: folders and files that the other commands wrote; a profile or an activation dataset is among them.
        model: with traces, the model that was traced, open or by its name: its tokenizer says what tokens are.
        out: the file.
        title: what stands at its head; by default the names of the models.
        overwrite: replaces an existing file.
        command: what the page says that it was made by.

    Returns:
        The file.

    InputError where something is nothing that a page shows; ProfileError where no profile is given, or things are of
    models of different sizes.

    Example:
        >>> import gptoss_jax as gj
        >>> profile = gj.profile("nano", [{"text": "2 + 2 = 4"}], keep="all", max_seq_length=64, out="profile")
        >>> gj.report("profile", out="page.html").name
        'page.html'
    """
    if not paths:
        raise InputError("a page shows what other commands wrote: name a profile's folder, and more beside it")
    target = place(out)
    atomic.check_free(target, overwrite)
    for path in paths:
        atomic.check_apart(target, place(path))
    things, packed = artifacts.opened(paths), Packed()
    tokenizer = _tokenizer(things.traces, model)
    said = content(things, tokenizer, packed, title, command or "gptoss_jax.report(…)", __version__)
    atomic.write_file(target, html.page(said["title"], said, packed), overwrite)
    return target


def _tokenizer(traces: Mapping[str, Trace], model: Any) -> Any:
    """What says what the tokens of traces are. TokenizerError where there are traces, and no model is named."""
    if not traces:
        return None
    if model is None:
        name = next(iter(traces))
        raise TokenizerError(f"{name}: holds tokens by their numbers: name the model that was traced, --model")
    from .model import as_model

    opened = as_model(model)
    check_tokenizer(traces, tokenizer_hash(opened.source.folder), opened.name)
    return opened.tokenizer
