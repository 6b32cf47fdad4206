"""Parity of the network with transformers, on a configuration in which every dimension differs."""

from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.hf import Checkpoint
from gptoss_jax.config import TINY
from gptoss_jax.data import batching
from gptoss_jax.data.batching import Document
from gptoss_jax.devices.placement import Placement
from gptoss_jax.network.source import load
from gptoss_jax.run.forward import Forward, forward
from tests.oracle import forward as reference_forward
from tests.oracle import load as load_reference
from tests.oracle import relative

pytestmark = pytest.mark.slow

HERE = Placement("cpu")


def documents(*lengths: int, seed: int = 0) -> list[Document]:
    rng = np.random.default_rng(seed)
    return [Document(rng.integers(0, TINY.vocab_size, n).astype(np.int32), np.ones(n, np.float32)) for n in lengths]


def assert_equal_rows(output: Forward, row: int, part: slice, reference) -> None:
    """Logits and every layer's hidden state to 1e-5 relative, identical choices of experts."""
    assert relative(output.logits[row, part], reference.logits) < 1e-5
    for layer in range(TINY.num_layers):
        assert relative(output.hidden[layer, row, part], reference.hidden[layer]) < 1e-5
        assert relative(output.router_logits[layer, row, part], reference.router_logits[layer]) < 1e-5
        assert relative(output.gates[layer, row, part], reference.gates[layer]) < 1e-5
        np.testing.assert_array_equal(output.experts[layer, row, part], reference.experts[layer])
        assert relative(output.norms[layer, row, part], reference.norms[layer]) < 1e-5


def test_sizes_of_the_tested_configuration_all_differ():
    sizes = [v for k, v in asdict(TINY).items() if isinstance(v, int) and k != "max_position"]
    assert max(Counter([*sizes, 2 * TINY.expert_hidden_size]).values()) == 1


@pytest.mark.parametrize("form", ["tiny_mxfp4", "tiny_bf16"])
def test_padded_rows_equal_transformers(form: str, request: pytest.FixtureRequest):
    folder = request.getfixturevalue(form)
    rows = documents(50, 61, 17)
    (batch,) = batching.padded(rows, 3, 4096)
    output = forward(load(Checkpoint(folder), "float32"), batch.tokens, HERE)
    reference = load_reference(folder)
    for row in range(3):
        ids = batch.tokens.ids[row][batch.tokens.segments[row] > 0]
        assert_equal_rows(output, row, slice(0, len(ids)), reference_forward(reference, ids))


def test_packed_documents_equal_transformers_on_each_alone(tiny_mxfp4: Path):
    rows = documents(20, 33, 9)
    (batch,) = batching.packed(rows, 1, 65, eos_token_id=2)
    output = forward(load(Checkpoint(tiny_mxfp4), "float32"), batch.tokens, HERE)
    reference, start = load_reference(tiny_mxfp4), 0
    for row in rows:
        stop = start + len(row.token_ids) + 1
        ids = batch.tokens.ids[0, start:stop]
        assert_equal_rows(output, 0, slice(start, stop), reference_forward(reference, ids))
        start = stop


def test_positions_past_the_original_context_equal_transformers(tiny_mxfp4: Path):
    (row,) = documents(1100)
    (batch,) = batching.padded([row], 1, 1100)
    output = forward(load(Checkpoint(tiny_mxfp4), "float32"), batch.tokens, HERE)
    assert TINY.rope_scaling and TINY.rope_scaling.original_context == 900
    assert_equal_rows(output, 0, slice(None), reference_forward(load_reference(tiny_mxfp4), row.token_ids))


def test_bfloat16_is_as_close_to_float32_as_transformers_bfloat16(tiny_mxfp4: Path):
    """bf16 has 8 bits: both implementations round each product, in different places."""
    (row,) = documents(256)
    (batch,) = batching.padded([row], 1, 256)
    ours = forward(load(Checkpoint(tiny_mxfp4), "bfloat16"), batch.tokens, HERE).logits[0]
    exact = reference_forward(load_reference(tiny_mxfp4), row.token_ids).logits
    theirs = reference_forward(load_reference(tiny_mxfp4, "bfloat16"), row.token_ids).logits

    def error(logits: np.ndarray) -> float:
        return float(np.sqrt(np.mean((np.asarray(logits, np.float64) - exact) ** 2)))

    assert error(ours) < 1.1 * error(theirs)


def test_no_output_depends_on_later_tokens(tiny_mxfp4: Path):
    """By gradient: what is computed at a position has no derivative in any later token's embedding."""
    network = load(Checkpoint(tiny_mxfp4), "float32")
    ids = np.arange(1, 25, dtype=np.int32)  # no token twice, so that a row of the table is one position
    (batch,) = batching.padded([Document(ids, np.ones(24, np.float32))], 1, 24)
    place, nothing = Placement("cpu", differentiable=True), lambda layer: None
    gradients = jax.jit(jax.grad(lambda network, batch: jnp.sum(network(batch.tokens, place, nothing).final[0, 11])))(
        network, batch
    )
    gradient = np.asarray(gradients.embedding[...])[ids]
    assert np.abs(gradient[:12]).sum(-1).min() > 0
    assert np.abs(gradient[12:]).max() == 0


def test_window_ends_where_config_says(tiny_mxfp4: Path):
    """With sliding layers alone, information moves at most window − 1 tokens a layer."""
    config = replace(TINY, layer_types=("sliding_attention",) * 4)
    network = load(Checkpoint(tiny_mxfp4), "float32")
    network.config = config
    rows = documents(64)[0].token_ids, documents(64)[0].token_ids.copy()
    rows[1][0] = (rows[1][0] + 1) % TINY.vocab_size
    batches = [next(iter(batching.padded([Document(r, np.ones(64, np.float32))], 1, 64))) for r in rows]
    hidden = [np.asarray(forward(network, b.tokens, HERE).hidden) for b in batches]
    for layer in range(4):
        moved = np.abs(hidden[0][layer, 0] - hidden[1][layer, 0]).max(-1)
        assert moved[(layer + 1) * (TINY.sliding_window - 1) + 1 :].max() == 0
        assert moved[TINY.sliding_window - 1] > 0
