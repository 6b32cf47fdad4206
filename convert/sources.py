"""Where MODEL is: a folder in Hugging Face form, an Orbax checkpoint, or a hub repository."""

from .from_hf import Checkpoint, locate


def open_source(model: str) -> Checkpoint:
    """The checkpoint that a user names."""
    return Checkpoint(locate(model))
