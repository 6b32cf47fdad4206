"""How models expect the scored tokens, and how far they are from a baseline. Letters: see `config`.

Logits of a vocabulary of 200,000 are large: they are made for some tokens at a time, for one variant after the other.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from ..devices import mesh as sharding
from ..devices.placement import Placement, over
from ..network.model import unembed
from ..run.scores import UNEMBED_BLOCK, Logits, expect, log_p_of
from ..run.steps import float32_is_float32

TOP = 64  # of a stored baseline's most probable tokens so many have their own probability


class Expected(NamedTuple):
    """Of each token and variant; what is behind `best` is None where nobody asks for it."""

    nats: Float[Array, "*any"]
    """−ln p of the true token."""
    entropy: Float[Array, "*any"]
    """Of the top 20 logits, renormalised, over ln 20."""
    best: Int[Array, "*any"]
    """The most probable token."""
    kl: Float[Array, "*any"] | None = None
    """KL(baseline ‖ variant), in nats."""
    top: "Top | None" = None


class Top(NamedTuple):
    """What is kept of a baseline: its most probable tokens, best first, the true one, and the rest together."""

    ids: Int[Any, "*any top"]
    log_p: Float[Any, "*any top"]
    true: Float[Any, "*any"]
    """ln p of the true token."""
    rest: Float[Any, "*any"]
    """ln of the probability of all tokens but these; −∞ where there are no others."""


class Other(NamedTuple):
    """Another model as the baseline: what its unembedding takes, and that."""

    finals: Float[Any, "B N D"]
    unembedding: Float[Any, "V D"]


Baseline = Other | Top | None
"""None is the first variant."""


def compare(
    finals_BvND: Float[Array, "B v N D"],
    targets_BN: Int[Array, "B N"],
    unembedding: Float[Array, "V D"],
    baseline: Baseline,
    place: Placement,
    vocab_size: int,
    keep_top: bool = False,
) -> Expected:
    """What is expected at each scored position, [B, v, N]: of every variant, against the baseline.

    The vocabulary may be split over devices. With `keep_top` there is no baseline, and the TOP tokens are returned.
    """
    B, v, N, _ = finals_BvND.shape
    block = min(UNEMBED_BLOCK, B * N)
    padding = -(B * N) % block

    def blocks(x: Array) -> Array:
        flat = x.reshape(B * N, *x.shape[2:])
        return jnp.pad(flat, [(0, padding)] + [(0, 0)] * (flat.ndim - 1)).reshape(-1, block, *flat.shape[1:])

    def one_block(inputs: tuple[Array, Array, Any]) -> Expected:
        finals_MvD, targets_M, base = inputs

        def expected(finals_MD: Array, head_VD: Array = unembedding) -> Logits:
            return expect(unembed(finals_MD, head_VD), targets_M, vocab_size, place)

        def one(log_p_MV: Array, at: tuple[Array, Array]) -> tuple[Array, Expected]:
            number, finals_MD = at
            logits = expected(finals_MD)
            found = Expected(-logits.true, logits.entropy, logits.best)
            if keep_top:
                return log_p_MV, found._replace(top=_top(logits, targets_M, vocab_size, place))
            if isinstance(baseline, Top):
                return log_p_MV, found._replace(kl=kl_of_top(Top(*base), logits, targets_M, vocab_size, place))
            if baseline is None:
                log_p_MV = jnp.where(number == 0, logits.log_p, log_p_MV)  # the first is that of the others
            return log_p_MV, found._replace(kl=place.sum_experts(terms(log_p_MV, logits.log_p).sum(-1)))

        if isinstance(baseline, Other):
            start = expected(base, baseline.unembedding).log_p
        else:
            start = jnp.zeros((block, place.local(vocab_size)[1]), jnp.float32)
        return lax.scan(one, start, (jnp.arange(v), jnp.moveaxis(finals_MvD, 1, 0)))[1]

    beside = None if baseline is None else baseline.finals if isinstance(baseline, Other) else tuple(baseline)
    found = lax.map(
        one_block, (blocks(jnp.moveaxis(finals_BvND, 1, 2)), blocks(targets_BN), jax.tree.map(blocks, beside))
    )

    def whole(x: Array) -> Array:  # [blocks, v, block, …] → [B, v, N, …]
        by_variant = jnp.moveaxis(x, 1, 0).reshape(v, -1, *x.shape[3:])[:, : B * N]
        return jnp.moveaxis(by_variant.reshape(v, B, N, *x.shape[3:]), 0, 1)

    return jax.tree.map(whole, found)


def _top(logits: Logits, targets_M: Array, vocab_size: int, place: Placement) -> Top:
    """The most probable tokens of all devices' parts of the vocabulary."""
    first, count = place.local(vocab_size)
    values, ids = lax.top_k(logits.log_p, min(TOP, count))
    values, ids = place.gather_experts(values), place.gather_experts(ids + first)
    values, order = lax.top_k(values, min(TOP, vocab_size))
    ids = jnp.take_along_axis(ids, order, axis=-1)
    return Top(ids, values, logits.true, rest_of(others(logits, ids, targets_M, vocab_size, place), place))


def others(logits: Logits, ids: Array, targets_M: Array, vocab_size: int, place: Placement) -> Float[Array, "M V"]:
    """ln p of all tokens but some, of which the true one is one; −∞ of these."""
    return logits.log_p.at[named(ids, targets_M, vocab_size, place)].set(-jnp.inf, mode="drop")


def named(ids: Array, targets_M: Array, vocab_size: int, place: Placement) -> tuple[Array, Array]:
    """Where some tokens and the true one, which may be one of them, stand in an array [M, V] of this device; out of its
    range for those of others."""
    first, count = place.local(vocab_size)
    some = jnp.concatenate([ids, targets_M[:, None]], axis=-1)
    return jnp.arange(len(some))[:, None], jnp.where(some >= first, some - first, count)


def rest_of(others_MV: Float[Array, "M V"], place: Placement) -> Float[Array, " M"]:
    """ln of the probability of these tokens together. (1 less that of the others would lose its digits.)"""
    largest_M = place.max_experts(others_MV.max(-1))
    largest_M = jnp.where(largest_M > -jnp.inf, largest_M, 0)  # where there are none
    return largest_M + jnp.log(place.sum_experts(jnp.exp(others_MV - largest_M[:, None]).sum(-1)))


def kl_of_top(base: Top, logits: Logits, targets_M: Array, vocab_size: int, place: Placement) -> Array:
    """KL of the distributions over the named tokens and the rest, which is at most that over all tokens."""
    there = log_p_of(logits.log_p, base.ids, vocab_size, place)
    rest = rest_of(others(logits, base.ids, targets_M, vocab_size, place), place)
    is_named = (base.ids == targets_M[:, None]).any(-1)
    true = jnp.where(is_named, 0, terms(base.true, logits.true))
    return terms(base.log_p, there).sum(-1) + true + terms(base.rest, rest)


def terms(log_p: Array, log_q: Array) -> Array:
    """p·ln(p/q) − p + q, whose sum over all tokens is the divergence; 0 where p and q are.

    Both distributions have the sum 1, so that −p + q adds nothing. No term is negative, and what rounding of their
    normalisation moves all of log_p − log_q by, cancels: near the baseline that would be most of the result."""
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    d = jnp.where(p > 0, log_p - log_q, 0)
    # Where d is small, the rest of the series of p·(d + exp(−d) − 1) is below its rounding.
    near = d**2 * (1 / 2 - d * (1 / 6 - d / 24))
    return jnp.where(jnp.abs(d) < 0.03, jnp.where(p > 0, p * near, q), p * d - p + q)


@cache
def mapped(mesh: Mesh, vocab_size: int, baseline: Any, keep_top: bool = False) -> Callable[..., Expected]:
    """`compare` over a mesh, jitted: rows and the vocabulary are split. `baseline` is the class of what there will be;
    the function takes finals, targets, the unembedding and the baseline."""
    place, rows, vocabulary = over(mesh), sharding.split("B"), sharding.split("V D")
    kind = {Other: Other(rows, vocabulary), Top: Top(rows, rows, rows, rows)}.get(baseline)
    run = partial(compare, place=place, vocab_size=vocab_size, keep_top=keep_top)
    local = float32_is_float32(run)
    split = jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, vocabulary, kind), out_specs=rows, check_vma=False)
    return jax.jit(split)
