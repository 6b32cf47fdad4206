"""Runs that are killed, and that find no space or other weights half-way, end with --resume as if nothing had been."""
# ruff: noqa: F401, F811  (fixtures are used by name)

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from upath import UPath

from gptoss_jax.files import atomic as outputs
from gptoss_jax.run import progress as resume
from gptoss_jax.run.progress import Progress

from .bad_input import Program, Refused, shard_of, without_told
from .test_interrupted import PROGRAM, no_space, words
from .test_resume import ENGINES, Killed, at_unit, finish, line, made, steps, stop, units, whole

pytestmark = pytest.mark.slow


def killed(argv: list[Any], folder: Path, delay: float) -> int:
    """Exit status of a process that is killed a while after it has kept something."""

    def version() -> Any:
        file = folder / "out.progress" / "state"
        return file.exists() and file.stat().st_mtime_ns

    before = version()
    with subprocess.Popen([*PROGRAM, *words(argv)], cwd=folder) as process:
        while process.poll() is None and version() == before:
            time.sleep(0.001)
        time.sleep(delay)
        process.kill()
    return process.returncode


@ENGINES
def test_from_any_kill(name: str, program: Program, tiny_mxfp4: Path, rows_jsonl: Path, tmp_path: Path) -> None:
    argv = line(name, tiny_mxfp4, rows_jsonl, "--num-rows", 12, "--batch-size", 1)
    expected = whole(program, tmp_path, argv)
    rng = random.Random(name)
    for _ in range(3):
        assert killed([*argv, "--resume"], tmp_path, rng.uniform(0, 0.1)) in (-signal.SIGKILL, 0)
    finish(program, tmp_path, argv, expected)


FULL = [*(("streamed", nth) for nth in (1, 2, 3, 6, 7, 8)), *(("resident", nth) for nth in (1, 2, 3))]


@pytest.mark.parametrize(("name", "nth"), FULL)
def test_no_space(
    name: str,
    nth: int,
    program: Program,
    refused: Refused,
    steps: list[str],
    tiny_mxfp4: Path,
    rows_jsonl: Path,
    tmp_path: Path,
) -> None:
    """For the nth file and all after it."""
    argv = line(name, tiny_mxfp4, rows_jsonl)
    expected, total = whole(program, tmp_path, argv), units(steps)
    real, files = resume.replace_file, []

    def full(file: Path, parts: Any) -> None:
        files.append(file)
        real(file, parts) if len(files) < nth else no_space()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "replace_file", full)
        status, error = program(*argv)
        assert (status, error.count("\n")) == (2, 1) and "out.progress: " in error and "o space left" in error
        kept = (tmp_path / "out.progress").exists()
        assert kept == (nth > 2) and ("kept: the same command with --resume goes on" in error) == kept
        if kept:
            refused(*argv, "--resume", says=("o space left", "--resume goes on"))
    done = Progress(tmp_path / "out").state().units
    steps.clear()
    finish(program, tmp_path, argv, expected)
    assert units(steps) == total - done


def test_no_space_for_the_output(
    program: Program, steps: list[str], tiny_mxfp4: Path, rows_jsonl: Path, tmp_path: Path
) -> None:
    argv = line("streamed", tiny_mxfp4, rows_jsonl, "--eaft")
    expected = whole(program, tmp_path, argv)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        status, error = program(*argv)
    assert (status, error.count("\n")) == (2, 1) and "no space left" in error and "--resume goes on" in error
    steps.clear()
    finish(program, tmp_path, argv, expected)
    assert steps == []


# A small disk of its own, that becomes a larger one.
SMALL_DISK = """mount -t tmpfs -o size=64k none disk; "$@"; echo $?
mount -o remount,size=1m disk; "$@" --resume; echo $?; cp -r disk/. ."""


def test_a_real_disk_that_is_full(program: Program, tiny_mxfp4: Path, rows_jsonl: Path, tmp_path: Path) -> None:
    argv = line("streamed", tiny_mxfp4, rows_jsonl, "--num-rows", 12)
    expected = whole(program, tmp_path, argv)
    (tmp_path / "disk").mkdir()
    namespace = ["unshare", "--map-root-user", "--mount", "sh", "-c", SMALL_DISK, "sh"]
    if (
        not shutil.which("unshare")
        or subprocess.run([*namespace, "true"], cwd=tmp_path, capture_output=True).returncode
    ):
        pytest.skip("file systems cannot be mounted here")
    started = [*namespace, *PROGRAM, *words([*argv, "--out", "disk/out"])]
    done = subprocess.run(started, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split("\n")[0] == "2" and done.stdout.endswith("\n0\n"), done.stdout
    error = without_told(done.stderr)
    assert error.count("\n") == 1 and "o space left" in error and "--resume goes on" in error
    found = made(tmp_path / "out")
    assert found.keys() == expected.keys() and found["saliency.parquet"] == expected["saliency.parquet"]


CHANGES: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda file: os.truncate(file, 1000),
    "touched": lambda file: os.utime(file, (0, 0)),
    "removed": lambda file: file.unlink(),
    "unreadable": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_weights_change_half_way(
    change: Callable[[Path], Any],
    program: Program,
    steps: list[str],
    model: Path,
    rows_jsonl: Path,
    tmp_path: Path,
) -> None:
    argv = line("streamed", model, rows_jsonl)
    expected = whole(program, tmp_path, argv)
    shard, copy = shard_of(model, "model.layers.3.mlp.experts.down_proj_blocks"), tmp_path / "copy"
    shutil.copy(shard, copy)
    with at_unit(1, lambda: change(shard)):
        status, error = program(*argv)
    assert (status, error.count("\n")) == (2, 1) and str(shard) in error and "--resume goes on" in error
    done = Progress(tmp_path / "out").state().units
    assert done >= 2
    shutil.rmtree(shard) if shard.is_dir() else shard.unlink(missing_ok=True)
    copy.rename(shard)
    steps.clear()
    finish(program, tmp_path, argv, expected)
    assert len(steps) == 8 - done


def no_answer(*_: Any) -> None:
    raise RuntimeError("503")


def half_of_it(folder: Path, target: UPath, last: str) -> None:
    copy = target / "report.md"
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes((folder / "report.md").read_bytes()[:100])
    raise Killed


def test_progress_in_a_remote_storage(program: Program, tiny_mxfp4: Path, rows_jsonl: Path, tmp_path: Path) -> None:
    argv = line("streamed", tiny_mxfp4, rows_jsonl, "--eaft", "--activation-gib", 0)
    expected = whole(program, tmp_path, argv)
    bucket = UPath("memory://resume")
    argv = [*argv, "--out", bucket / "runs/there"]
    try:
        stop(program, argv, after=3)
        kept = bucket / "runs/there.progress"
        assert {file.name for file in kept.iterdir()} >= {"run", "state", "batch-1.layer-1"}
        assert not (bucket / "runs/there").exists()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(resume, "replace_file", no_answer)
            status, error = program(*argv, "--resume")
        assert (status, error.count("\n")) == (2, 1) and "there.progress: 503" in error and "goes on" in error
        stop(program, [*argv, "--resume"], after=8)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(outputs, "upload", half_of_it)
            program(*argv, "--resume")
        assert (bucket / "runs/there").exists() and kept.exists()
        assert program(*argv, "--resume") == (0, "")
        assert not kept.exists()
        found = made(bucket / "runs/there")
    finally:
        bucket.fs.rm("/resume", recursive=True)
    for artifacts in (found, expected):  # which name the output
        del artifacts["report.md"], artifacts["profile.json"]["command"]
    assert found == expected
