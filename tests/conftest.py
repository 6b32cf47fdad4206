"""Settings of all tests, and the fixtures that many of them share."""

import os

# Before JAX is imported: a TPU's library may be installed where no TPU is.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# torch's threads spin against XLA's on two cores: the small models here are faster with one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
from tests.devices import QUICKLY

# The demo, the notebook and the benches compile as users do, and so do tests with XLA_FLAGS= before them.
os.environ.setdefault("XLA_FLAGS", QUICKLY)

from jaxtyping import install_import_hook

# Shapes in the annotations of public functions are checked at every call.
install_import_hook(["gptoss_jax"], "beartype.beartype")

import functools
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import jax
import jaxtyping
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptoss_jax.cli import main
from gptoss_jax.generation import resident as decoding
from gptoss_jax.generation import streamed as decoding_streamed
from gptoss_jax.healing import reconstruction
from gptoss_jax.healing import resident as healing
from gptoss_jax.healing import streamed as healing_streamed
from gptoss_jax.interface.fingerprint import import_published
from gptoss_jax.run import steps, streamed
from tests import published
from tests.bad_input import BLOCKS, RANKING, SHORT, Program, Refused, dump, table, tree, without_told
from tests.commands import COMMANDS
from tests.made_up import Finished, write_profile

jax.config.update("jax_numpy_rank_promotion", "raise")
# The same examples in every run, on however slow a machine: a test that fails here fails everywhere.
hypothesis.settings.register_profile(
    "project", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("project")

NANO = Path(__file__).resolve().parents[1] / "gptoss_jax" / "nano"
SHARED = Path(__file__).resolve().parents[2] / "shared"


# What makes jitted steps, and keeps the last ones.
KEEPING_STEPS = (
    *(steps.mapped, streamed._jitted),
    *(decoding.mapped, decoding._nothing, decoding_streamed._jitted),
    *(healing._jitted, healing_streamed._jitted, reconstruction._jitted),
)


@pytest.fixture(autouse=True)
def _nothing_traced(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test patches is seen by the steps that it makes, and by no other ones."""
    patches = "monkeypatch" in request.fixturenames
    for make in KEEPING_STEPS if patches else ():
        make.cache_clear()
    yield
    for make in KEEPING_STEPS if patches else ():
        make.cache_clear()


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


# Each with two columns for every thing that a row has.
ROWS = [
    {
        "id": f"r{i}",
        "key": f"k{i}",
        "domain": "ab"[i % 2],
        "topic": "xyz"[i % 3],
        "text": conversation(i),
        "other": conversation(i + 3),
    }
    for i in range(6)
]


@pytest.fixture(scope="session")
def rows_jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rows of two domains."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"id": f"r{i}", "domain": "ab"[i % 2], "text": conversation(i)} for i in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture(scope="session", autouse=True)
def _compiled_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the tests' own processes compile is found by all. Programs that they start find it too, and keep nothing
    there: one that is killed while it writes would leave half a program to the others."""
    base = tmp_path_factory.getbasetemp()
    compiled = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(compiled))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    # Nothing takes so long to compile.
    os.environ.update({"JAX_COMPILATION_CACHE_DIR": str(compiled), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9"})


@pytest.fixture
def shared() -> Path:
    """The folder of real data beside the project; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("the folder of shared data is not here")
    return SHARED


# The program called as its entry point is, with what its commands take.


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Program:
    """Calls the entry point in `tmp_path`; gives exit status, and standard error without what is no error."""

    def call(*argv: object) -> tuple[int, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["gptoss-jax", *map(str, argv)])
        # Users have no checked annotations: what they get must not rest on those of the tests.
        monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        capfd.readouterr()
        status = 0
        # pytest collects warnings; outside of it they would be further lines on standard error.
        with warnings.catch_warnings(record=True) as caught:
            try:
                main()
            except SystemExit as stop:
                status = stop.code if isinstance(stop.code, int) else 1
        shown = [f"{w.message}\n" for w in caught if not issubclass(w.category, DeprecationWarning)]
        return status, without_told(capfd.readouterr().err + "".join(shown))

    return call


@pytest.fixture
def refused(program: Program, tmp_path: Path) -> Refused:
    """Calls the program, which must give status 2 and one line with `says`, and leave `tmp_path` as it was."""

    def call(*argv: object, says: tuple[str, ...] = ()) -> str:
        before = tree(tmp_path)
        status, error = program(*argv)
        changed = {name for name, _ in tree(tmp_path).items() ^ before.items()}
        assert (status, error.count("\n"), changed) == (2, 1, set()), error
        assert error.startswith("gptoss-jax: ")
        assert [text for text in says if text not in error] == [], error
        return error

    return call


@pytest.fixture
def model(tiny_mxfp4: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may break."""
    return Path(shutil.copytree(tiny_mxfp4, tmp_path / "model"))


@pytest.fixture
def ranking(tmp_path: Path) -> Path:
    """A sound ranking for it."""
    return dump(tmp_path / "ranking.json", RANKING)


@pytest.fixture
def keep_sets(tmp_path: Path) -> Path:
    """Sound keep-sets for it."""
    return dump(tmp_path / "kept.json", [[0, 1, 3, 5]] * 4)


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """A profile's folder, without domains and EAFT."""
    folder = tmp_path / "profile"
    folder.mkdir()
    pq.write_table(pa.table(table()), folder / "saliency.parquet")
    return folder


@pytest.fixture
def finished(tmp_path: Path) -> Finished:
    """Writes profiles of made-up numbers into `tmp_path`."""
    return functools.partial(write_profile, tmp_path)


@pytest.fixture
def published_files(tmp_path: Path) -> Path:
    """Published fingerprints of made-up answers."""
    return published.write(tmp_path / "published")


@pytest.fixture
def activations(tmp_path: Path, published_files: Path) -> Path:
    """The dataset that they make."""
    import_published(published_files, published.DOMAINS, out=tmp_path / "activations")
    return tmp_path / "activations"


ONE_STEP = ("--max-seq-length", "64", "--batch-size", "4", "--steps", "1")
SHORTLY = ("--num-rows", "1", "--max-new-tokens", "6")  # enough for a first token of nano's thoughts


def questions(folder: Path) -> Path:
    """Two questions, in the folder."""
    asked = [{"text": f"What is {n} + 7?", "benchmark": "quiz", "category": "sums"} for n in (12, 9)]
    return dump(folder / "questions.json", asked)


def many_rows(folder: Path) -> Path:
    """So many that some are held out."""
    texts = [conversation(i % 7).replace("plus", f"plus {i},") for i in range(30)]
    lines = [json.dumps({"id": f"r{i}", "text": text}) + "\n" for i, text in enumerate(texts)]
    (folder / "many.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder / "many.jsonl"


@pytest.fixture
def argv(
    command: str,
    model: Path,
    rows_jsonl: Path,
    ranking: Path,
    keep_sets: Path,
    profile: Path,
    finished: Finished,
    published_files: Path,
    activations: Path,
    tmp_path: Path,
) -> list[Any]:
    """A command line of each command that would succeed; the test gives `command`, and adds --out where it writes."""
    made = {
        "profile": lambda: ["profile", model, "--data", rows_jsonl, *SHORT],
        "eval": lambda: ["eval", model, "--data", rows_jsonl, "--keep-sets", keep_sets, *BLOCKS],
        "merge": lambda: ["merge", finished("one", 1), finished("two", 2)],
        "prune": lambda: ["prune", model, "--ranking", ranking, "--keep", 4],
        "rank": lambda: ["rank", profile],
        "select": lambda: ["select", profile, "--keep", 4],
        "heal": lambda: ["heal", model, "--keep-sets", keep_sets, "--data", many_rows(tmp_path), *ONE_STEP],
        "convert": lambda: ["convert", model, "--to", "hf", "--format", "bf16"],
        "generate": lambda: ["generate", model, "--prompt", "1 + 1", "--max-new-tokens", 4],
        "report": lambda: ["report", finished("seen", 3)],
        "plan": lambda: ["plan", model, "--topology", "v5e:2x4"],
        "fingerprint record": lambda: ["fingerprint", "record", NANO, "--data", questions(tmp_path), *SHORTLY],
        "fingerprint import": lambda: ["fingerprint", "import", published_files],
        "fingerprint rank": lambda: ["fingerprint", "rank", activations],
    }
    assert made.keys() == COMMANDS.keys(), "a new command joins the tests of crashes and bad input here"
    return made[command]()
