"""MXFP4 against transformers' own dequantisation, and against rounding by exhaustive search."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from convert import mxfp4
from tests.oracle import needs_torch

MAGNITUDES = [Fraction(m) for m in ("0", "1/2", "1", "3/2", "2", "3", "4", "6")]
BIAS = 127
SANE_SCALES = np.arange(255, dtype=np.uint8)  # 255 is the format's NaN


def bits(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, ml_dtypes.bfloat16).view(np.uint16)


def all_bytes() -> np.ndarray:
    """uint8 [16, 16]: every byte once, in blocks of 16."""
    return np.arange(256, dtype=np.uint8).reshape(16, 16)


def nearest_code(value: float, exponent: int) -> int:
    """The obvious way: the closest of 8 magnitudes times 2^exponent; at a tie the even mantissa bit."""
    magnitude = abs(Fraction(value)) / Fraction(2) ** exponent
    code = min(range(8), key=lambda c: (abs(MAGNITUDES[c] - magnitude), c % 2))
    return code | (math.copysign(1, value) < 0) << 3


def slow_encode(block: np.ndarray) -> tuple[list[int], int]:
    """Codes and scale byte of 32 values, by the OCP rule: the largest magnitude's exponent less 2."""
    largest = max(abs(float(v)) for v in block)
    exponent = math.floor(math.log2(largest)) - 2 if largest else 0
    exponent = max(-BIAS, min(BIAS, exponent))
    return [nearest_code(float(v), exponent) for v in block], exponent + BIAS


def codes(blocks: np.ndarray) -> np.ndarray:
    """The four-bit codes of packed blocks, low nibble first."""
    return np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], -1)


@pytest.mark.filterwarnings("ignore:overflow")
def test_every_byte_and_scale_decodes_as_in_transformers() -> None:
    torch = needs_torch()
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = np.broadcast_to(all_bytes(), (1, len(SANE_SCALES), 16, 16)).copy()
    scales = np.broadcast_to(SANE_SCALES[None, :, None], blocks.shape[:-1]).copy()
    theirs = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.bfloat16)
    ours = mxfp4.decode(blocks, scales)
    assert ours.dtype == ml_dtypes.bfloat16
    assert np.array_equal(ours.view(np.int16), theirs.transpose(1, 2).contiguous().view(torch.int16).numpy())


def test_the_low_nibble_comes_first() -> None:
    block = np.zeros((1, 16), np.uint8)
    block[0, 0] = 0x72  # high nibble 6, low nibble 1
    assert mxfp4.decode(block, np.array([BIAS], np.uint8))[:3].tolist() == [1, 6, 0]


def test_decoded_values_are_exact() -> None:
    finite = np.arange(252, dtype=np.uint8)  # above, the largest magnitudes are past bfloat16's range
    for block in all_bytes():
        decoded = mxfp4.decode(np.broadcast_to(block, (252, 16)), finite).reshape(252, 32)
        signed = [float(MAGNITUDES[c & 7]) * (-1 if c & 8 else 1) for c in codes(block).tolist()]
        expected = np.ldexp(np.array(signed), finite.astype(int)[:, None] - BIAS)
        assert np.array_equal(decoded.astype(np.float64), expected)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("spread", [1e-38, 1e-6, 0.02, 1.0, 1e30])
def test_encode_rounds_to_the_nearest(dtype: type, spread: float) -> None:
    values = (np.random.default_rng(0).standard_normal((6, 3, 32)) * spread).astype(dtype)
    blocks, scales = mxfp4.encode(values.reshape(6, 96))
    for block, scale, wanted in zip(
        codes(blocks).reshape(-1, 32), scales.reshape(-1), values.reshape(-1, 32), strict=True
    ):
        assert (block.tolist(), int(scale)) == slow_encode(wanted)


@pytest.mark.parametrize("exponent", [-127, -30, 0, 30, 123])
def test_ties_go_to_the_even_mantissa(exponent: int) -> None:
    """Every midpoint of neighbours, both signs, and what lies just beside it."""
    midpoints = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], np.float32)
    beside = np.concatenate([midpoints, midpoints * np.float32(1 + 2**-7), midpoints * np.float32(1 - 2**-7)])
    block = np.zeros(64, np.float32)
    block[: 2 * len(beside)] = np.concatenate([beside, -beside])
    block[31] = block[63] = 4  # pins the scale of both blocks
    block = np.ldexp(block, exponent)
    blocks, scales = mxfp4.encode(block)
    assert scales.tolist() == [exponent + BIAS] * 2
    for mine, values in zip(codes(blocks), block.reshape(2, 32), strict=True):
        assert mine.tolist() == slow_encode(values)[0]


def test_encode_gives_decoded_values_back() -> None:
    rng = np.random.default_rng(1)
    # From blocks that use all magnitudes to blocks that use the smallest alone; 251 keeps 6 · 2^e finite.
    nibbles = rng.integers(0, rng.integers(1, 9, (20_000, 1)), (20_000, 32)) | rng.integers(0, 2, (20_000, 32)) << 3
    blocks = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).astype(np.uint8)[:, None]
    scales = rng.integers(0, 252, (20_000, 1)).astype(np.uint8)
    values = mxfp4.decode(blocks, scales)
    again = mxfp4.decode(*mxfp4.encode(values))
    assert np.array_equal(bits(again), bits(values))


def test_zeros_keep_their_signs() -> None:
    values = np.zeros((2, 64), np.float32)
    values[1, ::3] = -0.0
    blocks, scales = mxfp4.encode(values)
    assert np.array_equal(bits(mxfp4.decode(blocks, scales)), bits(values))
    assert not blocks[0].any()


def test_what_rounds_to_zero_keeps_its_sign() -> None:
    values = np.array([4, -4, 1e-3, -1e-3] * 8, np.float32)
    decoded = mxfp4.decode(*mxfp4.encode(values))
    assert np.array_equal(bits(decoded), bits(np.array([4, -4, 0.0, -0.0] * 8, np.float32)))


def test_saturation_stays_within_a_quarter() -> None:
    """Magnitudes in (6, 8) · 2^e become 6 · 2^e: at most a quarter of their own size is lost."""
    largest = np.linspace(4, 8, 4001, endpoint=False, dtype=np.float32)
    values = np.zeros((4001, 32), np.float32)
    values[:, 5] = -largest
    decoded = mxfp4.decode(*mxfp4.encode(values))[:, 5].astype(np.float32)
    assert decoded[largest > 6].tolist() == [-6.0] * int((largest > 6).sum())
    assert np.abs(decoded + largest).max() < 2
    assert (np.abs(decoded + largest) < largest / 4).all()


def test_encode_shapes() -> None:
    blocks, scales = mxfp4.encode(np.ones((5, 3, 96), np.float32))
    assert (blocks.shape, blocks.dtype) == ((5, 3, 3, 16), np.uint8)
    assert (scales.shape, scales.dtype) == ((5, 3, 3), np.uint8)
    assert mxfp4.decode(blocks, scales).shape == (5, 3, 96)
