"""Temporary folders beside an output: whose they are, and what the next run does with those of killed ones."""

import subprocess
import sys
from pathlib import Path

import pytest

from gptoss_jax.errors import OutputError
from gptoss_jax.files.atomic import new_folder

from .bad_input import tree

# A run that is killed: while it writes, or between the two renames by which it replaces what was there.
KILLED = """
import os, signal, sys
from pathlib import Path
from gptoss_jax.files.atomic import new_folder

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

real = Path.rename
Path.rename = lambda source, target: real(source, target) if source.name == "out" else kill()
with new_folder(Path("out"), overwrite=True) as folder:
    (folder / "file").write_text("theirs")
    if sys.argv[1] == "writing":
        kill()
"""


def kill(folder: Path, when: str) -> Path:
    """A run that writes `folder`/out is killed; returns what it leaves."""
    done = subprocess.run([sys.executable, "-c", KILLED, when], cwd=folder)
    assert done.returncode == -9
    (left,) = folder.glob(".out.partial-*")
    return left


def existing(folder: Path) -> Path:
    (folder / "out").mkdir()
    (folder / "out" / "file").write_text("mine")
    return folder / "out"


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_a_killed_run_left_is_removed(tmp_path: Path, overwrite: bool) -> None:
    if overwrite:
        existing(tmp_path)
    assert (kill(tmp_path, "writing") / "new" / "file").exists()
    with new_folder(tmp_path / "out", overwrite) as folder:
        (folder / "file").write_text("new")
    assert tree(tmp_path) == {"out": None, "out/file": b"new"}


def test_a_run_that_is_refused_removes_it_too(tmp_path: Path) -> None:
    existing(tmp_path)
    kill(tmp_path, "writing")
    with pytest.raises(OutputError, match="exists already"), new_folder(tmp_path / "out"):
        pass
    assert tree(tmp_path) == {"out": None, "out/file": b"mine"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_a_killed_run_moved_away_comes_back(tmp_path: Path, overwrite: bool) -> None:
    """Without --overwrite it is then refused; with it, it is there until the new one is complete."""
    out = existing(tmp_path)
    left = kill(tmp_path, "replacing")
    assert not out.exists() and (left / "old" / "file").read_text() == "mine"
    with pytest.raises((OutputError, RuntimeError)), new_folder(out, overwrite):
        assert (out / "file").read_text() == "mine"
        raise RuntimeError
    assert tree(tmp_path) == {"out": None, "out/file": b"mine"}


def test_what_a_killed_run_moved_away_is_not_put_over_another(tmp_path: Path) -> None:
    out = existing(tmp_path)
    kill(tmp_path, "replacing")
    out.mkdir()
    (out / "file").write_text("another's")
    with new_folder(out, overwrite=True) as folder:
        assert (out / "file").read_text() == "another's"
        (folder / "file").write_text("new")
    assert tree(tmp_path) == {"out": None, "out/file": b"new"}


def test_a_link_that_a_killed_run_moved_away_comes_back(tmp_path: Path) -> None:
    """It points to nowhere from where it waits."""
    (tmp_path / "there").mkdir()
    (tmp_path / "out").symlink_to("there")
    kill(tmp_path, "replacing")
    with pytest.raises(OutputError, match="exists already"), new_folder(tmp_path / "out"):
        pass
    assert tree(tmp_path) == {"there": None, "out": b"there"}


def test_a_living_run_keeps_its_folder(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="exists already"), new_folder(tmp_path / "out") as first:
        (first / "file").write_text("first")
        with new_folder(tmp_path / "out") as second:
            (second / "file").write_text("second")
            assert (first / "file").read_text() == "first"
    assert tree(tmp_path) == {"out": None, "out/file": b"second"}


def test_a_run_of_another_process_keeps_its_folder(tmp_path: Path) -> None:
    living = """
import sys
from pathlib import Path
from gptoss_jax.files.atomic import new_folder
with new_folder(Path("out")) as folder:
    (folder / "file").write_text("first")
    print("now", flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", living]
    with subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "now\n"
        with pytest.raises(RuntimeError), new_folder(tmp_path / "out"):
            raise RuntimeError
        process.communicate("")
    assert process.returncode == 0
    assert tree(tmp_path) == {"out": None, "out/file": b"first"}


def test_folders_of_other_outputs_stay(tmp_path: Path) -> None:
    """Those of names that begin alike, that hold a pattern's signs, and what users call alike."""
    for name in (".out.partial-x.partial-abcdefgh", ".outs.partial-abcdefgh", ".o.partial-abcdefgh", ".out.partial-x"):
        (tmp_path / name / "new").mkdir(parents=True)
    (tmp_path / ".out.partial-abcdefgh").write_text("a file")
    before = tree(tmp_path)
    for name in ("out", "*", "[o]"):
        with new_folder(tmp_path / name):
            pass
        (tmp_path / name).rmdir()
    assert tree(tmp_path) == before


def test_where_folders_have_no_locks_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import fcntl

    def none(*_: object) -> None:
        raise OSError(errno.EBADF, "as NFS says")

    kill(tmp_path, "writing")
    before = tree(tmp_path)
    monkeypatch.setattr(fcntl, "flock", none)
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("new")
    assert tree(tmp_path) == before | {"out": None, "out/file": b"new"}


def test_a_folder_that_was_just_made_stays(tmp_path: Path) -> None:
    """Its run may not have come to lock it yet."""
    (tmp_path / ".out.partial-abcdefgh").mkdir()
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("new")
    assert tree(tmp_path) == {".out.partial-abcdefgh": None, "out": None, "out/file": b"new"}
