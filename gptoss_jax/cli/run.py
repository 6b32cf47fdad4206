"""A run of `profile`: rows, engine, statistics, artifacts."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import DataError, OutputError, ResumeError, TokenizerError, UserError
from ..run import choose as engines
from .options import invocation, progress

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from ..config import Config
    from ..data.batching import Document
    from ..data.rows import Row
    from ..devices.hosts import Share
    from ..files.paths import AnyPath
    from ..network.source import Source
    from ..run.artifacts import Measured
    from ..run.progress import Progress

# Options that do not change what is computed: a run may go on with others.
FREE = ("data", "memory_gib", "activation_gib", "coordinator", "process_id")
REASON = "engine_reason"  # in profile.json, and beside the settings of an unfinished run


def run(model: str, out: str, overwrite: bool, resume: bool, options: dict[str, Any]) -> None:
    """Profile MODEL over the rows that the options name, and write the artifacts to `out`."""
    from convert.sources import open_source

    from ..data import harmony
    from ..data.rows import row_hashes
    from ..devices import hosts
    from ..files import atomic as outputs
    from ..files.paths import local_folder, place
    from ..run import artifacts
    from ..run import profile as job
    from ..run.progress import Progress

    target = place(out)
    if options["coordinator"]:
        hosts.start(options["coordinator"], options["num_processes"], options["process_id"], _settings())
    writes = hosts.is_first()
    kept = Progress(target)
    standing = hosts.exchange(_standing(target) if resume and writes else {})[0]
    began = hosts.exchange((kept.begun() or (not overwrite and standing)) if resume and writes else {})[0]
    # Files of a remote output come one after the other, the one that is asked for here last.
    overwrite = overwrite or bool(began and not standing and not isinstance(target, Path))
    if writes and (overwrite or not standing):
        outputs.try_folder(target, overwrite)
    source = open_source(model)
    if writes:
        outputs.check_apart(target, source.folder, or_inside=True)
        if options["data"]:
            outputs.check_apart(target, place(options["data"]))
    choice = engines.choose(source, options)
    if began:
        choice = _adopt(began, choice, options)
    mesh, share = engines.place(source, choice.engine, options)
    with local_folder(source.folder) as folder:
        tokenizer = harmony.load_tokenizer(folder)
    rows, documents, domains, make_batches = _documents(source.config, tokenizer, choice.engine, options, share)
    # Packed, every process holds all rows.
    counts = job.count_rows(documents if share.leads and (writes or not options["pack"]) else [])
    info = _info(model, source.fingerprint(), rows, counts, mesh, choice, options)
    settings = _computed(info, rows)
    hosts.agree(settings)
    info["settings_hash"] = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    finished = standing.get("settings_hash") == info["settings_hash"]
    if standing and not (finished or overwrite):
        raise OutputError(f"{target}: exists already, and is not of this run: give another --out")
    if writes:
        kept.begin({**settings, REASON: choice.reason}, resume)
    measured = None
    with _keeping(kept):
        if not finished:
            measured = _measure(source, choice.engine, options, mesh, share, kept, documents, make_batches)
        with hosts.first_alone():
            if writes and measured:
                with outputs.new_folder(target, overwrite, last=artifacts.INFO) as folder:
                    artifacts.write(folder, measured, domains, row_hashes(rows), info)
    if writes:
        kept.remove()
        said = _said(measured, domains, choice) if measured else "is complete"
        click.echo(f"{said}; report: {target / 'report.md'}")


def _standing(target: "AnyPath") -> dict[str, Any]:
    """Of the finished profile that stands there: the hash of its settings, and what `_adopt` takes."""
    from ..run import artifacts

    try:
        info = json.loads((target / artifacts.INFO).read_text(encoding="utf-8"))
        own = {"--engine": info["engine"], "--batch-size": info["options"]["batch_size"], REASON: info[REASON]}
        return {"settings_hash": info["settings_hash"], **own}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _adopt(began: dict[str, Any], choice: engines.Choice, options: dict[str, Any]) -> engines.Choice:
    """Take from a run that began what the user leaves open: memory may have it decided otherwise today."""
    options["batch_size"] = options["batch_size"] or began["--batch-size"]
    if options["engine"] not in ("auto", began["--engine"]):
        return choice
    return engines.Choice(began["--engine"], began[REASON])


def _said(measured: "Measured", domains: list[str], choice: engines.Choice) -> str:
    return (
        f"{measured.total_tokens:,} tokens at {measured.tokens_per_s:,.0f} tokens/s; "
        f"{len(domains)} domain{'s' * (len(domains) > 1)}; engine {choice.engine}: {choice.reason}; "
        f"peak memory {measured.peak_rss_bytes / engines.GIB:.2f} GiB"
    )


@contextmanager
def _keeping(kept: "Progress") -> Iterator[None]:
    """Errors say that what is finished is not lost."""
    try:
        yield
    except UserError as error:
        if isinstance(error, ResumeError) or not kept.exists():
            raise
        raise type(error)(f"{error}; what is finished is kept: the same command with --resume goes on") from error


def _measure(
    source: "Source",
    engine: str,
    options: dict[str, Any],
    mesh: "Mesh",
    share: "Share",
    kept: "Progress",
    documents: "Sequence[Document]",
    make_batches: Callable[[], Any],
) -> "Measured":
    from ..devices import hosts
    from ..run import profile as job
    from ..statistics.eaft import EaftOptions

    job.check_kept(make_batches())
    state = kept.state()
    eaft = EaftOptions(*options["eaft_quantiles"], *options["eaft_weights"]) if options["eaft"] else None
    num_tokens = sum(len(d.token_ids) + options["pack"] for d in documents) * (2 if eaft else 1)
    if options["pack"]:
        num_tokens //= share.of
    built = engines.build(source, engine, options, mesh, kept)
    with progress(num_tokens, "tokens", shown=hosts.is_first(), done=state.tokens) as advance:
        return job.run(built, make_batches, share, kept, state, advance, eaft)


def _settings() -> dict[str, Any]:
    """What all processes must be started with alike, by the names that users know."""
    context = click.get_current_context()
    own = ("coordinator", "process_id")
    return {p.opts[0]: context.params[p.name] for p in context.command.params if p.name and p.name not in own}


def _documents(
    config: "Config", tokenizer: Any, engine: str, options: dict[str, Any], share: "Share"
) -> tuple[list["Row"], list["Document"], list[str], Callable[[], Any]]:
    """All rows, tokens of this process' share of them, the names of the domains, and what makes batches."""
    from ..data import batching, harmony
    from ..data.rows import ColumnNames, read_rows, sample
    from ..devices import hosts
    from ..statistics.sums import MAX_DOMAINS

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
        elif engine == "streamed":
            batches = batching.side_by_side(documents, size, length, len(domains))
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
    choice: engines.Choice,
    options: dict[str, Any],
) -> dict[str, Any]:
    """What profile.json says of the run before it is measured."""
    import jax

    from ..data.rows import prompts_hash
    from ..run.artifacts import data_warnings

    truncated, empty = counts
    return {
        "model": model,
        "model_fingerprint": fingerprint,
        **invocation(),
        "options": options,
        "platform": jax.default_backend(),
        "devices": [str(device) for device in mesh.devices.flat],
        "mesh": dict(mesh.shape),
        "processes": jax.process_count(),
        "engine": choice.engine,
        REASON: choice.reason,
        "rows": len(rows),
        "truncated_rows": truncated,
        "empty_rows": empty,
        "prompts_hash": prompts_hash(rows),
        "warnings": data_warnings(len(rows), truncated, empty),
    }


def _computed(info: dict[str, Any], rows: "Sequence[Row]") -> dict[str, Any]:
    """All that decides what a run computes, to the bit, by the names that users know."""
    from ..data.rows import Row, prompts_hash

    context = click.get_current_context()
    flags = {p.name: p.opts[0] for p in context.command.params}
    options = {flags[name]: value for name, value in info["options"].items() if name not in FREE}
    return {
        "the model's fingerprint": info["model_fingerprint"],
        "the rows' hash": info["prompts_hash"],
        "the hash of the rows' domains": prompts_hash(Row(row.domain, row.id) for row in rows),
        "the versions": {name: info["versions"][name] for name in ("gptoss-jax", "jax")},
        "the mesh": info["mesh"],
        "the platform": info["platform"],
        **options,
        "--engine": info["engine"],
    }
