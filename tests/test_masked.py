"""A masked source against the checkpoint that pruning writes: one model, in every engine."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from click.testing import CliRunner

from convert import cut
from convert.hf import Checkpoint
from convert.sources import open_source
from convert.tensors import AnyCheckpoint
from gptoss_jax.cli import cli
from gptoss_jax.config import TINY
from gptoss_jax.data.batching import Document, padded
from gptoss_jax.devices import mesh
from gptoss_jax.devices.placement import here
from gptoss_jax.errors import RankingError
from gptoss_jax.generation import choose
from gptoss_jax.generation.continuous import prompts_of, replies
from gptoss_jax.generation.steps import How
from gptoss_jax.network.batch import Batch
from gptoss_jax.network.source import ROUTER_BIAS, Masked, Source, abstract, load
from gptoss_jax.run import steps
from gptoss_jax.run.engine import Engine
from gptoss_jax.run.forward import forward
from gptoss_jax.run.options import Placing, Sampling
from gptoss_jax.run.progress import Progress, State
from gptoss_jax.run.resident import Resident
from gptoss_jax.run.streamed import Streamed
from gptoss_jax.statistics.sums import DECLARED

pytestmark = pytest.mark.slow

L, E = TINY.num_layers, TINY.num_experts
KEEP = 4
KEEP_SETS = [sorted(np.random.default_rng(layer).permutation(E)[:KEEP].tolist()) for layer in range(L)]
BY_EXPERT = [name for name, statistic in DECLARED.items() if statistic.by_expert]
WHOLE = [name for name, statistic in DECLARED.items() if "E" not in statistic.axes]


@pytest.fixture(scope="module", params=["mxfp4", "orbax bf16"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AnyCheckpoint:
    """A small model from either reader, in either form."""
    kind, _, form = request.param.rpartition(" ")
    folder: Path = request.getfixturevalue(f"tiny_{form}")
    if kind:
        out = tmp_path_factory.mktemp("orbax") / form
        arguments = ["convert", str(folder), "--to", "orbax", "--out", str(out)]
        assert CliRunner().invoke(cli, arguments).exit_code == 0
        folder = out
    return open_source(str(folder))


@pytest.fixture(scope="module")
def pruned(source: AnyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("pruned")
    groups = cut.plan(source, KEEP_SETS, source.quantized)
    cut.write(source, KEEP_SETS, folder, groups, source.quantized, 10**9)
    return Checkpoint(folder)


@pytest.fixture(scope="module")
def masked(source: AnyCheckpoint) -> Masked:
    return Masked(source, KEEP_SETS)


def batches() -> list[Batch]:
    rng = np.random.default_rng(7)
    documents = [
        Document(rng.integers(0, TINY.vocab_size, 24).astype(np.int32), np.float32(rng.random(24) < 0.7), row % 2)
        for row in range(4)
    ]
    return list(padded(documents, 2, 24, num_groups=2))


def resident(source: Source, out: Path) -> Engine:
    one = mesh.make(source.config, 1, 1)
    return Resident(load(source, "float32", one), lambda asked: steps.mapped(asked, one))


def streamed(source: Source, out: Path) -> Engine:
    return Streamed(source, "float32", Progress(out), 0)


def statistics(engine: Engine) -> Any:
    state = State()
    for unit in engine.run(batches(), steps.Asked(swap=True), 0):
        state.add(unit, L)
    assert state.statistics is not None
    return state.statistics


def test_sources_and_masked_ones_are_sources(source: AnyCheckpoint, masked: Masked) -> None:
    assert isinstance(source, Source) and isinstance(masked, Source)
    assert (masked.config, masked.config_json, masked.folder) == (source.config, source.config_json, source.folder)


def test_logits_equal_the_pruned_models(source: AnyCheckpoint, masked: Masked, pruned: Checkpoint) -> None:
    models = [load(each, "float32") for each in (masked, pruned, source)]
    for batch in batches():
        ours, theirs, full = (np.asarray(forward(model, batch.tokens, here()).logits) for model in models)
        assert np.abs(ours - theirs).max() <= 1e-6
        assert np.abs(ours - full).max() > 1e-3  # what is dropped mattered


@pytest.mark.parametrize("engine", [resident, streamed])
def test_statistics_equal_the_pruned_models(engine: Any, masked: Masked, pruned: Checkpoint, tmp_path: Path) -> None:
    ours, theirs = (statistics(engine(each, tmp_path / each.folder.name)) for each in (masked, pruned))
    for layer, kept in enumerate(KEEP_SETS):
        assert np.delete(ours.count[layer], kept, axis=-1).max() == 0
        np.testing.assert_array_equal(ours.count[layer][:, kept], theirs.count[layer])
        np.testing.assert_array_equal(ours.coactivation[layer][:, kept][:, :, kept], theirs.coactivation[layer])
        for name in BY_EXPERT:
            mine, other = getattr(ours, name)[layer][:, kept], getattr(theirs, name)[layer]
            np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-6, err_msg=name)
    for name in WHOLE:
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-5, err_msg=name)
    assert ours.count.sum() > 0


def test_generated_tokens_equal_the_pruned_models(masked: Masked, pruned: Checkpoint) -> None:
    prompts = list(np.random.default_rng(3).integers(0, TINY.vocab_size, (2, 9)).astype(np.int32))
    how = How(TINY, Sampling(temperature=0.0), ())
    asked, place = prompts_of(prompts, TINY, 16), Placing(dtype="float32")
    ours, theirs = (
        replies(choose.decoder(each, place, asked, how._replace(config=each.config)), asked)
        for each in (masked, pruned)
    )
    assert ours == theirs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_but_the_biases_of_dropped_experts_changes(source: AnyCheckpoint, masked: Masked, dtype: str) -> None:
    wanted = mesh.by_path(abstract(TINY, mesh.make(TINY, 1, 1), dtype))
    before, after = source.load(wanted), masked.load(wanted)
    assert before.keys() == after.keys()
    stacked = f"layers/{ROUTER_BIAS}"
    for path in before.keys() - {stacked}:
        assert np.asarray(before[path]).tobytes() == np.asarray(after[path]).tobytes(), path
    assert (after[stacked].dtype, after[stacked].sharding) == (before[stacked].dtype, before[stacked].sharding)
    for layer, kept in enumerate(KEEP_SETS):
        was, now = (np.asarray(arrays[stacked], np.float32)[layer] for arrays in (before, after))
        assert np.array_equal(now[kept], was[kept])
        assert np.isneginf(np.delete(now, kept)).all()
        one = jax.ShapeDtypeStruct((E,), np.dtype(dtype), sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
        alone = masked.load({f"layers/{layer}/{ROUTER_BIAS}": one})
        assert np.array_equal(np.asarray(alone[f"layers/{layer}/{ROUTER_BIAS}"], np.float32), now)


def test_rows_are_the_sources(source: AnyCheckpoint, masked: Masked) -> None:
    ids = np.array([3, 0, 3])
    assert masked.rows("embedding", ids).tobytes() == source.rows("embedding", ids).tobytes()


def test_the_fingerprint_is_of_the_source_and_what_is_kept(tiny_bf16: Path, tiny_mxfp4: Path) -> None:
    source = Checkpoint(tiny_bf16)
    fingerprint = Masked(source, KEEP_SETS).fingerprint()
    assert Masked(source, [set(kept) for kept in KEEP_SETS]).fingerprint() == fingerprint
    others = [
        source.fingerprint(),
        Masked(source, [range(E)] * L).fingerprint(),
        Masked(source, KEEP_SETS[::-1]).fingerprint(),
        Masked(Checkpoint(tiny_mxfp4), KEEP_SETS).fingerprint(),
    ]
    assert len({fingerprint, *others}) == 5


@pytest.mark.parametrize(
    ("keep_sets", "says"),
    [
        (KEEP_SETS[1:], f"keep-sets of {L - 1} layers: the model has {L}"),
        ([*KEEP_SETS, range(E)], f"keep-sets of {L + 1} layers"),
        ([*KEEP_SETS[:2], [0, 1, 2, E], KEEP_SETS[3]], f"layer 2 keeps expert {E}"),
        ([[-1, 0, 1, 2], *KEEP_SETS[1:]], "layer 0 keeps expert -1"),
        ([*KEEP_SETS[:3], [5, 6]], f"layer 3 keeps 2 experts, and each token uses {TINY.top_k}"),
        ([*KEEP_SETS[:3], [5, 5, 6]], "layer 3 keeps 2 experts"),
    ],
)
def test_refused(tiny_bf16: Path, keep_sets: Sequence[Any], says: str) -> None:
    with pytest.raises(RankingError, match=says):
        Masked(Checkpoint(tiny_bf16), keep_sets)
