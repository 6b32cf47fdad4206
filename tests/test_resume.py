"""A run that was killed goes on with --resume, and ends with the bytes of one that was not."""

import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.numpy

from experiments.bench.kills import FIGURES, THROUGHPUT
from gptoss_jax.errors import ResumeError
from gptoss_jax.files.atomic import replace_file
from gptoss_jax.run import engine, memory
from gptoss_jax.run import progress as resume
from gptoss_jax.run import steps as forward
from gptoss_jax.run.engine import Unit
from gptoss_jax.run.progress import Progress, State
from gptoss_jax.statistics.sums import Statistics

from .bad_input import Program, Refused
from .test_interrupted import no_space

pytestmark = pytest.mark.slow

ENGINES = pytest.mark.parametrize("name", ["streamed", "resident"])
COMPILED: dict[Any, dict[Any, Any]] = {}
mapped = functools.cache(forward.mapped)


class Killed(BaseException):
    """Goes past everything that handles errors, as SIGKILL does."""


@pytest.fixture(autouse=True)
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the steps that ran. Each is compiled once for all tests."""
    ran: list[str] = []
    real_call, real_prepare = engine.Timed.__call__, engine.Timed.prepare

    def function(step: engine.Timed) -> Any:
        return getattr(step.step.__wrapped__, "func", step.step)

    def call(self: engine.Timed, *arguments: Any) -> Any:
        ran.append(function(self).__name__)
        return real_call(self, *arguments)

    def prepare(self: engine.Timed, *arguments: Any) -> None:
        self.compiled = COMPILED.setdefault(function(self), {})
        real_prepare(self, *arguments)

    monkeypatch.setattr(engine.Timed, "__call__", call)
    monkeypatch.setattr(engine.Timed, "prepare", prepare)
    monkeypatch.setattr(forward, "mapped", mapped)
    monkeypatch.setattr(resume, "SHARE", 0)  # what the resident engine has finished is kept after every unit
    return ran


def units(steps: list[str]) -> int:
    return len(steps) - steps.count("score_step")


def line(engine: str, model: Path, rows: Path, *more: Any) -> list[Any]:
    """A run of two batches."""
    argv = ["profile", model, "--data", rows, "--out", "out", "--engine", engine]
    return [*argv, "--max-seq-length", 64, "--num-rows", 6, "--batch-size", 3, *more]


def made(folder: Any) -> dict[str, Any]:
    """All artifacts, without what is measured."""
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    files["profile.json"] = {k: v for k, v in json.loads(files["profile.json"]).items() if k not in FIGURES}
    files["report.md"] = [x for x in files["report.md"].splitlines() if not x.startswith(THROUGHPUT)]
    return files


def whole(program: Program, folder: Path, argv: list[Any]) -> dict[str, Any]:
    """What the unbroken run makes; leaves nothing."""
    assert program(*argv) == (0, "")
    artifacts = made(folder / "out")
    shutil.rmtree(folder / "out")
    return artifacts


@contextmanager
def at_unit(number: int, act: Callable[[], Any]) -> Iterator[None]:
    """Act when so many units are kept, and the next one has just been computed."""
    real, kept = Progress.save, []

    def save(self: Progress, state: State, always: bool) -> None:
        if len(kept) == number:
            act()
        kept.append(state.units)
        real(self, state, always)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "save", save)
        yield


def stop(program: Program, argv: list[Any], after: int) -> None:
    """Run, and be killed when so many units are kept."""

    def kill() -> None:
        raise Killed

    with at_unit(after, kill), pytest.raises(Killed):
        program(*argv)


def finish(program: Program, folder: Path, argv: list[Any], expected: dict[str, Any]) -> None:
    assert program(*argv, "--resume") == (0, "")
    assert made(folder / "out") == expected
    assert sorted(file.name for file in folder.glob("*out*")) == ["out"]


# What is kept.


def state_of(seed: int) -> State:
    """One after two units of a pass with scores, and one of the second pass."""
    rng = np.random.default_rng(seed)

    def unit(layer: int) -> Unit:
        sizes = {"G": 2, "J": 2, "E": 7, "k": 3, "b": 200}
        statistics = Statistics.of(lambda _, s: rng.normal(size=(1, *(sizes[x] for x in s.axes.split()))))
        scores = rng.normal(size=(3, 64, 2)).astype(np.float32)
        return Unit(first_layer=layer, tokens=5.25, statistics=statistics, scores=scores)

    state = State(seconds=1 / 3, compile_seconds=0.1)
    for layer in (0, 3):
        state.add(unit(layer), 4)
    state.weighting, state.units = "eaft", 0
    state.add(unit(2), 4)
    return state


def test_a_state_comes_back(tmp_path: Path) -> None:
    progress, state = Progress(tmp_path / "out"), state_of(0)
    progress.begin({"--dtype": "float32", "mesh": (1, 2)}, resume=False)
    assert progress.begun() is None and progress.state() == State()
    progress.save(state, always=True)
    back = Progress(tmp_path / "out").state()
    assert back.to_bytes() == state.to_bytes() and back.units == 1 and back.tokens == 15.75
    assert progress.begun() == {"--dtype": "float32", "mesh": [1, 2]}
    back.add(Unit(0, 1.0, state.statistics), 4)  # can be added to
    progress.begin({"--dtype": "float32", "mesh": (1, 2)}, resume=True)
    progress.remove()
    assert not list(tmp_path.iterdir())


def test_scores_come_back_in_the_order_of_their_batches() -> None:
    """And not in that of their names, in which the eleventh batch stands before the third."""
    state = State(scores=[np.full((1, 2, 2), batch, np.float32) for batch in range(24)])
    back = State.from_bytes(state.to_bytes())
    assert [scores[0, 0, 0] for scores in back.scores] == [*range(24)]


def test_a_file_is_whole(tmp_path: Path) -> None:
    progress, file = Progress(tmp_path / "out"), tmp_path / "out.progress" / "state"
    progress.write("state", b"first")
    data = file.read_bytes()
    with pytest.raises(TypeError):
        replace_file(file, [b"half", None])  # type: ignore[list-item]
    assert file.read_bytes() == data
    progress.write("state", b"second")
    found = progress.read("state")
    assert found is not None and found.tobytes() == b"second"
    assert sorted(file.name for file in file.parent.iterdir()) == ["run", "state"]
    (file.parent / "other").mkdir()
    with pytest.raises(ResumeError, match=r"other: cannot be read: .*directory"):
        progress.read("other")
    assert progress.read("none") is None


def test_what_is_of_no_run_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A removal that was killed leaves the settings, or nothing."""
    progress, real = Progress(tmp_path / "out"), Path.unlink
    progress.write("state", state_of(0).to_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda path: real(path) if path.name != "run" else no_space())
        progress.remove()
    assert [file.name for file in progress.folder.iterdir()] == ["run"] and progress.state() == State()
    progress.write("state", state_of(0).to_bytes())
    (progress.folder / "run").unlink()
    with pytest.raises(ResumeError, match=r"out\.progress: is no unfinished run: remove that folder, or"):
        progress.begin({}, resume=True)


def test_saving_takes_a_small_part_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, kept = [100.0], []
    monkeypatch.setattr(resume, "SHARE", 20)
    monkeypatch.setattr(resume, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def write(self: Progress, name: str, data: Any) -> None:
        kept.append(now[0])
        now[0] += 0.5

    monkeypatch.setattr(Progress, "write", write)
    progress = Progress(tmp_path / "out")
    for _ in range(25):
        progress.save(State(), always=False)
        now[0] += 1
    assert kept == [100.0, 110.5, 121.0]
    progress.save(State(), always=True)
    assert len(kept) == 4


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"1",
        b"{}",
        b'{"--dtype": "float32"}',  # as those of before have it
        b'{"version": 1, "settings": {}}',
        b'{"version": 2}',
        b'{"version": 2, "settings": []}',
        b"\xff",
        b"[" * 10**5,
    ],
)
def test_settings_of_another_version_are_one_line(tmp_path: Path, content: bytes) -> None:
    progress = Progress(tmp_path / "out")
    progress.write("state", state_of(0).to_bytes())
    progress.write("run", content)
    with pytest.raises(ResumeError, match=r"out\.progress: another version of this program .* remove that folder"):
        progress.begin({}, resume=True)


@pytest.mark.parametrize("change", ["numbers", "statistic", "weighting", "more"])
def test_a_state_of_another_version_is_one_line(tmp_path: Path, change: str) -> None:
    progress = Progress(tmp_path / "out")
    arrays = safetensors.numpy.load(state_of(0).to_bytes())
    numbers = {"weighting": "eaft", "units": 1, "tokens": 1.0, "seconds": 1.0, "compile_seconds": 1.0}
    numbers |= {"curve": [], "kept": []}
    if change == "numbers":
        del numbers["units"]
    elif change == "statistic":
        del arrays["count"]
    elif change == "weighting":
        arrays["weighted/unknown"] = arrays.pop("weighted/eaft")
    else:
        arrays["a_newer_statistic"] = arrays["count"]
    progress.write("state", safetensors.numpy.save(arrays, {"numbers": json.dumps(numbers)}))
    with pytest.raises(ResumeError, match=r"out\.progress: another version of this program keeps"):
        progress.state()


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "flipped": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    "digest": lambda data: bytes([data[0] ^ 128]) + data[1:],
    "truncated": lambda data: data[:-1],
    "digest-alone": lambda data: data[:32],
    "empty": lambda data: b"",
    "garbage": lambda data: os.urandom(100),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_one_line(
    damage: Callable[[bytes], bytes],
    program: Program,
    refused: Refused,
    tiny_mxfp4: Path,
    rows_jsonl: Path,
    tmp_path: Path,
) -> None:
    """Nothing more is lost: with the file as it was the run goes on."""
    argv = line("streamed", tiny_mxfp4, rows_jsonl)
    expected = whole(program, tmp_path, argv)
    stop(program, argv, after=3)
    kept = tmp_path / "out.progress"
    late = "batch-0.layer-2"  # is read when one more unit is finished
    assert {file.name for file in kept.iterdir()} >= {"run", "state", "batch-1.layer-1", late}
    for name in ("run", "state", "batch-1.layer-1"):
        data = (kept / name).read_bytes()
        (kept / name).write_bytes(damage(data))
        error = refused(*argv, "--resume", says=(f"out.progress/{name}: is damaged", "remove that folder"))
        assert "goes on" not in error
        (kept / name).write_bytes(data)
    data = (kept / late).read_bytes()
    (kept / late).write_bytes(damage(data))
    status, error = program(*argv, "--resume")
    assert (status, error.count("\n")) == (2, 1) and f"{late}: is damaged" in error
    (kept / late).write_bytes(data)
    finish(program, tmp_path, argv, expected)


def test_a_state_of_another_version(
    program: Program, refused: Refused, tiny_mxfp4: Path, rows_jsonl: Path, tmp_path: Path
) -> None:
    argv = line("resident", tiny_mxfp4, rows_jsonl)
    stop(program, argv, after=1)
    progress = Progress(tmp_path / "out")
    data = progress.read("state")
    assert data is not None
    for other in (
        b"none",
        data.tobytes().replace(b"weighting", b"weighings"),
        data.tobytes().replace(b"norm_max", b"norm_min"),
    ):
        progress.write("state", other)
        refused(*argv, "--resume", says=("out.progress: another version", "remove that folder"))


# Which runs go on.


def test_other_settings(
    program: Program, refused: Refused, tiny_mxfp4: Path, tiny_bf16: Path, rows_jsonl: Path, tmp_path: Path
) -> None:
    argv = line("streamed", tiny_mxfp4, rows_jsonl)
    expected = whole(program, tmp_path, argv)
    stop(program, argv, after=3)
    other = tmp_path / "rows.jsonl"
    other.write_text(rows_jsonl.read_text().replace("Adding", "Subtracting"))
    for more, name in {
        ("--dtype", "float32"): "--dtype 'bfloat16', this one 'float32'",
        ("--max-seq-length", 32): "--max-seq-length 64, this one 32",
        ("--engine", "resident"): "--engine 'streamed', this one 'resident'",
        ("--num-rows", 5): "--num-rows 6, this one 5",
        ("--data", other): "the rows'",
        ("--domain-column", "domain"): "--domain-column None, this one 'domain'",
        ("--eaft",): "--eaft False, this one True",
        ("--swap",): "--swap False, this one True",
    }.items():
        refused(*argv, *more, "--resume", says=("out.progress: the unfinished run has", name, "remove that folder"))
    refused(*line("streamed", tiny_bf16, rows_jsonl), "--resume", says=("the model's fingerprint",))
    refused(*argv, says=("out.progress: holds an unfinished run: --resume", "remove that folder"))
    refused(*argv, "--overwrite", says=("holds an unfinished run",))
    other.unlink()
    finish(program, tmp_path, argv, expected)


def test_a_finished_run_is_complete(
    program: Program, refused: Refused, steps: list[str], tiny_mxfp4: Path, rows_jsonl: Path, tmp_path: Path
) -> None:
    argv = line("streamed", tiny_mxfp4, rows_jsonl)
    stop(program, argv, after=3)
    shutil.copytree(tmp_path / "out.progress", tmp_path / "copy")
    assert program(*argv, "--resume") == (0, "")  # nothing is lost where there is nothing, either
    expected = made(tmp_path / "out")
    steps.clear()
    finish(program, tmp_path, argv, expected)
    shutil.move(tmp_path / "copy", tmp_path / "out.progress")  # killed before it was removed
    finish(program, tmp_path, argv, expected)
    finish(program, tmp_path, [*argv, "--overwrite"], expected)
    refused(*argv, "--dtype", "float32", "--resume", says=("out: exists already, and is not of this run", "--out"))
    assert steps == []
    # An unfinished run of other settings, which is to replace it, is not lost.
    stop(program, [*argv, "--eaft", "--overwrite"], after=3)
    refused(*argv, "--resume", says=("--eaft True",))
    (tmp_path / "out" / "profile.json").write_text("{}")
    refused(*argv, "--resume", says=("out: exists already",))


def test_a_run_that_replaces(program: Program, tiny_mxfp4: Path, rows_jsonl: Path, tmp_path: Path) -> None:
    argv = line("streamed", tiny_mxfp4, rows_jsonl, "--eaft", "--overwrite")
    expected = whole(program, tmp_path, argv)
    assert program(*line("streamed", tiny_mxfp4, rows_jsonl)) == (0, "")
    stop(program, argv, after=9)
    finish(program, tmp_path, argv, expected)


def test_what_the_user_leaves_open_stays(
    program: Program, steps: list[str], tiny_mxfp4: Path, rows_jsonl: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Memory may be another one when the run goes on."""
    argv = ["profile", tiny_mxfp4, "--data", rows_jsonl, "--out", "out", "--max-seq-length", 64, "--num-rows", 6]
    with monkeypatch.context() as patch:
        patch.setattr(memory, "available", lambda: 0)
        patch.setattr(memory, "streamed_tokens", lambda *_: 3 * 64)
        expected = whole(program, tmp_path, argv)
        stop(program, argv, after=3)
    steps.clear()
    for _ in range(2):  # the second time it is complete
        assert program(*argv, "--resume") == (0, "")
        assert made(tmp_path / "out") == expected and steps == ["layer_step"] * 5
    assert "free memory" in expected["profile.json"]["engine_reason"]


# From any moment.


class Moment(NamedTuple):
    """What a kill leaves, and how many units had run."""

    left: Path
    ran: int

    def lay(self, folder: Path, total: int) -> int:
        """Have it left in `folder`; returns how many of all units need not run again."""
        for file in folder.glob("*out*"):
            shutil.rmtree(file)
        shutil.copytree(self.left, folder, dirs_exist_ok=True)
        state = Progress(folder / "out").state()
        return total if (folder / "out").exists() else state.units + bool(state.weighting) * total // 2


def moments(program: Program, steps: list[str], folder: Path, argv: list[Any]) -> list[Moment]:
    """Run, and keep what a kill would leave whenever a file of the progress or the output is about to change."""
    kept: list[Moment] = []

    def before(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(path: Path, *arguments: Any, **options: Any) -> Any:
            left = folder / "moments" / str(len(kept))
            for file in folder.glob("*out*"):
                shutil.copytree(file, left / file.name)
            if name == "replace_file" and len(kept):
                (left / "out.progress" / f".{path.name}.new").write_bytes(b"half")
            left.mkdir(parents=True, exist_ok=True)
            kept.append(Moment(left, units(steps)))
            return real(path, *arguments, **options)

        patch.setattr(owner, name, call)

    with pytest.MonkeyPatch.context() as patch:
        before(resume, "replace_file")
        before(Path, "unlink")
        before(Path, "rename")
        assert program(*argv) == (0, "")
    return kept


WAYS = {"plain": ((), 1), "both": (("--eaft", "--swap"), 5), "pack": (("--pack", "--batch-size", 4), 5)}


@ENGINES
@pytest.mark.parametrize(("way", "stride"), WAYS.values(), ids=WAYS)
def test_from_any_moment(
    name: str,
    way: tuple[str, ...],
    stride: int,
    program: Program,
    steps: list[str],
    tiny_mxfp4: Path,
    rows_jsonl: Path,
    tmp_path: Path,
) -> None:
    argv = line(name, tiny_mxfp4, rows_jsonl, *way)
    kept = moments(program, steps, tmp_path, argv)
    expected, total = made(tmp_path / "out"), units(steps)
    assert len(kept) > total
    for moment in kept[::stride]:
        done = moment.lay(tmp_path, total)
        assert 0 <= moment.ran - done <= 1
        steps.clear()
        finish(program, tmp_path, argv, expected)
        assert units(steps) == total - done


@ENGINES
def test_rows_in_portions_go_on_in_the_portion_at_work(
    name: str, program: Program, steps: list[str], tiny_mxfp4: Path, rows_jsonl: Path, tmp_path: Path
) -> None:
    """Of 6 rows the portions end with 1, 2, 3 and 6; they are killed within each, and where one has just ended."""
    argv = line(name, tiny_mxfp4, rows_jsonl, "--keep", "assistant", "--until-stable", 1)
    expected, total = whole(program, tmp_path, argv), units(steps)
    assert len(expected["profile.json"]["until_stable"]["curve"]) == total // (4 if name == "streamed" else 1) == 4
    for after in range(1, total, 3 if name == "streamed" else 1):
        stop(program, argv, after)
        finish(program, tmp_path, argv, expected)
        shutil.rmtree(tmp_path / "out")


def test_scores_of_many_batches_weigh_their_own_tokens(
    program: Program, tiny_mxfp4: Path, rows_jsonl: Path, tmp_path: Path
) -> None:
    """Killed amidst the second pass, when the scores of twelve batches are kept."""
    argv = line("resident", tiny_mxfp4, rows_jsonl, "--eaft", "--num-rows", 12, "--batch-size", 1)
    expected = whole(program, tmp_path, argv)
    stop(program, argv, after=13)
    finish(program, tmp_path, argv, expected)
