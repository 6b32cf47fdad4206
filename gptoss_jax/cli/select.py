"""The command `select`."""

import os
from typing import Any

import click

from ..errors import OptionError
from ..run.choosing import OF_DATA, OF_JUDGING, OF_PLACING, Keeping, Ranked, Searching
from ..run.judging import Judging
from ..run.options import Data, Placing, Writing, taken
from ..selection.criteria import ELIMINATIONS
from . import terminal
from .options import MODEL, PATH, option_of, options_of, some_of

SAID = click.core.ParameterSource.COMMANDLINE
NAMED = 20  # domains whose loss is shown


@click.command()
@click.argument("profile", type=MODEL)
@options_of(Keeping, Ranked)
@option_of(Writing, "format")
@click.option("--model", type=MODEL, help="With --budget-gib, the model of a profile that does not say its sizes.")
@options_of(Searching)
@some_of(Data, *OF_DATA)
@some_of(Judging, *OF_JUDGING)
@some_of(Placing, *OF_PLACING)
@click.option("--out", type=PATH, default="keep.json", help="The file for the keep-sets.")
@click.option("--overwrite", is_flag=True, help="Replaces existing files.")
@click.option("--resume", is_flag=True, help="Goes on with the unfinished search beside --out.")
def select(
    profile: Any, out: Any, overwrite: bool, resume: bool, model: Any, format: str, rule: str, **options: Any
) -> None:
    """Choose the experts of each layer that stay: so many, as many as fit, or as hold a share.

    PROFILE is a profile's folder or a saliency.parquet; for a criterion of the weights alone, for rules other than
    score, and for --pick, a MODEL. The file has the reason for each expert, and prune --keep-sets takes it. What each
    domain loses is printed: its coverage is the mean over layers of the score that is kept of it, over what its own
    best experts, as many, would keep; of reap_sum where a criterion is a mean or may be negative.

    With --rule greedy or greedy_cosine the file KEEP-ranking.json beside --out has all experts, and what the going of
    each costs; what is finished of a run is kept in the folder OUT.progress. With --pick candidates are made of four
    fifths of the rows, by their hashes, and judged by the rest; the file has what was tried.
    """
    ranked, keeping = taken(Ranked, options), taken(Keeping, options)
    context = click.get_current_context()
    given = {name: value for name, value in options.items() if context.get_parameter_source(name) == SAID}
    if rule in ELIMINATIONS or "pick" in given:
        if model is not None:
            raise OptionError("--model goes with a profile: a search is given the model in its place")
        from ..devices import hosts
        from ..interface import searching
        from ..run.progress import resumable

        asked = (ranked, keeping, format, out, overwrite, resume, terminal.complain)
        with resumable(out):
            found = searching.search(profile, rule, *asked, **given)
        _show(found if hosts.is_first() else [])
        return
    if given or resume:
        flags = {parameter.name: parameter.opts[0] for parameter in context.command.params}
        first = flags[next(iter(given), "resume")]
        searches = ", ".join(f"--rule {name}" for name in ELIMINATIONS)
        raise OptionError(f"{first} goes with {searches} and --pick: leave it out, or give one of these too")
    # No device is needed. On one host of many, JAX would wait for the others before it says which there are.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from ..interface import choosing

    _show(choosing.choose(profile, ranked, keeping, format, model, out, overwrite))


def _show(found: Any) -> None:
    for selected in found:
        kept = selected.keep_sets
        for remark in selected.remarks:
            terminal.complain(f"{selected.file}: {remark}")
        terminal.report(f"{len(kept.layers)} layers of {len(kept.layers[0])} experts {kept.origin}: {selected.file}")
        if selected.coverage:
            lost = [f"{name} {share:.3f}" for name, share in selected.coverage.items()]
            further = f" and {len(lost) - NAMED:,} domains that keep more" if len(lost) > NAMED else ""
            terminal.report(f"coverage, worst first: {', '.join(lost[:NAMED])}{further}")
