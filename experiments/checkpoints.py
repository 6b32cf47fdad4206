"""Checkpoints with random weights, in the published names, shapes and formats, of any size.

    python -m experiments.checkpoints OUT --preset 20b --layers 2     # MXFP4, true tokenizer

A tensor is made and written a piece at a time, so that size is bounded by the disk alone.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click
import ml_dtypes
import numpy as np

from convert.folder import QUANTIZATION
from convert.mapping import Named, all_tensors
from convert.shards import Planned, write_shards
from gptoss_jax.config import GPT_OSS_20B, GPT_OSS_120B, TINY, Config
from gptoss_jax.files.atomic import new_folder

from . import tokenizers

PRESETS = {"20b": GPT_OSS_20B, "120b": GPT_OSS_120B, "tiny": TINY}
PIECE = 1 << 24  # values made at once
# Scales 2^-8 … 2^-6 times random FP4 values, whose mean square is 8.6, give weights near 0.02.
SCALES = (119, 122)


def write_random(
    folder: Path, config: Config, mxfp4: bool = True, seed: int = 0, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Weights, index and config.json; the tokenizer is written by `experiments.tokenizers`."""
    groups = [_random(entry, config, mxfp4, (seed, i)) for i, entry in enumerate(all_tensors(config))]
    write_shards(folder, groups, max_shard_bytes)
    raw = config.to_json() | ({"quantization_config": QUANTIZATION} if mxfp4 else {})
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def _random(entry: Named, config: Config, mxfp4: bool, seed: tuple[int, int]) -> list[Planned]:
    name, tensor, _ = entry
    if mxfp4 and tensor.mxfp4:
        shape = tensor.blocks_shape(config)
        return [
            Planned(f"{name}_blocks", "U8", shape, lambda: _bytes(shape, (*seed, 0), 0, 256)),
            Planned(f"{name}_scales", "U8", shape[:-1], lambda: _bytes(shape[:-1], (*seed, 1), *SCALES)),
        ]
    shape = tensor.hf_shape(config)
    # Norm scales near 1, biases, sinks and kernels near 0; the router's rows such that logits of normed
    # inputs spread by 2 at any size: experts are chosen by what a token is, and gates are neither all nor even.
    center = 1.0 if "norm" in name else 0.0
    spread = 2 / math.sqrt(config.hidden_size) if tensor.path == "moe/router/kernel" else 0.02
    if name == "model.embed_tokens.weight":
        spread = 1.0
    return [Planned(name, "BF16", shape, lambda: _normal(shape, seed, center, spread))]


def _bytes(shape: tuple[int, ...], seed: tuple[int, ...], low: int, high: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    for size in _pieces(shape):
        yield rng.integers(low, high, size, np.uint8)


def _normal(shape: tuple[int, ...], seed: tuple[int, ...], center: float, spread: float) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    for size in _pieces(shape):
        values = rng.standard_normal(size, np.float32) * np.float32(spread) + np.float32(center)
        yield values.astype(ml_dtypes.bfloat16)


def _pieces(shape: tuple[int, ...]) -> Iterator[int]:
    total = math.prod(shape)
    for start in range(0, total, PIECE):
        yield min(PIECE, total - start)


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--preset", type=click.Choice(list(PRESETS)), default="tiny", show_default=True)
@click.option("--layers", type=click.IntRange(1), help="Of the preset's layers, the first so many.")
@click.option("--bf16", is_flag=True, help="Experts in BF16 instead of MXFP4.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--overwrite", is_flag=True)
def main(out: Path, preset: str, layers: int | None, bf16: bool, seed: int, overwrite: bool) -> None:
    """Write a checkpoint with random weights and its tokenizer."""
    config = PRESETS[preset]
    if layers:
        config = replace(config, num_layers=layers, layer_types=config.layer_types[:layers])
    with new_folder(out, overwrite) as folder:
        write_random(folder, config, not bf16, seed)
        if preset == "tiny":
            tokenizers.write_small(folder, config.vocab_size)
        else:
            tokenizers.write_published(folder)


if __name__ == "__main__":
    main()
