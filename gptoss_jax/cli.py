"""The command line: the one place that joins the library and `convert`.

JAX and the other large packages are imported inside the commands, so that --help answers at once.
"""

import math
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import __version__
from .errors import DataError, TokenizerError, UserError

if TYPE_CHECKING:
    from .batching import Document
    from .config import Config
    from .rows import Row

CRITERIA = ["reap", "reap_sum", "frequency", "gate", "ean_sum", "ean_mean", "reap_l2", "eaft_reap", "random"]
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
CHANNELS = ("analysis", "commentary", "final")  # of harmony, the ones that GPT-OSS was trained with
MAX_DOMAINS = 256  # co-activations by domain are [L, G, E, E]; an id column taken for domains has thousands
CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 110}


def _size(_: Any, __: Any, text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([KMG]?i?B?)", text.strip(), re.IGNORECASE)
    if not match or match[2].upper() not in UNITS or not 1 <= float(match[1]) * UNITS[match[2].upper()] < 1 << 63:
        raise click.BadParameter(f"{text!r} is no size: write for example 5GB or 500MiB")
    return int(float(match[1]) * UNITS[match[2].upper()])


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


@click.group(context_settings=CONTEXT)
@click.version_option(__version__)
def cli() -> None:
    """Profile, understand and prune the experts of GPT-OSS in JAX."""


@cli.command()
@click.argument("model")
@click.option("--data", required=True, help="JSONL, Parquet or text file, a folder of these, or a hub id.")
@click.option("--split", default="train", help="Split of a hub dataset.")
@click.option("--text-column", default="text", help="Column with harmony text, or with a list of messages.")
@click.option("--id-column", default="id", help="Column with the row's id; may be absent.")
@click.option("--domain-column", help="Column with the row's domain: statistics are also kept by domain.")
@click.option("--domain", multiple=True, help="Only rows of this domain; may be given several times.")
@click.option("--num-rows", type=click.IntRange(1), help="Sample this many rows by hash.  [default: all]")
@click.option("--max-seq-length", type=click.IntRange(1), default=2048, help="Tokens a row, or a packed block.")
@click.option("--batch-size", type=click.IntRange(1), default=4, help="Rows a step.")
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
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", help="Of the computation.")
@click.option("--out", type=click.Path(path_type=Path), default="profile", help="Folder for the artifacts.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output folder, at the end.")
def profile(model: str, out: Path, overwrite: bool, **options: Any) -> None:
    """Run rows through MODEL and write the statistics of its experts.

    MODEL is a folder in Hugging Face form or a hub id.
    """
    from convert.from_hf import Checkpoint, locate

    from . import model as network
    from . import outputs
    from . import profile as job
    from .eaft import EaftOptions

    outputs.check_free(out, overwrite)
    _check_options(options)
    checkpoint = Checkpoint(locate(model))
    outputs.check_apart(out, checkpoint.folder, or_inside=True)
    if options["data"]:
        outputs.check_apart(out, Path(options["data"]))
    if options["max_seq_length"] > checkpoint.config.max_position:
        raise UserError(f"--max-seq-length is above the model's context of {checkpoint.config.max_position}")
    rows, documents, domains, make_batches = _documents(checkpoint.folder, checkpoint.config, options)
    job.check_kept(make_batches())
    gpt_oss = network.load(checkpoint, options["dtype"])
    eaft = EaftOptions(*options["eaft_quantiles"], *options["eaft_weights"]) if options["eaft"] else None
    num_tokens = sum(len(d.token_ids) + options["pack"] for d in documents) * (2 if eaft else 1)
    with outputs.new_folder(out, overwrite) as folder:
        with _progress(num_tokens, "tokens") as advance:
            measured = job.run(gpt_oss, make_batches, advance, eaft)
        info = _info(model, checkpoint.fingerprint(), rows, documents, options)
        job.write(folder, measured, domains, info)
    click.echo(
        f"{measured.total_tokens:,} tokens at {measured.tokens_per_s:,.0f} tokens/s; "
        f"{len(domains)} domain{'s' * (len(domains) > 1)}; report: {out / 'report.md'}"
    )


def _check_options(options: dict[str, Any]) -> None:
    if options["domain"] and not options["domain_column"]:
        raise UserError("--domain needs --domain-column: name the column that holds the domain")
    if options["cross_document"] and not options["pack"]:
        raise UserError("--cross-document needs --pack: padded rows never see one another")
    if options["channel_weights"] and options["keep"] == "all":
        raise UserError("--channel-weights needs --keep assistant: only its messages have channels")
    if not all(map(math.isfinite, (*options["eaft_quantiles"], *options["eaft_weights"]))):
        raise UserError("--eaft-quantiles and --eaft-weights are finite numbers")
    if options["skip_first"] >= options["max_seq_length"]:
        raise UserError("--skip-first leaves no position of a row: make it less than --max-seq-length")


def _documents(
    folder: Path, config: "Config", options: dict[str, Any]
) -> tuple[list["Row"], list["Document"], list[str], Callable[[], Any]]:
    """Rows, their tokens, the names of their domains, and what makes batches of them."""
    from . import batching, harmony
    from .rows import ColumnNames, read_rows, sample

    tokenizer = harmony.load_tokenizer(folder)
    columns = ColumnNames(options["text_column"], options["domain_column"], options["id_column"])
    stream = read_rows(options["data"], options["split"], columns, lambda m: harmony.render(m, tokenizer))
    rows = sample(stream, options["domain"], options["num_rows"], options["seed"])
    domains = sorted({row.domain for row in rows})
    if len(domains) > MAX_DOMAINS:
        raise DataError(f"column {options['domain_column']!r} holds {len(domains)} domains, at most {MAX_DOMAINS}")
    eos = tokenizer.eos_token_id
    if options["pack"] and (eos is None or eos >= config.vocab_size):
        raise TokenizerError(
            f"--pack needs an eos_token below vocab_size {config.vocab_size}; the tokenizer's is {eos}"
        )
    documents = harmony.encode(
        rows,
        tokenizer,
        domains,
        vocab_size=config.vocab_size,
        max_length=None if options["pack"] else options["max_seq_length"],
        truncate=options["truncate"],
        keep_all=options["keep"] == "all",
        channel_weights=options["channel_weights"],
    )

    def make_batches() -> Any:
        size, length = options["batch_size"], options["max_seq_length"]
        if options["pack"]:
            batches = batching.packed(documents, size, length, eos, len(domains), options["cross_document"])
        else:
            batches = batching.padded(documents, size, length, len(domains))
        return (batching.skip_first(batch, options["skip_first"]) for batch in batches)

    return rows, documents, domains, make_batches


def _info(
    model: str, fingerprint: str, rows: list["Row"], documents: list["Document"], options: dict[str, Any]
) -> dict[str, Any]:
    """What profile.json says of the run before it is measured."""
    from importlib.metadata import version

    import jax

    from .profile import data_warnings
    from .rows import prompts_hash

    packages = ("jax", "flax", "transformers", "tokenizers", "datasets", "numpy")
    return {
        "model": model,
        "model_fingerprint": fingerprint,
        "command": shlex.join(["gptoss-jax", *sys.argv[1:]]),
        "options": options,
        "versions": {"gptoss-jax": __version__, **{name: version(name) for name in packages}},
        "platform": jax.default_backend(),
        "engine": "resident",
        "rows": len(rows),
        "truncated_rows": sum(d.truncated for d in documents),
        "prompts_hash": prompts_hash(rows),
        "warnings": data_warnings(documents),
    }


@contextmanager
def _progress(total: int, unit: str) -> Iterator[Callable[[int], Any]]:
    """A bar on the terminal with rate and time left; nothing where standard error is no terminal."""
    from tqdm import tqdm

    with tqdm(total=total, unit=unit, unit_scale=True, disable=None, dynamic_ncols=True) as bar:
        yield bar.update


@cli.command()
@click.argument("profile", type=click.Path(path_type=Path))
@click.option("--criterion", type=click.Choice(CRITERIA), default="reap", help="The score; a higher one stays.")
@click.option("--domain", help="Rank by the statistics of this domain alone.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Seed of random.")
@click.option("--out", type=click.Path(path_type=Path), default="ranking.json", help="File for the ranking.")
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
def rank(profile: Path, criterion: str, domain: str | None, seed: int, out: Path, overwrite: bool) -> None:
    """Rank the experts of each layer, best first.

    PROFILE is a profile's folder or a saliency.parquet.
    """
    import json

    from . import outputs, select

    outputs.check_free(out, overwrite)
    outputs.check_apart(out, profile)
    ranking = select.rank(select.read_columns(profile, domain), criterion, seed)
    outputs.write_file(out, json.dumps(ranking) + "\n", overwrite)
    click.echo(f"{len(ranking)} layers of {len(ranking[0])} experts by {criterion}: {out}")


@cli.command()
@click.argument("model")
@click.option("--ranking", type=click.Path(path_type=Path), help="A ranking's JSON file; goes with --keep.")
@click.option("--keep", type=int, help="Experts to keep in each layer.")
@click.option("--keep-sets", type=click.Path(path_type=Path), help="A keep.json, in place of ranking and number.")
@click.option(
    "--format", "form", type=click.Choice(["same", "mxfp4", "bf16"]), default="same", help="Form of the weights."
)
@click.option("--max-shard-size", callback=_size, default="5GB", help="Largest size of a file.")
@click.option("--domain", help="What the model is specialised in, for its name and card.  [default: ranking's name]")
@click.option("--lower-top-k", is_flag=True, help="Allow fewer experts than each token uses now.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the checkpoint.  [default: its name]")
@click.option("--overwrite", is_flag=True, help="Replace an existing output folder, at the end.")
def prune(
    model: str,
    ranking: Path | None,
    keep: int | None,
    keep_sets: Path | None,
    domain: str | None,
    lower_top_k: bool,
    out: Path | None,
    overwrite: bool,
    form: str,
    max_shard_size: int,
) -> None:
    """Write MODEL with only the best experts of each layer.

    MODEL is a folder in Hugging Face form or a hub id.
    """
    from convert import card
    from convert import prune as cut
    from convert.from_hf import Checkpoint, locate

    from . import outputs, select

    if (keep_sets is None) == (ranking is None) or (ranking is None) != (keep is None):
        raise UserError("prune takes either --ranking with --keep, or --keep-sets")
    checkpoint = Checkpoint(locate(model))
    config = checkpoint.config
    if keep_sets is not None:
        kept, source = select.read_keep_sets(keep_sets, config), keep_sets
    else:
        assert ranking is not None and keep is not None
        kept, source = select.keep_best(select.read_ranking(ranking, config), keep, config), ranking
    select.check_active(len(kept[0]), config, lower_top_k)
    domain = domain or card.domain_of(source)
    if not re.fullmatch(r"[\w.-]{1,80}", domain):
        raise UserError(f"--domain {domain!r} becomes part of a folder's name: use letters, digits, '_', '-' and '.'")
    name = card.model_name(config, len(kept[0]), domain)
    out = out or Path(name)
    outputs.check_apart(out, checkpoint.folder, or_inside=True)
    quantize = checkpoint.quantized if form == "same" else form == "mxfp4"
    with outputs.new_folder(out, overwrite) as folder:
        groups = cut.plan(checkpoint, kept, quantize)
        with _progress(sum(t.nbytes for group in groups for t in group), "B") as advance:
            cut.write(checkpoint, kept, folder, groups, quantize, max_shard_size, advance)
        text = card.card(checkpoint, kept, domain=domain, model=model, quantized=quantize, source=source.name)
        (folder / "README.md").write_text(text, encoding="utf-8")
    click.echo(f"{name}: {len(kept[0])} of {config.num_experts} experts a layer: {out}")


def main() -> None:
    """Entry point: exit status 0 done, 2 for what the user can mend, 1 for a fault of the program."""
    # With libtpu installed, a CPU run asks a metadata server that is not there.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # Standard error is for our own line: transformers remarks that PyTorch is missing, the hub on retries.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    # An exit lets temporary folders be removed, where the signal's own way would leave them.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    try:
        cli.main(prog_name="gptoss-jax", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError:
        _fail(f"name a command: {', '.join(cli.commands)}; see gptoss-jax --help")
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "gptoss-jax"
        _fail(f"{error.format_message().rstrip('.')}; see {command} --help")
    except UserError as error:
        _fail(str(error))
    except (click.Abort, KeyboardInterrupt):
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        # JAX has a class of its own for memory that it cannot get; to import it here would load JAX.
        if not isinstance(error, MemoryError) and not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        _fail("not enough memory: give a smaller --batch-size or --max-seq-length")


def _fail(message: str) -> None:
    click.echo(f"gptoss-jax: {' '.join(message.split())}", err=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
