"""Four-bit weights as devices hold them, against the decoder of checkpoints."""

from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert import mxfp4
from convert.hf import Checkpoint
from gptoss_jax.config import TINY
from gptoss_jax.kernels.mxfp4 import BLOCK, dequantise, dequantise_pairs, round_to_mxfp4
from gptoss_jax.network import model
from gptoss_jax.network.source import load

unpack, unpack_pairs = (jax.jit(function, static_argnums=2) for function in (dequantise, dequantise_pairs))


def random_bytes(seed: int, *shape: int, first: int = 0, last: int = 255) -> np.ndarray:
    return np.random.default_rng(seed).integers(first, last + 1, shape, np.uint8)


def dequantised(blocks: np.ndarray, scales: np.ndarray, dtype: type = ml_dtypes.bfloat16) -> np.ndarray:
    """Values [E, O, I] of a checkpoint's blocks [E, O, I/32, 16], by way of either form in device memory."""
    pairs_EIO = np.moveaxis(blocks.reshape(*blocks.shape[:2], -1), -1, 1)
    values_EIO = unpack(jnp.asarray(mxfp4.halves(pairs_EIO)), jnp.asarray(np.moveaxis(scales, -1, 1)), dtype)
    values_EOI = np.moveaxis(np.asarray(values_EIO), 1, -1)
    pairs = unpack_pairs(jnp.asarray(blocks.reshape(*blocks.shape[:2], -1)), jnp.asarray(scales), dtype)
    assert np.asarray(pairs).tobytes() == values_EOI.tobytes()
    return values_EOI


def every_byte(scales: range) -> tuple[np.ndarray, np.ndarray]:
    """Each scale with each of the 256 bytes: blocks [scales, 16, 1, 16] and scales [scales, 16, 1]."""
    blocks = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(1, 16, 1, 16), (len(scales), 16, 1, 16))
    return blocks, np.tile(np.array(scales, np.uint8)[:, None, None], (1, 16, 1))


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_every_byte_and_scale_is_decoded_to_the_bit(dtype: type) -> None:
    """Scales from 2; infinities of the largest included."""
    blocks, scales = every_byte(range(2, 255))
    expected = mxfp4.decode(blocks, scales).astype(dtype)
    assert dequantised(blocks, scales, dtype).tobytes() == expected.tobytes()


def test_subnormal_values_count_as_0() -> None:
    """At the smallest scale that is a normal float32, 2^-126: the half of it alone."""
    blocks, scales = every_byte(range(1, 2))
    expected = mxfp4.decode(blocks, scales)
    smallest = np.finfo(np.float32).tiny
    np.testing.assert_array_equal(dequantised(blocks, scales), np.where(np.abs(expected) < smallest, 0, expected))
    assert set(np.abs(expected[np.abs(expected) < smallest]).tolist()) == {0, smallest / 2}


def test_values_at_a_scale_of_0_count_as_0() -> None:
    assert not dequantised(*every_byte(range(1))).any()


@settings(max_examples=15)  # each shape is compiled
@given(experts=st.integers(1, 3), outputs=st.integers(1, 5), blocks=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
def test_any_shape_is_decoded_to_the_bit(experts: int, outputs: int, blocks: int, seed: int) -> None:
    packed = random_bytes(seed, experts, outputs, blocks, BLOCK // 2)
    scales = random_bytes(seed, experts, outputs, blocks, first=2, last=250)
    assert dequantised(packed, scales).tobytes() == mxfp4.decode(packed, scales).tobytes()


def test_the_low_nibbles_hold_the_first_half_of_the_inputs() -> None:
    packed = np.zeros((BLOCK, 1), np.uint8)  # 64 inputs of one output
    packed[5], packed[7] = 0x02, 0x40
    values = np.asarray(dequantise(jnp.asarray(packed), jnp.array([[127], [128]], jnp.uint8), jnp.float32))[:, 0]
    assert {int(i): float(values[i]) for i in np.flatnonzero(values)} == {5: 1.0, 7 + BLOCK: 4.0}


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9).map(lambda n: 2 * n), st.integers(1, 4)), seed=st.integers(0)
)
def test_halves_and_pairs_are_inverse(shape: tuple[int, int, int], seed: int) -> None:
    packed = random_bytes(seed, *shape)
    np.testing.assert_array_equal(mxfp4.pairs(mxfp4.halves(packed)), packed)
    np.testing.assert_array_equal(mxfp4.halves(mxfp4.pairs(packed)), packed)


def test_rounding_is_that_of_the_encoder() -> None:
    values = np.random.default_rng(0).normal(size=(50, 96)).astype(np.float32) * np.logspace(-30, 3, 50)[:, None]
    values[3], values[4, :32] = 0, np.linspace(-6, 6, 32)
    values[5, :16] = np.arange(16) / 4  # halfway between neighbours, up to 4
    values = values.astype(np.float32)
    expected = mxfp4.decode(*mxfp4.encode(values))
    np.testing.assert_array_equal(np.asarray(round_to_mxfp4(jnp.asarray(values))), expected.astype(np.float32))


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def both_forms(request: pytest.FixtureRequest, tiny_mxfp4: Path) -> list[model.GptOss]:
    """The same checkpoint, its experts as floats and in four bits."""
    return [load(Checkpoint(tiny_mxfp4), request.param, form=weights) for weights in ("bf16", "mxfp4")]


@pytest.mark.parametrize("layer", range(TINY.num_layers))
@pytest.mark.parametrize("name", ["gate_up", "down"])
def test_experts_have_the_same_kernels_in_both_forms(name: str, layer: int, both_forms: list[model.GptOss]) -> None:
    dtype = both_forms[0].embedding[...].dtype
    floats, bits = (network.layers.moe.experts.weights(name, dtype, jnp.asarray(layer)) for network in both_forms)
    (floats, first), (bits, first_of_bits) = floats, bits
    E = TINY.num_experts
    assert (floats.inputs_first, bits.inputs_first, first, first_of_bits) == (False, True, layer * E, 0)
    assert floats.array.dtype == bits.array.dtype == dtype
    theirs_EOI, ours_EIO = np.asarray(floats.array)[first : first + E], np.asarray(bits.array)
    assert ours_EIO.swapaxes(1, 2).tobytes() == theirs_EOI.tobytes()
