"""The command `profile`."""

import math
import re
import shlex
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from .. import __version__
from ..errors import DataError, MeshError, TokenizerError, UserError
from .options import mesh_sizes, progress, weights_option

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from ..batching import Document
    from ..config import Config
    from ..hosts import Share
    from ..rows import Row

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
@click.option("--engine", type=click.Choice(["auto", "resident"]), default="auto", help="All weights in memory.")
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
@click.option("--merge", is_flag=True, help="In place of MODEL, finished profiles over different rows: add them.")
def profile(model: tuple[str, ...], out: str, overwrite: bool, merge: bool, **options: Any) -> None:
    """Run rows through MODEL and write the statistics of its experts.

    MODEL is a folder in Hugging Face form, an Orbax checkpoint of this project, or a hub id. All devices of all
    processes are used; docs/pods.md says how many processes run as one.

    With --merge, MODEL... are the folders of two or more finished profiles over different rows; of the
    options only --out and --overwrite go with it.
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
    _run(model[0], out, overwrite, options)


def _check_merge(context: click.Context) -> None:
    """UsageError where an option would mean nothing for profiles that are finished."""
    if len(context.params["model"]) < 2:
        raise click.UsageError("--merge takes the folders of two or more profiles", context)
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "") != click.core.ParameterSource.DEFAULT
        if given and parameter.name not in ("model", "merge", "out", "overwrite"):
            raise click.UsageError(f"{parameter.opts[0]} means nothing with --merge: leave it out", context)


def _merge(folders: tuple[str, ...], out: str, overwrite: bool) -> None:
    from .. import merge, outputs
    from ..artifacts import INFO
    from ..storage import place

    target = place(out)
    outputs.check_free(target, overwrite)
    parts = merge.read_parts([place(folder) for folder in folders])
    outputs.check_apart(target, *(part.folder for part in parts))
    with outputs.new_folder(target, overwrite, last=INFO) as folder:
        merge.write(folder, parts, _invocation())
    tokens, rows = (sum(part.info[name] for part in parts) for name in ("total_tokens", "rows"))
    click.echo(f"{len(parts)} profiles: {tokens:,} tokens of {rows:,} rows; report: {target / 'report.md'}")


def _run(model: str, out: str, overwrite: bool, options: dict[str, Any]) -> None:
    from convert.sources import open_source

    from .. import artifacts, harmony, hosts, outputs
    from .. import model as network
    from .. import profile as job
    from ..eaft import EaftOptions
    from ..rows import Row, prompts_hash, row_hashes
    from ..storage import local_folder, place

    target = place(out)
    _check_options(options)
    if options["coordinator"]:
        hosts.start(options["coordinator"], options["num_processes"], options["process_id"], _settings())
    writes = hosts.is_first()
    if writes:
        outputs.try_folder(target, overwrite)
    source = open_source(model)
    if writes:
        outputs.check_apart(target, source.folder, or_inside=True)
        if options["data"]:
            outputs.check_apart(target, place(options["data"]))
    mesh, share = _mesh(source.config, options)
    with local_folder(source.folder) as folder:
        tokenizer = harmony.load_tokenizer(folder)
    rows, documents, domains, make_batches = _documents(source.config, tokenizer, options, share)
    fingerprint = source.fingerprint()
    # Packed, every process holds all rows.
    counts = job.count_rows(documents if share.leads and (writes or not options["pack"]) else [])
    info = _info(model, fingerprint, rows, counts, mesh, options)
    by_domain = prompts_hash(Row(row.domain, row.id) for row in rows)
    data = {"the rows' hash": info["prompts_hash"], "the hash of the rows' domains": by_domain}
    hosts.agree({"the model's fingerprint": fingerprint} | data)
    job.check_kept(make_batches())
    gpt_oss = network.load(source, options["dtype"], mesh, options["weights"])
    eaft = EaftOptions(*options["eaft_quantiles"], *options["eaft_weights"]) if options["eaft"] else None
    num_tokens = sum(len(d.token_ids) + options["pack"] for d in documents) * (2 if eaft else 1)
    if options["pack"]:
        num_tokens //= share.of
    with progress(num_tokens, "tokens", shown=writes) as advance:
        measured = job.run(gpt_oss, _mapping(mesh, options), make_batches, share, advance, eaft)
    with hosts.first_alone():
        if writes:
            with outputs.new_folder(target, overwrite, last=artifacts.INFO) as folder:
                artifacts.write(folder, measured, domains, row_hashes(rows), info)
    if writes:
        click.echo(
            f"{measured.total_tokens:,} tokens at {measured.tokens_per_s:,.0f} tokens/s; "
            f"{len(domains)} domain{'s' * (len(domains) > 1)}; report: {target / 'report.md'}"
        )


def _settings() -> dict[str, Any]:
    """What all processes must be started with alike, by the names that users know."""
    context = click.get_current_context()
    own = ("coordinator", "process_id")
    return {p.opts[0]: context.params[p.name] for p in context.command.params if p.name and p.name not in own}


def _mesh(config: "Config", options: dict[str, Any]) -> tuple["Mesh", "Share"]:
    """The mesh over all devices, and this process' share of the rows; sets what --batch-size leaves open."""
    import jax

    from .. import hosts
    from .. import mesh as sharding

    pmap = options["mapping"] == "pmap"
    if pmap and jax.process_count() > 1:
        raise MeshError("--map pmap maps over the cores of one host: with many processes use --map mesh")
    sizes = options["mesh"] or ((jax.device_count(), 1) if pmap else sharding.default_sizes(config, jax.device_count()))
    if pmap and sizes[1] > 1:
        raise MeshError(f"--map pmap holds all experts on each core: expert={sizes[1]} needs --map mesh")
    mesh = sharding.make(config, *sizes)
    options["batch_size"] = options["batch_size"] or 4 * sizes[0]
    sharding.check_batch(options["batch_size"], sizes[0])
    return mesh, hosts.share(mesh)


def _mapping(mesh: "Mesh", options: dict[str, Any]) -> Callable[[Any], Any]:
    from .. import forward

    return partial(forward.pmapped if options["mapping"] == "pmap" else forward.mapped, mesh=mesh)


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


def _documents(
    config: "Config", tokenizer: Any, options: dict[str, Any], share: "Share"
) -> tuple[list["Row"], list["Document"], list[str], Callable[[], Any]]:
    """All rows, tokens of this process' share of them, the names of the domains, and what makes batches."""
    from .. import batching, harmony, hosts
    from ..rows import ColumnNames, read_rows, sample
    from ..saliency import MAX_DOMAINS

    pack = options["pack"]
    if options["max_seq_length"] > config.max_position:
        raise UserError(f"--max-seq-length is above the model's context of {config.max_position}")
    columns = ColumnNames(options["text_column"], options["domain_column"], options["id_column"])
    stream = read_rows(options["data"], options["split"], columns, lambda m: harmony.render(m, tokenizer))
    rows = sample(stream, options["domain"], options["num_rows"], options["seed"])
    domains = sorted({row.domain for row in rows})
    if len(domains) > MAX_DOMAINS:
        raise DataError(f"column {options['domain_column']!r} holds {len(domains)} domains, at most {MAX_DOMAINS}")
    eos = tokenizer.eos_token_id
    if pack and (eos is None or eos >= config.vocab_size):
        raise TokenizerError(
            f"--pack needs an eos_token below vocab_size {config.vocab_size}; the tokenizer's is {eos}"
        )
    documents = harmony.encode(
        # What a packed block holds depends on all rows before it.
        rows if pack else rows[share.number :: share.of],
        tokenizer,
        domains,
        vocab_size=config.vocab_size,
        max_length=None if pack else options["max_seq_length"],
        truncate=options["truncate"],
        keep_all=options["keep"] == "all",
        channel_weights=options["channel_weights"],
    )

    def make_batches() -> Any:
        batches: Any
        size, length = options["batch_size"], options["max_seq_length"]
        if pack:
            whole = batching.packed(documents, size, length, eos, len(domains), options["cross_document"])
            batches = (batching.share(batch, share.number, share.of) for batch in whole)
        else:
            batches = batching.padded(documents, size // share.of, length, len(domains), hosts.agree_lengths)
        return (batching.skip_first(batch, options["skip_first"]) for batch in batches)

    return rows, documents, domains, make_batches


def _info(
    model: str,
    fingerprint: str,
    rows: list["Row"],
    counts: tuple[int, int],
    mesh: "Mesh",
    options: dict[str, Any],
) -> dict[str, Any]:
    """What profile.json says of the run before it is measured."""
    import jax

    from ..artifacts import data_warnings
    from ..rows import prompts_hash

    truncated, empty = counts
    return {
        "model": model,
        "model_fingerprint": fingerprint,
        **_invocation(),
        "options": options,
        "platform": jax.default_backend(),
        "devices": [str(device) for device in mesh.devices.flat],
        "mesh": dict(mesh.shape),
        "processes": jax.process_count(),
        "engine": "resident",
        "rows": len(rows),
        "truncated_rows": truncated,
        "empty_rows": empty,
        "prompts_hash": prompts_hash(rows),
        "warnings": data_warnings(len(rows), truncated, empty),
    }


def _invocation() -> dict[str, Any]:
    """What profile.json says of any command line, and of what ran it."""
    from importlib.metadata import version

    packages = ("jax", "flax", "transformers", "tokenizers", "datasets", "numpy")
    return {
        "command": shlex.join(["gptoss-jax", *sys.argv[1:]]),
        "versions": {"gptoss-jax": __version__, **{name: version(name) for name in packages}},
    }
