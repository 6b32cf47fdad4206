"""The jobs that write checkpoints, as functions with the names and defaults of the command line."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from convert import cut, published
from convert import folder as folders
from convert.cut import Bar, Pruned, silent
from convert.folder import CONFIG
from convert.rounding import Rounding
from convert.tensors import AnyCheckpoint, stored_forms, told_forms

from ..devices import mesh as sharding
from ..errors import CheckpointError, EvaluationError, InputError, OptionError, RankingError, plain
from ..evaluation import stored
from ..evaluation.card import card_quality
from ..evaluation.markdown import kept as experts_of
from ..evaluation.summary import Summary
from ..files import atomic
from ..files.paths import AnyPath, is_path, place
from ..run.options import Writing
from ..selection.keep_sets import KeepSets
from ..selection.ranking import Ranking
from .model import Model, as_model


def read_choice(model: Model, ranking: AnyPath | None, keep: int | str | None, keep_sets: AnyPath | None) -> KeepSets:
    """The keep-sets of a file, or the best `keep` of a ranking's; RankingError where they do not fit the model."""
    if keep_sets is not None:
        return KeepSets.read(keep_sets, model.config)
    if ranking is None or keep is None:
        raise RankingError("a ranking goes with the number of experts to keep")
    return Ranking.read(ranking, model.config).keep(keep)


def prune(
    model: Any,
    keep_sets: Any,
    domain: str | None = None,
    *,
    eval: Any = None,
    out: str | AnyPath | None = None,
    format: str = "same",
    max_shard_size: int = 5 * 10**9,
    lower_top_k: bool = False,
    overwrite: bool = False,
    verify: bool = False,
    progress: Bar = silent,
) -> Pruned:
    """Write a model with only the experts of the keep-sets, in Hugging Face form; its folder is the result's `folder`.

    Args:
        model: an open model, or the name of one.
        keep_sets: what `select` gives, or for each layer the experts that stay.
        domain: what the model is specialised in, for its name and card.
        eval: an eval.json in which these keep-sets were measured, or its summary: the card says what was found.
        out: the folder; by default the model's name, in the current folder.
        format: the form of the experts, "same", "mxfp4" or "bf16".
        max_shard_size: the largest size of a file, in bytes.
        lower_top_k: whether fewer experts may stay than each token uses.
        overwrite: replaces an existing folder, at the end.
        verify: reads the files again from the disk before they get their final name.
        progress: makes a bar for each long part of the work.

    Raises RankingError, EvaluationError, OutputError or CheckpointError, and writes nothing then.

    Example:
        >>> import gptoss_jax as gj
        >>> kept = [[0, 2, 4, 6, 8, 10]] * 6
        >>> gj.prune("nano", kept, "even", out="even", overwrite=True).num_kept
        6
    """
    opened, writing = as_model(model), Writing(format=format, max_shard_size=max_shard_size)
    source, kept, target = checkpoint_of(opened), as_keep_sets(keep_sets), None if out is None else place(out)
    if target is not None and is_path(eval):
        atomic.check_apart(target, place(eval))
    return cut.prune(
        source,
        kept,
        target,
        model=opened.name,
        domain=domain,
        format=writing.format,  # type: ignore[arg-type]
        max_shard_bytes=writing.max_shard_size,
        lower_top_k=lower_top_k,
        overwrite=overwrite,
        verify=verify,
        quality=None if eval is None else _measured(eval, kept, source.fingerprint()),
        progress=progress,
    )


def _measured(evaluation: Any, keep_sets: KeepSets, fingerprint: str) -> str:
    """What a card says of keep-sets that were evaluated. EvaluationError where they were not, or of no such model."""
    is_file = is_path(evaluation)
    if not is_file and not isinstance(evaluation, Summary):
        raise InputError(f"an evaluation is {type(evaluation).__name__}: give an eval.json, or its summary")
    summary, where = (stored.read(evaluation), str(evaluation)) if is_file else (evaluation, "the evaluation")
    entry = summary.of(keep_sets.layers_hash)
    if entry is None:
        named = ", ".join(
            f"{plain(one.name)} ({experts_of(one)} experts {one.origin})" for one in summary.entries if one.layers_hash
        )
        raise EvaluationError(
            f"{where}: is not of these keep-sets, it has {named or 'none'}: give one of those, or evaluate these first"
        )
    doubt = (
        "Measured with a checkpoint of another fingerprint: of another model, or of the same weights in another form."
    )
    is_other = summary.setting.model_fingerprint != fingerprint
    return card_quality(summary, entry) + (f"\n- {doubt}" if is_other else "")


def as_keep_sets(given: Any) -> KeepSets:
    """What functions take as keep-sets: those of `select`, or for each layer the experts that stay."""
    if isinstance(given, KeepSets):
        return given
    layers = list(given) if isinstance(given, Iterable) and not isinstance(given, Mapping) else [given]
    if not all(isinstance(kept, Collection) and not isinstance(kept, str | Mapping) for kept in layers):
        what = f"keep-sets are {type(given).__name__}"
        raise InputError(f"{what}: give what gptoss_jax.select gives, or for each layer the experts that stay")
    return KeepSets([[int(expert) for expert in kept] for kept in layers])


def checkpoint_of(model: Model) -> AnyCheckpoint:
    """What an open model is read from; InputError where it is a masked one."""
    if not isinstance(model.source, AnyCheckpoint):
        raise InputError(f"{model.name} is no checkpoint: give the model that it was made from")
    return model.source


@dataclass(frozen=True)
class Converted:
    """A checkpoint that `convert` wrote."""

    folder: AnyPath
    num_layers: int
    num_experts: int
    quantized: bool
    warnings: tuple[str, ...] = ()
    """What a user should know of it: what was rounded, what was left out."""


def convert(
    model: Any,
    to: str,
    out: str | AnyPath,
    *,
    format: str = "same",
    max_shard_size: int = 5 * 10**9,
    mesh: tuple[int, int] | None = None,
    overwrite: bool = False,
    progress: Bar = silent,
) -> Converted:
    """Write a model as an Orbax checkpoint (`to` is "orbax") or in Hugging Face form ("hf"), to the folder `out`.

    `max_shard_size` in bytes goes with "hf"; `mesh` goes with "orbax", and says from which devices arrays are saved.
    OutputError or CheckpointError where it cannot be written or read.

    Example:
        >>> import gptoss_jax as gj
        >>> gj.convert("nano", "hf", "nano-bf16", format="bf16", overwrite=True).quantized
        False
    """
    writing, folder_out = Writing(format=format, max_shard_size=max_shard_size), place(out)
    if to not in ("orbax", "hf"):
        raise OptionError(f"--to is {to!r}: give one of orbax, hf")
    if mesh and to == "hf":
        raise OptionError("--mesh goes with --to orbax: files in Hugging Face form are written by one process")
    atomic.check_free(folder_out, overwrite, last=CONFIG)
    opened = as_model(model)
    source = checkpoint_of(opened)
    atomic.check_apart(folder_out, source.folder, or_inside=True)
    quantize = source.quantized if writing.format == "same" else writing.format == "mxfp4"
    with atomic.new_folder(folder_out, overwrite, last=CONFIG) as folder:
        if to == "orbax":
            told = _write_orbax(source, folder, quantize, mesh, progress)
        else:
            told = _write_hf(source, folder, quantize, writing.max_shard_size, progress)
        is_other = stored_forms(source) != (["MXFP4" if quantize else "BF16"], ["BF16"])
        if is_other and (folder / "README.md").exists():
            told += ("README.md is that of the source: what it says of the form of its weights is no longer true",)
    config = source.config
    return Converted(folder_out, config.num_layers, config.num_experts, quantize, told)


def _write_hf(
    source: AnyCheckpoint, folder: Path, quantize: bool, max_shard_bytes: int, progress: Bar
) -> tuple[str, ...]:
    rounding = Rounding()
    groups = published.plan(source, quantize, rounding)
    config = folders.pruned_config(source.config_json, source.config.num_experts, quantize)
    with progress(sum(t.nbytes for group in groups for t in group), "B") as advance:
        left = folders.write_checkpoint(folder, groups, config, source.folder, max_shard_bytes, advance)
    return (*told_forms(source, quantize), *rounding.told(), *folders.told_left(left))


def _write_orbax(
    source: AnyCheckpoint, folder: Path, quantize: bool, mesh: tuple[int, int] | None, progress: Bar
) -> tuple[str, ...]:
    from convert import orbax  # slow to import, and needed for its own checkpoints only

    kernels, others = stored_forms(source)
    if quantize and not source.quantized:
        what = f"{source.folder}: its experts are {' and '.join(kernels)}"
        raise CheckpointError(f"{what}: make them MXFP4 with --to hf --format mxfp4 first")
    if wide := {*kernels, *others} - {"BF16", "MXFP4"}:
        what = f"{source.folder}: holds weights in {' and '.join(sorted(wide))}, and Orbax checkpoints BF16"
        raise CheckpointError(f"{what}: round them with --to hf first, which says how many change")
    config = source.config
    devices = sharding.make(config, *(mesh or sharding.default_sizes(config, jax.device_count())))
    wanted = orbax.plan(config, devices, "mxfp4" if quantize else "bf16")
    with progress(sum(map(orbax.nbytes, wanted.values())), "B") as advance:
        left = orbax.write(source, folder, wanted, advance)
    return (*told_forms(source, quantize), *folders.told_left(left))
