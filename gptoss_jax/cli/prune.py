"""The commands `rank` and `prune`."""

import re
from pathlib import Path

import click

from ..errors import OutputError, UserError
from .options import progress, size

CRITERIA = ["reap", "reap_sum", "frequency", "gate", "ean_sum", "ean_mean", "reap_l2", "eaft_reap", "random"]


@click.command()
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

    from ..files import atomic as outputs
    from ..select import ranking as select
    from ..statistics.tables import read_columns

    outputs.check_free(out, overwrite)
    outputs.check_apart(out, profile)
    ranking = select.rank(read_columns(profile, domain), criterion, seed)
    outputs.write_file(out, json.dumps(ranking) + "\n", overwrite)
    click.echo(f"{len(ranking)} layers of {len(ranking[0])} experts by {criterion}: {out}")


@click.command()
@click.argument("model")
@click.option("--ranking", type=click.Path(path_type=Path), help="A ranking's JSON file; goes with --keep.")
@click.option("--keep", type=int, help="Experts to keep in each layer.")
@click.option("--keep-sets", type=click.Path(path_type=Path), help="A keep.json, in place of ranking and number.")
@click.option(
    "--format", "form", type=click.Choice(["same", "mxfp4", "bf16"]), default="same", help="Form of the weights."
)
@click.option("--max-shard-size", callback=size, default="5GB", help="Largest size of a file.")
@click.option("--domain", help="What the model is specialised in, for its name and card.  [default: ranking's name]")
@click.option("--lower-top-k", is_flag=True, help="Allow fewer experts than each token uses now.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the checkpoint.  [default: its name]")
@click.option("--overwrite", is_flag=True, help="Replace an existing output folder, at the end.")
@click.option("--verify", is_flag=True, help="Read the files again from the disk before they get their final name.")
def prune(
    model: str,
    ranking: Path | None,
    keep: int | None,
    keep_sets: Path | None,
    domain: str | None,
    lower_top_k: bool,
    out: Path | None,
    overwrite: bool,
    verify: bool,
    form: str,
    max_shard_size: int,
) -> None:
    """Write MODEL with only the best experts of each layer.

    MODEL is a folder in Hugging Face form, a hub id, or nano, the small model that ships with the project. The file
    SHA256SUMS in the new folder has the digest of every other: in that folder, sha256sum -c SHA256SUMS says at any
    time whether a byte has changed.
    """
    from convert import card, checksums, cut
    from convert.sources import open_hf

    from ..files import atomic as outputs
    from ..select import ranking as select
    from ..select.keep_sets import check_active, keep_best, read_keep_sets

    if (keep_sets is None) == (ranking is None) or (ranking is None) != (keep is None):
        raise UserError("prune takes either --ranking with --keep, or --keep-sets")
    checkpoint = open_hf(model)
    config = checkpoint.config
    if keep_sets is not None:
        kept, source = read_keep_sets(keep_sets, config), keep_sets
    else:
        assert ranking is not None and keep is not None
        kept, source = keep_best(select.read_ranking(ranking, config), keep, config), ranking
    check_active(len(kept[0]), config, lower_top_k)
    domain = domain or card.domain_of(source)
    if not re.fullmatch(r"[\w.-]{1,80}", domain):
        raise UserError(f"--domain {domain!r} becomes part of a folder's name: use letters, digits, '_', '-' and '.'")
    name = card.model_name(config, len(kept[0]), domain)
    out = out or Path(name)
    outputs.check_apart(out, checkpoint.folder, or_inside=True)
    quantize = checkpoint.quantized if form == "same" else form == "mxfp4"
    with outputs.new_folder(out, overwrite) as folder:
        text = card.card(checkpoint, kept, domain=domain, model=model, quantized=quantize, source=source.name)
        (folder / "README.md").write_text(text, encoding="utf-8")
        groups = cut.plan(checkpoint, kept, quantize)
        with progress(sum(t.nbytes for group in groups for t in group), "B") as advance:
            cut.write(checkpoint, kept, folder, groups, quantize, max_shard_size, advance)
        if verify:
            with progress(sum(file.stat().st_size for file in folder.iterdir()), "B") as advance:
                changed = checksums.differing(folder, advance)
            if changed:
                raise OutputError(f"{out / changed[0]}: reads back otherwise than it was written: try another disk")
    click.echo(f"{name}: {len(kept[0])} of {config.num_experts} experts a layer: {out}")
