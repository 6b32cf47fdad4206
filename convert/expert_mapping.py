"""expert_mapping.json: for each layer, the new number of each kept expert by its number in the original model."""

import json
from collections.abc import Sequence
from pathlib import Path

from gptoss_jax.config import Config
from gptoss_jax.files.paths import AnyPath

from .shards import sound

FILE = "expert_mapping.json"
UNUSABLE = "no mapping of this model's experts", "copy the one that was written with it, or remove it"

Layers = Sequence[Sequence[int]]


def original_numbers(folder: AnyPath, config: Config) -> Layers | None:
    """For each layer and expert the number in the model that was pruned first; None where none has been.

    CheckpointError where the file is not of this model.
    """
    file = folder / FILE
    if not file.exists():
        return None
    with sound(str(file), *UNUSABLE):
        return parse(file.read_bytes(), config, str(file))


def parse(data: bytes, config: Config, where: str = FILE) -> Layers:
    """The same from the file's bytes."""
    with sound(where, *UNUSABLE):
        layers = json.loads(data)
        if list(layers) != [str(layer) for layer in range(config.num_layers)]:
            raise ValueError(f"its layers are not 0 to {config.num_layers - 1}")
        return [_numbers(layer, new_by_old, config.num_experts) for layer, new_by_old in layers.items()]


def _numbers(layer: str, new_by_old: dict[str, int], num_experts: int) -> list[int]:
    if any(type(new) is not int for new in new_by_old.values()) or any(str(int(old)) != old for old in new_by_old):
        raise ValueError(f"layer {layer} holds what is no number of an expert")
    if sorted(new_by_old.values()) != [*range(num_experts)]:
        raise ValueError(f"layer {layer} has {len(new_by_old)} experts, not each of 0 to {num_experts - 1} once")
    old_by_new = {new: int(old) for old, new in new_by_old.items()}
    if min(old_by_new.values()) < 0:
        raise ValueError(f"layer {layer} holds a negative number")
    return [old_by_new[new] for new in range(num_experts)]


def write(folder: Path, keep_sets: Layers, before: Layers | None) -> None:
    """Write that of the experts in keep-sets, which name them as the source does, whose own numbers are `before`."""
    layers = [kept if before is None else [before[i][expert] for expert in kept] for i, kept in enumerate(keep_sets)]
    mapping = {str(i): {str(old): new for new, old in enumerate(kept)} for i, kept in enumerate(layers)}
    (folder / FILE).write_text(json.dumps(mapping, indent=1) + "\n", encoding="utf-8")
