"""Arrays on their way into a page: one block of bytes, compressed, in which words name each by its place.

The page's JSON has an object in an array's place: {"array": type, "shape": …, "at": first byte}. Types are those of
`TYPES`; assets/data.js reads them.
"""

import base64
import gzip
import math
from collections.abc import Iterable
from typing import Any, Literal

import ml_dtypes
import numpy as np

Type = Literal["u1", "u2", "u4", "f4", "b2"]
TYPES: dict[Type, Any] = {"u1": np.uint8, "u2": np.uint16, "u4": np.uint32, "f4": np.float32, "b2": ml_dtypes.bfloat16}
ALIGNED = 4  # bytes: an array of the page begins at a multiple of its items' size
# Of a float32 the last seven bits say what nobody sees: without them a value is off by 2^-17 of itself, less than the
# sixth digit, and the block is a fifth smaller. Whole numbers are counts, and keep them. What is shown in two digits,
# as the widths of intervals, is bfloat16.
UNSEEN = np.uint32(0x7F)


class Packed:
    """The arrays that were added so far."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.size = 0

    def add(self, values: Any, kind: Type) -> dict[str, Any]:
        """What stands in the array's place in the page's JSON."""
        array = np.ascontiguousarray(values, TYPES[kind])
        if kind == "f4":
            bits = array.view(np.uint32)
            cut = np.isfinite(array) & (array != np.rint(array))
            array = np.where(cut, (bits + (UNSEEN >> 1)) & ~UNSEEN, bits).view(np.float32)
        data, at = array.tobytes(), self.size
        padded = data + bytes(-len(data) % ALIGNED)
        self.parts.append(padded)
        self.size += len(padded)
        return {"array": kind, "shape": [*array.shape], "at": at}

    def add_experts(self, ids: Any, num_experts: int) -> dict[str, Any]:
        """What stands in the place of ids of experts, of so many."""
        return self.add(ids, "u1" if num_experts <= 256 else "u2")

    def text(self) -> str:
        """The block, compressed, as base64: equal arrays give equal texts."""
        return base64.b64encode(gzip.compress(b"".join(self.parts), 9, mtime=0)).decode()


def known(numbers: Iterable[float]) -> list[float | None]:
    """Numbers as JSON has them: null where one is not finite, as the interval of a single row."""
    return [number if math.isfinite(number) else None for number in numbers]
