"""Gradients of what is small, made by hand, against those of the plain operations, for every form of the weights."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptoss_jax.config import TINY, Form
from gptoss_jax.devices.placement import Placement
from gptoss_jax.kernels import grouped
from gptoss_jax.network.attention import attend, attend_backward
from gptoss_jax.network.experts import Experts
from gptoss_jax.network.router import Routing

from .oracle import relative

HERE, PLAIN = Placement("cpu"), Placement("cpu", differentiable=True)
E, D, K = TINY.num_experts, TINY.hidden_size, TINY.top_k
TOKENS = 61
BIASES = ("gate_up_bias", "down_bias")


def experts_of(form: Form) -> Experts:
    """Random bytes, whose scales give weights near 0.02, or floats."""
    experts, rng = Experts(TINY, form, rngs=nnx.Rngs(0)), np.random.default_rng(0)
    for name, parameter in vars(experts).items():
        if name.endswith(("_packed", "_blocks")):
            parameter[...] = rng.integers(0, 256, parameter.shape, np.uint8)
        elif name.endswith(("_scales", "_exponents")):
            parameter[...] = rng.integers(119, 122, parameter.shape, np.uint8)
        elif name in BIASES:
            parameter[...] = rng.normal(size=parameter.shape).astype(np.float32) * 0.1
    return experts


def inputs() -> dict[str, Any]:
    """Tokens of which some are padding, and experts of which one is never chosen."""
    rng = np.random.default_rng(1)
    chosen = np.stack([rng.permutation(E - 1)[:K] for _ in range(TOKENS)]).astype(np.int32)
    gates = rng.dirichlet(np.ones(K), TOKENS).astype(np.float32)
    return {
        "x": rng.normal(size=(TOKENS, D)).astype(np.float32),
        "routing": Routing(jnp.zeros((TOKENS, E)), jnp.asarray(chosen), jnp.asarray(gates)),
        "valid": rng.random(TOKENS) < 0.8,
        "change": rng.normal(size=(TOKENS, D)).astype(np.float32),
    }


def gradients(experts: Experts, place: Placement, dtype: Any = jnp.float32) -> dict[str, np.ndarray]:
    """By x, gates and biases, of the product of the output and a fixed array."""
    given = inputs()

    def product(x: jax.Array, gates: jax.Array, biases: dict[str, jax.Array]) -> jax.Array:
        graph, state = nnx.split(experts)
        merged = nnx.merge(graph, state)
        for name, bias in biases.items():
            setattr(merged, name, nnx.Param(bias))
        mixture = merged(x.astype(dtype), given["routing"]._replace(gates_Tk=gates), jnp.asarray(given["valid"]), place)
        return (mixture.output_TD * given["change"]).sum()

    biases = {name: getattr(experts, name)[...] for name in BIASES}
    of_x, of_gates, of_biases = jax.jit(jax.grad(product, (0, 1, 2)))(given["x"], given["routing"].gates_Tk, biases)
    return {"x": of_x, "gates": of_gates, **of_biases}


@functools.cache
def by_plain_operations(form: Form) -> dict[str, np.ndarray]:
    if form == "bf16":
        return gradients(experts_of(form), PLAIN)
    experts, plain = experts_of(form), experts_of("bf16")
    for name in BIASES:
        setattr(plain, name, getattr(experts, name))
    for name, shape in (("gate_up", (E, 2, -1, D)), ("down", (E, D, -1))):
        weights, _ = experts.weights(name, jnp.float32, None)
        array = weights.array.swapaxes(1, 2) if weights.inputs_first else weights.array
        setattr(plain, f"{name}_kernel", nnx.Param(array.reshape(shape)))
    return gradients(plain, PLAIN)


@pytest.mark.slow
@pytest.mark.parametrize("by_expert", [True, False])
@pytest.mark.parametrize("form", ["bf16", "blocks", "mxfp4"])
def test_of_experts(form: Form, by_expert: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One expert after the other, or pieces of two tiles of any."""
    if not by_expert:
        several = grouped.Kernel(8, 2, grouped._each_with_its_own)
        monkeypatch.setattr(grouped, "choose", lambda *_, **__: several)
    ours = gradients(experts_of(form), HERE)
    monkeypatch.undo()
    for name, theirs in by_plain_operations(form).items():
        assert relative(ours[name], theirs) < 1e-5, name
    assert not ours["x"][~inputs()["valid"]].any()
    assert not ours["down_bias"][E - 1].any()  # of the expert that nobody chose


@pytest.mark.parametrize("form", ["bf16", "blocks"])
def test_of_experts_in_bfloat16(form: Form) -> None:
    """In the mean: where a value is near the clamp's edge, rounding takes it to the other side."""
    ours = gradients(experts_of(form), HERE, jnp.bfloat16)
    for name, theirs in by_plain_operations(form).items():
        assert np.linalg.norm(ours[name] - theirs) < 0.03 * np.linalg.norm(theirs), name


@pytest.mark.parametrize("window", [5, 1000])
@pytest.mark.parametrize("length", [40, 300])
def test_of_attention(length: int, window: int) -> None:
    """Rows of two documents and padding, of one block or of several."""
    rng = np.random.default_rng(length)
    shapes = {"q": (2, length, 6, 8), "k": (2, length, 3, 8), "v": (2, length, 3, 8)}
    sequences = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes.values()]
    sinks, change = jnp.asarray(rng.normal(size=6), jnp.float32), jnp.asarray(rng.normal(size=shapes["q"]), jnp.float32)
    segments = np.ones((2, length), np.int32)
    segments[0, length // 3 :], segments[1, -length // 4 :] = 2, 0
    change *= (segments > 0)[..., None, None]  # nobody asks what stands in padding

    def plain(*arrays: jax.Array) -> jax.Array:
        return (attend(*arrays, jnp.asarray(segments), jnp.asarray(window), PLAIN) * change).sum()

    theirs = jax.jit(jax.grad(plain, (0, 1, 2, 3)))(*sequences, sinks)
    ours = jax.jit(functools.partial(attend_backward, place=HERE))(
        *sequences, sinks, jnp.asarray(segments), jnp.asarray(window), change
    )
    for name, mine, other in zip([*shapes, "sinks"], ours, theirs, strict=True):
        assert relative(mine, other) < 1e-5, name
