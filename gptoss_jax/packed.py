"""MXFP4 weights in device memory: four bits a value, unpacked where they are used.

A kernel of I inputs and O outputs lies as bytes [I/2, O]: that of row i holds the code of input i in its low
nibble and that of input i + I/2 in its high one. A block of 32 inputs shares a scale byte s, for 2^(s − 127);
they lie as [I/32, O]. Unpacking then joins and repeats whole rows: along the last axis, the one that TPUs
hold in lanes, either would be a copy of everything.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

BLOCK = 32  # values that share a scale


def dequantise(
    packed: UInt8[Array, "*any half_I O"], scales: UInt8[Array, "*any blocks O"], dtype: Any
) -> Float[Array, "*any I O"]:
    """The values; every one is exact in bfloat16, except that those below 2^-126 count as 0."""
    codes = jnp.concatenate([packed & 15, packed >> 4], axis=-2).astype(jnp.int32)
    exponent, mantissa = (codes >> 1) & 3, codes & 1
    # Twice the magnitude is whole: 0, 1, then (2 + mantissa) · 2^(exponent − 1).
    doubled = jnp.where(exponent > 0, (2 + mantissa) << jnp.maximum(exponent - 1, 0), mantissa)
    signed = jnp.where(codes & 8, -0.5, 0.5) * doubled.astype(jnp.float32)
    # A scale byte is the exponent field of the float32 that it stands for.
    factors = lax.bitcast_convert_type(scales.astype(jnp.int32) << 23, jnp.float32)
    return (signed * jnp.repeat(factors, BLOCK, axis=-2)).astype(dtype)
