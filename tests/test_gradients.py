"""Gradients of every weight against transformers' in float32."""

from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from convert.hf import Checkpoint
from convert.mapping import all_tensors
from gptoss_jax.config import TINY
from gptoss_jax.data import batching
from gptoss_jax.data.batching import Document
from gptoss_jax.devices import mesh as sharding
from gptoss_jax.devices.placement import Placement
from gptoss_jax.kernels import grouped
from gptoss_jax.network import model
from gptoss_jax.network.batch import Batch
from gptoss_jax.network.source import load
from tests import oracle
from tests.oracle import relative

pytestmark = pytest.mark.slow

IDS = np.random.default_rng(2).integers(0, TINY.vocab_size, 45).astype(np.int32)


@pytest.mark.parametrize("tiles", [grouped.ALL_TILES, 3])
def test_gradients_of_all_weights_equal_transformers(
    tiny_bf16: Path, tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the mean loss of a row behind which there is padding; experts in one call or in several."""
    monkeypatch.setattr(grouped, "ALL_TILES", tiles)
    theirs = oracle.gradients(oracle.load(tiny_bf16), IDS)

    def loss(network: model.GptOss, batch: Batch) -> jax.Array:
        output = network(batch.tokens, Placement("cpu", differentiable=True), lambda layer: None)
        logits = network.logits(output.final)[:, :44]
        return optax.softmax_cross_entropy_with_integer_labels(logits, IDS[None, 1:]).mean()

    network = load(Checkpoint(tiny_bf16), "float32")
    (batch,) = batching.padded([Document(IDS, np.ones(45, np.float32))], 1, 64)
    ours = sharding.by_path(jax.jit(jax.grad(loss))(network, batch))
    for name, tensor, layer in all_tensors(TINY):
        gradient = ours[tensor.path] if layer is None else ours[f"layers/{tensor.path}"][layer]
        assert relative(gradient, tensor.to_model(theirs[name], TINY)) < 1e-4, name


def test_gradients_of_norms_are_finite(tiny_bf16: Path) -> None:
    """The root of a norm has none at 0, and of the tiles some have rows without a pair or no expert at all."""

    def norms(network: model.GptOss, batch: Batch) -> jax.Array:
        place = Placement("cpu", differentiable=True)
        return network(batch.tokens, place, lambda layer: layer.mixture.norms_Tk).layers.sum()

    network = load(Checkpoint(tiny_bf16), "float32")
    (batch,) = batching.padded([Document(IDS, np.ones(45, np.float32))], 1, 64)
    gradients = sharding.by_path(jax.jit(jax.grad(norms))(network, batch))
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())
    assert np.any(gradients["layers/moe/experts/down_kernel"])
