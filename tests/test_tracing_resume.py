"""`profile --trace` that is killed, or finds no space, ends with --resume as if nothing had been."""
# ruff: noqa: F811  (fixtures are used by name)

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from upath import UPath

import gptoss_jax as gj
from gptoss_jax.files import atomic
from gptoss_jax.run.progress import Progress

from . import test_resume
from .bad_input import Program, Refused
from .test_interrupted import no_space
from .test_resume import ENGINES, Killed, at_unit, line, made, steps  # noqa: F401
from .test_resume_kills import killed

pytestmark = pytest.mark.slow

COMPILED: dict[Any, dict[Any, Any]] = {}
TRACED = ("--trace", "trace")


@pytest.fixture(autouse=True)
def each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that also give what tokens chose are compiled once, apart from those that do not."""
    monkeypatch.setattr(test_resume, "COMPILED", COMPILED)


def kill() -> None:
    raise Killed


def of_trace(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def whole(program: Program, folder: Path, argv: list[Any]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What the unbroken run makes; leaves nothing."""
    assert program(*argv) == (0, "")
    found = made(folder / "out"), of_trace(folder / "trace")
    for name in ("out", "trace"):
        shutil.rmtree(folder / name)
    return found


def finish(program: Program, folder: Path, argv: list[Any], expected: Any) -> None:
    assert program(*argv, "--resume") == (0, "")
    assert (made(folder / "out"), of_trace(folder / "trace")) == expected
    assert sorted(file.name for file in folder.iterdir()) == ["out", "trace"]


@ENGINES
@pytest.mark.parametrize(
    "more", [(), ("--eaft",), ("--until-stable", 6), ("--pack",)], ids=lambda more: "".join(more[:1])
)
def test_from_any_unit(
    name: str,
    more: tuple[Any, ...],
    program: Program,
    steps: list[str],
    tiny_mxfp4: Path,
    rows_jsonl: Path,
    tmp_path: Path,
) -> None:
    argv = line(name, tiny_mxfp4, rows_jsonl, *TRACED, *more)
    expected = whole(program, tmp_path, argv)

    after = 0
    while True:
        with at_unit(after, kill):
            try:
                assert program(*argv) == (0, "")
                break
            except Killed:
                assert not (tmp_path / "trace").exists()
        if (tmp_path / "out.progress").exists():
            finish(program, tmp_path, argv, expected)
        for file in tmp_path.iterdir():
            shutil.rmtree(file)
        after += 1
    assert after >= 2


@ENGINES
def test_from_any_kill(name: str, program: Program, tiny_mxfp4: Path, rows_jsonl: Path, tmp_path: Path) -> None:
    argv = line(name, tiny_mxfp4, rows_jsonl, "--num-rows", 12, "--batch-size", 1, *TRACED)
    expected = whole(program, tmp_path, argv)
    for delay in (0, 0.03, 0.1):
        assert killed([*argv, "--resume"], tmp_path, delay) in (-signal.SIGKILL, 0)
    finish(program, tmp_path, argv, expected)


@pytest.mark.parametrize("number", range(4))
def test_from_any_output(
    number: int,
    program: Program,
    steps: list[str],
    tiny_mxfp4: Path,
    rows_jsonl: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed before a folder appears or behind it: the trace is first, and is not written twice."""
    argv = line("streamed", tiny_mxfp4, rows_jsonl, *TRACED)
    expected = whole(program, tmp_path, argv)
    rename, seen = Path.rename, []

    def killing(self: Path, target: Any) -> Any:
        seen.append(target)
        if len(seen) > number // 2:
            if number % 2:
                rename(self, target)
            raise Killed
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killing)
        with pytest.raises(Killed):
            program(*argv)
    assert (tmp_path / "trace").exists() == (number > 0) and (tmp_path / "out").exists() == (number > 2)
    steps.clear()
    before = (tmp_path / "trace").stat().st_ino if number else None
    finish(program, tmp_path, argv, expected)
    assert steps == [] and before in (None, (tmp_path / "trace").stat().st_ino)


def test_no_space_for_the_trace(
    program: Program, steps: list[str], tiny_mxfp4: Path, rows_jsonl: Path, tmp_path: Path
) -> None:
    argv = line("resident", tiny_mxfp4, rows_jsonl, *TRACED)
    expected = whole(program, tmp_path, argv)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        status, error = program(*argv)
    assert (status, error.count("\n")) == (2, 1) and "trace: no space left" in error and "--resume goes on" in error
    assert "another --trace" in error and not (tmp_path / "trace").exists()
    steps.clear()
    finish(program, tmp_path, argv, expected)
    assert steps == []


def test_in_a_remote_storage(
    program: Program, steps: list[str], tiny_mxfp4: Path, rows_jsonl: Path, tmp_path: Path
) -> None:
    argv = line("streamed", tiny_mxfp4, rows_jsonl, *TRACED)
    _, expected = whole(program, tmp_path, argv)
    bucket = UPath("memory://tracing")
    argv = [*argv, "--out", bucket / "out", "--trace", bucket / "trace"]
    real = atomic.upload

    def half(folder: Path, target: Any, last: str) -> None:
        (target / "part-00000.parquet").write_bytes(b"half")
        raise Killed

    try:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(atomic, "upload", half)
            program(*argv)
        assert (bucket / "out.progress/routing-0.1.3").exists() and atomic.upload is real
        assert program(*argv)[0] == 2  # half a trace is in the way of a run that does not go on
        assert program(*argv, "--resume") == (0, "")
        found = of_trace(bucket / "trace")
        assert not (bucket / "out.progress").exists() and (bucket / "out" / "profile.json").exists()
    finally:
        bucket.fs.rm("/tracing", recursive=True)
    assert found["part-00000.parquet"] == expected["part-00000.parquet"]


def test_a_run_goes_on_as_it_began(
    program: Program, refused: Refused, tiny_mxfp4: Path, rows_jsonl: Path, tmp_path: Path
) -> None:
    """With its trace or without it, and over no other's."""
    argv = line("streamed", tiny_mxfp4, rows_jsonl)
    assert program(*argv, "--trace", "other", "--out", "one", "--seed", 1)[0] == 0

    with at_unit(1, kill), pytest.raises(Killed):
        program(*argv)
    refused(*argv, "--resume", "--trace", "trace", says=("--trace None, this one True",))
    with at_unit(1, kill), pytest.raises(Killed):
        program(*argv, "--trace", "trace", "--out", "two")
    refused(*argv, "--resume", "--out", "two", says=("--trace True, this one None",))
    refused(
        *argv, "--resume", "--out", "two", "--trace", "other", says=("other: exists already, and is not of this run",)
    )
    # The place of the trace is free to choose.
    assert program(*argv, "--resume", "--out", "two", "--trace", "elsewhere") == (0, "")
    assert len(gj.Trace.open(tmp_path / "elsewhere")) == 6
    refused(
        *argv, "--resume", "--out", "two", "--trace", "new", says=("two: exists already, and its trace new does not",)
    )
    assert program(*argv, "--resume", "--out", "two", "--trace", "elsewhere") == (0, "")
    assert program(*argv, "--resume", "--out", "two", "--trace", "new", "--overwrite") == (0, "")
    assert len(gj.Trace.open(tmp_path / "new")) == 6


def test_what_is_kept_is_damaged(
    program: Program, refused: Refused, tiny_mxfp4: Path, rows_jsonl: Path, tmp_path: Path
) -> None:
    argv = line("streamed", tiny_mxfp4, rows_jsonl, "--trace", "trace")

    with at_unit(3, kill), pytest.raises(Killed):
        program(*argv)
    kept = Progress(tmp_path / "out").folder
    file = kept / "routing-0.0.1"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    status, error = program(*argv, "--resume")
    assert (status, error.count("\n")) == (2, 1) and "routing-0.0.1: is damaged" in error
    file.unlink()
    status, error = program(*argv, "--resume")
    assert (status, error.count("\n")) == (2, 1) and "routing-0.0.1: is damaged" in error
    file.write_bytes(whole)
    assert program(*argv, "--resume") == (0, "") and len(gj.Trace.open(tmp_path / "trace")) == 6
