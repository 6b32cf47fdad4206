"""Where MODEL is: a folder in Hugging Face form, an Orbax checkpoint, or a hub repository."""

from typing import TYPE_CHECKING

from gptoss_jax.errors import CheckpointError

from .from_hf import Checkpoint, locate
from .shards import ORBAX

if TYPE_CHECKING:
    from .orbax import OrbaxCheckpoint


def open_source(model: str) -> "Checkpoint | OrbaxCheckpoint":
    """The checkpoint that a user names."""
    folder = locate(model)
    if not (folder / ORBAX).is_dir():
        return Checkpoint(folder)
    from .orbax import OrbaxCheckpoint  # Orbax is slow to import, and needed for its own checkpoints only

    return OrbaxCheckpoint(folder)


def open_hf(model: str) -> Checkpoint:
    """The checkpoint that a user names, in Hugging Face form and no other."""
    folder = locate(model)
    if (folder / ORBAX).is_dir():
        raise CheckpointError(f"{folder}: an Orbax checkpoint: first gptoss-jax convert {folder} --to hf")
    return Checkpoint(folder)
