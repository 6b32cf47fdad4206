"""The command `profile`."""

import math
import re
from typing import Any

import click

from ..errors import UserError
from .options import invocation, mesh_sizes, weights_option

CHANNELS = ("analysis", "commentary", "final")  # of harmony, the ones that GPT-OSS was trained with


def _channel_weights(_: Any, __: Any, text: str | None) -> dict[str, float] | None:
    if text is None:
        return None
    try:
        pairs = [pair.split("=") for pair in text.split(",")]
        weights = {channel.strip(): float(weight) for channel, weight in pairs}
    except ValueError:
        raise click.BadParameter(f"{text!r}: write for example analysis=0.5,final=1") from None
    if not set(weights) <= set(CHANNELS) or not all(0 <= weight < math.inf for weight in weights.values()):
        raise click.BadParameter(f"{text!r}: channels are {', '.join(CHANNELS)}, weights numbers of at least 0")
    return weights


def _coordinator(_: Any, __: Any, text: str | None) -> str | None:
    if text in (None, "auto"):
        return text
    match = re.fullmatch(r"[^\s:/]+:(\d{1,5})", text)
    if not match or not 0 < int(match[1]) < 1 << 16:
        raise click.BadParameter(f"{text!r}: write for example 10.0.0.1:1234")
    return text


@click.command()
@click.argument("model", nargs=-1, required=True)
@click.option("--data", help="JSONL, Parquet or text file, a folder of these, or a hub id.  [required]")
@click.option("--split", default="train", help="Split of a hub dataset.")
@click.option("--text-column", default="text", help="Column with harmony text, or with a list of messages.")
@click.option("--id-column", default="id", help="Column with the row's id; may be absent.")
@click.option("--domain-column", help="Column with the row's domain: statistics are also kept by domain.")
@click.option("--domain", multiple=True, help="Only rows of this domain; may be given several times.")
@click.option("--num-rows", type=click.IntRange(1), help="Sample this many rows by hash.  [default: all]")
@click.option("--max-seq-length", type=click.IntRange(1), default=2048, help="Tokens a row, or a packed block.")
@click.option("--batch-size", type=click.IntRange(1), help="Rows a step.  [default: 4 for each of the mesh's data]")
@click.option(
    "--truncate",
    type=click.Choice(["left", "right"]),
    default="left",
    help="Side longer rows lose; --pack cuts instead.",
)
@click.option("--pack", is_flag=True, help="Pack rows into full blocks, EOS after each.")
@click.option("--cross-document", is_flag=True, help="With --pack: attention crosses from row to row.")
@click.option("--keep", type=click.Choice(["assistant", "all"]), default="assistant", help="Which tokens count.")
@click.option(
    "--channel-weights",
    callback=_channel_weights,
    help="E.g. analysis=0.5,final=1; others 0. Sums are weighted, counts are not.",
)
@click.option(
    "--skip-first", type=click.IntRange(0), default=0, help="Positions of each row or document that do not count."
)
@click.option("--seed", type=int, default=0, help="Seed of the row sample.")
@click.option("--eaft", is_flag=True, help="Also sum for the criterion eaft_reap: a second pass over the rows.")
@click.option(
    "--eaft-quantiles", type=click.FloatRange(0, 1), nargs=2, default=(0.15, 0.15), help="Of probability and entropy."
)
@click.option("--eaft-weights", type=float, nargs=3, default=(1.0, -2.0, 0.25), help="Right, wrong, other tokens.")
@click.option(
    "--engine",
    type=click.Choice(["auto", "resident", "streamed"]),
    default="auto",
    help="Resident holds all weights, streamed one layer after the other; auto goes by memory.",
)
@click.option("--memory-gib", type=click.FloatRange(0, min_open=True), help="Most memory to take.  [default: any]")
@click.option(
    "--activation-gib",
    type=click.FloatRange(0),
    default=2.0,
    help="Streamed: hidden states beyond this are not held in memory, but mapped from files of the progress.",
)
@click.option(
    "--mesh", callback=mesh_sizes, help="data=N,expert=M: how devices share rows and experts.  [default: all]"
)
@click.option(
    "--map",
    "mapping",
    type=click.Choice(["mesh", "pmap"]),
    default="mesh",
    help="pmap: the cores of one host, all weights on each.",
)
@weights_option
@click.option(
    "--coordinator",
    callback=_coordinator,
    help="Many processes: host:port of process 0, or auto where the platform knows.",
)
@click.option("--num-processes", type=click.IntRange(1), help="How many processes run this command.")
@click.option("--process-id", type=click.IntRange(0), help="Which of them this is.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", help="Of the computation.")
@click.option("--out", default="profile", help="Folder for the artifacts; may be gs:// or another that fsspec knows.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output folder, at the end.")
@click.option("--resume", is_flag=True, help="Go on with the unfinished run beside --out, if there is one.")
@click.option("--merge", is_flag=True, help="In place of MODEL, finished profiles over different rows: add them.")
def profile(model: tuple[str, ...], out: str, overwrite: bool, resume: bool, merge: bool, **options: Any) -> None:
    """Run rows through MODEL and write the statistics of its experts.

    MODEL is a folder in Hugging Face form, an Orbax checkpoint of this project, a hub id, or nano, the small model
    that ships with the project. All devices of all processes are used; docs/pods.md says how many processes run as one.

    With --merge, MODEL... are the folders of two or more finished profiles over different rows; of the
    options only --out and --overwrite go with it.

    What is finished of a run is kept in the folder OUT.progress until OUT is complete.
    """
    context = click.get_current_context()
    if merge:
        _check_merge(context)
        _merge(model, out, overwrite)
        return
    if len(model) > 1:
        raise click.UsageError(f"Got more than one MODEL ({' '.join(model)}): only --merge takes several", context)
    if options["data"] is None:
        raise click.UsageError("Missing option '--data'", context)
    from .run import run

    _check_options(options)
    run(model[0], out, overwrite, resume, options)


def _check_merge(context: click.Context) -> None:
    """UsageError where an option would mean nothing for profiles that are finished."""
    if len(context.params["model"]) < 2:
        raise click.UsageError("--merge takes the folders of two or more profiles", context)
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "") != click.core.ParameterSource.DEFAULT
        if given and parameter.name not in ("model", "merge", "out", "overwrite"):
            raise click.UsageError(f"{parameter.opts[0]} means nothing with --merge: leave it out", context)


def _merge(folders: tuple[str, ...], out: str, overwrite: bool) -> None:
    from ..files import atomic as outputs
    from ..files.paths import place
    from ..run import merge
    from ..run.artifacts import INFO

    target = place(out)
    outputs.check_free(target, overwrite)
    parts = merge.read_parts([place(folder) for folder in folders])
    outputs.check_apart(target, *(part.folder for part in parts))
    with outputs.new_folder(target, overwrite, last=INFO) as folder:
        merge.write(folder, parts, invocation())
    tokens, rows = (sum(part.info[name] for part in parts) for name in ("total_tokens", "rows"))
    click.echo(f"{len(parts)} profiles: {tokens:,} tokens of {rows:,} rows; report: {target / 'report.md'}")


def _check_options(options: dict[str, Any]) -> None:
    if options["domain"] and not options["domain_column"]:
        raise UserError("--domain needs --domain-column: name the column that holds the domain")
    if options["cross_document"] and not options["pack"]:
        raise UserError("--cross-document needs --pack: padded rows never see one another")
    if options["channel_weights"] and options["keep"] == "all":
        raise UserError("--channel-weights needs --keep assistant: only its messages have channels")
    if not all(map(math.isfinite, (*options["eaft_quantiles"], *options["eaft_weights"]))):
        raise UserError("--eaft-quantiles and --eaft-weights are finite numbers")
    coordinator, count, process = (options[name] for name in ("coordinator", "num_processes", "process_id"))
    if (coordinator in (None, "auto")) != (count is process is None) or (count is None) != (process is None):
        raise UserError("--coordinator host:port goes with --num-processes and --process-id, and auto without them")
    if count and process >= count:
        raise UserError(f"--process-id {process} is too large: of {count} processes the last is {count - 1}")
    if options["skip_first"] >= options["max_seq_length"]:
        raise UserError("--skip-first leaves no position of a row: make it less than --max-seq-length")
