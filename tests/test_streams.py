"""Standard streams that are closed or full: a complete output is no failure, and what is asked for there is not lost
in silence."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def shell(line: str, folder: Path) -> tuple[int, str]:
    """Status of the program and standard error of a shell's line, in which "$@" is the program."""
    program = [sys.executable, "-c", "from gptoss_jax.cli import main; main()"]
    command = ["bash", "-c", f"PYTHONPATH={ROOT} {line}; exit ${{PIPESTATUS[0]}}", "bash", *program]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stderr


@pytest.mark.parametrize("streams", [">&-", "> /dev/full", "2>&-", "2> /dev/full", ">&- 2>&- <&-", "| true"])
def test_a_complete_output_is_no_failure(streams: str, profile: Path, tmp_path: Path) -> None:
    assert shell('"$@" rank profile --out wanted.json', tmp_path)[0] == 0
    assert shell(f'"$@" rank profile --out ranking.json {streams}', tmp_path) == (0, "")
    assert (tmp_path / "ranking.json").read_bytes() == (tmp_path / "wanted.json").read_bytes()


@pytest.mark.parametrize("streams", ["2>&-", "2> /dev/full", "2>&- >&-"])
def test_bad_input_has_its_status_though_nobody_is_told(streams: str, tmp_path: Path) -> None:
    assert shell(f'"$@" rank nothing {streams}', tmp_path) == (2, "")


@pytest.mark.parametrize("streams", [">&-", "> /dev/full"])
@pytest.mark.parametrize("words", ["--version", "rank --help"])
def test_what_is_asked_for_on_standard_output_is_not_lost_in_silence(words: str, streams: str, tmp_path: Path) -> None:
    status, error = shell(f'"$@" {words} {streams}', tmp_path)
    assert (status, error.count("\n")) == (2, 1), error
    assert "standard output cannot be written" in error


@pytest.mark.slow
@pytest.mark.parametrize("streams", [">&-", "> /dev/full"])
def test_a_reply_is_not_lost_in_silence(streams: str, tiny_mxfp4: Path, tmp_path: Path) -> None:
    words = f"generate {tiny_mxfp4} --prompt 1 --prompt 2 --max-new-tokens 2"
    status, error = shell(f'"$@" {words} {streams}', tmp_path)
    assert (status, error.count("\n")) == (2, 1), error
    assert "standard output cannot be written" in error


def test_a_reader_that_has_enough_is_left_in_peace(tmp_path: Path) -> None:
    status, error = shell('"$@" profile --help | true', tmp_path)
    assert error == "" and status in (0, 1)  # it may have ended before the pipe did


# Threads of this process, and what adds to them: a thread of PyArrow's that outlives what it read aborts the program.
COUNT = """
import os
import pyarrow.parquet, pyarrow.dataset
from pathlib import Path
from gptoss_jax.files.parquet import read_parquet

data = Path("profile/saliency.parquet").read_bytes()
before = len(os.listdir("/proc/self/task"))
table = {}
assert table.num_rows == 28
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted as Linux lists them")
@pytest.mark.parametrize(
    ("table", "adds"),
    [("read_parquet(data)", False), ('pyarrow.parquet.read_table("profile/saliency.parquet")', True)],
)
def test_tables_are_read_in_the_thread_that_asks(table: str, adds: bool, profile: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", COUNT.format(table)]
    counted = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert counted.returncode == 0, counted.stderr
    assert (int(counted.stdout) > 0) == adds
