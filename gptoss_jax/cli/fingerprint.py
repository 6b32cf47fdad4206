"""The commands `fingerprint record`, `fingerprint import` and `fingerprint rank`."""

from typing import Any

import click

from ..run.fingerprinting import ANSWERED, RECORDED, Asked, Used
from ..run.options import SIDE_BY_SIDE, Answering, Data, Placing, Sampling, by_flag, taken
from . import terminal
from .options import MODEL, PATH, command_line, options_of, soft_prune, some_of

SHOWN = 10  # experts with the highest specificity
DOMAINS = 'A JSON file of domains: {"law": ["BENCHMARK/CATEGORY", ...], ...}.'


@click.group()
def fingerprint() -> None:
    """See which experts the answers of a kind use: record them, read what is published, rank by domain.

    The commands share a folder, the activation dataset, which `datasets.load_dataset` loads too.
    """


@fingerprint.command("record")
@click.argument("model", type=MODEL)
@some_of(Data, *RECORDED)
@options_of(Asked)
@some_of(Answering, *ANSWERED)
@options_of(Sampling)
@some_of(Placing, *SIDE_BY_SIDE)
@soft_prune
@click.option("--domains", type=PATH, help=DOMAINS)
@click.option("--out", type=PATH, default="activations", help="The folder for the dataset.")
@click.option("--overwrite", is_flag=True, help="Replaces an existing output folder, at the end.")
@click.option("--resume", is_flag=True, help="Goes on with the unfinished run beside --out, if there is one.")
def record(model: str, keep_sets: Any, domains: Any, out: Any, overwrite: bool, resume: bool, **options: Any) -> None:
    """Have MODEL answer questions, and write which experts its tokens chose.

    A row of the data is a conversation, or has a column with what a user says, which --text-column names; and it has a
    benchmark and a category. Many questions are answered side by side. What is finished of a run is kept in the folder
    OUT.progress until OUT is complete.
    """
    # First, since the seed is that of the answers: all of `Data` that is an option here is named otherwise.
    answering, sampling = taken(Answering, options), taken(Sampling, options)
    data, asked, placing = taken(Data, options), taken(Asked, options), taken(Placing, options)
    from ..devices import hosts
    from ..files.atomic import check_apart
    from ..fingerprints import recording
    from ..fingerprints.domains import domains_of
    from ..interface.model import open_masked
    from ..run.job import join

    check_apart(out, *(given for given in (keep_sets, domains) if given is not None))
    known = None if domains is None else domains_of(domains)
    own = {"MODEL": model, "--keep-sets": str(keep_sets), "--domains": known, "--out": str(out)}
    join(placing, own | by_flag(data, asked, answering, sampling, placing))
    name = f"{model}, masked by {keep_sets}" if keep_sets else model
    request = recording.Request(name, data, asked, answering, sampling, placing, known, command_line())
    info = recording.record(
        request, lambda _: open_masked(model, keep_sets).source, out, overwrite, resume, terminal.complain
    ).info
    if hosts.is_first():
        terminal.report(
            f"{info['answers']:,} answers in {info['groups']:,} groups, over {info['num_layers']} layers of "
            f"{info['num_experts']} experts: {out}"
        )


@fingerprint.command("import")
@click.argument("source", type=PATH, nargs=-1, required=True)
@click.option("--domains", type=PATH, help=DOMAINS)
@click.option("--out", type=PATH, default="activations", help="The folder for the dataset.")
@click.option("--overwrite", is_flag=True, help="Replaces an existing output folder, at the end.")
def import_published(source: tuple[Any, ...], domains: Any, out: Any, overwrite: bool) -> None:
    """Make an activation dataset of published summaries and examples.

    SOURCE is a folder or a tar archive, or several, with files BENCHMARK/CATEGORY/True_False.json, or
    True_False_examples.json with the routing of each token; the words say whether the answers are finished, and whether
    they repeat themselves.
    """
    from ..interface.fingerprint import import_published

    info = import_published(source, domains, out=out, overwrite=overwrite).info
    whole, same = info["whole_groups"], info["reproduced_groups"]
    if same < whole:
        terminal.complain(
            f"{whole - same} of {whole} groups whose answers are all examples have other figures than their examples "
            "give: those of the summaries stand"
        )
    terminal.report(
        f"{info['groups']:,} groups of {info['samples']:,} answers, {info['answers']:,} of them with their text, over "
        f"{info['num_layers']} layers of {info['num_experts']} experts; of {whole} groups whose answers are all "
        f"examples these give {same} summaries to the bit: {out}"
    )


@fingerprint.command("rank")
@click.argument("dataset", type=PATH)
@options_of(Used)
@click.option("--domains", type=PATH, help=f"{DOMAINS} It takes the place of those of the dataset.")
@click.option("--out", type=PATH, default="ranking.json", help="The file for the ranking.")
@click.option("--overwrite", is_flag=True, help="Replaces existing files.")
def rank(dataset: Any, domains: Any, out: Any, overwrite: bool, **options: Any) -> None:
    """Rank the experts of each layer by how much the answers of a domain use them.

    DATASET is the folder of an activation dataset. The ranking is one that prune takes, with the share of each expert
    as its reason. Of a domain it is printed which experts it uses the most beyond all answers: how many times as much,
    with the interval over its categories.
    """
    from ..interface.fingerprint import compare

    used = taken(Used, options)
    compared = compare(dataset, used, domains, out, overwrite)
    for remark in compared.remarks:
        terminal.complain(remark)
    layers = compared.ranking.layers
    terminal.report(f"{len(layers)} layers of {len(layers[0])} experts {compared.ranking.origin}: {out}")
    if compared.keep_sets is not None:
        terminal.report(f"{len(compared.keep_sets.layers[0])} experts a layer: {compared.keep_file}")
    if compared.specificity is not None:
        for layer, expert in compared.specificity.best(SHOWN):
            terminal.report(f"layer {layer}, expert {expert}: {compared.specificity.words(layer, expert)}")
