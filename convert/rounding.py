"""Floats of 16 and 32 bits as the BF16 of the published form, counted: what changes is told."""

import numpy as np

from gptoss_jax.errors import CheckpointError

from .mxfp4 import BF16


class Rounding:
    """Counts what becomes BF16 and what of that changes; tensors are rounded in several threads."""

    def __init__(self) -> None:
        self._counts: list[tuple[int, int]] = []

    def to_bf16(self, values: np.ndarray, name: str) -> np.ndarray:
        """The nearest values in BF16, at ties the even ones; what is BF16 or no float stays as it is.

        CheckpointError where one is NaN, infinite, or too large for BF16.
        """
        if values.dtype not in (np.float16, np.float32):
            return values
        with np.errstate(over="ignore"):
            rounded = values.astype(BF16)
        if not np.isfinite(rounded).all():
            raise CheckpointError(f"{name}: holds NaN, infinity or a value that is too large for BF16: mend the source")
        changed = int(np.count_nonzero(rounded.astype(np.float32) != values))
        self._counts.append((values.size, changed))  # in one step, as a sum over threads would not be
        return rounded

    def told(self) -> tuple[str, ...]:
        """A line about the values that became BF16, where there are any."""
        values, changed = (sum(column) for column in zip(*self._counts, strict=True)) if self._counts else (0, 0)
        if not values:
            return ()
        return (f"of {values:,} values in F16 or F32, {changed:,} were rounded to BF16, the others are the same in it",)
