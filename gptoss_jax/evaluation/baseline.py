"""A baseline in a file: what comparisons need of a model's expectations, without the model.

The file is safetensors. For each length of blocks S it has `S/nats`, `S/entropy` and `S/best`, [B, 1, N], as a pass
gives them, and `S/top/…`: the 64 most probable tokens, the true one, and the rest together. Divergences from these are
at most those over all tokens: what moves among the rest is not seen.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from ..errors import BaselineError, reason, refusal, shown
from ..files.paths import AnyPath, place, storage_errors
from .blocks import Blocks
from .compare import Top
from .passes import Arrays

VERSION = 1
NAMES = ("nats", "entropy", "best", *(f"top/{name}" for name in Top._fields))


@dataclass(frozen=True)
class StoredBaseline:
    """The content of such a file."""

    where: str
    model: str
    fingerprint: str
    digests: dict[str, str]
    """`Blocks.digest` by the length of blocks."""
    arrays: Arrays

    @classmethod
    def open(cls, file: str | AnyPath) -> "StoredBaseline | None":
        """Read a file; None where the path is none, and may be a model. BaselineError where it cannot be read."""
        path = place(file)
        try:
            with storage_errors(path):
                if not path.is_file():
                    return None
                data = path.read_bytes()
        except OSError as error:
            raise BaselineError(f"{path}: cannot be read ({refusal(error)})") from None
        return cls.parse(data, str(path))

    @classmethod
    def parse(cls, data: bytes, where: str) -> "StoredBaseline":
        """Reads what `open` does, from the bytes of a file that errors call `where`."""
        try:
            arrays = safetensors.numpy.load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            about: Any = json.loads((header.get("__metadata__") or {})["baseline"])
            version, model, fingerprint, digests = (about[key] for key in ("version", *KEYS))
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise BaselineError(f"{where}: is no baseline ({reason(error)}): make one with --write-baseline") from None
        if version != VERSION:
            raise BaselineError(f"{where}: is of version {shown(version)}, this program reads {VERSION}: write it anew")
        if not isinstance(digests, dict) or {*arrays} != {f"{length}/{name}" for length in digests for name in NAMES}:
            raise BaselineError(f"{where}: lacks some of its tensors, or has others: write it anew")
        return cls(where, str(model), str(fingerprint), digests, arrays)

    def of(self, blocks: Blocks) -> Arrays:
        """What a pass of the model over these blocks gave; BaselineError where it was over others."""
        length = str(blocks.length)
        if length not in self.digests:
            raise BaselineError(
                f"{self.where}: has no blocks of {length} tokens: give --seq-len {', '.join(self.digests)}, or write "
                "it anew"
            )
        if self.digests[length] != blocks.digest:
            raise BaselineError(
                f"{self.where}: was written for other rows, or for other tokens of them: give the data and the options "
                "that it was written with, or write it anew"
            )
        return {name: self.arrays[f"{length}/{name}"] for name in NAMES}


KEYS = ("model", "fingerprint", "digests")


def to_bytes(model: str, fingerprint: str, found: Mapping[int, Arrays], digests: Mapping[int, str]) -> bytes:
    """The content of a file, from passes with the most probable tokens by the length of blocks."""
    about = {"version": VERSION, "model": model, "fingerprint": fingerprint, "digests": digests}
    arrays = {f"{length}/{name}": np.ascontiguousarray(x[name]) for length, x in found.items() for name in NAMES}
    return safetensors.numpy.save(arrays, {"baseline": json.dumps(about)})
