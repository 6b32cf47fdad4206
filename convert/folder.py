"""The folder of a checkpoint: shards, config.json, and the files that are copied."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gptoss_jax.config import Config
from gptoss_jax.config_keys import ACTIVE, EXPERTS
from gptoss_jax.errors import CheckpointError, refusal
from gptoss_jax.files.paths import WEIGHT_SUFFIXES, AnyPath, parse_json, read_file

from . import checksums
from .shards import Planned, write_shards

CONFIG = "config.json"

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


def write_checkpoint(
    folder: Path,
    groups: Sequence[Sequence[Planned]],
    config: dict[str, Any],
    others: AnyPath,
    max_shard_bytes: int,
    progress: Callable[[int], Any] = lambda nbytes: None,
) -> None:
    """Write into `folder` shards and config.json, copy from `others` what is no weight and not there yet, and sum up.

    SHA256SUMS comes last and has every file: of shards the digests of what was to be written.
    """
    digests = write_shards(folder, groups, max_shard_bytes, progress)
    write_config(folder, config)
    copy_others(others, folder)
    checksums.write(folder, digests)


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """config.json; keys stay in their order."""
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def copy_others(source: AnyPath, folder: Path) -> None:
    """Copy what is no weight and not in `folder` yet: tokenizer, chat template, generation config, licence."""
    for file in source.iterdir():
        is_weight = file.suffix in WEIGHT_SUFFIXES or file.name.endswith(".index.json")
        is_own = is_weight or file.name == checksums.FILE  # of the source alone: its weights, and its digests
        if file.is_file() and not is_own and not (folder / file.name).exists():
            _copy(file, folder / file.name)


def _copy(source: AnyPath, target: Path) -> None:
    try:
        with source.open("rb") as read, target.open("wb") as write:
            shutil.copyfileobj(read, write)
    except OSError as error:
        if str(error.filename) != str(source):  # it is the target's that has no space
            raise
        raise CheckpointError(f"{source}: cannot be read: {refusal(error)}") from error


def pruned_config(config: dict[str, Any], num_kept: int, quantize: bool) -> dict[str, Any]:
    """The source's config.json with the numbers of experts changed, and the quantisation as written."""
    changed = dict(config)
    changed |= {key: num_kept for key in EXPERTS if key in config}
    changed |= {key: min(config[key], num_kept) for key in ACTIVE if key in config}
    if not quantize:
        changed.pop("quantization_config", None)
    elif changed.get("quantization_config") is None:
        changed["quantization_config"] = QUANTIZATION
    return changed
