"""The folder of a checkpoint: shards, config.json, and the files that are copied."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from gptoss_jax.config import Config
from gptoss_jax.config_keys import ACTIVE, EXPERTS
from gptoss_jax.errors import CheckpointError, refusal
from gptoss_jax.files.paths import WEIGHT_SUFFIXES, AnyPath, is_local, parse_json, read_file

from . import checksums
from .shards import INDEX, ORBAX, Planned, write_shards

CONFIG = "config.json"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# What is written anew for the weights as they are in the new folder.
RENEWED = ("model*.safetensors", INDEX, ORBAX, f"{ORBAX}.index.json", checksums.FILE)
# What says something of the weights in its folder, that others need not have in common with them; hidden files hold
# what is of this machine alone, as keys.
OF_WEIGHTS = (
    ".*",
    *(f"*{suffix}{more}" for suffix in sorted(WEIGHT_SUFFIXES) for more in ("", ".*")),
    "*.index.json",
    "*.sha256",
    "*.md5",
    "*quant*.json",
    "recipe.yaml",
    "params.json",
    "dtypes.json",
    "imatrix*",
    "trainer_state.json",
    "*_results.json",
)
MAX_TOLD = 10

# The published config's block, for a BF16 model that becomes MXFP4.
QUANTIZATION = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}


def read_config(folder: AnyPath) -> tuple[dict[str, Any], Config]:
    """config.json as it stands, with the keys that mean nothing here, and what it says; ConfigError."""
    return parse_config(read_file(folder / CONFIG), str(folder / CONFIG))


def parse_config(data: bytes, where: str = CONFIG) -> tuple[dict[str, Any], Config]:
    """The same from the file's bytes."""
    raw = parse_json(data, where)
    return raw, Config.from_json(raw, where)


def check_entries(folder: AnyPath) -> None:
    """CheckpointError where a folder of this machine holds a link that leads out of it, or neither file nor folder.

    A link could lead to anything that the user may read, and what is in the folder gets into checkpoints that are
    published. Those of a hub cache are its own: from snapshots/REVISION/FILE to ../../blobs/HASH.
    """
    if not is_local(folder) or not folder.is_dir():
        return
    inside = folder.resolve()
    blobs = inside.parent.parent / "blobs" if inside.parent.name == "snapshots" else None
    for entry in sorted(folder.iterdir()):
        target = Path(os.path.realpath(entry))  # Path.resolve raises where links lead in a circle
        if entry.is_symlink() and not target.is_relative_to(inside) and target.parent != blobs:
            raise CheckpointError(f"{entry}: is a link out of the folder, to {target}: put the file itself there")
        if not entry.is_file() and not entry.is_dir():
            what = "a link to nothing" if entry.is_symlink() else "neither file nor folder"
            raise CheckpointError(f"{entry}: is {what}: put the file there, or remove it")


def check_no_adapter(folder: AnyPath) -> None:
    """CheckpointError where an adapter lies in the folder: beside its weights, or in their place."""
    adapters = [file.name for file in folder.iterdir() if file.name in ADAPTER]
    if not adapters:
        return
    if not any(file.suffix == ".safetensors" and file.name not in ADAPTER for file in folder.iterdir()):
        raise CheckpointError(f"{folder}: holds an adapter ({adapters[0]}) and no model: merge it into its base first")
    raise CheckpointError(
        f"{folder / adapters[0]}: an adapter beside a model's weights: transformers adds it where peft is installed, "
        "others take the weights alone: merge it into them first, or move it out of the folder"
    )


def write_checkpoint(
    folder: Path,
    groups: Sequence[Sequence[Planned]],
    config: dict[str, Any],
    others: AnyPath,
    max_shard_bytes: int,
    progress: Callable[[int], Any] = lambda nbytes: None,
) -> list[str]:
    """Write into `folder` shards and config.json, copy from `others` what is not of its weights, and sum up.

    SHA256SUMS comes last and has every file: of shards the digests of what was to be written. Returns what
    `copy_others` left out.
    """
    digests = write_shards(folder, groups, max_shard_bytes, progress)
    write_config(folder, config)
    left = copy_others(others, folder)
    checksums.write(folder, digests)
    return left


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """config.json; keys stay in their order."""
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def copy_others(source: AnyPath, folder: Path) -> list[str]:
    """Copy what is not in `folder` yet and can be true of other weights too: tokenizer, chat template, generation
    config, licence. Returns the names of what is left out and has no new form in `folder`."""
    left = []
    for entry in source.iterdir():
        if (folder / entry.name).exists() or _matches(entry.name, RENEWED):
            continue
        if entry.is_file() and not _matches(entry.name, OF_WEIGHTS):
            _copy(entry, folder / entry.name)
        else:
            left.append(entry.name)
    return sorted(left)


def told_left(names: Sequence[str]) -> tuple[str, ...]:
    """A line about what was left out, where anything was."""
    if not names:
        return ()
    more = f" and {len(names) - MAX_TOLD} more" if len(names) > MAX_TOLD else ""
    listed = ", ".join(names[:MAX_TOLD]) + more
    return (f"not carried over, being hidden, a folder, or about the weights of the source: {listed}",)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _copy(source: AnyPath, target: Path) -> None:
    try:
        with source.open("rb") as read, target.open("wb") as write:
            shutil.copyfileobj(read, write)
    except OSError as error:
        if str(error.filename) != str(source):  # it is the target's that has no space
            raise
        raise CheckpointError(f"{source}: cannot be read: {refusal(error)}") from error


def pruned_config(config: dict[str, Any], num_kept: int, quantize: bool) -> dict[str, Any]:
    """The source's config.json with the numbers of experts changed, and quantisation and embeddings as written."""
    changed = dict(config)
    if changed.get("tie_word_embeddings") is True:
        changed["tie_word_embeddings"] = False  # both are written
    changed |= {key: "bfloat16" for key in ("dtype", "torch_dtype") if key in config}
    changed |= {key: num_kept for key in EXPERTS if key in config}
    changed |= {key: min(config[key], num_kept) for key in ACTIVE if key in config}
    if not quantize:
        changed.pop("quantization_config", None)
    elif not _says_mxfp4(changed.get("quantization_config")):
        changed["quantization_config"] = QUANTIZATION
    return changed


def _says_mxfp4(quantization: Any) -> bool:
    """Whether a quantization_config is true of experts that are MXFP4 in all layers."""
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "mxfp4":
        return False
    return "experts" not in json.dumps(quantization.get("modules_to_not_convert"))
