"""A run that fails, is stopped or runs out of space leaves what was there, and nothing half-made."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from convert import shards

from .bad_input import SHORT, Program, Refused, tree, without_told
from .commands import FINGERPRINTS

pytestmark = pytest.mark.slow

PROGRAM = [sys.executable, "-c", "from gptoss_jax.cli import main; main()"]
# Waits half-way: after the first shard, or where the model would run.
STOPPING = """
import signal

# What runs in the background inherits an ignored SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)

import sys, time
import convert.shards, gptoss_jax.generation.choose, gptoss_jax.pods.plan, gptoss_jax.run.job

def stopping(module, name, first):
    def call(*args):
        first(*args)
        print("now", flush=True)
        time.sleep(60)
    setattr(module, name, call)

write = convert.shards._write_shard
stopping(convert.shards, "_write_shard", lambda *args: list(write(*args)))
stopping(gptoss_jax.run.job, "measure", lambda *args: None)
stopping(gptoss_jax.generation.choose, "load", lambda *args: None)
stopping(gptoss_jax.pods.plan, "compile_step", lambda *args: None)
from gptoss_jax.cli import main
main()
"""
# Commands that write, and of these those that write a folder in several steps, and a checkpoint. What
# `fingerprint record` writes in a second step is made in memory first, where no disk is full.
ALL = pytest.mark.parametrize(
    "command", ["profile", "merge", "prune", "rank", "select", "convert", "report", *FINGERPRINTS]
)
FOLDERS = pytest.mark.parametrize("command", ["profile", "merge", "prune", "convert", "fingerprint import"])
CHECKPOINTS = pytest.mark.parametrize("command", ["prune", "convert"])


@pytest.fixture(params=[False, True], ids=["new", "overwrite"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> list[Any]:
    """--out: what does not exist, or what is to be replaced."""
    if not request.param:
        return ["--out", "out"]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").write_text("mine")
    return ["--out", "old", "--overwrite"]


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def second_fails(real: Callable[..., Any]) -> Callable[..., Any]:
    """Finds no space the second time; before and after it does what it did."""
    calls: list[int] = []

    def call(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return real(*args, **options) if len(calls) != 2 else no_space()

    return call


@pytest.fixture
def undone(program: Program, refused: Refused, tmp_path: Path) -> Refused:
    """As `refused`, but for what profile or fingerprint record has finished, which is kept."""

    def call(*argv: Any, says: tuple[str, ...]) -> str:
        if "profile" not in argv and "record" not in argv:
            return refused(*argv, says=says)
        before = tree(tmp_path)
        status, error = program(*argv)
        (kept,) = tmp_path.glob("*.progress")
        shutil.rmtree(kept)
        assert (status, error.count("\n")) == (2, 1) and tree(tmp_path) == before, error
        assert [text for text in (*says, "the same command with --resume goes on") if text not in error] == [], error
        return error

    return call


@ALL
def test_no_space_at_the_end(argv: list[Any], out: list[Any], monkeypatch: pytest.MonkeyPatch, undone: Refused) -> None:
    monkeypatch.setattr(os, "fsync", no_space)
    undone(*argv, *out, says=(str(out[1]), "no space left", "--out"))


@FOLDERS
def test_no_space_half_way(argv: list[Any], out: list[Any], monkeypatch: pytest.MonkeyPatch, undone: Refused) -> None:
    monkeypatch.setattr(shards, "_write_shard", second_fails(shards._write_shard))
    monkeypatch.setattr(pq, "write_table", second_fails(pq.write_table))
    small = ["--max-shard-size", "100KB"] if argv[0] in ("prune", "convert") else []
    undone(*argv, *out, *small, says=(str(out[1]), "no space left", "--out"))


@CHECKPOINTS
def test_file_too_large(argv: list[Any], out: list[Any], refused: Refused) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        refused(*argv, *out, says=(str(out[1]), "too large"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_late_failure(tiny_mxfp4: Path, out: list[Any], tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "r.txt").write_text("no harmony here")
    refused("profile", tiny_mxfp4, "--data", "r.txt", *SHORT, "--keep", "reply", *out, says=("no token is kept",))


def test_parents_of_a_failed_output(tiny_mxfp4: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "r.txt").write_text("no harmony here")
    refused(
        "profile",
        tiny_mxfp4,
        "--data",
        "r.txt",
        *SHORT,
        "--keep",
        "reply",
        "--out",
        "a/b/out",
        says=("no token is kept",),
    )


@FOLDERS
def test_replacing_fails(argv: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, undone: Refused) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").write_text("mine")
    monkeypatch.setattr(Path, "rename", second_fails(Path.rename))
    undone(*argv, "--out", "old", "--overwrite", says=("old", "no space left"))


@CHECKPOINTS
def test_out_appears_meanwhile(
    argv: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: Program
) -> None:
    real = shards._write_shard

    def slow(*args: Any) -> Iterator[int]:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "file").write_text("another's")
        return real(*args)

    monkeypatch.setattr(shards, "_write_shard", slow)
    status, error = program(*argv, "--out", "out")
    assert (tmp_path / "out" / "file").read_text() == "another's"
    assert (status, error.count("\n")) == (2, 1) and "exists" in error


@CHECKPOINTS
def test_source_that_cannot_be_read(argv: list[Any], monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    def denied(source: Any, *_: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), source.name)

    monkeypatch.setattr(shutil, "copyfileobj", denied)
    refused(*argv, "--out", "out", says=("model/", "permission denied"))


@CHECKPOINTS
@pytest.mark.parametrize("change", [lambda file: os.utime(file, (0, 0)), lambda file: os.truncate(file, 100)])
def test_source_changes_half_way(
    argv: list[Any], model: Path, monkeypatch: pytest.MonkeyPatch, program: Program, change: Callable[[Path], None]
) -> None:
    real = shards._write_shard

    def late(*args: Any) -> Iterator[int]:
        for file in model.glob("*.safetensors"):
            change(file)
        return real(*args)

    monkeypatch.setattr(shards, "_write_shard", late)
    status, error = program(*argv, "--out", "out")
    assert (status, error.count("\n")) == (2, 1) and "model/model-0000" in error and "changed while it was" in error
    assert not list(model.parent.glob("*out*"))


# Real processes from here on.


def words(argv: list[Any]) -> list[str]:
    return [str(word) for word in argv]


STOPS = [
    ("prune", signal.SIGTERM, False),
    ("prune", signal.SIGINT, True),
    ("prune", signal.SIGKILL, False),
    ("prune", signal.SIGKILL, True),
    ("prune", signal.SIGHUP, False),
    ("profile", signal.SIGTERM, True),
    ("convert", signal.SIGTERM, True),
    ("convert", signal.SIGKILL, False),
]


@pytest.mark.parametrize(("command", "stop", "out"), STOPS, indirect=["out"])
def test_signal(argv: list[Any], stop: signal.Signals, out: list[Any], tmp_path: Path) -> None:
    before = tree(tmp_path)
    started = [sys.executable, "-c", STOPPING, *words([*argv, *out])]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(started, cwd=tmp_path, **pipes) as process:
        assert process.stdout is not None and process.stdout.readline() == "now\n"
        process.send_signal(stop)
        _, error = process.communicate()
    assert "Traceback" not in error
    after = tree(tmp_path)
    if stop == signal.SIGKILL:  # which leaves no time for the part to be removed
        assert process.returncode == -stop
        assert any(".partial-" in name for name in after)
        after = {name: content for name, content in after.items() if ".partial-" not in name}
        subprocess.run([*PROGRAM, *words([*argv, *out])], cwd=tmp_path, capture_output=True, check=True)
        assert not any(".partial-" in name for name in tree(tmp_path))
    else:
        assert process.returncode == 128 + stop
    assert after == before


@pytest.mark.parametrize("command", ["generate", "plan"])
def test_a_signal_to_what_writes_nothing(argv: list[Any], tmp_path: Path) -> None:
    before = tree(tmp_path)
    started, pipes = (
        [sys.executable, "-c", STOPPING, *words(argv)],
        {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE},
    )
    with subprocess.Popen(started, cwd=tmp_path, text=True, **pipes) as process:
        assert process.stdout is not None and process.stdout.readline() == "now\n"
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in error
    assert tree(tmp_path) == before


# Stops itself while one thread makes pieces and others write and hash them.
AMIDST = """
import os, signal, sys
import convert.shards

signal.signal(signal.SIGINT, signal.default_int_handler)
real, read, stop = convert.shards.Stored.read, [], int(sys.argv.pop())

def stopping(*args):
    read.append(args)
    if len(read) == 20:
        os.kill(os.getpid(), stop)
    return real(*args)

convert.shards.Stored.read = stopping
from gptoss_jax.cli import main
main()
"""


@CHECKPOINTS
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_signal_amidst_the_pieces(argv: list[Any], stop: signal.Signals, tmp_path: Path) -> None:
    before = tree(tmp_path)
    command = [sys.executable, "-c", AMIDST, *words([*argv, "--out", "out"]), str(int(stop))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (128 + stop, "gptoss-jax: stopped; nothing was written")
    assert tree(tmp_path) == before


# A small or read-only disk of its own, in a mount namespace that ends with the process.
ON_DISK = 'mount -t tmpfs -o "$0" none disk && { "$@"; status=$?; ls -A disk; exit $status; }'


def on_disk(options: str, folder: Path, argv: list[Any]) -> subprocess.CompletedProcess[str]:
    (folder / "disk").mkdir()
    namespace = ["unshare", "--map-root-user", "--mount", "sh", "-c", ON_DISK, options]
    if not shutil.which("unshare") or subprocess.run([*namespace, "true"], cwd=folder, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    return subprocess.run([*namespace, *PROGRAM, *words(argv)], cwd=folder, capture_output=True, text=True)


SMALL = [
    ("profile", "8k", "disk/out.progress: No space left on device: free some"),  # before it has kept anything
    ("prune", "300k", "disk/out: no space left on the device"),
    ("convert", "300k", "disk/out: no space left on the device"),
    ("merge", "8k", "disk/out: no space left on the device"),
    ("fingerprint import", "8k", "disk/out: no space left on the device"),
    ("rank", "4k,nr_inodes=1", "disk/out: no space left on the device"),  # 0k would be no limit
]


@pytest.mark.parametrize(("command", "size", "says"), SMALL)
def test_small_disk(argv: list[Any], size: str, says: str, tmp_path: Path) -> None:
    done = on_disk(f"size={size}", tmp_path, [*argv, "--out", "disk/out"])
    assert (done.returncode, done.stdout, without_told(done.stderr).count("\n")) == (2, "", 1), done.stderr
    assert says in done.stderr


@pytest.mark.parametrize("command", ["merge", "prune", "rank", "select", "convert", "report", *FINGERPRINTS])
def test_read_only_disk(argv: list[Any], tmp_path: Path) -> None:
    done = on_disk("ro", tmp_path, [*argv, "--out", "disk/out"])
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert "disk/out: read-only file system: give an --out" in done.stderr


def test_real_process(model: Path, rows_jsonl: Path, ranking: Path, tmp_path: Path) -> None:
    (model / "tokenizer.json").write_text("{}")
    cases = {
        "gptoss-jax: No such command 'fly'": ["fly"],
        "gptoss-jax: gone: no such folder": ["prune", "gone", "--ranking", ranking, "--keep", 4],
        "gptoss-jax: --batch-size is 'x': give a whole number": [
            "profile",
            model,
            "--data",
            rows_jsonl,
            "--batch-size",
            "x",
        ],
        f"gptoss-jax: {model}: the tokenizer cannot be read": ["profile", model, "--data", rows_jsonl],
    }
    before = tree(tmp_path)
    for start, line in cases.items():
        done = subprocess.run([*PROGRAM, *words(line)], cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
        assert done.stderr.startswith(start)
    assert tree(tmp_path) == before
