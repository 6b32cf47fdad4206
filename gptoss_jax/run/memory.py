"""How much memory there is, and what the engines need of it. Letters: see `config`."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import psutil
from flax import nnx

from ..config import Config, Form
from ..errors import MemoryLimitError
from ..network.model import GptOss, Layer
from ..network.products import OUTPUTS, pairs

GIB = 1 << 30
STREAMED_TOKENS = 16384  # of a batch: unpacking an expert then takes a twentieth of its products' time
# Beside weights and hidden states (docs/measurements.md): what a process on CPU takes in the end for its program,
# compilers and rows, and what a layer takes for each token, in hidden states of its own.
PROCESS_BYTES = GIB
STATES_A_TOKEN = 12
# A cgroup's files: what it may take, what it takes, and what of that the system would give up first (in `memory.stat`).
CGROUP2 = (("memory.max", "memory.high"), "memory.current", "inactive_file")
CGROUP1 = (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")


def available() -> int:
    """Bytes that can still be had: of the first device, or of this machine where that is the CPU."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        statistics = device.memory_stats() or {}
        return statistics.get("bytes_limit", 0) - statistics.get("bytes_in_use", 0)
    return min([psutil.virtual_memory().available, *cgroup_rooms()])


def cgroup_rooms(root: Path = Path("/sys/fs/cgroup"), of_process: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Bytes that each cgroup of this process, and each above it, lets it still take; of those that have a limit.

    Args:
        root: where cgroups are mounted: those of version 2, or the folder `memory` of version 1.
        of_process: a line for each hierarchy, as 0::/a/b (version 2) or 4:memory:/a/b (version 1).
    """
    rooms = []
    for controllers, path in re.findall(r"^\d+:([^:\n]*):/(.*)$", _read(of_process), re.MULTILINE):
        if controllers and "memory" not in controllers.split(","):
            continue
        files, mount = (CGROUP1, root / "memory") if controllers else (CGROUP2, root)
        # In a container the path may be that of the host, of which only the mount itself is here.
        inner = mount.joinpath(*(part for part in path.split("/") if part not in ("", "..")))
        for folder in (inner, *inner.parents):
            rooms += _room(folder, *files)
            if folder == mount:
                break
    return rooms


def _room(folder: Path, limits: Sequence[str], usage: str, reclaimable: str) -> list[int]:
    """What one cgroup leaves; nothing where it has no limit, or files that are not understood."""
    found = [int(text) for text in (_read(folder / limit).strip() for limit in limits) if _is_number(text)]
    used = _read(folder / usage).strip()
    if not found or not _is_number(used):
        return []
    statistics = dict(line.rsplit(" ", 1) for line in _read(folder / "memory.stat").splitlines() if " " in line)
    kept = statistics.get(reclaimable, "0")
    # Files that were read lie in memory until others want it: they are in use, and free.
    return [max(0, min(found) - int(used) + (int(kept) if _is_number(kept) else 0))]


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 25


def weight_bytes(part: type, config: Config, form: Form, dtype: Any) -> int:
    """The bytes that a module of `model` takes in device memory; four-bit weights stay such."""
    leaves = jax.tree.leaves(nnx.eval_shape(lambda: part(config, form, rngs=nnx.Rngs(0))))
    return sum(leaf.size * (1 if leaf.dtype == jnp.uint8 else jnp.dtype(dtype).itemsize) for leaf in leaves)


def resident_bytes(config: Config, form: Form, dtype: Any) -> int:
    """What the resident engine needs on one device, with batches of a few thousand tokens."""
    return weight_bytes(GptOss, config, form, dtype) + 2 * PROCESS_BYTES


def further_bytes(config: Config, dtype: Any, swap: bool, grams: bool) -> tuple[int, int]:
    """What a layer takes for each token, and beside it once, where it shows what dropping experts changes, or the
    products of all experts' outputs."""
    output = config.hidden_size * jnp.dtype(dtype).itemsize
    token, once = ((config.top_k + 1) * output if swap else 0), 0
    if grams:
        # Products on the device and on the host; outputs of a block of tokens, which are rounded from float32.
        token += 2 * 4 * len(pairs(config.num_experts)[0])
        once += 2 * OUTPUTS * output
    return token, once


def streamed_tokens(
    config: Config,
    form: Form,
    dtype: Any,
    limit: int | None,
    activation_bytes: int,
    length: int,
    token_bytes: int = 0,
    further_bytes: int = 0,
) -> int:
    """Tokens of a batch, in rows of `length`, with which the streamed engine stays below `limit` bytes in all, where a
    layer takes so many bytes more for each token, and so many more in all.

    MemoryLimitError where even one row does not."""
    if limit is None:
        return max(length, STREAMED_TOKENS)
    # One layer runs while the next is read.
    fixed = PROCESS_BYTES + 2 * weight_bytes(Layer, config, form, dtype) + activation_bytes + further_bytes
    a_token = STATES_A_TOKEN * config.hidden_size * jnp.dtype(dtype).itemsize + token_bytes
    tokens = (limit - fixed) // a_token
    if tokens < length:
        raise MemoryLimitError(
            f"--memory-gib {limit / GIB:.3g} is too little: two layers, {activation_bytes / GIB:.3g} GiB of hidden "
            f"states and rows of {length:,} tokens need {(fixed + length * a_token) / GIB:.2f}: give more, a smaller "
            "--activation-gib or a smaller --max-seq-length"
        )
    return min(tokens, max(length, STREAMED_TOKENS))
