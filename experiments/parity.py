"""How far the network is from transformers in float32, on a configuration with all dimensions different.

    python -m experiments.parity

The tests hold these to the bars of docs/measurements.md; this prints what they are. Needs the test extra.
"""

import tempfile
from pathlib import Path

import jax
import numpy as np

from convert import cut
from convert.hf import Checkpoint
from gptoss_jax.config import TINY
from gptoss_jax.data import batching
from gptoss_jax.data.batching import Document
from gptoss_jax.devices.placement import here
from gptoss_jax.network.batch import Batch
from gptoss_jax.network.model import GptOss
from gptoss_jax.network.source import load
from gptoss_jax.run.forward import forward
from gptoss_jax.run.steps import Asked, network_step
from tests import oracle

from . import checkpoints


def differences(network: GptOss, batch: Batch, part: slice, reference: oracle.Reference) -> str:
    """Largest relative differences of the first row, over all layers, and the choices that differ."""
    output = forward(network, batch.tokens, here())
    logits = oracle.relative(output.logits[0, part], reference.logits)
    hidden = max(oracle.relative(output.hidden[i, 0, part], h) for i, h in enumerate(reference.hidden))
    chosen = np.asarray(output.experts)[:, 0, part]
    other = int((chosen != np.stack(reference.experts)).sum())
    return (
        f"{logits:.1e} | {hidden:.1e} | {other} of {chosen.size:,} | {sums_difference(network, batch, reference):.1e}"
    )


def sums_difference(network: GptOss, batch: Batch, reference: oracle.Reference) -> float:
    """Largest relative difference of any expert's sums, in float64 from transformers' routing and outputs."""
    results = jax.jit(network_step, static_argnums=(2, 3))(network, batch, here(), Asked())
    statistics = results.statistics.to_host()
    largest = 0.0
    for layer, experts in enumerate(reference.experts):
        g, n = (x[layer].astype(np.float64) for x in (reference.gates, reference.norms))
        expected = {"gate_sum": g, "norm_sum": n, "gate_norm_sum": g * n, "gate_norm_sq_sum": (g * n) ** 2}
        count = np.bincount(experts.reshape(-1), minlength=TINY.num_experts)
        assert np.array_equal(count, statistics.count[layer, 0]), layer
        for name, pairs in expected.items():
            total = np.bincount(experts.reshape(-1), pairs.reshape(-1), TINY.num_experts)
            ours = getattr(statistics, name)[layer, 0]
            largest = max(largest, float(np.abs(ours / total - 1)[count > 0].max()))
    return largest


def bfloat16_error(folder: Path, batch: Batch, exact: np.ndarray) -> float:
    """Our root mean square error in bfloat16 over that of transformers in bfloat16."""
    import torch

    ours = forward(load(Checkpoint(folder), "bfloat16"), batch.tokens, here()).logits[0]
    theirs = oracle.forward(oracle.load(folder, torch.bfloat16), batch.tokens.ids[0]).logits
    mine, other = (np.sqrt(np.mean((np.asarray(x, np.float64) - exact) ** 2)) for x in (ours, theirs))
    return float(mine / other)


def cut_minus_masked(folder: Path, batch: Batch) -> str:
    """Pruned to 4 of 7 experts, in transformers and here: largest differences from the masked full model."""
    rng = np.random.default_rng(0)
    keep_sets = [sorted(rng.permutation(TINY.num_experts)[:4].tolist()) for _ in range(TINY.num_layers)]
    source, masked = Checkpoint(folder), oracle.load(folder)
    for layer, kept in enumerate(keep_sets):
        dropped = sorted(set(range(TINY.num_experts)) - set(kept))
        masked.model.layers[layer].mlp.router.bias.data[dropped] = -np.inf
    with tempfile.TemporaryDirectory() as name:
        groups = cut.plan(source, keep_sets, source.quantized)
        cut.write(source, keep_sets, Path(name), groups, source.quantized, 10**9)
        theirs = oracle.forward(oracle.load(Path(name)), batch.tokens.ids[0]).logits
        ours = np.asarray(forward(load(Checkpoint(Path(name)), "float32"), batch.tokens, here()).logits[0])
    expected = oracle.forward(masked, batch.tokens.ids[0]).logits
    return f"{np.abs(theirs - expected).max():.1e} in transformers, {np.abs(ours - expected).max():.1e} here"


def main() -> None:
    """Print one table row for each form of checkpoint and length, then a line for each form."""
    print("| checkpoint | tokens | logits | hidden states | choices that differ | sums |")
    print("|---|---:|---:|---:|---:|---:|")
    lines = []
    for form in ("MXFP4", "BF16"):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            checkpoints.write_random(folder, TINY, mxfp4=form == "MXFP4", seed=1)
            ours, theirs = load(Checkpoint(folder), "float32"), oracle.load(folder)
            for length in (50, 700, 4200):
                ids = np.random.default_rng(length).integers(0, TINY.vocab_size, length).astype(np.int32)
                (batch,) = batching.padded([Document(ids, np.ones(length, np.float32))], 1, length)
                reference = oracle.forward(theirs, ids)
                row = differences(ours, batch, slice(length), reference)
                print(f"| {form} | {length:,} | {row} |", flush=True)
                if length == 700:
                    error = bfloat16_error(folder, batch, reference.logits)
                    lines.append(f"{form}: bfloat16 error {error:.2f} of transformers' bfloat16 error")
                    lines.append(f"{form}: cut − masked {cut_minus_masked(folder, batch)}")
    print("", *lines, sep="\n")


if __name__ == "__main__":
    main()
