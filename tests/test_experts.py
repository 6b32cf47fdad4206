"""The grouped experts against a loop over tokens, and the statistics against a loop over pairs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax.config import TINY
from gptoss_jax.data import batching
from gptoss_jax.data.batching import Document
from gptoss_jax.devices import mesh as sharding
from gptoss_jax.devices.placement import Placement
from gptoss_jax.errors import StatisticsError
from gptoss_jax.network.batch import Batch, Tokens
from gptoss_jax.network.experts import Experts, Mixture
from gptoss_jax.network.router import Routing
from gptoss_jax.network.source import abstract
from gptoss_jax.run.steps import Asked, network_step
from gptoss_jax.statistics.sums import DECLARED, GATE_BINS, layer_statistics

HERE = Placement("cpu")
# One expert after the other, and all pieces of the worst case.
SPELLINGS = [HERE, Placement("cpu", differentiable=True)]
D, E, K = TINY.hidden_size, TINY.num_experts, TINY.top_k


@functools.cache
def experts_and_float64() -> tuple[Experts, dict[str, np.ndarray]]:
    experts = Experts(TINY, rngs=nnx.Rngs(0))
    # Biases are zero at the start, and a limit that nothing reaches would hide a clamp left out.
    experts.gate_up_bias[...] = jax.random.normal(jax.random.key(1), (E, 2, TINY.expert_hidden_size))
    experts.down_bias[...] = jax.random.normal(jax.random.key(2), (E, D))
    experts.swiglu_limit = 0.5
    state = nnx.to_pure_dict(nnx.state(experts))
    return experts, {name: np.asarray(value, np.float64) for name, value in state.items()}


def one_expert(w: dict[str, np.ndarray], e: int, x: np.ndarray) -> np.ndarray:
    gate = np.minimum(w["gate_up_kernel"][e, 0] @ x + w["gate_up_bias"][e, 0], 0.5)
    up = np.clip(w["gate_up_kernel"][e, 1] @ x + w["gate_up_bias"][e, 1], -0.5, 0.5)
    act = (up + 1) * gate / (1 + np.exp(-TINY.swiglu_alpha * gate))
    return w["down_kernel"][e] @ act + w["down_bias"][e]


def routing_of(chosen: np.ndarray, seed: int) -> Routing:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(len(chosen), E)).astype(np.float32)
    gates = np.exp(np.take_along_axis(logits, chosen, 1))
    return Routing(jnp.asarray(logits), jnp.asarray(chosen), jnp.asarray(gates / gates.sum(1, keepdims=True)))


def mixture_of(norms, peaks) -> Mixture:
    """What the experts would return; its output is no part of the statistics."""
    return Mixture(jnp.zeros((len(norms), D)), jnp.asarray(norms), jnp.asarray(peaks), jnp.ones(norms.shape, bool))


def random_choice(tokens: int, rng: np.random.Generator) -> np.ndarray:
    return np.stack([rng.permutation(E)[:K] for _ in range(tokens)]).astype(np.int32)


CHOICES = {
    "spread over all experts": lambda t, rng: random_choice(t, rng),
    "all tokens on the same experts": lambda t, rng: np.tile(np.array([5, 0, 6], np.int32), (t, 1)),
    "one expert never chosen": lambda t, rng: np.where(random_choice(t, rng) == 3, 4, random_choice(t, rng)),
}


def mixture_by_loop(weights: dict[str, np.ndarray], x: np.ndarray, routing: Routing, valid: np.ndarray) -> Mixture:
    tokens = len(x)
    output, norms, peaks = np.zeros((tokens, D)), np.zeros((tokens, K)), np.zeros((tokens, K))
    for t, j in np.ndindex(tokens, K):
        if valid[t]:
            f = one_expert(weights, int(routing.experts_Tk[t, j]), x[t].astype(np.float64))
            output[t] += float(routing.gates_Tk[t, j]) * f
            norms[t, j], peaks[t, j] = np.linalg.norm(f), np.abs(f).max()
    return Mixture(output, norms, peaks, np.tile(valid[:, None], K))


def assert_mixtures_equal(ours: Mixture, theirs: Mixture) -> None:
    np.testing.assert_allclose(ours.output_TD, theirs.output_TD, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours.norms_Tk, theirs.norms_Tk, rtol=1e-5)
    np.testing.assert_allclose(ours.peaks_Tk, theirs.peaks_Tk, rtol=1e-5)
    np.testing.assert_array_equal(ours.computed_Tk, theirs.computed_Tk)


@pytest.mark.parametrize("place", SPELLINGS, ids=["by expert", "by piece"])
@pytest.mark.parametrize("tokens", [1, 2, 53, 400])
@pytest.mark.parametrize("choice", CHOICES)
def test_grouped_experts_equal_a_loop_over_tokens(tokens: int, choice: str, place: Placement):
    rng = np.random.default_rng(tokens)
    experts, weights = experts_and_float64()
    x = rng.normal(size=(tokens, D)).astype(np.float32)
    valid = rng.random(tokens) < 0.8
    routing = routing_of(CHOICES[choice](tokens, rng), tokens)
    mixture = jax.jit(lambda e, *args: e(*args, place))(experts, jnp.asarray(x), routing, jnp.asarray(valid))
    assert_mixtures_equal(mixture, mixture_by_loop(weights, x, routing, valid))


def statistics_by_loop(
    routing: Routing, norms: np.ndarray, peaks: np.ndarray, swaps: np.ndarray, batch: Batch
) -> dict[str, np.ndarray]:
    """All that are declared: one that nothing is added to below stays 0, and is unequal to ours."""
    G = batch.num_groups
    sizes = {"G": G, "J": G, "E": E, "k": K, "b": GATE_BINS}
    s = {name: np.zeros([sizes[x] for x in statistic.axes.split()]) for name, statistic in DECLARED.items()}
    s["computed"] += K * np.bincount(batch.groups.reshape(-1), minlength=G)
    for t, w in enumerate(batch.weights.reshape(-1).astype(np.float64)):
        if w == 0:
            continue
        d = batch.groups.reshape(-1)[t]
        p = np.exp(np.asarray(routing.logits_TE[t], np.float64))
        p /= p.sum()
        s["tokens"][d] += 1
        s["router_entropy_sum"][d] -= (p * np.log(p)).sum()
        for j in range(K):
            e, g, n = int(routing.experts_Tk[t, j]), float(routing.gates_Tk[t, j]), float(norms[t, j])
            s["count"][d, e] += 1
            s["lead_count"][d, e] += j == 0
            s["gate_sum"][d, e] += w * g
            s["norm_sum"][d, e] += w * n
            s["gate_norm_sum"][d, e] += w * g * n
            s["gate_norm_sq_sum"][d, e] += w * (g * n) ** 2
            s["norm_sq_sum"][d, e] += w * n**2
            s["norm_max"][d, e] = max(s["norm_max"][d, e], n)
            s["swap_sum"][d, e] += w * swaps[t, j]
            s["activation_max"][d, e] = max(s["activation_max"][d, e], peaks[t, j])
            s["gate_rank_sum"][d, j] += g
            s["gate_histogram"][d, min(int(np.float32(g) * np.float32(GATE_BINS)), GATE_BINS - 1)] += 1
            for other in np.asarray(routing.experts_Tk[t]):
                s["coactivation"][d, e, other] += other != e
    return s


def tokens_of(shape: tuple[int, int]) -> Tokens:
    """None of them padding; what they are is no part of the statistics."""
    return Tokens(*np.zeros((2, *shape), np.int32), segments=np.ones(shape, np.int32))


@settings(max_examples=15)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 3), length=st.integers(1, 40), domains=st.integers(1, 3))
def test_statistics_equal_a_loop_over_pairs(seed: int, rows: int, length: int, domains: int):
    rng = np.random.default_rng(seed)
    shape, tokens = (rows, length), rows * length
    weights = rng.choice([0, 0, 1, 0.5, -2], shape).astype(np.float32)
    groups = rng.integers(0, domains, shape).astype(np.int32)
    batch = Batch(tokens_of(shape), weights, groups, num_groups=domains)
    routing = routing_of(random_choice(tokens, rng), seed)
    norms, peaks, swaps = rng.exponential(size=(3, tokens, K)).astype(np.float32)
    mixture = mixture_of(norms, peaks)
    ours = jax.jit(layer_statistics, static_argnums=3)(routing, mixture, batch, HERE, jnp.asarray(swaps))
    for name, expected in statistics_by_loop(routing, norms, peaks, swaps, batch).items():
        np.testing.assert_allclose(getattr(ours, name), expected, rtol=1e-5, atol=1e-5, err_msg=name)


def test_co_activations_have_groups_of_their_own():
    """Four groups of sums, two of co-activations."""
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 4, (2, 30)).astype(np.int32)
    apart = Batch(tokens_of((2, 30)), np.ones((2, 30), np.float32), groups, num_groups=4)
    routing, ones = routing_of(random_choice(60, rng), 0), jnp.ones((60, K))
    four, two = (
        layer_statistics(routing, mixture_of(ones, ones), dataclasses.replace(apart, joint=joint), HERE)
        for joint in ((), (0, 1, 1, 0))
    )
    np.testing.assert_array_equal(two.coactivation[0], four.coactivation[0] + four.coactivation[3])
    np.testing.assert_array_equal(two.coactivation[1], four.coactivation[1] + four.coactivation[2])
    np.testing.assert_array_equal(two.gate_sum, four.gate_sum)


def test_what_is_not_kept_does_not_count_even_where_it_is_no_number():
    shape = (1, 8)
    weights = np.array([[0, 1] * 4], np.float32)
    batch = Batch(tokens_of(shape), weights, np.zeros(shape, np.int32))
    logits, experts, gates = routing_of(random_choice(8, np.random.default_rng(0)), 0)
    broken = np.where(weights.reshape(-1, 1) == 0, np.float32(np.nan), np.float32(0))
    routing = Routing(logits + broken, experts, gates + broken)
    ones = jnp.ones((8, K)) + broken
    ours = layer_statistics(routing, mixture_of(ones, ones), batch, HERE, ones)
    assert all(np.isfinite(value).all() for value in vars(ours).values())
    assert ours.tokens.tolist() == [4]  # all are in one group where nothing else is said


def host_statistics(seed: int):
    rng = np.random.default_rng(seed)
    batch = Batch(tokens_of((2, 30)), np.ones((2, 30), np.float32), np.zeros((2, 30), np.int32))
    norms, peaks, swaps = rng.exponential(size=(3, 60, K)).astype(np.float32)
    routing, mixture = routing_of(random_choice(60, rng), seed), mixture_of(norms, peaks)
    step = layer_statistics(routing, mixture, batch, HERE, jnp.asarray(swaps))
    return jax.tree.map(lambda x: x[None], step).to_host()


def test_merging_is_addition_in_any_grouping():
    a, b, c = map(host_statistics, range(3))
    left, right = a.merge(b).merge(c), c.merge(b.merge(a))
    for name, value in vars(left).items():
        np.testing.assert_allclose(value, getattr(right, name), rtol=1e-15)
        reduce = np.max if DECLARED[name].largest else np.sum
        np.testing.assert_allclose(value, reduce([getattr(s, name) for s in (a, b, c)], axis=0), rtol=1e-15)
    assert left.count.dtype == np.int64 and left.gate_sum.dtype == np.float64


def test_means_of_experts_never_chosen_are_zero():
    one = host_statistics(0)
    empty = dataclasses.replace(one, count=one.count * 0, gate_sum=one.gate_sum * 0).total()
    assert (empty.means()["gate_mean"] == 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_statistic_that_is_not_finite_names_layer_and_expert(value: float):
    statistics = host_statistics(0)
    bad = statistics.norm_sum.copy()
    bad[0, 0, 5] = value
    with pytest.raises(StatisticsError, match=r"layer 0, expert 5 "):
        dataclasses.replace(statistics, norm_sum=bad).check_finite()


def test_no_copy_of_all_experts_is_made() -> None:
    """In bfloat16, of which the compiler for CPU takes no slices: float32 of all would be twice the weights."""
    config = dataclasses.replace(TINY, hidden_size=256, expert_hidden_size=256, num_experts=16)
    network = abstract(config, sharding.make(config, 1, 1, jax.devices()[:1]), jnp.bfloat16)
    (batch,) = batching.padded([Document(np.ones(64, np.int32), np.ones(64, np.float32))], 1, 64)
    step = jax.jit(functools.partial(network_step, place=HERE, asked=Asked())).lower(network, batch).compile()
    sizes = {path.rpartition("/")[2]: x.size for path, x in sharding.by_path(network).items()}
    all_experts = sizes["gate_up_kernel"] + sizes["down_kernel"]
    assert step.memory_analysis().temp_size_in_bytes < all_experts  # of 4 bytes each in float32
