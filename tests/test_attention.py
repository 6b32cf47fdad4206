"""Attention by blocks of queries against one dense softmax."""

import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax import attention


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


@pytest.mark.parametrize(("length", "window"), [(7, 3), (16, 99), (37, 5), (37, 37), (1, 1)])
def test_blocks_equal_the_dense_softmax(length: int, window: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", 8 * 2 * 6 * length)  # blocks of 8 queries
    rng = np.random.default_rng(length)
    q = rng.normal(size=(2, length, 6, 4)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, length, 3, 4)).astype(np.float32)
    sinks = rng.normal(size=6).astype(np.float32)
    segments = np.sort(rng.integers(0, 3, (2, length)).astype(np.int32))
    ours = attention.attend(*map(jnp.asarray, (q, k, v, sinks, segments)), jnp.asarray(window))
    np.testing.assert_allclose(ours, dense(q, k, v, sinks, segments, window), rtol=0, atol=2e-6)


def test_a_large_sink_takes_all_weight():
    one = jnp.ones((1, 4, 1, 2))
    segments = jnp.ones((1, 4), jnp.int32)
    out = attention.attend(one, one, one, jnp.array([60.0]), segments, jnp.asarray(4))
    assert np.abs(out).max() < 1e-12
