"""MXFP4 weights in device memory: four bits a value, unpacked where they are used.

A block of 32 inputs shares a scale byte s, for 2^(s − 127). Two layouts:

- Halves, where all of a layer is unpacked at once, [I, O]: bytes [I/2, O], of which that of row i holds the code of
  input i in its low nibble and that of input i + I/2 in its high one; scales [I/32, O]. Unpacking joins and repeats
  whole rows: along the last axis, the one that TPUs hold in lanes, either would be a copy of everything.
- Pairs, where one expert is unpacked at a time, [O, I]: bytes [O, I/2] that hold inputs 2i and 2i + 1; scales
  [O, I/32]. So checkpoints have them, and they are read without a change.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Integer, UInt8, UInt32

BLOCK = 32  # values that share a scale
LARGEST_EXPONENT = 2  # of four bits: 6 = 1.5 · 2²


def dequantise(
    packed: UInt8[Array, "*any half_I O"], scales: UInt8[Array, "*any blocks O"], dtype: Any
) -> Float[Array, "*any I O"]:
    """The values of halves; every one is exact in bfloat16, except that those below 2^-126 count as 0."""
    codes = jnp.concatenate([packed & 15, packed >> 4], axis=-2).astype(jnp.int32)
    return (_values(codes) * jnp.repeat(_factors(scales), BLOCK, axis=-2)).astype(dtype)


def dequantise_pairs(
    packed: UInt8[Array, "*any O half_I"], scales: UInt8[Array, "*any O blocks"], dtype: Any
) -> Float[Array, "*any O I"]:
    """The values of pairs; as exact."""
    codes = packed.astype(jnp.uint32).reshape(*scales.shape, BLOCK // 2)
    factors = _factors(scales)[..., None]
    if jnp.dtype(dtype) == jnp.bfloat16:
        # Two values as one word: joined along the last axis, XLA's CPU backend takes ten times as long.
        low, high = (_bfloat16_bits(part, factors) for part in (codes & 15, codes >> 4))
        values = lax.bitcast_convert_type(low | high << 16, jnp.bfloat16)
    else:
        values = jnp.stack([_values(codes & 15) * factors, _values(codes >> 4) * factors], axis=-1).astype(dtype)
    return values.reshape(*scales.shape[:-1], -1)


def round_to_mxfp4(values: Float[Array, "*any I"]) -> Float[Array, "*any I"]:
    """Each value as MXFP4 holds it, by the rule of `convert.mxfp4.encode`: the nearest, ties to even."""
    grouped = values.reshape(*values.shape[:-1], -1, BLOCK)
    largest = jnp.abs(grouped).max(-1, keepdims=True)
    exponent = jnp.where(largest > 0, jnp.frexp(largest)[1] - 1 - LARGEST_EXPONENT, 0)
    magnitude = jnp.minimum(jnp.ldexp(jnp.abs(grouped), -exponent), 6)
    step = jnp.where(magnitude < 2, 0.5, jnp.where(magnitude < 4, 1, 2))
    rounded = jnp.ldexp(jnp.round(magnitude / step) * step, exponent)
    return (jnp.sign(grouped) * rounded).reshape(values.shape).astype(values.dtype)


def _values(codes: Integer[Array, "*any"]) -> Float[Array, "*any"]:
    exponent, mantissa = (codes >> 1) & 3, codes & 1
    # Twice the magnitude is whole: 0, 1, then (2 + mantissa) · 2^(exponent − 1).
    doubled = jnp.where(exponent > 0, (2 + mantissa) << jnp.maximum(exponent, 1) - 1, mantissa)
    return jnp.where(codes & 8, -0.5, 0.5) * doubled.astype(jnp.float32)


def _bfloat16_bits(codes: UInt32[Array, "*any"], factors: Float[Array, "..."]) -> UInt32[Array, "*any"]:
    """The bits of value × factor. The product is exact, so that they are the upper half of the float32's."""
    magnitude = codes & 7
    # From 1 on, exponent and mantissa stand as in a float32, whose exponent has 126 more.
    large = lax.bitcast_convert_type((magnitude << 22) + (126 << 23), jnp.float32)
    value = jnp.where(magnitude < 2, magnitude.astype(jnp.float32) * 0.5, large)
    bits = lax.bitcast_convert_type(value * factors, jnp.uint32)
    normal = bits >= 1 << 23  # operations of floats count others as 0, those of bits do not
    return jnp.where(normal, bits >> 16, 0) | (codes & 8) << 12


def _factors(scales: UInt8[Array, "*any"]) -> Float[Array, "*any"]:
    # A scale byte is the exponent field of the float32 that it stands for.
    return lax.bitcast_convert_type(scales.astype(jnp.int32) << 23, jnp.float32)
