"""The TPU's attention, interpreted, against one dense softmax; and the whole network with the TPU's kernels."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert.hf import Checkpoint
from gptoss_jax.config import TINY
from gptoss_jax.data import batching
from gptoss_jax.data.batching import Document
from gptoss_jax.devices.placement import Placement
from gptoss_jax.kernels import splash
from gptoss_jax.network.batch import Batch
from gptoss_jax.network.source import load
from gptoss_jax.run.steps import Asked, network_step

from .test_attention import dense

pytestmark = pytest.mark.slow


def documents(*shape: int) -> np.ndarray:
    """Segments of rows that hold up to three documents each."""
    return np.sort(np.random.default_rng(0).integers(0, 3, shape).astype(np.int32))


attend = jax.jit(partial(splash.attend, interpret=True), static_argnums=6)


def assert_equals_dense(
    length: int, window: int, heads: tuple[int, int], head_size: int, dtype: Any = np.float32, atol: float = 3e-6
) -> None:
    """Two rows, as a sliding layer attends and as a full one does."""
    rng, (H, K) = np.random.default_rng(length), heads
    q = rng.normal(size=(2, length, H, head_size)).astype(dtype)
    k, v = rng.normal(size=(2, 2, length, K, head_size)).astype(dtype)
    sinks, segments = rng.normal(size=H).astype(dtype), documents(2, length)
    exact = [x.astype(np.float64) for x in (q, k, v, sinks)]
    for sliding, shown in ((True, window), (False, length)):
        ours = attend(q, k, v, sinks, segments, jnp.asarray(sliding), window)
        assert ours.dtype == dtype
        expected = dense(*exact, segments, shown)
        np.testing.assert_allclose(np.asarray(ours, np.float64), expected, rtol=0, atol=atol)


@pytest.mark.parametrize(("length", "window"), [(1, 9), (100, 128), (130, 9), (600, 128), (600, 129), (600, 1000)])
def test_blocks_equal_the_dense_softmax(length: int, window: int) -> None:
    """Windows end inside a block of keys, where it ends, just behind, and behind all rows."""
    assert_equals_dense(length, window, heads=(2, 1), head_size=14)


@pytest.mark.parametrize(("heads", "head_size"), [((1, 1), 64), ((3, 3), 14), ((8, 1), 64), ((6, 2), 14)])
def test_heads_share_keys_in_groups(heads: tuple[int, int], head_size: int) -> None:
    assert_equals_dense(130, 17, heads, head_size)


def test_bfloat16_is_summed_in_float32() -> None:
    """Queries are rounded again when they are scaled, and results once."""
    assert_equals_dense(130, 9, (4, 2), 64, jnp.bfloat16, atol=2e-2)


def test_a_window_of_one_sees_the_token_alone() -> None:
    v = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 1, 4)).astype(np.float32))
    ones, segments = jnp.ones((1, 5, 1, 4)), jnp.ones((1, 5), jnp.int32)
    out = attend(ones, ones, v, jnp.array([-1e9]), segments, jnp.array(True), 1)
    np.testing.assert_allclose(out, v, rtol=1e-6)


@pytest.mark.parametrize("sliding", [False, True])
def test_a_large_sink_takes_all_weight(sliding: bool) -> None:
    one, segments = jnp.ones((1, 4, 1, 2)), jnp.ones((1, 4), jnp.int32)
    out = attend(one, one, one, jnp.array([60.0]), segments, jnp.asarray(sliding), 4)
    assert np.abs(out).max() < 1e-12


@given(length=st.integers(1, 200_000))
def test_rows_are_padded_to_whole_blocks_and_by_less_than_one(length: int) -> None:
    padded = splash.padded_length(length)
    assert all(padded % min(block, padded) == 0 for block in (splash.QUERIES, splash.KEYS, splash.KEYS_IN_WINDOW))
    assert padded % splash.LANES == 0
    assert 0 <= padded - length < (splash.LANES if length <= splash.QUERIES else splash.QUERIES)


@pytest.mark.parametrize("window", [None, 1, 9, 128, 129, 700])
@pytest.mark.parametrize("length", [1, 100, 130, 600, 2048])
def test_visited_scores_are_those_of_the_blocks_that_show_anything(length: int, window: int | None) -> None:
    S = splash.padded_length(length)
    queries, keys = min(splash.QUERIES, S), min(splash.KEYS_IN_WINDOW if window else splash.KEYS, S)
    distance = np.arange(S)[:, None] - np.arange(S)
    shown = (distance >= 0) & (distance < (window or S))
    blocks = shown.reshape(S // queries, queries, S // keys, keys).any((1, 3))
    assert splash.visited_scores(length, window) == blocks.sum() * queries * keys


def rows() -> list[Document]:
    """Three of two domains, of whose tokens about two thirds are kept."""
    rng = np.random.default_rng(1)
    return [
        Document(rng.integers(0, TINY.vocab_size, n).astype(np.int32), np.float32(rng.random(n) < 0.7), n % 2)
        for n in (100, 61, 16)
    ]


@pytest.mark.parametrize(
    ("batch", "weights"),
    [(batching.padded(rows(), 3, 128, 2), "mxfp4"), (batching.packed(rows(), 1, 190, 2, 2), "bf16")],
    ids=["padded rows, four bits", "packed documents, floats"],
)
def test_statistics_by_the_kernels_of_tpus_are_those_of_the_cpu(
    batch: Iterator[Batch], weights: str, tiny_mxfp4: Path
) -> None:
    network, (only,) = load(Checkpoint(tiny_mxfp4), "float32", form=weights), batch
    profile = jax.jit(partial(network_step, asked=Asked(swap=True)), static_argnums=2)
    theirs = profile(network, only, Placement("cpu")).statistics
    ours = profile(network, only, Placement("tpu", interpret=True)).statistics
    for name, expected in vars(theirs).items():
        atol = 1e-6 * np.abs(expected).max() if expected.dtype == jnp.float32 else 0
        np.testing.assert_allclose(getattr(ours, name), expected, rtol=0, atol=atol, err_msg=name)
    assert (np.asarray(ours.computed).sum(1) == TINY.top_k * only.tokens.count).all()
