"""How far a model's expectations are from its teacher's, and the gradient of that. Letters: see `config`.

Logits of a vocabulary of 200,000 are large: they are made for some tokens at a time, and [T, V] never exists.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ..devices.placement import Placement
from ..evaluation.compare import Top, compare, kl_of_top, named, others, rest_of, terms
from ..network.batch import Batch
from ..network.model import unembed
from ..run.scores import Logits, expect

# Positions at once: 256 × 201,088 logits in float32 are 196 MiB. The product that leads back from logits brings the
# unembedding into another order for each block, so that small ones take longer.
BLOCK = 256


class Finals(NamedTuple):
    """A teacher as what its unembedding takes; the unembedding is the student's own."""

    final: Float[Any, "B S D"]


Teacher = Finals | Top
"""What the whole model expects behind each position: all of it, or its most probable tokens, the true one and the rest
together."""


class Loss(NamedTuple):
    """How far a student is from its teacher."""

    kl: Float[Any, " B"]
    """Σ w·KL(teacher ‖ student) of each row, in nats, w being what the predicted token counts."""
    weight: Float[Any, " B"]
    """Σ w."""


def scored(batch: Batch) -> tuple[Int[Array, "B S"], Float[Array, "B S"]]:
    """The token behind each position, which the logits there predict, and what it counts: 0 where no other token of the
    document comes."""
    following, segments, weights = (
        jnp.roll(x, -1, axis=1) for x in (batch.tokens.ids, batch.tokens.segments, batch.weights)
    )
    last = jnp.arange(batch.shape[1]) == batch.shape[1] - 1
    predicts = (batch.tokens.segments > 0) & (batch.tokens.segments == segments) & ~last[None]
    return following, jnp.where(predicts, weights, 0)


def top(final_BSD: Float[Array, "B S D"], unembedding: Float[Array, "V D"], batch: Batch, place: Placement) -> Top:
    """A teacher that keeps little: of each position [B, S, …]."""
    targets_BS, _ = scored(batch)
    vocab_size = _vocab_size(unembedding, place)
    found = compare(final_BSD[:, None], targets_BS, unembedding, None, place, vocab_size, keep_top=True).top
    assert found is not None
    return Top(*(x[:, 0] for x in found))


def distance(
    final_BSD: Float[Array, "B S D"],
    teacher: Teacher,
    unembedding: Float[Array, "V D"],
    batch: Batch,
    place: Placement,
) -> tuple[Loss, Float[Array, "B S D"]]:
    """The loss of the student with these final hidden states, and the gradient of its sum by them, float32.

    Where the vocabulary is split over devices, each has the part of the gradient that its tokens give. Blocks of
    positions that count nothing are left out.
    """
    B, S, D = final_BSD.shape
    targets_BS, weights_BS = scored(batch)
    block = min(BLOCK, B * S)
    # Those that count come first. Behind the last position stand some out of range.
    order_T = jnp.argsort(weights_BS.reshape(-1) == 0, stable=True)
    order = jnp.pad(order_T, (0, -(B * S) % block), constant_values=B * S).reshape(-1, block)

    def flat(x: Array) -> Array:
        return x.reshape(B * S, *x.shape[2:])

    beside = type(teacher)(*map(flat, teacher))
    final_TD, targets_T, weights_T = flat(final_BSD), flat(targets_BS), flat(weights_BS)

    def one_block(at_M: Array) -> tuple[Array, Array]:
        weights_M = weights_T.at[at_M].get(mode="fill", fill_value=0)

        def runs() -> tuple[Array, Array]:
            some = type(teacher)(*(x[at_M] for x in beside))
            kl_M, change_MD = _of_block(final_TD[at_M], some, targets_T[at_M], weights_M, unembedding, place)
            return jnp.where(weights_M == 0, 0, weights_M * kl_M), change_MD

        # Sums over devices stand in no branch, which some of them might not take.
        if place.expert_axis is not None:
            return runs()
        return lax.cond(weights_M[0] != 0, runs, lambda: (jnp.zeros(block), jnp.zeros((block, D))))

    kl, change = lax.map(one_block, order)
    kl_T = jnp.zeros(B * S).at[order.reshape(-1)].set(kl.reshape(-1), mode="drop")
    change_TD = jnp.zeros((B * S, D)).at[order.reshape(-1)].set(change.reshape(-1, D), mode="drop")
    return Loss(kl_T.reshape(B, S).sum(1), weights_BS.sum(1)), change_TD.reshape(B, S, D)


def _of_block(
    final_MD: Array, teacher: Teacher, targets_M: Array, weights_M: Array, unembedding: Array, place: Placement
) -> tuple[Array, Array]:
    """KL of each position, and the gradient of its weighted sum by the final hidden states: (q − goal)·U."""
    vocab_size = _vocab_size(unembedding, place)

    def expected(final_MD: Array) -> Logits:
        return expect(unembed(final_MD, unembedding), targets_M, vocab_size, place)

    student = expected(final_MD)
    if isinstance(teacher, Top):
        kl_M = kl_of_top(teacher, student, targets_M, vocab_size, place)
        goal_MV = _goal_of_top(teacher, student, targets_M, vocab_size, place)
    else:
        log_p_MV = expected(teacher.final).log_p
        kl_M = place.sum_experts(terms(log_p_MV, student.log_p).sum(-1))
        goal_MV = jnp.exp(log_p_MV)
    change_MV = weights_M[:, None] * (jnp.exp(student.log_p) - goal_MV)
    change_MV = jnp.where(weights_M[:, None] == 0, 0, change_MV)
    # Rounded to the unembedding's type, as products of a backward pass are: no two terms of them cancel any more.
    return kl_M, jnp.einsum(
        "MV,VD->MD", change_MV.astype(unembedding.dtype), unembedding, preferred_element_type=jnp.float32
    )


def _goal_of_top(base: Top, student: Logits, targets_M: Array, vocab_size: int, place: Placement) -> Array:
    """The distribution that the student is drawn to: the teacher's of the named tokens, and the student's own of the
    others, as much in sum as the teacher has there."""
    others_MV = others(student, base.ids, targets_M, vocab_size, place)
    more_M = jnp.where(base.rest > -jnp.inf, base.rest - rest_of(others_MV, place), -jnp.inf)
    named_Mn = jnp.exp(jnp.concatenate([base.log_p, base.true[:, None]], axis=-1))
    goal_MV = jnp.exp(others_MV + more_M[:, None])
    return goal_MV.at[named(base.ids, targets_M, vocab_size, place)].set(named_Mn, mode="drop")


def _vocab_size(unembedding: Array, place: Placement) -> int:
    return len(unembedding) * (1 if place.expert_axis is None else lax.axis_size(place.expert_axis))
