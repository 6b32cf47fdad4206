"""Rotary position embedding with YaRN frequencies. Letters: see `config`."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..config import Config


def frequencies(config: Config) -> np.ndarray:
    """Angle per position of each rotated pair, float32 [h/2].

    Source: Su et al. 2021 (arXiv:2104.09864), and where they are stretched Peng et al. 2023 (arXiv:2309.00071),
    section 3.2: pairs that turn more than beta_fast times in the original context keep their frequency, those that
    turn less than beta_slow times are slowed by `factor`, and a linear ramp lies between.
    """
    yarn, half = config.rope_scaling, config.head_dim // 2
    # float32 throughout, as published implementations compute it: the tables agree to the bit.
    periods = np.float32(config.rope_theta) ** (np.arange(half, dtype=np.float32) / np.float32(half))
    if yarn is None:
        return 1 / periods

    def pair_that_turns(times: float) -> float:
        return half * math.log(yarn.original_context / (times * 2 * math.pi)) / math.log(config.rope_theta)

    low, high = pair_that_turns(yarn.beta_fast), pair_that_turns(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    width = high - low or 0.001  # no division by zero; below 0 no pair is slowed, in transformers too
    slowed = np.clip((np.arange(half, dtype=np.float32) - np.float32(low)) / np.float32(width), 0, 1)
    return ((1 / (np.float32(yarn.factor) * periods)) * slowed + (1 / periods) * (1 - slowed)).astype(np.float32)


def tables(
    config: Config, positions_BS: Int[Array, "B S"]
) -> tuple[Float[Array, "B S half"], Float[Array, "B S half"]]:
    """cos and sin for each position, float32 (bfloat16 cannot tell positions past 256 apart)."""
    angles = positions_BS.astype(jnp.float32)[:, :, None] * frequencies(config)[None, None, :]
    scale = 1.0 if config.rope_scaling is None else config.rope_scaling.amplitude
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(
    x: Float[Array, "B S heads h"], cos: Float[Array, "B S half"], sin: Float[Array, "B S half"]
) -> Float[Array, "B S heads h"]:
    """Turn each pair (i, i + h/2) by its angle; computed in float32, returned in x's dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
