"""What dropping an expert changes, against brute force: its logit is −∞, top-k is taken again, the layer runs again."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.hf import Checkpoint
from gptoss_jax.config import TINY, Config
from gptoss_jax.data.batching import Document, padded
from gptoss_jax.devices.placement import Placement
from gptoss_jax.network.batch import Batch
from gptoss_jax.network.experts import Experts
from gptoss_jax.network.model import GptOss
from gptoss_jax.network.moe import Further, MoE
from gptoss_jax.network.router import Routing
from gptoss_jax.network.source import load, load_part
from gptoss_jax.network.swap import coefficients, with_runner_up
from gptoss_jax.run.steps import Asked, network_step
from gptoss_jax.statistics.sums import Statistics

HERE = Placement("cpu")
SPELLINGS = {"by expert": HERE, "by piece": Placement("cpu", differentiable=True)}
TOKENS = 60
# Nothing may rest on the sizes of one configuration.
SIZES = {
    "tiny": TINY,
    "one a token": replace(TINY, top_k=1),
    "all but one": replace(TINY, top_k=6),
    "all experts": replace(TINY, top_k=7),
}


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max())
    return e / e.sum()


def gates_by_hand(logits_E: np.ndarray, k: int) -> np.ndarray:
    """float64 [E], of the best k, the lower id first; 0 for others, and for those whose logit is −∞."""
    best = [e for e in sorted(range(len(logits_E)), key=lambda e: (-logits_E[e], e))[:k] if logits_E[e] > -np.inf]
    gates = np.zeros(len(logits_E))
    if best:
        gates[best] = softmax(logits_E[best])
    return gates


def without(logits_E: np.ndarray, expert: int) -> np.ndarray:
    dropped = logits_E.copy()
    dropped[expert] = -np.inf
    return dropped


# Coefficients.


@pytest.mark.slow
@settings(max_examples=60)
@given(data=st.data(), k=st.integers(1, 5), more=st.integers(0, 3))
def test_coefficients_are_the_change_of_gates(data: st.DataObject, k: int, more: int) -> None:
    """With ties, with experts that are masked, with as many experts as a token takes, with gates near 0 and 1."""
    E = k + more
    numbers = st.one_of(st.integers(-2, 2).map(float), st.floats(-30, 30, width=32))
    logits_E = np.array(data.draw(st.lists(numbers, min_size=E, max_size=E)), np.float64)
    masked = data.draw(st.integers(0, more))
    logits_E[data.draw(st.permutations(range(E)))[:masked]] = -np.inf
    ours = all_changes(logits_E, k)
    for j in range(E):
        expected = gates_by_hand(without(logits_E, j), k) - gates_by_hand(logits_E, k)
        if gates_by_hand(logits_E, k)[j] == 0:
            expected = np.zeros(E)
        np.testing.assert_allclose(ours[j], expected, rtol=2e-5, atol=1e-12, err_msg=f"{logits_E} without {j}")


def all_changes(logits_E: np.ndarray, k: int) -> np.ndarray:
    """[E, E]: how the gates of all experts change where each is dropped."""
    E = len(logits_E)
    logits = jnp.asarray(logits_E[None], jnp.float32)
    top, experts = jax.lax.top_k(logits, k)
    chosen, logits_Tr = with_runner_up(Routing(logits, experts, jax.nn.softmax(top)))
    assert chosen[0, :k].tolist() == experts[0].tolist()
    changes = np.zeros((E + 1, E + 1))
    for j, row in zip(experts[0].tolist(), np.asarray(coefficients(logits_Tr))[0], strict=True):
        changes[j, np.asarray(chosen[0])] = row
    assert not changes[:, E].any(), "nobody enters where nobody is left"
    return changes[:E, :E]


# The mixture of a layer.


@functools.cache
def moe(config: Config) -> MoE:
    mixture, key = MoE(config, rngs=nnx.Rngs(3)), jax.random.key(4)
    # Biases are zero at the start, and routers so even that gates would hardly differ.
    mixture.router.kernel[...] = jax.random.normal(key, mixture.router.kernel.shape) / 8
    for name in ("gate_up_bias", "down_bias"):
        bias = getattr(mixture.experts, name)
        bias[...] = jax.random.normal(key, bias.shape)
    return mixture


def tied(mixture: MoE) -> MoE:
    """Experts whose logits are always equal: 1 and 4, and 2 and 5."""
    return routed(mixture, lambda kernel, bias: (kernel.at[4:6].set(kernel[1:3]), bias))


def masked(mixture: MoE) -> MoE:
    """As few experts as a token takes are left."""
    dropped = jnp.arange(TINY.num_experts - mixture.router.top_k)
    return routed(mixture, lambda kernel, bias: (kernel, bias.at[dropped].set(-jnp.inf)))


def routed(mixture: MoE, change: Callable[[Any, Any], tuple[Any, Any]]) -> MoE:
    other = nnx.clone(mixture)
    kernel, bias = change(other.router.kernel[...], other.router.bias[...])
    other.router.kernel[...], other.router.bias[...] = kernel, bias
    return other


def outputs_by_hand(experts: Experts, x: np.ndarray) -> np.ndarray:
    """float64 [T, E, D]: what every expert makes of every token."""
    w = {name: np.asarray(value, np.float64) for name, value in nnx.to_pure_dict(nnx.state(experts)).items()}
    hidden = np.einsum("ecfd,td->tecf", w["gate_up_kernel"], x) + w["gate_up_bias"]
    gate, up = np.minimum(hidden[:, :, 0], TINY.swiglu_limit), np.clip(hidden[:, :, 1], *TINY_LIMITS)
    act = (up + 1) * gate / (1 + np.exp(-TINY.swiglu_alpha * gate))
    return np.einsum("edf,tef->ted", w["down_kernel"], act) + w["down_bias"]


TINY_LIMITS = -TINY.swiglu_limit, TINY.swiglu_limit


def changes_by_hand(mixture: MoE, x: np.ndarray) -> np.ndarray:
    """float64 [T, E]: the squared norm of the change without each expert."""
    k, kernel, bias = mixture.router.top_k, *(np.asarray(p, np.float64) for p in router_of(mixture))
    # As the network ranks them: in float64 two that tie would not.
    logits_TE = np.asarray(mixture.router(jnp.asarray(x), HERE).logits_TE, np.float64)
    np.testing.assert_allclose(logits_TE, x @ kernel.T + bias, rtol=1e-4, atol=1e-4)
    outputs, changes = outputs_by_hand(mixture.experts, x.astype(np.float64)), np.zeros(logits_TE.shape)
    for t, e in np.ndindex(*changes.shape):
        gates = gates_by_hand(logits_TE[t], k)
        if gates[e]:
            other = gates_by_hand(without(logits_TE[t], e), k)
            changes[t, e] = (((other - gates) @ outputs[t]) ** 2).sum()
    return changes


def router_of(mixture: MoE) -> tuple[Any, Any]:
    return mixture.router.kernel[...], mixture.router.bias[...]


def inputs(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(3, TOKENS // 3, TINY.hidden_size)).astype(np.float32)


def run(mixture: MoE, x: Any, swap: Any, place: Placement = HERE, valid: Any = None) -> Any:
    valid = jnp.ones(x.shape[:2], bool) if valid is None else valid
    step = jax.jit(lambda m, *args: m(args[0], args[1], place, further=Further(args[2])))
    with jax.default_matmul_precision("highest"):
        return step(mixture, jnp.asarray(x), valid, swap)


@pytest.mark.parametrize("place", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("change", [lambda mixture: mixture, tied, masked], ids=["plain", "tied", "masked"])
@pytest.mark.parametrize("sizes", SIZES)
def test_changes_equal_brute_force(sizes: str, change: Any, place: Placement) -> None:
    mixture, x = change(moe(SIZES[sizes])), inputs()
    mixed = run(mixture, x, jnp.ones(x.shape[:2], bool), place)
    routing, changes_Tk = mixed.routing, mixed.changes_Tk
    expected = changes_by_hand(mixture, x.reshape(TOKENS, -1))
    ours = np.zeros(expected.shape)
    np.put_along_axis(ours, np.asarray(routing.experts_Tk), np.asarray(changes_Tk, np.float64), axis=1)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    assert (expected > 0).sum(1).tolist() == [mixture.router.top_k] * TOKENS


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("place", SPELLINGS.values(), ids=SPELLINGS)
def test_the_runner_up_changes_no_bit_of_the_rest(place: Placement, dtype: Any) -> None:
    mixture, x = moe(TINY), jnp.asarray(inputs(), dtype)
    mixture = jax.tree.map(lambda w: w.astype(dtype), mixture)
    valid = jnp.asarray(np.random.default_rng(0).random(x.shape[:2]) < 0.8)
    for swap in (valid, valid & (jnp.arange(x.shape[1]) % 2 == 0)[None]):
        plain, with_ = (run(mixture, x, asked, place, valid) for asked in (None, swap))
        assert plain[3] is None and with_[3].shape == (TOKENS, TINY.top_k)
        assert plain[2].outputs is None
        rest = with_[0], with_[1], with_[2]._replace(outputs=None)
        for ours, theirs in zip(jax.tree.leaves(rest), jax.tree.leaves(plain[:3]), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_only_tokens_that_are_asked_for_take_one_more() -> None:
    x = inputs()
    swap = jnp.arange(x.shape[1]) % 3 == 0
    outputs = run(moe(TINY), x, jnp.broadcast_to(swap[None], x.shape[:2]))[2].outputs
    ran = np.asarray(outputs.at(outputs.places_Tr) != 0).any(-1).reshape(*x.shape[:2], -1)
    assert ran[..., :-1].all() and (ran[..., -1] == np.asarray(swap)).all()


def test_a_narrow_type_rounds_outputs_alone() -> None:
    """bfloat16 has 8 bits: outputs that are rounded to it move a sum of squares by about a per cent of one of them."""
    mixture, x = moe(TINY), jnp.asarray(inputs(), jnp.bfloat16)
    narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), mixture)
    wide = jax.tree.map(lambda w: w.astype(jnp.float32), narrow)
    asked = jnp.ones(x.shape[:2], bool)
    ours, theirs = (run(m, x.astype(t), asked) for m, t in ((narrow, jnp.bfloat16), (wide, jnp.float32)))
    same = np.asarray(ours[1].experts_Tk == theirs[1].experts_Tk).all(1)
    assert same.mean() > 0.9
    np.testing.assert_allclose(ours[3][same], theirs[3][same], rtol=0.1)


@pytest.mark.parametrize("form", ["blocks", "mxfp4"])
def test_four_bits_give_what_their_floats_give(form: Any, tiny_mxfp4: Path) -> None:
    source, x = Checkpoint(tiny_mxfp4), inputs()
    asked = jnp.ones(x.shape[:2], bool)
    ours, theirs = (
        run(
            load_part(source, lambda f=f: MoE(TINY, f, rngs=nnx.Rngs(0)), jnp.float32, "layers/1/moe/"), 1000 * x, asked
        )
        for f in (form, "bf16")
    )
    np.testing.assert_allclose(ours[3], theirs[3], rtol=1e-6)


# The statistic of the whole network.


def batch() -> Batch:
    rng = np.random.default_rng(7)
    documents = [
        Document(rng.integers(0, TINY.vocab_size, n).astype(np.int32), np.float32(rng.choice([0, 1, 0.5], n)), n % 2)
        for n in (11, 16, 5)
    ]
    (made,) = padded(documents, 3, 16, num_groups=2)
    return made


def statistics(network: GptOss, asked: Asked) -> Statistics:
    step = jax.jit(functools.partial(network_step, place=HERE, asked=asked))
    found: Any = step(network, batch()).statistics
    return found


def test_sums_are_of_layers_that_ran_again(tiny_bf16: Path) -> None:
    """Each layer with each expert dropped, and nothing else changed before it, against the layer as it is."""
    network, rows = load(Checkpoint(tiny_bf16), "float32"), batch()
    step = jax.jit(lambda m, tokens: m(tokens, HERE, lambda output: output.hidden).layers)
    hidden = functools.partial(step, tokens=rows.tokens)
    weights = np.asarray(rows.weights, np.float64)
    bias = network.layers.moe.router.bias[...]
    ours = np.asarray(statistics(network, Asked(swap=True)).swap_sum)
    with jax.default_matmul_precision("highest"):
        whole = np.asarray(hidden(network), np.float64)
        for layer, expert in np.ndindex(TINY.num_layers, TINY.num_experts):
            network.layers.moe.router.bias[...] = bias.at[layer, expert].set(-jnp.inf)
            change = np.asarray(hidden(network)[layer], np.float64) - whole[layer]
            relative = weights * (change**2).sum(-1) / (whole[layer] ** 2).sum(-1)
            for group in range(2):
                expected = relative[np.asarray(rows.groups) == group].sum()
                # What stands here is a difference of float32's.
                np.testing.assert_allclose(ours[layer, group, expert], expected, rtol=2e-4, atol=1e-9)


def test_without_it_no_other_statistic_changes(tiny_bf16: Path) -> None:
    network = load(Checkpoint(tiny_bf16), "bfloat16")
    plain, with_ = (vars(statistics(network, Asked(swap=swap))) for swap in (False, True))
    assert plain.pop("swap_sum") is None and (with_.pop("swap_sum") > 0).any()
    for name, ours in with_.items():
        np.testing.assert_array_equal(ours, plain[name], err_msg=name)
