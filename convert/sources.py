"""Where MODEL is: a folder in Hugging Face form, an Orbax checkpoint, or a hub repository."""

from importlib.resources import files
from pathlib import Path

from gptoss_jax.config import HUB_ID
from gptoss_jax.errors import CheckpointError, reason
from gptoss_jax.files.paths import AnyPath, place

from .folder import check_entries
from .hf import Checkpoint
from .shards import ORBAX
from .tensors import AnyCheckpoint

NANO = "nano"  # the small model that ships with the project; a folder of this name is ./nano
# A hub repository may hold the weights again in other forms, in folders of their own.
HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "LICENSE*", "README.md", "USAGE_POLICY*"]


def locate(model: str) -> AnyPath:
    """The folder of a model: `model` itself, or where the hub repository of that id is downloaded to."""
    if not model:
        raise CheckpointError("MODEL is empty: name a folder in Hugging Face form, or a hub id")
    if model == NANO:
        return Path(str(files("gptoss_jax"))) / NANO
    path = place(model)
    if path.exists() or not HUB_ID.fullmatch(model):
        return path
    from huggingface_hub import snapshot_download  # slow to import, and needed for hub ids only

    try:
        return Path(snapshot_download(model, allow_patterns=HUB_PATTERNS, ignore_patterns=["*/*"]))
    # The hub client raises errors of several packages; all mean that the model is not to be had.
    except Exception as error:
        raise CheckpointError(f"{model}: no such folder, and the hub does not give it: {reason(error)}") from error


def open_source(model: str) -> AnyCheckpoint:
    """The checkpoint that a user names."""
    folder = locate(model)
    if model != NANO:  # what ships with the project may be installed as links
        check_entries(folder)
    if not (folder / ORBAX).is_dir():
        return Checkpoint(folder)
    if other := next((file.name for file in folder.iterdir() if file.suffix == ".safetensors"), None):
        raise CheckpointError(
            f"{folder}: holds {ORBAX} and {other}: this program would take the first, others the second: remove the "
            "one that is not meant"
        )
    from .orbax import OrbaxCheckpoint  # Orbax is slow to import, and needed for its own checkpoints only

    return OrbaxCheckpoint(folder)
