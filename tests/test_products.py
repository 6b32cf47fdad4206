"""Products of all experts' outputs, against what every expert makes of every token."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.hf import Checkpoint
from gptoss_jax.config import TINY
from gptoss_jax.devices.placement import Placement
from gptoss_jax.network import products
from gptoss_jax.network.moe import Further, Mixed, MoE
from gptoss_jax.network.products import pairs
from gptoss_jax.network.source import load_part

from .test_swap import HERE, SIZES, SPELLINGS, TOKENS, inputs, moe, outputs_by_hand

FIRST, SECOND = pairs(TINY.num_experts)


def run(mixture: MoE, x: Any, wanted: Any, place: Placement = HERE) -> Mixed:
    step = jax.jit(lambda m, x, valid, wanted: m(x, valid, place, further=Further(products_BS=wanted)))
    with jax.default_matmul_precision("highest"):
        return step(mixture, jnp.asarray(x), jnp.ones(x.shape[:2], bool), wanted)


@pytest.mark.parametrize("blocks", [(960, 64), (7, 3), (20, 20)], ids=["one", "that do not divide", "that do"])
@pytest.mark.parametrize("place", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("sizes", SIZES)
def test_they_are_those_of_all_outputs(
    sizes: str, place: Placement, blocks: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture, x = moe(SIZES[sizes]), inputs()
    monkeypatch.setattr(products, "OUTPUTS", blocks[0] * len(mixture.experts.down_bias[...]))
    monkeypatch.setattr(products, "MULTIPLIED", blocks[1])
    found = run(mixture, x, jnp.ones(x.shape[:2], bool), place).products_TP
    outputs = outputs_by_hand(mixture.experts, x.reshape(TOKENS, -1).astype(np.float64))
    expected = np.einsum("TPD,TPD->TP", outputs[:, FIRST], outputs[:, SECOND])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_those_of_some_experts_and_of_a_vector_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks that do not divide the tokens."""
    monkeypatch.setattr(products, "OUTPUTS", 7 * 3)
    monkeypatch.setattr(products, "MULTIPLIED", 3)
    mixture, x, kept = moe(TINY), inputs().reshape(TOKENS, -1), np.array([1, 2, 6])
    beside = np.random.default_rng(1).normal(size=(TOKENS, 1, x.shape[1])).astype(np.float32)
    wanted = np.arange(TOKENS) % 3 != 0

    @jax.jit
    def run(experts: Any, *of_tokens: Any) -> Any:
        only_N, (x_TD, wanted_T, beside_TbD) = jnp.asarray(kept), of_tokens
        return products.products(experts, x_TD, wanted_T, TINY.num_experts, HERE, only_N=only_N, beside_TbD=beside_TbD)

    with jax.default_matmul_precision("highest"):
        found = run(mixture.experts, x, wanted, beside)
    outputs = outputs_by_hand(mixture.experts, x.astype(np.float64))[:, kept]
    vectors = np.concatenate([outputs, beside], axis=1)
    first, second = pairs(4)
    expected = np.where(wanted[:, None], np.einsum("TPD,TPD->TP", vectors[:, first], vectors[:, second]), 0)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_only_tokens_that_are_wanted_have_some() -> None:
    x = inputs()
    wanted = jnp.broadcast_to((jnp.arange(x.shape[1]) % 3 == 0)[None], x.shape[:2])
    some, all_ = (run(moe(TINY), x, asked).products_TP for asked in (wanted, jnp.ones_like(wanted)))
    flat = np.asarray(wanted).reshape(-1)
    np.testing.assert_array_equal(np.asarray(some)[flat], np.asarray(all_)[flat])
    assert not np.asarray(some)[~flat].any()


@pytest.mark.parametrize("every", [1, 3])
def test_they_change_no_bit_of_the_rest(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether all tokens are wanted or some, also where they run in several blocks."""
    monkeypatch.setattr(products, "OUTPUTS", 40 * TINY.num_experts)
    monkeypatch.setattr(products, "MULTIPLIED", 8)
    x = inputs()
    wanted = jnp.broadcast_to((jnp.arange(x.shape[1]) % every == 0)[None], x.shape[:2])
    plain, with_ = (run(moe(TINY), x, asked) for asked in (None, wanted))
    assert plain.products_TP is None
    for ours, theirs in zip(jax.tree.leaves(with_[:3]), jax.tree.leaves(plain[:3]), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("form", ["blocks", "mxfp4"])
def test_four_bits_give_what_their_floats_give(form: Any, tiny_mxfp4: Path) -> None:
    source, x = Checkpoint(tiny_mxfp4), 1000 * inputs()
    ours, theirs = (
        run(
            load_part(source, lambda f=f: MoE(TINY, f, rngs=nnx.Rngs(0)), jnp.float32, "layers/1/moe/"),
            x,
            jnp.ones(x.shape[:2], bool),
        ).products_TP
        for f in (form, "bf16")
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())
