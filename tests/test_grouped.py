"""Products of rows with their experts' kernels: the TPU's kernel, interpreted, against loops in float64."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import SingleDeviceSharding

from gptoss_jax.config import TINY
from gptoss_jax.devices import topologies
from gptoss_jax.devices.placement import Placement
from gptoss_jax.kernels import grouped
from gptoss_jax.kernels.grouped import LANES, ExpertWeights, tile_width

from .test_experts import CHOICES, assert_mixtures_equal, experts_and_float64, mixture_by_loop, routing_of
from .test_plan import libtpu

Choice = Callable[[int, np.random.Generator], np.ndarray]

PLACES = {"tpu": Placement("tpu", interpret=True), "gpu": Placement("gpu"), "cpu": Placement("cpu")}
BLOCK = 16


def product_by_tiles(x: np.ndarray, kernels: np.ndarray, inputs_first: bool, ids: list[int]) -> np.ndarray:
    """Float64; NaN for the tiles of groups that do not exist."""
    blocks = x.astype(np.float64).reshape(len(ids), BLOCK, -1)
    kernels_GIO = (kernels if inputs_first else kernels.swapaxes(1, 2)).astype(np.float64)
    nothing = np.full((BLOCK, kernels_GIO.shape[2]), np.nan)
    return np.concatenate(
        [b @ kernels_GIO[i] if i < len(kernels) else nothing for b, i in zip(blocks, ids, strict=True)]
    )


GROUPS = {
    "one group": [2, 2, 2, 2, 2],
    "every group": [0, 1, 1, 2, 3],
    "groups without rows": [1, 1, 1, 3, 3],
    "groups that do not exist": [0, 2, 2, 4, 4],
    "the last group and none": [3, 4, 4, 9, 9],
}


@pytest.mark.parametrize("inputs_first", [False, True], ids=["outputs first", "inputs first"])
@pytest.mark.parametrize("outputs", [128, 300])
@pytest.mark.parametrize("ids", GROUPS.values(), ids=GROUPS)
def test_the_kernel_equals_a_loop_over_tiles(ids: list[int], outputs: int, inputs_first: bool) -> None:
    assert_kernel_equals_the_loop(ids, outputs, inputs_first, np.float32, 2e-6)


@pytest.mark.parametrize("inputs_first", [False, True], ids=["outputs first", "inputs first"])
def test_the_kernel_sums_bfloat16_in_float32(inputs_first: bool) -> None:
    """The operands are exact in float64: what is left is the rounding of sums."""
    assert_kernel_equals_the_loop(GROUPS["groups that do not exist"], 300, inputs_first, jnp.bfloat16, 2e-6)


def assert_kernel_equals_the_loop(ids: list[int], outputs: int, inputs_first: bool, dtype: type, atol: float) -> None:
    rng, inputs = np.random.default_rng(outputs), 24
    x = rng.normal(size=(len(ids) * BLOCK, inputs)).astype(dtype)
    array = rng.normal(size=(4, inputs, outputs) if inputs_first else (4, outputs, inputs)).astype(dtype)
    weights = ExpertWeights(jnp.asarray(array), inputs_first)
    ours = grouped._megablox(jnp.asarray(x), weights, jnp.array(ids), interpret=True)
    expected = product_by_tiles(x, array, inputs_first, ids)
    exists = ~np.isnan(expected)
    assert ours.dtype == jnp.float32 and ours.shape == expected.shape
    np.testing.assert_allclose(np.asarray(ours)[exists], expected[exists], rtol=0, atol=atol * inputs)


def test_kernels_know_their_sizes_in_both_orders() -> None:
    for inputs_first, sizes in ((True, (3, 5)), (False, (5, 3))):
        weights = ExpertWeights(jnp.zeros((2, 3, 5)), inputs_first)
        assert (weights.inputs, weights.outputs) == sizes


@given(width=st.integers(1, 20_000), input_bytes=st.integers(1, 100_000))
def test_a_tile_fits_and_wastes_least(width: int, input_bytes: int) -> None:
    def computed(tile: int) -> int:
        return -(-width // tile) * tile

    tile = tile_width(width, input_bytes)
    most = max(1, grouped.TPU_TILE_BYTES // input_bytes // LANES)
    tiles = [LANES * n for n in range(1, most + 1)]
    assert tile in tiles
    assert computed(tile) == min(map(computed, tiles))
    assert all(computed(larger) > computed(tile) for larger in tiles if larger > tile)


@pytest.mark.parametrize(("width", "input_bytes"), [(5760, 5760), (2880, 5760), (5760, 11520), (2880, 11520)])
def test_tiles_of_the_published_models_waste_little(width: int, input_bytes: int) -> None:
    tile = tile_width(width, input_bytes)
    assert tile * input_bytes <= grouped.TPU_TILE_BYTES
    assert -(-width // tile) * tile < 1.07 * width


@libtpu
@pytest.mark.parametrize("outputs", [5760, 2880])
def test_tiles_of_the_published_models_fit_the_memory_of_a_core(outputs: int) -> None:
    """Where they do not, the TPU's compiler refuses the kernel."""
    one = SingleDeviceSharding(topologies.devices("v5e:2x2")[0])
    sizes = ((256, 2880), jnp.bfloat16), ((4, outputs, 2880), jnp.bfloat16), ((1,), jnp.int32)
    x, array, ids = (jax.ShapeDtypeStruct(*size, sharding=one) for size in sizes)

    def product(x: Any, array: Any, ids: Any) -> Any:
        return grouped._megablox(x, ExpertWeights(array, inputs_first=False), ids, interpret=False)

    assert jax.jit(product).lower(x, array, ids).compile().output_shardings == one


def to_one_expert(tokens: int, _: np.random.Generator) -> np.ndarray:
    """All pairs, which a router never does: a token's k experts are different ones."""
    return np.full((tokens, TINY.top_k), 4, np.int32)


choices = pytest.mark.parametrize(
    "choice", [*CHOICES.values(), to_one_expert], ids=[*CHOICES, "all pairs on one expert"]
)
# Compiled once for all choices.
run, run_by_pieces = (jax.jit(lambda experts, *args: experts(*args), static_argnums=4) for _ in range(2))


@pytest.mark.parametrize("place", ["cpu", "gpu"])
def test_of_few_pairs_only_the_chosen_experts_are_looked_at(place: str) -> None:
    """Of more, the weights of one expert at a time become floats."""
    kernels = [grouped.choose(PLACES[place], rows, TINY.num_experts) for rows in (1, 2, 300)]
    assert [(kernel.tiles, kernel.by_expert) for kernel in kernels] == [(1, False), (1, True), (1, True)]


@choices
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("tokens", [1, 200])
def test_experts_equal_a_loop_over_tokens(tokens: int, place: str, choice: Choice) -> None:
    assert_experts_equal_the_loop(run, tokens, PLACES[place], choice)


@choices
def test_pieces_together_equal_a_loop_over_tokens(choice: Choice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tiles a piece: most pieces of an uneven split are skipped."""
    monkeypatch.setattr(grouped, "TPU_PIECE", 2 * grouped.TILES["tpu"][0])
    assert grouped.choose(PLACES["tpu"], 200 * TINY.top_k // TINY.num_experts, TINY.num_experts).tiles == 2
    assert_experts_equal_the_loop(run_by_pieces, 200, PLACES["tpu"], choice)


def assert_experts_equal_the_loop(run: Any, tokens: int, place: Placement, choice: Choice) -> None:
    rng = np.random.default_rng(tokens)
    experts, weights = experts_and_float64()
    x = rng.normal(size=(tokens, TINY.hidden_size)).astype(np.float32)
    valid = rng.random(tokens) < 0.8
    routing = routing_of(choice(tokens, rng), tokens)
    mixture = run(experts, jnp.asarray(x), routing, jnp.asarray(valid), place)
    assert_mixtures_equal(mixture, mixture_by_loop(weights, x, routing, valid))
