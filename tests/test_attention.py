"""Attention by blocks of queries against one dense softmax."""

import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.devices.placement import Placement
from gptoss_jax.network import attention


def dense(q, k, v, sinks, segments, window):
    """Section 1 of the architecture, one query at a time, in float64."""
    B, S, H, h = q.shape
    out = np.zeros((B, S, H, h))
    for b, i, head in np.ndindex(B, S, H):
        seen = [j for j in range(S) if j <= i < j + window and segments[b, i] == segments[b, j]]
        kv = head // (H // k.shape[2])
        scores = np.array([q[b, i, head] @ k[b, j, kv] for j in seen]) * h**-0.5
        weights = np.exp(scores - scores.max())
        weights /= weights.sum() + np.exp(sinks[head] - scores.max())
        out[b, i, head] = weights @ v[b, seen, kv]
    return out


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("rows_at_once", [1, 2, 4])
@pytest.mark.parametrize(("length", "window"), [(7, 3), (16, 99), (37, 5), (37, 37), (37, 12), (1, 1)])
def test_blocks_equal_the_dense_softmax(
    length: int, window: int, rows_at_once: int, differentiable: bool, monkeypatch: pytest.MonkeyPatch
):
    """Rows of documents one after the other and padding behind them, as batches are."""
    monkeypatch.setattr(attention, "BLOCK", 8)
    monkeypatch.setitem(attention.SCORES_AT_ONCE, "cpu", rows_at_once * 6 * min(8, length) ** 2)
    place = Placement("cpu", differentiable=differentiable)
    rng = np.random.default_rng(length)
    q = rng.normal(size=(4, length, 6, 4)).astype(np.float32)
    k, v = rng.normal(size=(2, 4, length, 3, 4)).astype(np.float32)
    sinks = rng.normal(size=6).astype(np.float32)
    segments = np.sort(rng.integers(1, 5, (4, length)).astype(np.int32))
    segments[segments == 4] = 0
    segments[0] = 1
    ours = attention.attend(*map(jnp.asarray, (q, k, v, sinks, segments)), jnp.asarray(window), place)
    expected = dense(q, k, v, sinks, segments, window)
    np.testing.assert_allclose(np.asarray(ours)[segments > 0], expected[segments > 0], rtol=0, atol=2e-6)
    assert np.isfinite(ours).all()


def test_a_large_sink_takes_all_weight():
    one = jnp.ones((1, 4, 1, 2))
    segments = jnp.ones((1, 4), jnp.int32)
    out = attention.attend(one, one, one, jnp.array([60.0]), segments, jnp.asarray(4), Placement("cpu"))
    assert np.abs(out).max() < 1e-12
