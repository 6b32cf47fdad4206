"""MXFP4: blocks of 32 four-bit floats that share a power of two (OCP Microscaling Formats v1.0).

Two values a byte, low nibble first. A value is sign, 2 exponent bits, 1 mantissa bit; a scale byte s
means 2^(s − 127). Every value is exact in bfloat16.
"""

import ml_dtypes
import numpy as np

from gptoss_jax.kernels.mxfp4 import LARGEST_EXPONENT

FP4_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
SCALE_BIAS = 127
BF16 = np.dtype(ml_dtypes.bfloat16)

_SIGNED = np.concatenate([FP4_VALUES, -FP4_VALUES])
# Both values of every byte at once: a look-up of 256 pairs.
_BYTE_TO_PAIR = np.stack([_SIGNED[np.arange(256) & 15], _SIGNED[np.arange(256) >> 4]], axis=-1)
# Halfway points between neighbours; at a tie the even mantissa wins, as IEEE rounding has it.
_MIDPOINTS = (FP4_VALUES[1:] + FP4_VALUES[:-1]) / 2
_TIE_GOES_UP = np.arange(1, 8) % 2 == 0


def decode(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Values of uint8 blocks [..., n, 16] with uint8 scales [..., n], as bfloat16 [..., 32·n]."""
    values = _BYTE_TO_PAIR.astype(BF16)[blocks].reshape(*blocks.shape[:-1], 32)
    # As bfloat16 the product is exact: a mantissa of two bits times a power of two. Scales below
    # 2^-126 are subnormal in bfloat16, and ldexp gives them where an exponent field could not.
    factors = np.ldexp(np.float32(1), scales.astype(np.int32) - SCALE_BIAS).astype(BF16)
    return (values * factors[..., None]).reshape(*blocks.shape[:-2], -1)


def halves(pairs: np.ndarray) -> np.ndarray:
    """Turn bytes [E, I/2, …] that hold inputs 2i and 2i + 1 into those that hold i and i + I/2.

    The first is how checkpoints pack, the second `gptoss_jax.kernels.mxfp4`.
    """
    first, second = np.split(pairs, 2, axis=1)  # of the low halves' inputs, and of the high ones'
    packed = np.empty_like(pairs)
    packed[:, 0::2] = (first & 15) | (second << 4)
    packed[:, 1::2] = (first >> 4) | (second & 0xF0)
    return packed


def pairs(packed: np.ndarray) -> np.ndarray:
    """Do the reverse of `halves`."""
    even, odd = packed[:, 0::2], packed[:, 1::2]
    return np.concatenate([(even & 15) | (odd << 4), (even >> 4) | (odd & 0xF0)], axis=1)


def encode(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Blocks and scales of values [..., 32·n], each rounded to the nearest (ties to even).

    The scale is the OCP rule's: the largest magnitude's exponent less 2, so that magnitudes above
    6 · 2^e, less than a third over, saturate. Values that MXFP4 can hold come back exactly.
    """
    grouped = values.astype(np.float32).reshape(*values.shape[:-1], -1, 32)
    largest = np.abs(grouped).max(-1)
    exponent = np.frexp(largest)[1] - 1 - LARGEST_EXPONENT
    exponent = np.where(largest > 0, np.clip(exponent, -SCALE_BIAS, SCALE_BIAS), 0)
    magnitude = np.ldexp(np.abs(grouped), -exponent[..., None])
    code = np.zeros(grouped.shape, np.uint8)
    for midpoint, up in zip(_MIDPOINTS, _TIE_GOES_UP, strict=True):
        code += magnitude >= midpoint if up else magnitude > midpoint
    code |= np.signbit(grouped).astype(np.uint8) << 3
    return code[..., 0::2] | (code[..., 1::2] << 4), (exponent + SCALE_BIAS).astype(np.uint8)
