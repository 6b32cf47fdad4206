"""The streamed engine against the resident one: the same statistics, one layer in memory at a time."""

import json
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from flax import nnx
from safetensors.numpy import load_file

from convert.hf import Checkpoint
from convert.shards import Stored
from gptoss_jax.cli import cli
from gptoss_jax.config import GPT_OSS_20B, GPT_OSS_120B, TINY
from gptoss_jax.errors import MemoryLimitError
from gptoss_jax.network.model import GptOss, Layer
from gptoss_jax.network.source import load, load_part
from gptoss_jax.run import choose as engines
from gptoss_jax.run import memory
from gptoss_jax.run import streamed as stream
from gptoss_jax.run.memory import GIB
from gptoss_jax.run.options import Placing

from .bad_input import Refused
from .test_profile import decided

pytestmark = pytest.mark.slow

WEIGHTS = ["gate_up", "down"]


def run(source: Path, data: Path, out: Path, *options: Any) -> dict[str, np.ndarray]:
    """The sums of a profile."""
    arguments = ["profile", source, "--data", data, "--domain-column", "domain", "--dtype", "float32", "--out", out]
    result = CliRunner().invoke(cli, [str(word) for word in (*arguments, *options)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return load_file(out / "statistics.safetensors")


def assert_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], rtol: float = 1e-6) -> None:
    """Whole numbers equal, sums to `rtol` of the largest of their kind."""
    assert ours.keys() == theirs.keys()
    for name, column in theirs.items():
        if np.issubdtype(column.dtype, np.integer):
            np.testing.assert_array_equal(ours[name], column, err_msg=name)
        else:
            np.testing.assert_allclose(ours[name], column, rtol=0, atol=rtol * np.abs(column).max(), err_msg=name)


@pytest.fixture(params=["mxfp4", "bf16", "orbax mxfp4", "orbax bf16"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The same small model in each form that a checkpoint can have."""
    form = request.param.split()[-1]
    folder: Path = request.getfixturevalue(f"tiny_{form}")
    if form == request.param:
        return folder
    arguments = ["convert", str(folder), "--to", "orbax", "--out", str(tmp_path / "orbax")]
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    return tmp_path / "orbax"


def test_statistics_equal_the_resident_engines(source: Path, rows_jsonl: Path, tmp_path: Path) -> None:
    resident = run(source, rows_jsonl, tmp_path / "resident", "--engine", "resident")
    streamed = run(source, rows_jsonl, tmp_path / "streamed", "--engine", "streamed", "--batch-size", 3)
    assert_same(streamed, resident)


@pytest.mark.parametrize(
    "options", [("--skip-first", 3), ("--pack", "--max-seq-length", 100), ("--keep", "all"), ("--swap",)]
)
def test_with_any_option(tiny_mxfp4: Path, rows_jsonl: Path, options: tuple[Any, ...], tmp_path: Path) -> None:
    resident = run(tiny_mxfp4, rows_jsonl, tmp_path / "resident", "--engine", "resident", *options)
    assert_same(run(tiny_mxfp4, rows_jsonl, tmp_path / "streamed", "--engine", "streamed", *options), resident)


def test_scores_of_tokens(tiny_bf16: Path, rows_jsonl: Path, tmp_path: Path) -> None:
    """Two passes, and the unembedding behind the last layer of the first."""
    source = decided(tiny_bf16, tmp_path / "decided")
    resident = run(source, rows_jsonl, tmp_path / "resident", "--eaft", "--engine", "resident")
    streamed = run(source, rows_jsonl, tmp_path / "streamed", "--eaft", "--engine", "streamed", "--batch-size", 2)
    assert "eaft_gate_norm_sum" in streamed
    assert_same(streamed, resident, rtol=1e-5)  # a weight rests on a cut between scores


@pytest.mark.newest
def test_hidden_states_in_files_change_no_bit(tiny_mxfp4: Path, rows_jsonl: Path, tmp_path: Path) -> None:
    options = ("--engine", "streamed", "--batch-size", 2)
    held = run(tiny_mxfp4, rows_jsonl, tmp_path / "held", *options)
    mapped = run(tiny_mxfp4, rows_jsonl, tmp_path / "mapped", *options, "--activation-gib", 0)
    assert {name: x.tobytes() for name, x in mapped.items()} == {name: x.tobytes() for name, x in held.items()}


def test_hidden_states_beyond_the_limit_are_not_held(tmp_path: Path) -> None:
    from gptoss_jax.run.progress import Progress

    progress = Progress(tmp_path / "out")
    x = np.arange(24, dtype=np.float32).reshape(1, 2, 12)
    hidden = stream._Hidden(progress, np.dtype(np.float32), 12, limit=2 * x.nbytes)
    for batch in range(3):
        hidden.put(1, batch, x + batch)
    assert list(hidden.held) == ["batch-0.layer-1", "batch-1.layer-1"]
    for batch in range(3):
        np.testing.assert_array_equal(hidden.get(1, batch, (1, 2)), x + batch)
        hidden.drop(1, batch)
    assert not hidden.held and [p.name for p in progress.folder.iterdir()] == ["run"]


def streamed(source: Path, out: Path) -> stream.Streamed:
    from gptoss_jax.run.progress import Progress

    return stream.Streamed(Checkpoint(source), "float32", Progress(out), 0)


def test_a_layer_is_read_while_the_one_before_it_runs_and_no_sooner(
    tiny_mxfp4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = [Event() for _ in range(TINY.num_layers)]
    first = stream.load_part

    def recording(source: Any, make: Callable[[], Any], dtype: Any, prefix: str) -> Any:
        part = first(source, make, dtype, prefix)
        read[int(prefix.split("/")[1])].set()
        return part

    monkeypatch.setattr(stream, "load_part", recording)

    def compile() -> None:
        assert read[0].wait(60)

    for index, layer in stream.Layers(Checkpoint(tiny_mxfp4), "float32").each(range(TINY.num_layers), compile):
        assert isinstance(layer, Layer)
        assert all(event.wait(60) for event in read[: index + 2])
        assert not any(event.is_set() for event in read[index + 2 :])


@pytest.mark.parametrize(("eaft", "expected"), [((), False), (("--eaft",), True)])
def test_the_unembedding_is_read_where_tokens_are_scored(
    tiny_mxfp4: Path, rows_jsonl: Path, tmp_path: Path, eaft: Any, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = set()
    first = Stored._fill

    def recording(self: Stored, array: np.ndarray, starts: Any) -> None:
        names.add((self.name, array.nbytes < self.nbytes))
        first(self, array, starts)

    monkeypatch.setattr(Stored, "_fill", recording)
    run(tiny_mxfp4, rows_jsonl, tmp_path / "out", "--engine", "streamed", "--num-rows", 2, *eaft)
    assert (("lm_head.weight", False) in names) is expected
    assert ("model.embed_tokens.weight", True) in names and ("model.embed_tokens.weight", False) not in names


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_one_layer_has_the_weights_of_the_stack(tiny_mxfp4: Path, dtype: str) -> None:
    """Kernels in four bits are those of the resident form, expert by expert."""
    source = Checkpoint(tiny_mxfp4)
    whole = load(source, dtype)
    for index in range(TINY.num_layers):
        make = lambda: Layer(TINY, "blocks", rngs=nnx.Rngs(0))  # noqa: E731
        layer = load_part(source, make, dtype, f"layers/{index}/")
        np.testing.assert_array_equal(layer.attention.q_kernel[...], whole.layers.attention.q_kernel[index])
        for name in WEIGHTS:
            all_floats, offset = whole.layers.moe.experts.weights(name, jnp.dtype(dtype), jnp.asarray(index))
            for expert in range(TINY.num_experts):
                kernel, own = layer.moe.experts.weights(name, jnp.dtype(dtype), None, jnp.asarray(expert))
                np.testing.assert_array_equal(kernel.array[expert + own], all_floats.array[expert + offset])


@pytest.mark.parametrize("config", [GPT_OSS_20B, GPT_OSS_120B, TINY])
def test_batches_grow_with_the_limit_and_end_at_what_serves(config: Any) -> None:
    def tokens(limit: float | None) -> int:
        return memory.streamed_tokens(config, "blocks", "bfloat16", limit and int(limit * GIB), GIB, 512)

    assert tokens(None) == tokens(100) == memory.STREAMED_TOKENS
    sizes = [tokens(limit) for limit in (8, 9, 10, 12, 16)]
    assert sizes == sorted(sizes) and sizes[0] >= 512
    with pytest.raises(MemoryLimitError, match="too little"):
        tokens(1)


def test_outputs_that_are_kept_leave_room_for_fewer_tokens() -> None:
    kept = memory.further_bytes(GPT_OSS_20B, "bfloat16", swap=True, grams=False)
    asked = GPT_OSS_20B, "blocks", "bfloat16", 5 * GIB // 2, 0, 512
    sizes = [memory.streamed_tokens(*asked), memory.streamed_tokens(*asked, *kept)]
    states = memory.STATES_A_TOKEN
    assert abs(sizes[0] / sizes[1] - (states + 5) / states) < 0.01 and sizes[0] < memory.STREAMED_TOKENS


def test_longer_rows_than_a_batch_are_one_row() -> None:
    assert memory.streamed_tokens(GPT_OSS_20B, "blocks", "bfloat16", None, GIB, 131072) == 131072


def test_weights_of_a_model_and_of_its_layers() -> None:
    whole = memory.weight_bytes(GptOss, GPT_OSS_20B, "bf16", "bfloat16")
    assert whole == 2 * 20_914_757_184  # the published number of parameters
    layer = memory.weight_bytes(Layer, GPT_OSS_20B, "blocks", "bfloat16")
    assert 0.25 < 24 * layer / whole < 0.31


@pytest.mark.parametrize(
    ("free", "changed", "expected"),
    [
        (64, {}, "resident"),
        (3, {}, "resident"),
        (1, {}, "streamed"),
        (64, {"memory_gib": 1.0}, "streamed"),
        (1, {"memory_gib": 64.0}, "resident"),
        (1, {"engine": "resident"}, "resident"),
        (64, {"engine": "streamed"}, "streamed"),
        (1, {"mapping": "pmap"}, "resident"),
        (1, {"mesh": (1, 1)}, "resident"),
    ],
)
def test_auto_goes_by_memory_and_says_why(
    free: int, changed: dict[str, Any], expected: str, tiny_mxfp4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available", lambda: free * GIB)
    choice = engines.choose(Checkpoint(tiny_mxfp4), Placing(**changed))
    assert choice.engine == expected and choice.reason
    if not changed:
        assert f"{free}.0 GiB of free memory" in choice.reason


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--engine", "resident", "--memory-gib", 1), "all weights at once"),
        (("--engine", "streamed", "--memory-gib", 1), "two layers"),
        (("--engine", "streamed", "--memory-gib", 4, "--batch-size", 4096), "at most"),
        (("--engine", "streamed", "--mesh", "data=1,expert=1"), "--mesh means nothing"),
        (("--engine", "streamed", "--map", "pmap"), "--map pmap means nothing"),
        (("--engine", "streamed", "--weights", "mxfp4"), "--weights mxfp4 means nothing"),
    ],
)
def test_what_an_engine_cannot_do_is_said(
    options: tuple[Any, ...], says: str, tiny_mxfp4: Path, rows_jsonl: Path, refused: Refused
) -> None:
    refused("profile", tiny_mxfp4, "--data", rows_jsonl, *options, "--out", "out", says=(says,))


def test_available_memory_is_some() -> None:
    assert 1 << 27 < memory.available() < 1 << 50


def test_the_profile_says_which_engine_ran_and_why(tiny_mxfp4: Path, rows_jsonl: Path, tmp_path: Path) -> None:
    run(tiny_mxfp4, rows_jsonl, tmp_path / "out", "--memory-gib", 1.9, "--activation-gib", 0.5)
    info = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert info["engine"] == "streamed" and "1.9 GiB of --memory-gib" in info["engine_reason"]
    assert info["peak_rss_bytes"] > 0
