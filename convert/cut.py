"""Cutting experts out of a checkpoint, a tensor's rows at a time. Letters: see `gptoss_jax.config`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gptoss_jax.config import Config
from gptoss_jax.errors import CheckpointError, OutputError, RankingError
from gptoss_jax.files.atomic import check_apart, new_folder
from gptoss_jax.files.paths import AnyPath
from gptoss_jax.selection import keep_sets as select

from . import card, checksums, expert_mapping, mxfp4
from .changed import Changed
from .folder import CONFIG, pruned_config, told_left, write_checkpoint
from .mapping import MXFP4_BLOCK, Named, Tensor, all_tensors
from .rounding import Rounding
from .shards import Planned, Rows
from .tensors import AnyCheckpoint, check_finite, is_quantized, read_values, told_forms

PIECE_BYTES = 16 << 20

Layers = Sequence[Sequence[int]]
"""The experts that stay, of each layer, sorted."""
Bar = Callable[[int, str], AbstractContextManager[Callable[[int], Any]]]
"""Takes a total and its unit and makes a bar, which is told of each part that is done."""


def silent(total: int, unit: str) -> AbstractContextManager[Callable[[int], Any]]:
    """A bar that shows nothing."""
    return nullcontext(lambda done: None)


@dataclass(frozen=True)
class Pruned:
    """A checkpoint that `prune` wrote, and may stand where its folder's path may."""

    folder: AnyPath
    name: str
    num_kept: int
    warnings: tuple[str, ...]
    source_bytes: int
    """Of the weights that the source has."""
    weight_bytes: int
    """Of the weights that were written."""

    def __fspath__(self) -> str:
        return str(self.folder)


@dataclass(frozen=True)
class Healed:
    """What was trained after experts were chosen."""

    values: Mapping[str, Any]
    """By their paths in the model, of all layers [L, …]; empty where nothing that was trained is kept."""
    said: str
    """A section of the card, in Markdown."""
    files: Mapping[str, bytes]
    """What stands beside the weights, by name."""


def prune(
    source: AnyCheckpoint,
    keep_sets: select.KeepSets,
    out: AnyPath | None = None,
    *,
    model: str | None = None,
    domain: str | None = None,
    format: Literal["same", "mxfp4", "bf16"] = "same",
    max_shard_bytes: int,
    lower_top_k: bool = False,
    overwrite: bool = False,
    verify: bool = False,
    quality: str | None = None,
    healed: Healed | None = None,
    progress: Bar = silent,
) -> Pruned:
    """Write a checkpoint with only the experts of `keep_sets`; nothing is written where it raises.

    Args:
        source: The model.
        keep_sets: The experts that stay, of every layer as many.
        out: The new folder; by default one of the new model's name, here.
        model: What the card calls the model: a folder or a hub id; by default the source's folder.
        domain: What it is specialised in, for name and card; by default the only domain of the keep-sets, or general.
        format: The form of the experts' weights.
        max_shard_bytes: The largest size of a file.
        lower_top_k: Whether fewer experts may stay than each token uses now.
        overwrite: Whether an existing folder is replaced, at the end.
        verify: Whether the files are read again from the disk before they get their final name.
        quality: What the card says of what was measured of these keep-sets, in Markdown.
        healed: What was trained after the choice of experts, which is written in the place of the source's.
        progress: Makes a bar for each long part of the work.

    Raises:
        RankingError: The keep-sets do not fit the model, or keep different numbers of experts in its layers.
        OutputError: The folder exists, cannot be written, or reads back otherwise than it was written.
        CheckpointError: A weight of the source cannot be read, or not be written in that form.
    """
    num_kept = checked(keep_sets, source.config, lower_top_k)
    domain = card.domain_for(keep_sets.origin, domain)
    name = card.model_name(source.config, num_kept, domain)
    out = out or Path(name)
    check_apart(out, source.folder, or_inside=True)
    quantize = source.quantized if format == "same" else format == "mxfp4"
    warnings = _doubts(source, keep_sets)
    before = expert_mapping.original_numbers(source.folder, source.config)
    called = model or str(source.folder)
    said = None if healed is None else healed.said
    text = card.card(source, keep_sets, domain, called, quantize, warnings, before is not None, quality, said)
    if healed is not None:
        source = Changed(source, healed.values)
    with new_folder(out, overwrite, last=CONFIG) as folder:
        (folder / "README.md").write_text(text, encoding="utf-8")
        for file, content in ({} if healed is None else healed.files).items():
            (folder / file).write_bytes(content)
        rounding = Rounding()
        groups = plan(source, keep_sets.layers, quantize, rounding)
        weight_bytes = sum(t.nbytes for group in groups for t in group)
        with progress(weight_bytes, "B") as advance:
            left = write(source, keep_sets.layers, folder, groups, quantize, max_shard_bytes, advance)
        if verify:
            _verify(folder, out, progress)
    told = (*warnings, *told_forms(source, quantize), *rounding.told(), *told_left(left))
    source_bytes = sum(stored.nbytes for stored in source.tensors.values())
    return Pruned(out, name, num_kept, told, source_bytes, weight_bytes)


def _verify(folder: Path, out: AnyPath, progress: Bar) -> None:
    """OutputError where a file, which will be in `out`, reads back otherwise than it was written."""
    with progress(sum(file.stat().st_size for file in folder.iterdir()), "B") as advance:
        changed = checksums.differing(folder, advance)
    if changed:
        raise OutputError(f"{out / changed[0]}: reads back otherwise than it was written: try another disk")


def checked(keep_sets: select.KeepSets, config: Config, lower_top_k: bool) -> int:
    """How many experts every layer keeps; RankingError where the keep-sets cannot become a checkpoint."""
    keep_sets.check(config)
    sizes = [len(kept) for kept in keep_sets.layers]
    if len({*sizes}) > 1:
        raise RankingError(
            f"the layers keep {', '.join(map(str, sizes))} experts: a checkpoint has the same number in every layer: "
            "give keep-sets of one size"
        )
    keep_sets.check_active(config, lower_top_k)
    return sizes[0]


def _doubts(source: AnyCheckpoint, keep_sets: select.KeepSets) -> tuple[str, ...]:
    """What a reader should know of keep-sets that fit the model and may be another's."""
    profiled = keep_sets.origin.model_fingerprint
    if profiled is None or profiled == source.fingerprint():
        return ()
    what = "the weights" if keep_sets.origin.of_weights else "answers" if keep_sets.origin.answers_hash else "a profile"
    return (
        f"The choice of experts rests on {what} of a checkpoint with another fingerprint: "
        "of another model, or of the same weights in another form",
    )


def write(
    checkpoint: AnyCheckpoint,
    keep_sets: Layers,
    folder: Path,
    groups: Sequence[Sequence[Planned]],
    quantize: bool,
    max_shard_bytes: int,
    progress: Callable[[int], Any] = lambda nbytes: None,
) -> list[str]:
    """Write into `folder` the checkpoint that `plan` laid out, with its config, mapping and other files.

    Returns the names of files that were left out."""
    before = expert_mapping.original_numbers(checkpoint.folder, checkpoint.config)
    expert_mapping.write(folder, keep_sets, before)
    config = pruned_config(checkpoint.config_json, len(keep_sets[0]), quantize)
    return write_checkpoint(folder, groups, config, checkpoint.folder, max_shard_bytes, progress)


def plan(
    checkpoint: AnyCheckpoint, keep_sets: Layers, quantize: bool, rounding: Rounding | None = None
) -> list[list[Planned]]:
    """The tensors with only the experts of the L keep-sets (sorted, of equal length).

    Groups stay in one shard: a projection's blocks and scales. From MXFP4 to MXFP4 nothing is decoded,
    and the bytes of kept experts do not change; floats of other sizes become BF16, which `rounding` counts. A piece
    is one expert of one tensor, or PIECE_BYTES.
    """
    for size in (checkpoint.config.hidden_size, checkpoint.config.expert_hidden_size):
        if quantize and size % MXFP4_BLOCK:
            raise CheckpointError(f"MXFP4 needs sizes that are multiples of {MXFP4_BLOCK}, and {size} is not: use bf16")
    rounding = rounding or Rounding()
    return [
        _group(checkpoint, entry, [] if entry.layer is None else keep_sets[entry.layer], quantize, rounding)
        for entry in all_tensors(checkpoint.config)
    ]


def _group(
    checkpoint: AnyCheckpoint, entry: Named, kept: Sequence[int], quantize: bool, rounding: Rounding
) -> list[Planned]:
    name, tensor, _ = entry
    if not tensor.per_expert:
        return [_copied(checkpoint.tensors[name], rounding)]
    is_mxfp4 = is_quantized(checkpoint, name)
    if tensor.mxfp4 is None or not (quantize or is_mxfp4):
        return [_cut(checkpoint.tensors[name], kept, rounding)]
    if quantize and is_mxfp4:
        return [_cut(checkpoint.tensors[f"{name}_{part}"], kept, rounding) for part in ("blocks", "scales")]
    return _encoded(checkpoint, entry, kept) if quantize else [_decoded(checkpoint, entry, kept)]


def _copied(stored: Rows, rounding: Rounding) -> Planned:
    def pieces() -> Iterator[np.ndarray]:
        step = max(1, PIECE_BYTES * stored.shape[0] // stored.nbytes)
        for first in range(0, stored.shape[0], step):
            yield rounding.to_bf16(stored.read(first, min(step, stored.shape[0] - first)), stored.name)

    return Planned(stored.name, _written(stored), stored.shape, pieces)


def _cut(stored: Rows, kept: Sequence[int], rounding: Rounding) -> Planned:
    def pieces() -> Iterator[np.ndarray]:
        for expert in kept:
            yield rounding.to_bf16(stored.read(expert, 1), f"{stored.name}, expert {expert}")

    return Planned(stored.name, _written(stored), (len(kept), *stored.shape[1:]), pieces)


def _written(stored: Rows) -> str:
    return "U8" if stored.dtype == "U8" else "BF16"


def _decoded(checkpoint: AnyCheckpoint, entry: Named, kept: Sequence[int]) -> Planned:
    name, tensor, _ = entry
    config: Config = checkpoint.config

    def pieces() -> Iterator[np.ndarray]:
        for expert in kept:
            blocks, scales = (checkpoint.tensors[f"{name}_{part}"].read(expert, 1) for part in ("blocks", "scales"))
            values = decode_to_hf(blocks, scales, tensor, config)
            check_finite(values, name, tensor, expert)
            yield values

    return Planned(name, "BF16", (len(kept), *tensor.hf_shape(config)[1:]), pieces)


def decode_to_hf(blocks: np.ndarray, scales: np.ndarray, tensor: Tensor, config: Config) -> np.ndarray:
    """`tensor.mxfp4_to_hf` of `mxfp4.decode`, in a tenth of its time: bytes are rearranged, then looked up.

    blocks [E, O, I / 32, 16], scales [E, O, I / 32], uint8 → [E, I, O] bfloat16.
    """
    first, second = _values_of_bytes()
    by_input = np.ascontiguousarray(tensor.mxfp4_to_hf(blocks.reshape(*scales.shape[:2], -1), config))  # [E, I / 2, O]
    tables = np.ascontiguousarray(tensor.mxfp4_to_hf(scales, config)).astype(np.intp) << 8  # [E, I / 32, O]
    values = np.empty((*by_input.shape[:2], 2, by_input.shape[2]), np.uint16)
    # A block's rows at a time, whose indices fit a core's cache.
    for block in range(tables.shape[1]):
        rows = slice(block * MXFP4_BLOCK // 2, (block + 1) * MXFP4_BLOCK // 2)
        at = tables[:, block, None] | by_input[:, rows]
        values[:, rows, 0] = first.take(at)
        values[:, rows, 1] = second.take(at)
    return values.reshape(len(values), -1, values.shape[-1]).view(mxfp4.BF16)


@cache
def _values_of_bytes() -> np.ndarray:
    """uint16 [2, 256 · 256]: at 256 s + b the bits of byte b's two values under scale s, by `mxfp4.decode`."""
    every = np.arange(256, dtype=np.uint8)
    blocks = np.broadcast_to(every.reshape(16, 16), (256, 16, 16))
    with np.errstate(over="ignore", invalid="ignore"):  # of the largest scales, which whoever looks them up refuses
        pairs = mxfp4.decode(blocks, np.broadcast_to(every[:, None], (256, 16)))
    return np.ascontiguousarray(pairs.view(np.uint16).reshape(-1, 2).T)


def _encoded(checkpoint: AnyCheckpoint, entry: Named, kept: Sequence[int]) -> list[Planned]:
    name, tensor, _ = entry
    config: Config = checkpoint.config
    shape = (len(kept), *tensor.blocks_shape(config)[1:])
    # A group is written in order, so each expert's scales wait here from its blocks on.
    scales: list[np.ndarray] = []

    def blocks() -> Iterator[np.ndarray]:
        for expert in kept:
            values = read_values(checkpoint, name, expert, 1)
            # MXFP4 has no NaN: a damaged expert would come out sound.
            check_finite(values, name, tensor, expert)
            block, scale = mxfp4.encode(tensor.hf_to_mxfp4(values, config))
            scales.append(scale)
            yield block

    return [
        Planned(f"{name}_blocks", "U8", shape, blocks),
        Planned(f"{name}_scales", "U8", shape[:-1], lambda: iter(scales)),
    ]
