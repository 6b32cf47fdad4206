"""How much memory there is, and what the engines need of it. Letters: see `config`."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import psutil
from flax import nnx

from ..config import Config, Form
from ..errors import MemoryLimitError
from ..network.model import GptOss, Layer

GIB = 1 << 30
STREAMED_TOKENS = 16384  # of a batch: unpacking an expert then takes a twentieth of its products' time
# Beside weights and hidden states (docs/measurements.md): what a process on CPU takes in the end for its program,
# compilers and rows, and what a layer takes for each token, in hidden states of its own.
PROCESS_BYTES = GIB
STATES_A_TOKEN = 12
# Of cgroups, version 2 and 1.
LIMITS = {"memory.max": "memory.current", "memory/memory.limit_in_bytes": "memory/memory.usage_in_bytes"}


def available() -> int:
    """Bytes that can still be had: of the first device, or of this machine where that is the CPU."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        statistics = device.memory_stats() or {}
        return statistics.get("bytes_limit", 0) - statistics.get("bytes_in_use", 0)
    free = psutil.virtual_memory().available
    for limit, usage in LIMITS.items():
        files = [Path("/sys/fs/cgroup", name) for name in (limit, usage)]
        if all(file.exists() for file in files):
            values = [file.read_text().strip() for file in files]
            if values[0] != "max":
                free = min(free, int(values[0]) - int(values[1]))
    return free


def weight_bytes(part: type, config: Config, form: Form, dtype: Any) -> int:
    """The bytes that a module of `model` takes in device memory; four-bit weights stay such."""
    leaves = jax.tree.leaves(nnx.eval_shape(lambda: part(config, form, rngs=nnx.Rngs(0))))
    return sum(leaf.size * (1 if leaf.dtype == jnp.uint8 else jnp.dtype(dtype).itemsize) for leaf in leaves)


def resident_bytes(config: Config, form: Form, dtype: Any) -> int:
    """What the resident engine needs on one device, with batches of a few thousand tokens."""
    return weight_bytes(GptOss, config, form, dtype) + 2 * PROCESS_BYTES


def streamed_tokens(
    config: Config, form: Form, dtype: Any, limit: int | None, activation_bytes: int, length: int
) -> int:
    """Tokens of a batch, in rows of `length`, with which the streamed engine stays below `limit` bytes in all.

    MemoryLimitError where even one row does not."""
    if limit is None:
        return max(length, STREAMED_TOKENS)
    # One layer runs while the next is read.
    fixed = PROCESS_BYTES + 2 * weight_bytes(Layer, config, form, dtype) + activation_bytes
    a_token = STATES_A_TOKEN * config.hidden_size * jnp.dtype(dtype).itemsize
    tokens = (limit - fixed) // a_token
    if tokens < length:
        raise MemoryLimitError(
            f"--memory-gib {limit / GIB:.3g} is too little: two layers, {activation_bytes / GIB:.3g} GiB of hidden "
            f"states and rows of {length:,} tokens need {(fixed + length * a_token) / GIB:.2f}: give more, a smaller "
            "--activation-gib or a smaller --max-seq-length"
        )
    return min(tokens, max(length, STREAMED_TOKENS))
