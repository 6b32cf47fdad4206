"""Drafts that a model accepts or rejects: what comes out is what the model says alone."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from convert.hf import Checkpoint
from experiments.speculative import rule
from experiments.speculative.decoding import Reply, Speculative, _grow, scored
from gptoss_jax.config import TINY
from gptoss_jax.devices import mesh
from gptoss_jax.devices.placement import here
from gptoss_jax.generation import choose, resident
from gptoss_jax.generation.continuous import prompts_of, replies
from gptoss_jax.generation.steps import How, Network
from gptoss_jax.network import cache
from gptoss_jax.network.batch import Tokens
from gptoss_jax.network.source import Masked, Source, load
from gptoss_jax.run.forward import forward
from gptoss_jax.run.options import Placing, Sampling
from tests.oracle import relative

V = 3
GREEDY = Sampling(temperature=0.0)


def drawn(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Distributions, some of whose tokens are never drawn."""
    chances = rng.gamma(0.7, size=shape) * (rng.random(shape) > 0.2) + 1e-9
    return (chances / chances.sum(-1, keepdims=True)).astype(np.float32)


def test_one_token_is_distributed_as_the_target_says() -> None:
    """Exactly, by all ways that lead to it: q(x)·min(1, p/q) and what is drawn in the place of rejected ones."""
    rng = np.random.default_rng(1)
    pairs = [(drawn(rng, V), drawn(rng, V)) for _ in range(200)]
    pairs += [(p, p) for p, _ in pairs[:5]] + [(np.eye(V, dtype=np.float32)[i], pairs[0][1]) for i in range(V)]
    for p, q in pairs:
        stays = np.asarray(rule.accepting(jnp.array(p), jnp.array(q)), np.float64)
        rejected = 1 - (q * stays).sum()
        found = q * stays + rejected * np.asarray(rule.replacing(jnp.array(p), jnp.array(q)), np.float64)
        np.testing.assert_allclose(found, p, rtol=0, atol=1e-6)


def test_rounds_are_distributed_as_the_target_says() -> None:
    """The first three tokens of drafts of two, where every token depends on the one before it, against the exact
    probabilities; behind what is left of a draft the target goes on alone."""
    rng, draws = np.random.default_rng(2), 200_000
    target, draft = (drawn(rng, V, V).astype(np.float64) for _ in range(2))

    def draw(key: Any, chances: np.ndarray, before: Any) -> Any:
        return jax.random.categorical(key, jnp.log(jnp.array(chances))[before])

    def one(key: Any) -> Any:
        first, second, judging, *rest = jax.random.split(key, 5)
        a = draw(first, draft, 0)
        b = draw(second, draft, a)
        seen = jnp.array([0, a, b])
        judged = rule.judge(jnp.array(target)[seen][None], jnp.array(draft)[seen[:2]][None], seen[None, 1:], judging)
        own = judged.following[0]
        then = draw(rest[0], target, own)
        return jnp.array([[own, then, draw(rest[1], target, then)], [a, own, then], [a, b, own]])[judged.accepted[0]]

    said = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), draws)))
    counts = np.bincount(said @ [V * V, V, 1], minlength=V**3)
    chances = np.array([target[0, a] * target[a, b] * target[b, c] for a, b, c in product(range(V), repeat=3)])
    likely = chances * draws > 5
    assert counts[~likely].sum() <= 5 * max(1, (~likely).sum())
    expected = chances[likely] / chances[likely].sum() * counts[likely].sum()
    assert chisquare(counts[likely], expected).pvalue > 1e-3
    alone = np.array([draft[0, a] * draft[a, b] * draft[b, c] for a, b, c in product(range(V), repeat=3)])
    assert chisquare(counts[likely], alone[likely] / alone[likely].sum() * counts[likely].sum()).pvalue < 1e-9


@pytest.fixture(scope="module")
def tiny(tiny_bf16: Path) -> Source:
    return Checkpoint(tiny_bf16)


def network(source: Source) -> Network:
    return resident.load(source, "float32", mesh.make(source.config, 1, 1, jax.devices()[:1]))


def masked(source: Source) -> Source:
    """The model without three of its seven experts."""
    return Masked(source, [[layer % 3, 3, 4, 6] for layer in range(TINY.num_layers)])


@pytest.mark.slow
@pytest.mark.parametrize(("source", "length"), [("masked", 1), ("masked", 4), ("itself", 4)])
def test_greedy_replies_are_those_of_the_target_alone(source: str, length: int, tiny: Source) -> None:
    """Far past the sliding window, of prompts that are shorter and longer than it, up to a stop or the limit."""
    rng = np.random.default_rng(5)
    asked = [rng.integers(0, TINY.vocab_size, n).astype(np.int32) for n in (3, 9, 40)]
    prompts = prompts_of(asked, TINY, 60)
    prompts[1] = prompts[1]._replace(limit=9 + 33)
    placing = Placing(engine="resident", dtype="float32")
    (free, *_) = replies(choose.decoder(tiny, placing, prompts, How(TINY, GREEDY, ())), prompts)
    stops = (free[5],)  # which no other reply has
    alone = replies(choose.decoder(tiny, placing, prompts, How(TINY, GREEDY, stops)), prompts)
    target = network(tiny)
    draft = target if source == "itself" else network(masked(tiny))
    found = Speculative(target, draft, TINY, length, GREEDY).replies(prompts, stops)
    assert [reply.token_ids for reply in found] == alone
    assert [*map(len, alone)] == [6, 33, 60]
    for reply in found:
        assert 0 <= reply.accepted <= reply.judged
        if source == "itself":
            assert reply.accepted == reply.judged and reply.rounds == -(-(len(reply.token_ids) - 1) // (length + 1))
    if source == "masked":
        assert 0 < sum(r.accepted for r in found) < sum(r.judged for r in found)


def test_rejected_tokens_leave_nothing_behind(tiny: Source) -> None:
    """Tokens go through in steps of several, the last of which are others at first, as rejected drafts are: logits are
    those of the forward of all tokens at once, past the window of sliding layers."""
    rng, ahead = np.random.default_rng(7), 4
    ids = rng.integers(0, TINY.vocab_size, (2, 60)).astype(np.int32)
    positions = np.broadcast_to(np.arange(60, dtype=np.int32), ids.shape)
    expected = forward(load(tiny, "float32"), Tokens(ids, positions, np.ones_like(ids)), here()).logits
    whole, caches = (
        network(tiny),
        tuple(cache.empty(TINY, 2, 70, kind, jnp.float32, ahead) for kind in TINY.layer_types),
    )
    score = jax.jit(lambda tokens, caches: scored(whole, tokens, caches, TINY, here()))
    start, found = 0, []
    while start + ahead < 60:
        here_now = slice(start, start + ahead + 1)
        right = int(rng.integers(1, ahead + 2))
        tried = ids[:, here_now].copy()
        tried[:, right:] = rng.integers(0, TINY.vocab_size, tried[:, right:].shape)
        logits, caches = score(Tokens(tried, positions[:, here_now], np.ones_like(tried)), caches)
        found.append(logits[:, :right])
        start += right
    assert start > 5 * TINY.sliding_window
    assert relative(np.concatenate(found, 1), np.asarray(expected[:, :start])) < 1e-5


def test_replies_end_and_are_counted_where_they_end() -> None:
    """Of what a round gives, nothing behind a stop or the limit is said, judged or accepted."""
    for accepted, room, stops, said, counts in (
        (3, 9, (), [1, 2, 3, 8], (3, 3)),
        (1, 9, (), [1, 8], (2, 1)),
        (3, 9, (2,), [1, 2], (2, 2)),
        (3, 3, (), [1, 2, 3], (3, 3)),
        (0, 9, (8,), [8], (1, 0)),
    ):
        reply = Reply([0])
        _grow(reply, [1, 2, 3], accepted, 8, room, stops)
        assert (reply.token_ids[1:], (reply.judged, reply.accepted), reply.rounds) == (said, counts, 1)


@pytest.mark.newest
@pytest.mark.slow
def test_sampled_replies_of_a_draft_that_is_the_target(tiny: Source) -> None:
    """All tokens are accepted, whatever is drawn."""
    rng, target = np.random.default_rng(5), network(tiny)
    prompts = prompts_of([rng.integers(0, TINY.vocab_size, n).astype(np.int32) for n in (5, 20)], TINY, 30)
    found = Speculative(target, target, TINY, 3, replace(GREEDY, temperature=1.0)).replies(prompts, ())
    # Steps of one token and of four round otherwise: of p/q a little less than 1 may be left.
    assert sum(reply.judged - reply.accepted for reply in found) <= 1
    assert [len(reply.token_ids) for reply in found] == [30, 30]
