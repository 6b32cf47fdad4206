"""How many bytes a cut model takes, and how many experts fit into some. Letters: see `config`."""

import math

from ..config import SLIDING, Config
from ..errors import CheckpointError, OptionError, RankingError

GIB = 1 << 30
BF16_BYTES = 2


def weight_bytes(config: Config, num_kept: int, quantize: bool) -> int:
    """The bytes of all tensors that `prune` writes for so many experts a layer, their kernels in MXFP4 or in BF16.

    CheckpointError where MXFP4 does not divide them.
    """
    every = BF16_BYTES * config.num_parameters(num_kept)
    if not quantize:
        return every
    from ..kernels.mxfp4 import BLOCK  # with it comes JAX, without which a choice is made

    D, F = config.hidden_size, config.expert_hidden_size
    for size in (D, F):
        if size % BLOCK:
            raise CheckpointError(f"MXFP4 needs sizes that are multiples of {BLOCK}, and {size} is not: use bf16")
    kernels = config.num_layers * num_kept * 3 * D * F
    # A block of values is half as many bytes, and one of their scale.
    return every - kernels * BF16_BYTES + kernels // BLOCK * (BLOCK // 2 + 1)


def cache_bytes(config: Config, context: int, rows: int) -> int:
    """The bytes of keys and values, in BF16, of so many rows of so many tokens: sliding layers hold their window alone.

    OptionError where the model's context is shorter.
    """
    if context > config.max_position:
        raise OptionError(f"--context {context} is above the model's context of {config.max_position}")
    tokens = sum(min(context, config.sliding_window) if kind == SLIDING else context for kind in config.layer_types)
    return rows * tokens * 2 * config.num_kv_heads * config.head_dim * BF16_BYTES


def most_experts(config: Config, budget_gib: float | int, quantize: bool, beside: int = 0) -> int:
    """The most experts a layer with which weights, and `beside` bytes more, take at most the budget.

    RankingError says what one expert a layer takes where that is too much.
    """
    least = weight_bytes(config, 1, quantize) + beside
    if least > budget_gib * GIB:
        raise RankingError(
            f"--budget-gib {budget_gib:g} is too little: with 1 expert a layer the model takes "
            f"{math.ceil(least / GIB * 1e4) / 1e4:.4f}: give at least that, or a smaller --context"
        )
    counts = range(config.num_experts, 0, -1)
    return next(n for n in counts if weight_bytes(config, n, quantize) + beside <= budget_gib * GIB)
