"""The experts of one layer of 20b's shape beside one large product, by form, tokens a step and size of block.

Four-bit kernels are unpacked in the measured time.

    python -m experiments.bench.experts

Each figure is the median of five rounds in which every case runs once, so that all see the same machine.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gptoss_jax.config import GPT_OSS_20B
from gptoss_jax.devices import mesh as sharding
from gptoss_jax.devices.placement import here
from gptoss_jax.kernels import grouped as kernels
from gptoss_jax.network.experts import Experts
from gptoss_jax.network.router import Routing

E, D, F, K = GPT_OSS_20B.num_experts, GPT_OSS_20B.hidden_size, GPT_OSS_20B.expert_hidden_size, GPT_OSS_20B.top_k
BLOCKS = (128, 192, 256)
CASES = [("bf16", 8192), ("blocks", 2048), ("blocks", 8192), ("blocks", 16384)]
ROUNDS = 5


def random_experts(weights: str) -> Experts:
    """Weights of one layer; values repeat, which no product minds."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Experts(GPT_OSS_20B, weights, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    floats = rng.standard_normal(1 << 20, np.float32) * 0.02
    codes, scales = (rng.integers(*ends, 1 << 20, np.uint8) for ends in ((0, 256), (119, 122)))

    def values(path: Any, x: jax.ShapeDtypeStruct) -> jax.Array:
        some = scales if "exponents" in sharding.path_of(path) else codes if x.dtype == jnp.uint8 else floats
        return jnp.asarray(np.resize(some, x.shape), x.dtype if x.dtype == jnp.uint8 else jnp.bfloat16)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(values, state))


def grouped(experts: Experts, tokens: int, block: int) -> tuple[Callable[[], Any], float]:
    """The layer's experts on random routing, and their floating-point operations."""
    key = jax.random.key(tokens)
    logits = jax.random.normal(key, (tokens, E))
    gates, chosen = jax.lax.top_k(logits, K)
    routing = Routing(logits, chosen, jax.nn.softmax(gates))
    x = jax.random.normal(key, (tokens, D), jnp.bfloat16)
    kernels.TILES = {"cpu": (block,)}
    step = jax.jit(lambda e, *args: e(*args, here())).lower(experts, x, routing, jnp.ones(tokens, bool)).compile()
    return lambda: step(experts, x, routing, jnp.ones(tokens, bool)), tokens * K * 6.0 * D * F


def main() -> None:
    """Print the table."""
    forms = {weights: random_experts(weights) for weights in ("bf16", "blocks")}
    x = jnp.ones((2048, D), jnp.bfloat16)
    kernel = forms["bf16"].gate_up_kernel[0].reshape(-1, D)
    product = jax.jit(lambda x, w: jnp.einsum("MD,ID->MI", x, w, preferred_element_type=jnp.float32))
    cases = {"one product of 2,048 rows": (lambda: product(x, kernel), 4.0 * 2048 * D * F)}
    for form, tokens in CASES:
        name = f"{'four bits' if form == 'blocks' else form}, {tokens:,} tokens"
        cases |= {f"{name}, blocks of {b}": grouped(forms[form], tokens, b) for b in BLOCKS}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for round_ in range(ROUNDS + 1):
        for name, (run, _) in cases.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if round_:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    rates = {name: flops / np.median(seconds[name]) / 1e9 for name, (_, flops) in cases.items()}
    print("| what | GFLOP/s | of one product |\n|---|---:|---:|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:.0f} | {rate / next(iter(rates.values())):.0%} |")


if __name__ == "__main__":
    main()
