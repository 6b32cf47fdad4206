"""Which engine generates, on what, and with how many rows side by side. Letters: see `config`."""

from collections.abc import Sequence

import jax.numpy as jnp

from ..config import SLIDING, Config
from ..devices import mesh as sharding
from ..errors import MemoryLimitError
from ..network.model import GptOss, Layer
from ..network.source import Source
from ..run import choose, memory
from ..run.memory import GIB, PROCESS_BYTES
from ..run.options import Placing
from ..run.streamed import weights_form
from .decoder import Decoder, Prompt
from .resident import Resident, load
from .steps import How
from .streamed import Streamed

ROWS = 64  # side by side, where nothing else is asked for and memory allows
CAPACITY_STEP = 128  # tokens: caches grow by so many, so that few lengths are compiled


def decoder(source: Source, placing: Placing, prompts: Sequence[Prompt], how: How) -> Decoder:
    """A decoder with room for these prompts, some of them side by side.

    MemoryLimitError where memory does not hold the rows that are asked for, MeshError where they do not divide over
    the devices.
    """
    config = source.config
    capacity = min(-(-max(p.limit for p in prompts) // CAPACITY_STEP) * CAPACITY_STEP, config.max_position)
    if choose.choose(source, placing).engine == "streamed":
        choose.check_streamed(placing)
        weights = 2 * memory.weight_bytes(Layer, config, weights_form(source), placing.dtype)
        weights += config.vocab_size * config.hidden_size * jnp.dtype(placing.dtype).itemsize
        rows = _rows(placing, len(prompts), _bytes_a_row(config, capacity, placing.dtype), weights, 1)
        return Streamed(source, placing.dtype, how, rows, capacity)
    mesh = choose.resident_mesh(source, placing)
    data, expert = mesh.shape[sharding.DATA], mesh.shape[sharding.EXPERT]
    weights = memory.weight_bytes(GptOss, config, placing.weights, placing.dtype) // expert
    a_row = _bytes_a_row(config, capacity, placing.dtype) // expert
    rows = _rows(placing, len(prompts), a_row, weights, data)
    return Resident(load(source, placing.dtype, mesh, placing.weights), how, mesh, rows, capacity)


def _rows(placing: Placing, prompts: int, bytes_a_row: int, weights: int, data: int) -> int:
    """How many rows: as many as there are prompts, ROWS at most, and as memory holds beside the weights."""
    limit = int(placing.memory_gib * GIB) if placing.memory_gib else memory.available()
    fitting = max(1, (limit - weights - PROCESS_BYTES) // bytes_a_row) * data
    if placing.batch_size is None:
        return -(-min(prompts, ROWS, fitting) // data) * data
    sharding.check_batch(placing.batch_size, data)
    if placing.batch_size > fitting:
        raise MemoryLimitError(
            f"--batch-size {placing.batch_size} is too much for {limit / GIB:.3g} GiB: keys and values of a row take "
            f"{bytes_a_row / GIB:.3f} GiB, beside weights of {weights / GIB:.2f}: at most {fitting}"
        )
    return placing.batch_size


def _bytes_a_row(config: Config, capacity: int, dtype: str) -> int:
    """Keys and values of one row, in all layers."""
    slots = [min(capacity, config.sliding_window) if kind == SLIDING else capacity for kind in config.layer_types]
    return sum(slots) * 2 * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize
