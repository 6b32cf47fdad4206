"""`prune` of gpt-oss-20b to 12 experts beside `cp` of the bytes that it writes, on the same disk.

    python -m experiments.checkpoints MODEL --preset 20b
    python -m experiments.bench.prune MODEL OUT [--format bf16] [--cold]

The two take turns, and which of them begins changes from pair to pair. Before each, what it will read is read into
the page cache, or put out of it with --cold. prune is the whole process, which has every file on the disk before it
names the folder; cp is timed alone, and with the sync of its files. Then every kept expert is compared with the
source by SHA-256, and a model that keeps all experts is compared with it byte for byte.
"""

import hashlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from statistics import median

import click
import numpy as np

from convert import checksums, cut
from convert.hf import Checkpoint
from convert.shards import Planned
from gptoss_jax.files.atomic import let_go

from ..measure import Cost, program
from ..science_model import KEEP, compare

GIB = 1 << 30


def keep_sets(folder: Path, source: Checkpoint, keep: int) -> Path:
    """A file that keeps random experts."""
    experts = [
        np.random.default_rng(layer).permutation(source.config.num_experts) for layer in range(source.config.num_layers)
    ]
    file = folder / f"keep-{keep}.json"
    file.write_text(json.dumps([sorted(chosen[:keep].tolist()) for chosen in experts]))
    return file


def prepare(files: list[Path], reading: list[list[Planned]], cold: bool) -> None:
    """Have what a side reads in the page cache, or, if `cold`, nothing of its files."""
    for file in files:
        if cold:
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
                let_go(stream.fileno())
        elif not reading:
            checksums.digest(file)
    for tensor in (tensor for group in reading for tensor in group if not cold):
        for _ in tensor.pieces():
            pass


def timed(*command: object) -> float:
    """Seconds of a command."""
    start = time.perf_counter()
    subprocess.run([str(word) for word in command], check=True)
    return time.perf_counter() - start


def copy(source: Path, target: Path) -> tuple[float, float]:
    """Seconds of `cp`, and of `sync` after it."""
    seconds = timed("cp", "-r", source, target), timed("sync", *(target / file.name for file in source.iterdir()))
    shutil.rmtree(target)
    return seconds


def equal(source: Checkpoint, made: Checkpoint) -> int:
    """Compare every tensor byte for byte; returns how many there are."""
    assert source.tensors.keys() == made.tensors.keys()
    for name, before in source.tensors.items():
        after = made.tensors[name]
        assert (before.dtype, before.shape) == (after.dtype, after.shape), name
        digests = {hashlib.sha256(tensor.read().view(np.uint8).data).digest() for tensor in (before, after)}
        assert len(digests) == 1, name
    return len(source.tensors)


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--format", "form", type=click.Choice(["mxfp4", "bf16"]), default="mxfp4", show_default=True)
@click.option("--cold", is_flag=True, help="Inputs from the disk.")
@click.option("--pairs", default=5, show_default=True)
def main(model: Path, out: Path, form: str, cold: bool, pairs: int) -> None:
    """Print the table and what the comparisons say; nothing is left in OUT."""
    out.mkdir()
    source, shards = Checkpoint(model), sorted(model.glob("*.safetensors"))
    sets = keep_sets(out, source, KEEP)
    reference, target = out / "reference", out / "target"

    def pruned(folder: Path, sets: Path = sets, *options: str) -> Cost:
        return program("prune", model, "--keep-sets", sets, "--format", form, "--out", folder, *options)

    pruned(reference)
    reading = cut.plan(source, json.loads(sets.read_text()), quantize=True)
    costs: list[Cost] = []
    copies: list[tuple[float, float]] = []
    for pair in range(pairs):
        for side in ("prune", "cp") if pair % 2 else ("cp", "prune"):
            if side == "prune":
                prepare(shards, reading, cold)
                costs.append(pruned(target))
                shutil.rmtree(target)
            else:
                prepare(sorted(reference.iterdir()), [], cold)
                copies.append(copy(reference, target))
                click.echo("  cp {:.1f} s, sync {:.1f} s".format(*copies[-1]))
    size = sum(file.stat().st_size for file in reference.iterdir())
    synced = [sum(pair) for pair in copies]
    ratios = [
        median(c / p.seconds for c, p in zip(side, costs, strict=True)) for side in (synced, [c for c, _ in copies])
    ]
    click.echo(
        "| written | inputs | prune, s | cp and sync, s | cp alone, s | speed of cp and sync | of cp alone | peak |"
    )
    click.echo("|---|---|---:|---:|---:|---:|---:|---:|")
    click.echo(
        f"| {form}, {size / 1e9:.2f} GB | {'cold' if cold else 'warm'} | {median(c.seconds for c in costs):.1f} "
        f"| {median(synced):.1f} | {median(c for c, _ in copies):.1f} | {ratios[0]:.0%} | {ratios[1]:.0%} "
        f"| {max(c.peak_gib for c in costs):.2f} GiB |"
    )
    click.echo(f"{compare(source, Checkpoint(reference)):,} slices of kept experts equal the source's")
    shutil.rmtree(reference)
    if form == "mxfp4":
        pruned(target, keep_sets(out, source, source.config.num_experts), "--verify")
        click.echo(f"all experts kept: {equal(source, Checkpoint(target)):,} tensors equal the source's")
    shutil.rmtree(out)


if __name__ == "__main__":
    main()
