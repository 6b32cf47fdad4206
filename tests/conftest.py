"""Settings of all tests, and the checkpoints that many of them share."""

import os

# Before JAX is imported: a TPU's library may be installed where no TPU is.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# torch's threads spin against XLA's on two cores: the small models here are faster with one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from jaxtyping import install_import_hook

# Shapes in the annotations of public functions are checked at every call.
install_import_hook(["gptoss_jax"], "beartype.beartype")

import json
from pathlib import Path

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
# The same examples in every run, on however slow a machine: a test that fails here fails everywhere.
hypothesis.settings.register_profile(
    "project", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("project")

# Compiler options of large programs that run a few times: half of the time to compile goes into speed.
QUICK = {"xla_backend_optimization_level": 0}
SHARED = Path(__file__).resolve().parents[2] / "shared"


def _tiny(folder: Path, mxfp4: bool) -> Path:
    from experiments import checkpoints, tokenizers
    from gptoss_jax.config import TINY

    folder.mkdir()
    # Small shards, so that every test reads more than one.
    checkpoints.write_random(folder, TINY, mxfp4, seed=1, max_shard_bytes=150_000)
    tokenizers.write_small(folder, TINY.vocab_size)
    return folder


def _eight(folder: Path, mxfp4: bool) -> Path:
    from experiments import checkpoints
    from tests.on_eight_devices import EIGHT

    checkpoints.write_random(folder, EIGHT, mxfp4, seed=3, max_shard_bytes=500_000)
    return folder


@pytest.fixture(scope="session")
def tiny_mxfp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with all dimensions different, experts in MXFP4. Not to be changed."""
    return _tiny(tmp_path_factory.mktemp("checkpoint") / "tiny-mxfp4", mxfp4=True)


@pytest.fixture(scope="session")
def tiny_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shapes, all in BF16. Not to be changed."""
    return _tiny(tmp_path_factory.mktemp("checkpoint") / "tiny-bf16", mxfp4=False)


@pytest.fixture(scope="session")
def eight_mxfp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose experts and heads eight devices can share, in MXFP4. Not to be changed."""
    return _eight(tmp_path_factory.mktemp("eight-mxfp4"), mxfp4=True)


@pytest.fixture(scope="session")
def eight_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shapes, all in BF16. Not to be changed."""
    return _eight(tmp_path_factory.mktemp("eight-bf16"), mxfp4=False)


def conversation(i: int) -> str:
    """Harmony text with all three channels, of a length that grows with i."""
    return (
        f"<|start|>user<|message|>{'What is ' * (i + 1)}{i} plus {i}?<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>Adding is easy.<|end|>"
        '<|start|>assistant to=functions.add<|channel|>commentary <|constrain|>json<|message|>{"a": 1}<|call|>'
        "<|start|>functions.add to=assistant<|channel|>commentary<|message|>2<|end|>"
        f"<|start|>assistant<|channel|>final<|message|>It is {2 * i}.<|return|>"
    )


@pytest.fixture(scope="session")
def rows_jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rows of two domains."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"id": f"r{i}", "domain": "ab"[i % 2], "text": conversation(i)} for i in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def shared() -> Path:
    """The folder of real data beside the project; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("the folder of shared data is not here")
    return SHARED
