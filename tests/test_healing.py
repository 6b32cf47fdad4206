"""Distillation: its loss against plain formulas, its gradients against transformers' and between engines."""

import dataclasses
import re
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from convert.hf import Checkpoint
from convert.mapping import all_tensors
from gptoss_jax.config import TINY
from gptoss_jax.data.batching import Document, packed, padded
from gptoss_jax.devices import mesh as sharding
from gptoss_jax.devices.placement import here
from gptoss_jax.evaluation.compare import TOP, Top
from gptoss_jax.healing import loss, resident, streamed, trained, training
from gptoss_jax.healing.engine import Engine
from gptoss_jax.healing.loss import Finals, distance, scored, top
from gptoss_jax.healing.resident import Resident
from gptoss_jax.healing.streamed import Streamed
from gptoss_jax.network.batch import Batch
from gptoss_jax.network.model import Layer
from gptoss_jax.network.source import abstract, abstract_part, load
from gptoss_jax.run.distilling import Distilling
from tests import oracle
from tests.oracle import relative

L, E, D, V = TINY.num_layers, TINY.num_experts, TINY.hidden_size, TINY.vocab_size
KEPT = [sorted(np.random.default_rng(layer).permutation(E)[:4].tolist()) for layer in range(L)]
LENGTHS = (24, 17, 9, 21)
SMALL = "small"
# What makes a student of small random weights expect something: what of it, by our and transformers' names. Powers of
# two are no rounding.
STRONGER = {"final_norm/scale": ("model.norm.weight", 16.0), "experts/down_bias": ("down_proj_bias", 8.0)}


def rows() -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens and what each counts."""
    rng = np.random.default_rng(5)
    return [
        (rng.integers(0, V, n).astype(np.int32), np.float32(rng.choice([0, 1, 0.5], n, p=[0.4, 0.4, 0.2])))
        for n in LENGTHS
    ]


def with_kept(batch: Batch) -> Batch:
    kept_LE = np.array([np.isin(np.arange(E), kept) for kept in KEPT])
    return dataclasses.replace(batch, kept=np.tile(kept_LE, (batch.shape[0], 1, 1)))


def batches() -> list[Batch]:
    """Two rows each, behind which there is padding."""
    return [with_kept(batch) for batch in padded([Document(*row) for row in rows()], 2, 24)]


def engine(which: str, folder: Path, dtype: str, kind: Any) -> Engine:
    source = Checkpoint(folder)
    if which == "streamed":
        return Streamed(source, dtype, kind)
    one = sharding.make(source.config, 1, 1)
    return Resident(load(source, dtype, one), one, kind)


@cache
def found(which: str, folder: Path, dtype: str = "float32", kind: Any = Finals) -> Any:
    """The loss, what counts, and gradients, and the loss of each row."""
    runs = engine(which, folder, dtype, kind)
    assert isinstance(runs, Engine)
    teachers = runs.teach(batches())
    given = {
        path: x * next((factor for end, (_, factor) in STRONGER.items() if path.endswith(end)), 1)
        for path, x in trained.read(Checkpoint(folder), SMALL).items()
    }
    return runs.gradients(given, batches(), teachers), runs.losses(given, batches(), teachers)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["resident", "streamed"])
def test_gradients_equal_transformers(which: str, tiny_bf16: Path) -> None:
    """Of all that is small, from one end of the model to the other."""
    expected, theirs = oracle.distillation(tiny_bf16, KEPT, rows(), dict(STRONGER.values()))
    ours, by_row = found(which, tiny_bf16)
    assert ours.loss == pytest.approx(expected, rel=1e-5) and ours.loss == pytest.approx(by_row.kl.sum(), rel=1e-5)
    assert ours.weight == sum(weights[1:].sum() for _, weights in rows()) == by_row.weight.sum()
    for name, tensor, layer in all_tensors(TINY):
        path = tensor.path if layer is None else f"layers/{tensor.path}"
        if path in ours.gradients:
            gradient = ours.gradients[path] if layer is None else ours.gradients[path][layer]
            assert gradient.dtype == jnp.float32
            assert relative(gradient, tensor.to_model(theirs[name], TINY)) < 1e-4, name


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Finals, Top])
def test_engines_agree_in_four_bits(kind: Any, tiny_mxfp4: Path) -> None:
    (one, one_by_row), (other, other_by_row) = (
        found(which, tiny_mxfp4, kind=kind) for which in ("resident", "streamed")
    )
    assert one.loss == pytest.approx(other.loss, rel=1e-5)
    np.testing.assert_allclose(one_by_row.kl, other_by_row.kl, rtol=1e-4)
    assert one.gradients.keys() == other.gradients.keys()
    for path, gradient in one.gradients.items():
        assert np.any(gradient) and relative(other.gradients[path], gradient) < 1e-4, path
    dropped = np.array([~np.isin(np.arange(E), kept) for kept in KEPT])
    assert not np.asarray(one.gradients["layers/moe/router/kernel"])[dropped].any()


@pytest.mark.slow
def test_gradients_in_bfloat16_point_where_those_in_float32_do(tiny_mxfp4: Path) -> None:
    wide, narrow = (found("streamed", tiny_mxfp4, dtype)[0] for dtype in ("float32", "bfloat16"))
    assert narrow.loss == pytest.approx(wide.loss, rel=0.05)
    for path in ("layers/moe/router/kernel", "layers/moe/router/bias", "layers/moe_norm/scale"):
        a, b = (np.asarray(each.gradients[path], np.float64).reshape(-1) for each in (wide, narrow))
        assert a @ b > 0.97 * np.linalg.norm(a) * np.linalg.norm(b), path


def test_what_is_trained_takes_the_place_of_the_models_own_as_it_will_be_written(tiny_mxfp4: Path) -> None:
    runs, given = engine("streamed", tiny_mxfp4, "float32", Finals), trained.read(Checkpoint(tiny_mxfp4), "router")
    assert given.keys() == {"layers/moe/router/kernel", "layers/moe/router/bias"}
    teachers = runs.teach(batches())
    same = runs.losses(given, batches(), teachers)
    # Half of a step of bfloat16 and less is rounded away; more is not.
    slightly = {path: x * (1 + 2**-10) for path, x in given.items()}
    changed = {path: x * (1 + 2**-5) for path, x in given.items()}
    np.testing.assert_array_equal(runs.losses(slightly, batches(), teachers).kl, same.kl)
    assert (runs.losses(changed, batches(), teachers).kl != same.kl).all()
    whole = [dataclasses.replace(batch, kept=np.ones_like(batch.kept)) for batch in batches()]
    assert np.abs(runs.losses(given, whole, teachers).kl).max() < 1e-6 < same.kl.min()


def test_rows_of_routers_learn_the_less_the_wider_a_model_is() -> None:
    """Adam's first step moves every value by the rate: a logit, which sums over the rows, moves alike in all widths."""
    first = {"layers/moe/router/kernel": jnp.ones((L, E, 400)), "layers/moe/router/bias": jnp.ones((L, E))}
    optimizer = optax.adam(0.01)
    ones = jax.tree.map(jnp.ones_like, first)
    found, _ = training._update(optimizer, ones, 1.0, optimizer.init(first), first)
    np.testing.assert_allclose(1 - found["layers/moe/router/bias"], 0.01, rtol=1e-4)
    np.testing.assert_allclose(1 - found["layers/moe/router/kernel"], 0.004, rtol=1e-4)  # 160 of 400


def test_where_no_rate_is_given_it_is_that_of_what_is_trained() -> None:
    found = [Distilling(train=train).first_rate for train in ("router", "small")]
    assert found == [0.01, 0.003] and Distilling(train="small", rate=0.5).first_rate == 0.5


# The loss alone, of a student that is drawn.


def documents(kind: str) -> Batch:
    if kind == "padded":
        return batches()[0]
    return next(packed([Document(*row) for row in rows()], 2, 24, eos_token_id=1))


def log_softmax(logits: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(logits, axis=-1)


def plain_loss(final: jax.Array, teacher: Any, head: np.ndarray, batch: Batch) -> jax.Array:
    """A loop over positions and classes, as the definition has it."""
    total = jnp.zeros(())
    segments, ids = batch.tokens.segments, batch.tokens.ids
    for row, t in np.ndindex(*batch.shape):
        if t + 1 == batch.shape[1] or segments[row, t] == 0 or segments[row, t] != segments[row, t + 1]:
            continue
        log_q = log_softmax(final[row, t] @ head.T)
        if isinstance(teacher, Finals):
            log_p = log_softmax(teacher.final[row, t] @ head.T)
            kl = (jnp.exp(log_p) * (log_p - log_q)).sum()
        else:
            of_token = Top(*(np.asarray(x)[row, t] for x in teacher))
            known = dict(zip(of_token.ids.tolist(), of_token.log_p.tolist(), strict=True))
            own = sorted({*known, int(ids[row, t + 1])})
            rest = np.setdiff1d(np.arange(V), own)
            log_p = jnp.array([*(known.get(i, float(of_token.true)) for i in own), float(of_token.rest)])
            classes = jnp.concatenate([log_q[np.array(own)], jax.nn.logsumexp(log_q[rest])[None]])
            kl = (jnp.exp(log_p) * (log_p - classes)).sum()
        total = total + batch.weights[row, t + 1] * kl
    return total


@pytest.mark.parametrize("kind", [Finals, Top])
@pytest.mark.parametrize("how", ["padded", "packed"])
def test_the_loss_is_that_of_a_loop_and_its_gradient_that_of_the_loop(
    how: str, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks, of which the last is not full."""
    monkeypatch.setattr(loss, "BLOCK", 7)
    batch, rng = documents(how), np.random.default_rng(2)
    final, other = (rng.normal(size=(*batch.shape, D)).astype(np.float32) for _ in range(2))
    head = (rng.normal(size=(V, D)) * 0.3).astype(np.float32)
    base = jnp.asarray(final + 0.2 * other)
    teacher = Finals(base) if kind is Finals else top(base, jnp.asarray(head), batch, here())
    ours, change = jax.jit(partial(distance, place=here()))(jnp.asarray(final), teacher, jnp.asarray(head), batch)
    theirs, gradient = jax.value_and_grad(plain_loss)(jnp.asarray(final), teacher, head, batch)
    assert float(ours.kl.sum()) == pytest.approx(float(theirs), rel=1e-4)
    assert relative(change, gradient) < 1e-4
    assert ours.weight.sum() == scored(batch)[1].sum() > 0
    if how == "packed":
        assert batch.tokens.segments.max() > 1


def test_a_rest_of_no_probability_gives_numbers() -> None:
    """Of teacher or student: all but a few tokens have less than float32 can hold."""
    batch = batches()[0]
    head = np.zeros((V, D), np.float32)
    head[:TOP] = np.random.default_rng(0).normal(size=(TOP, D))
    head[TOP:, 0] = -400
    narrow, wide = (jnp.full((*batch.shape, D), x).at[..., 0].set(x) for x in (1.0, 0.0))
    for teacher, student in ((narrow, wide), (wide, narrow)):
        base = top(teacher, jnp.asarray(head), batch, here())
        found, change = distance(student, base, jnp.asarray(head), batch, here())
        assert np.isfinite(found.kl).all() and np.isfinite(change).all() and found.kl.sum() > 1


# What the programs hold and do.

LARGE = dataclasses.replace(TINY, hidden_size=256, expert_hidden_size=320, num_experts=16)
TOKENS = 64
LAYER_KERNELS = 16 * 3 * 256 * 320
"""Values of one layer's experts' kernels."""


def asked_of(part: Any, prefix: str, kind: trained.Kind) -> trained.Trained:
    shapes = {path: jax.ShapeDtypeStruct(x.shape, jnp.float32) for path, x in sharding.by_path(part).items()}
    return {path: x for path, x in shapes.items() if re.fullmatch(trained.KINDS[kind], prefix + path)}


def large_batch() -> Batch:
    (batch,) = padded([Document(np.ones(TOKENS, np.int32), np.ones(TOKENS, np.float32))], 1, TOKENS)
    return batch


@pytest.mark.slow
def test_nothing_of_the_size_of_kernels_is_made() -> None:
    """By the step of a model whose layers are stacked, in bfloat16, of which the compiler for CPU takes no slices."""
    one, batch = sharding.make(LARGE, 1, 1, jax.devices()[:1]), large_batch()
    network = abstract(LARGE, one, jnp.bfloat16)
    given = asked_of(network, "", "small")
    teacher = Finals(jax.ShapeDtypeStruct((*batch.shape, LARGE.hidden_size), jnp.bfloat16))
    step = resident._mapped(resident._gradients, lambda given: (sharding.split("B"), trained.specs(given)), one)
    memory = step.lower(network, given, batch, teacher).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2 * LAYER_KERNELS  # those of one layer as they are
    assert memory.output_size_in_bytes < 2 * sum(4 * x.size for x in given.values())


def test_experts_do_not_run_forward_on_the_way_back() -> None:
    """Of their products stay three: the hidden values again, and one behind each kernel."""
    layer, batch = abstract_part(lambda: Layer(LARGE, rngs=nnx.Rngs(0)), jnp.float32), large_batch()
    x_BSD = jax.ShapeDtypeStruct((1, TOKENS, LARGE.hidden_size), jnp.float32)
    step = jax.jit(partial(streamed._backward, config=LARGE, place=here()))
    given = asked_of(layer, "layers/", "router")
    text = step.lower(layer, given, x_BSD, x_BSD, batch, np.asarray(0)).compile().as_text()
    tile = TOKENS * LARGE.top_k // LARGE.num_experts
    assert sorted(map(int, re.findall(rf"= f32\[{tile},(\d+)\]\S* dot\(", text))) == [256, 320, 640]
