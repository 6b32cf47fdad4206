"""Elimination by the layer's loss, against sets that really run."""

from collections.abc import Sequence
from functools import partial
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.network.products import pairs
from gptoss_jax.selection.greedy import Aim, Grams, eliminate, loss, losses_without, weighted

E, D = 8, 16


def case(seed: int, tokens: int = 60) -> tuple[Grams, np.ndarray]:
    """What choosing needs to know of made-up tokens, and their experts' outputs, [T, E, D]."""
    rng = np.random.default_rng(seed)
    likes = 2 * rng.normal(size=(4, E))  # kinds of tokens, which like some experts
    logits = likes[rng.integers(0, 4, tokens)] + rng.normal(size=(tokens, E))
    # Experts say partly the same, and some of them loudly.
    outputs = rng.normal(size=(tokens, 1, D)) + rng.normal(size=(tokens, E, D)) * rng.lognormal(0, 0.7, (E, 1))
    first, second = pairs(E)
    products = np.einsum("TPD,TPD->TP", outputs[:, first], outputs[:, second])
    weights = rng.uniform(0.1, 2, tokens)
    arrays = (jnp.asarray(x, jnp.float32) for x in (logits, products, weights, rng.uniform(0, 2, tokens)))
    return Grams(*arrays, jnp.asarray(np.arange(tokens) % 2)), outputs


def mixed(logits: np.ndarray, outputs: np.ndarray, kept: tuple[int, ...], top_k: int) -> np.ndarray:
    """The layer's output in float64, [T, D], where these experts alone are there: token by token."""
    found = []
    for scores, given in zip(logits, outputs, strict=True):
        chosen = sorted(kept, key=lambda e: -scores[e])[:top_k]
        gates = np.exp(scores[chosen] - scores[chosen].max())
        found.append(gates / gates.sum() @ given[chosen])
    return np.array(found)


def brute(grams: Grams, outputs: np.ndarray, kept: tuple[int, ...], top_k: int) -> float:
    logits, weights = (np.asarray(x, np.float64) for x in (grams.logits_TE, grams.weights_T))
    change = mixed(logits, outputs, tuple(range(E)), top_k) - mixed(logits, outputs, kept, top_k)
    return float((weights * (change**2).sum(1)).sum())


def only(kept: tuple[int, ...]) -> jnp.ndarray:
    return jnp.asarray(np.isin(np.arange(E), kept))


@pytest.mark.parametrize("top_k", [1, 3, 8])
@pytest.mark.parametrize("kept", [(0, 1, 2, 3, 4, 5, 6), (1, 4, 5, 7), (2, 6), (5,)])
def test_the_loss_is_that_of_the_layer(kept: tuple[int, ...], top_k: int) -> None:
    """Also where fewer are left than a token takes."""
    grams, outputs = case(0)
    assert float(loss(grams, only(kept), top_k)) == pytest.approx(brute(grams, outputs, kept, top_k), rel=1e-5)


def test_all_experts_lose_nothing() -> None:
    grams, _ = case(1)
    assert float(loss(grams, jnp.ones(E, bool), 3)) == 0


def test_tokens_without_weight_do_not_count() -> None:
    grams, _ = case(2)
    half = grams._replace(weights_T=grams.weights_T.at[30:].set(0))
    alone = Grams(*(x[:30] for x in grams))
    assert eliminate(half, 3, 2, Aim((1, 1))).gone == eliminate(alone, 3, 2, Aim((1, 1))).gone
    assert float(loss(half, only((1, 2)), 3)) == pytest.approx(float(loss(alone, only((1, 2)), 3)), rel=1e-6)


def test_tokens_count_by_how_far_they_are_turned() -> None:
    grams, outputs = case(7)
    assert weighted(grams, "greedy") is grams
    turned, kept = weighted(grams, "greedy_cosine"), (1, 4, 6)
    change = mixed(np.asarray(grams.logits_TE), outputs, tuple(range(E)), 3)
    change -= mixed(np.asarray(grams.logits_TE), outputs, kept, 3)
    expected = sum(w * u * (c @ c) for w, u, c in zip(grams.weights_T, grams.turns_T, change, strict=True))
    assert float(loss(turned, only(kept), 3)) == pytest.approx(float(expected), rel=1e-5)


def test_each_step_takes_the_cheapest_and_its_losses_are_those_of_the_sets() -> None:
    grams, outputs = case(3)
    found = eliminate(grams, 3, 2, Aim((1, 1)))
    assert len(found.gone) == len(found.losses) == E - 2
    for number in range(E - 1, 1, -1):
        before, after = found.kept(E, number + 1), found.kept(E, number)
        costs = {e: brute(grams, outputs, tuple(x for x in before if x != e), 3) for e in before}
        assert {*before} - {*after} == {min(costs, key=costs.__getitem__)}
        assert found.losses[E - number - 1] == pytest.approx(min(costs.values()), rel=1e-5)
    assert found.kept(E, E) == tuple(range(E))


def test_of_equal_experts_the_highest_goes() -> None:
    ones = jnp.ones(5)
    grams = Grams(jnp.zeros((5, E)), jnp.ones((5, len(pairs(E)[0]))), ones, ones, jnp.zeros(5, int))
    assert eliminate(grams, 2, 5).gone == (7, 6, 5)


@pytest.mark.parametrize("top_k", [1, 3, 7, 8])
@pytest.mark.parametrize("kept", [range(E), (0, 1, 3, 4, 6), (2, 5)])
def test_what_each_going_costs_is_the_loss_without_it(kept: Sequence[int], top_k: int) -> None:
    """By domain, though only the tokens that have chosen an expert are looked at."""
    grams, _ = case(4)
    found = losses_without(grams, only(tuple(kept)), top_k, 2)
    for domain in range(2):
        own = grams._replace(weights_T=jnp.where(grams.domains_T == domain, grams.weights_T, 0))
        for expert in kept:
            left = tuple(other for other in kept if other != expert)
            assert float(found[expert, domain]) == pytest.approx(float(loss(own, only(left), top_k)), rel=1e-5)


def test_down_to_one_expert() -> None:
    grams, outputs = case(5)
    found = eliminate(grams, 3, aim=Aim((1, 1)))
    assert len({*found.gone}) == E - 1
    assert found.losses[-1] == pytest.approx(brute(grams, outputs, found.kept(E, 1), 3), rel=1e-5)


def test_domains_count_by_their_factors_or_the_worst_decides() -> None:
    grams, outputs = case(6)
    of_domains = [grams._replace(weights_T=jnp.where(grams.domains_T == d, grams.weights_T, 0)) for d in range(2)]
    kept = (0, 2, 3, 6)
    own = [brute(one, outputs, kept, 2) for one in of_domains]
    assert Aim((3, 0.5)).of(np.array([own]))[0] == pytest.approx(3 * own[0] + own[1] / 2)
    assert Aim((3, 0.5), largest=True).of(np.array([own]))[0] == pytest.approx(max(3 * own[0], own[1] / 2))
    assert eliminate(grams, 2, aim=Aim((1, 0))).gone == eliminate(of_domains[0], 2, aim=Aim((1, 1))).gone
    worst = eliminate(grams, 2, 4, Aim((1, 1), largest=True))
    found = [brute(one, outputs, worst.kept(E, 4), 2) for one in of_domains]
    assert worst.losses[-1] == pytest.approx(max(found), rel=1e-5)


def reap(grams: Grams, outputs: np.ndarray, top_k: int, number: int) -> tuple[int, ...]:
    """The experts with the highest mean of gate × norm over the tokens that chose them."""
    logits = np.asarray(grams.logits_TE)
    chosen = np.argsort(-logits, axis=1)[:, :top_k]
    is_chosen = np.zeros(logits.shape, bool)
    np.put_along_axis(is_chosen, chosen, True, 1)
    gates = np.where(is_chosen, np.exp(logits), 0)
    score = (gates / gates.sum(1, keepdims=True) * np.linalg.norm(outputs, axis=2)).sum(0) / is_chosen.sum(0).clip(1)
    return tuple(sorted(np.argsort(-score)[:number].tolist()))


def test_it_is_near_the_best_set_and_no_worse_than_scores() -> None:
    """200 random layers of 8 experts, half of which stay: every set is tried."""
    sets = [*combinations(range(E), 4)]
    every = jnp.stack([only(kept) for kept in sets])
    losses = jax.jit(jax.vmap(partial(loss, top_k=2), (None, 0)))
    near = worse = 0
    for seed in range(200):
        grams, outputs = case(1000 + seed, tokens=40)
        found, of_sets = eliminate(grams, 2, 4, Aim((1, 1))).losses[-1], np.asarray(losses(grams, every))
        assert found >= of_sets.min() * (1 - 1e-5)
        near += found <= 1.05 * of_sets.min()
        worse += found > of_sets[sets.index(reap(grams, outputs, 2, 4))] * (1 + 1e-5)
    assert near >= 190 and worse == 0
