"""Real processes on loopback, with several CPU devices each, as one run."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from jax.sharding import Mesh

from experiments import checkpoints, tokenizers
from gptoss_jax.cli import cli
from gptoss_jax.config import TINY
from gptoss_jax.devices import hosts
from gptoss_jax.errors import HostsError
from gptoss_jax.run.progress import Progress

from .bad_input import Refused, poke, tree, without_told
from .conftest import conversation
from .devices import seen
from .test_profile import run_profile
from .test_resume import made

pytestmark = pytest.mark.slow

# What the `expert` axis splits is divisible by 8, and the other dimensions differ from one another.
CONFIG = replace(TINY, num_heads=48, num_kv_heads=16, num_experts=24)
OPTIONS = ["--domain-column", "domain", "--max-seq-length", "64", "--keep", "assistant"]
PATIENCE = 180  # seconds for what a slow machine may take long for
LAST_WORDS = 10  # seconds, more than a process waits for the words of others
STOP = 60  # seconds in which processes must stop that lost one
WAIT = 12  # seconds that processes wait here for one that does not come
# The program, which waits for a signal in the n-th call of a function.
CHILD = """
import signal, sys, time
import gptoss_jax.devices.hosts

gptoss_jax.devices.hosts.START_TIMEOUT = int(sys.argv.pop(1))

# What runs in the background inherits an ignored SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)

def wait_in(owner, name, nth, seconds=600):
    real, calls = getattr(owner, name), []
    def call(*args, **options):
        calls.append(1)
        if len(calls) == nth:
            print("now", flush=True)
            time.sleep(seconds)
        return real(*args, **options)
    setattr(owner, name, call)

moment = sys.argv.pop(1)
if moment == "start":
    import jax
    wait_in(jax.distributed, "initialize", 1, seconds=0)
if moment == "loading":
    import gptoss_jax.run.choose
    wait_in(gptoss_jax.run.choose, "load", 1)
if moment in ("step", "late step"):
    import gptoss_jax.run.engine
    wait_in(gptoss_jax.run.engine.Timed, "__call__", 2 if moment == "step" else 6)
if moment == "sixth batch":
    import gptoss_jax.healing.training
    wait_in(gptoss_jax.healing.training, "_order", 6)
from gptoss_jax.cli import main
main()
"""


class Process:
    """The program, in a folder and a process group of its own."""

    def __init__(self, cwd: Path, argv: list[Any], variables: dict[str, str], moment: str, wait: int):
        self.cwd, self.out, self.err = cwd, cwd.with_suffix(".out"), cwd.with_suffix(".err")
        cwd.mkdir(exist_ok=True)
        with open(self.out, "w") as out, open(self.err, "w") as err:
            started = [sys.executable, "-c", CHILD, str(wait), moment, *map(str, argv)]
            pipes: Any = {"stdout": out, "stderr": err, "start_new_session": True}
            self.popen = subprocess.Popen(started, cwd=cwd, env=os.environ | variables, **pipes)

    def wait_for_moment(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while "now\n" not in self.out.read_text():
            assert self.popen.poll() is None and time.monotonic() < deadline, self.err.read_text()
            time.sleep(0.05)

    def end(self, timeout: float = PATIENCE) -> tuple[int, str]:
        """Exit status and standard error."""
        return self.popen.wait(timeout), self.err.read_text()

    def done(self) -> bool:
        """Whether the process ends well, with nothing to say but what process 0 says before its first step."""
        status, error = self.end()
        assert (status, without_told(error)) == (0, ""), error
        return True

    def refused(self, timeout: float = PATIENCE) -> str:
        """The one line of a process that stops with status 2."""
        status, error = self.end(timeout)
        error = without_told(error)
        assert (status, error.count("\n"), error.startswith("gptoss-jax: ")) == (2, 1, True), error
        return error


Run = Callable[..., list[Process]]


@contextmanager
def running(folder: Path) -> Iterator[Run]:
    """Starts processes with the same arguments, in folders named by their number; none outlives the block."""
    processes: list[Process] = []

    def start(
        *argv: Any,
        devices: int = 4,
        ids: tuple[int, ...] = (0, 1),
        of: int | None = None,
        moments: Any = None,
        own: Any = None,
        slurm: bool = False,
        wait: int = PATIENCE,
    ) -> list[Process]:
        port = free_port()
        for i in ids:
            # Many clusters have a proxy, which does not lead from host to host.
            variables = {"http_proxy": "http://127.0.0.1:9"} | seen(devices)
            where = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", of or len(ids), "--process-id", i]
            if slurm:
                where = ["--coordinator", "auto"]
                variables |= {"JAX_COORDINATOR_PORT": str(port), "SLURM_JOB_ID": "1", "SLURM_NTASKS": str(len(ids))}
                variables |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}
            line = [*argv, *where, *(own or {}).get(i, ())]
            processes.append(Process(folder / str(i), line, variables, (moments or {}).get(i, ""), wait))
        return processes[-len(ids) :]

    yield start
    for process in processes:
        if process.popen.poll() is None:
            os.killpg(process.popen.pid, signal.SIGKILL)
            process.popen.wait()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with running(tmp_path) as start:
        yield start


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    folder.mkdir()
    checkpoints.write_random(folder, CONFIG, mxfp4=False, seed=1, max_shard_bytes=10**6)
    tokenizers.write_small(folder, CONFIG.vocab_size)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """27 rows of two domains: two processes have shares of 14 and 13."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [{"id": f"r{i}", "domain": "ab"[i % 2], "text": conversation(i % 11)} for i in range(27)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def test_generates_as_one_process(model: Path, run: Run, tmp_path: Path) -> None:
    """Process 0 speaks, of prompts that all have; which differ is said by both."""
    asked = ["generate", model, "--prompt", "Hi", "--prompt", "What is 2?", "--prompt", "Why?", "--max-new-tokens", 9]
    asked += ["--temperature", 0, "--dtype", "float32"]
    alone = CliRunner().invoke(cli, list(map(str, asked)), catch_exceptions=False)
    processes = run(*asked, devices=2)
    assert [process.end()[0] for process in processes] == [0, 0]
    first, second = (process.out.read_text() for process in processes)
    assert first.endswith(alone.stdout) and "--- 1" not in second  # the collectives of CPUs print there too
    for process in run(*asked, devices=2, own={1: ("--seed", 3)}):
        assert "--seed" in process.refused()


def test_eliminates_as_one_process(model: Path, run: Run, tmp_path: Path) -> None:
    """Rows and experts of two processes; process 0 writes."""
    lines = [json.dumps({"id": str(i), "text": conversation(i)}) + "\n" for i in range(8)]
    (tmp_path / "some.jsonl").write_text("".join(lines), encoding="utf-8")
    asked = ["select", model, "--rule", "greedy", "--data", tmp_path / "some.jsonl", "--keep", 8, "--batch-size", 8]
    asked += ["--max-seq-length", 64, "--dtype", "float32"]
    alone = CliRunner().invoke(cli, [*map(str, asked), "--out", str(tmp_path / "alone.json")], catch_exceptions=False)
    assert alone.exit_code == 0, alone.stderr
    first, second = run(*asked, "--mesh", "data=2,expert=2", "--out", tmp_path / "there.json", devices=2)
    assert first.end()[0] == 0 and "layers' outputs move by" in first.err.read_text()
    assert second.done()
    ours, theirs = (json.loads((tmp_path / f"{name}-ranking.json").read_text()) for name in ("there", "alone"))
    assert ours["layers"] == theirs["layers"]
    for one, other in zip(ours["losses"], theirs["losses"], strict=True):
        np.testing.assert_allclose(one[1:], other[1:], rtol=1e-4, atol=1e-6 * other[1])  # the first to go cost little


def test_heals_as_one_process(model: Path, rows: Path, run: Run, tmp_path: Path) -> None:
    """All processes have all rows, each the part of a batch that its devices hold; process 0 writes, and what it has
    kept is enough for all to go on."""
    (tmp_path / "half.json").write_text(json.dumps([list(range(0, 24, 2))] * CONFIG.num_layers))
    asked = ["heal", model, "--keep-sets", tmp_path / "half.json", "--data", rows, "--max-seq-length", 64]
    asked += ["--batch-size", 4, "--steps", 8, "--check-every", 4, "--train", "small", "--reconstruct", "biases"]
    asked += ["--dtype", "float32", "--tokens", "all"]
    alone = CliRunner().invoke(cli, [*map(str, asked), "--out", str(tmp_path / "alone")], catch_exceptions=False)
    assert alone.exit_code == 0, alone.stderr
    there = [*asked, "--mesh", "data=2,expert=2", "--out", tmp_path / "there"]
    for process in (killed := run(*there, devices=2, moments={0: "sixth batch", 1: "sixth batch"})):
        process.wait_for_moment()
    for process in killed:
        os.killpg(process.popen.pid, signal.SIGKILL)
        process.popen.wait()
    assert (tmp_path / "there.progress" / "training").exists() and not (tmp_path / "there").exists()
    first, second = run(*there, "--resume", devices=2)
    assert first.end()[0] == 0 and "there" in first.out.read_text()
    assert second.done() and "there" not in second.out.read_text()
    ours, theirs = (json.loads((tmp_path / name / "heal.json").read_text()) for name in ("there", "alone"))
    np.testing.assert_allclose(ours["curve"]["losses"], theirs["curve"]["losses"], rtol=5e-3)  # Adam's roots of 1e-6
    np.testing.assert_allclose(ours["overall"]["healed"]["value"], theirs["overall"]["healed"]["value"], rtol=5e-3)
    assert ours["is_kept"] == theirs["is_kept"] is True
    assert not (tmp_path / "there.progress").exists()


def assert_equal_profiles(ours: Path, one: Path) -> None:
    """Counts are equal, sums to 1e-6, squares to twice that; signed sums of EAFT as parts of the largest."""
    names = sorted(file.name for file in one.iterdir())
    assert sorted(file.name for file in ours.iterdir()) == names
    for name in ("saliency.parquet", "saliency_by_domain.parquet"):
        table, expected = (pq.read_table(folder / name).to_pydict() for folder in (ours, one))
        assert list(table) == list(expected)
        for column, values in expected.items():
            if column in ("domain", "layer", "expert", "count"):
                assert table[column] == values
            elif column == "eaft_gate_norm_sum":
                np.testing.assert_allclose(table[column], values, rtol=0, atol=1e-6 * np.abs(values).max())
            else:
                rtol = 2e-6 if "_sq_" in column else 1e-6
                np.testing.assert_allclose(table[column], values, rtol=rtol, err_msg=column)
    table, expected = (pq.read_table(folder / "usage.parquet").to_pylist() for folder in (ours, one))
    for kind in ("usage_count", "coact_count"):
        assert [row for row in table if row["kind"] == kind] == [row for row in expected if row["kind"] == kind]
    said, expected = (json.loads((folder / "profile.json").read_text()) for folder in (ours, one))
    for name in ("rows", "truncated_rows", "prompts_hash", "total_tokens", "kept_tokens", "kept_tokens_by_domain"):
        assert said[name] == expected[name], name
    assert said["warnings"] == expected["warnings"]
    assert said.get("until_stable") == expected.get("until_stable")


WAYS = {
    "two": ((0, 1), 4, "data=2,expert=4", ("--eaft",)),
    # Each row of this mesh is two processes, which feed the same.
    "four": ((0, 1, 2, 3), 2, "data=2,expert=4", ("--pack",)),
    # Rows of each portion are shared out anew.
    "portions": ((0, 1), 4, "data=2,expert=4", ("--until-stable", "50%")),
}


@pytest.mark.parametrize(("ids", "devices", "mesh", "way"), WAYS.values(), ids=WAYS)
def test_equals_one_process(
    ids: tuple[int, ...],
    devices: int,
    mesh: str,
    way: tuple[str, ...],
    model: Path,
    rows: Path,
    run: Run,
    tmp_path: Path,
) -> None:
    argv = ["profile", model, "--data", rows, "--dtype", "float32", *OPTIONS, *way]
    processes = run(*argv, "--mesh", mesh, "--batch-size", 26, ids=ids, devices=devices)
    one = run_profile(model, rows, tmp_path / "one", *OPTIONS, *way)
    assert all(process.done() for process in processes)
    told = [process.end()[1].count("a kept token; engine resident: ") for process in processes]
    assert told == [1] + [0] * (len(ids) - 1)
    assert_equal_profiles(tmp_path / "0" / "profile", one)
    assert [tree(process.cwd) for process in processes[1:]] == [{}] * (len(ids) - 1)
    said = json.loads((tmp_path / "0" / "profile" / "profile.json").read_text())
    assert said["processes"] == len(ids) and len(said["devices"]) == 8


# What JAX says of a process that was lost, and of process 0, which keeps the list of all.
GONE = r"unhealthy \(stopped sending heartbeats\):\n1\n|Task 1 heartbeat timeout"
FIRST_GONE = r"leader \(usually slice 0 task 0\)"
FIRST_SILENT = r"gptoss-jax: process 0 of 2 has not answered for 10 s\n(.|\n)*DEADLINE_EXCEEDED"
# Which process is lost, of how many, where, and how.
LOSSES = {
    "killed": (1, 2, "step", signal.SIGKILL, GONE),
    "silent": (1, 4, "step", signal.SIGSTOP, GONE),
    "fails": (1, 2, "", None, GONE),
    "first-silent": (0, 2, "step", signal.SIGSTOP, FIRST_SILENT),
    "first-loading": (0, 2, "loading", signal.SIGTERM, FIRST_GONE),
}


@pytest.fixture(scope="module")
def lost(model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[Process]]]:
    """The processes of each loss, whose ends are waited for side by side."""
    folder = tmp_path_factory.mktemp("lost")
    # A NaN in an expert that only the second process reads.
    broken = shutil.copytree(model, folder / "broken")
    poke(broken, "model.layers.2.mlp.experts.down_proj", (20,), float("nan"))
    options = ["--data", rows, *OPTIONS, "--batch-size", 12, "--out", "a/out"]
    losses = {}
    with ExitStack() as stack:
        for name, (who, of, moment, stop, _) in LOSSES.items():
            (folder / name).mkdir()
            start = stack.enter_context(running(folder / name))
            mesh = f"data={of // 2},expert=4" if stop else "data=1,expert=4"
            argv = ["profile", model if stop else broken, *options, "--mesh", mesh]
            losses[name] = start(*argv, devices=2, ids=tuple(range(of)), moments={who: moment})
            if stop:
                losses[name][who].wait_for_moment()
                losses[name][who].popen.send_signal(stop)
        yield losses


@pytest.mark.parametrize("name", LOSSES)
def test_others_stop(name: str, lost: dict[str, list[Process]]) -> None:
    """JAX ends them, and says which process was lost."""
    who, _, moment, stop, says = LOSSES[name]
    processes = lost[name]
    for number, process in enumerate(processes):
        if number != who:
            status, error = process.end(STOP)
            assert (status, bool(re.search(says, error))) == (-signal.SIGABRT, True), error
    if stop is None:
        assert "model.layers.2.mlp.experts.down_proj" in processes[who].refused(STOP)
    elif stop != signal.SIGSTOP:
        status = -stop if stop == signal.SIGKILL else 128 + stop
        ended, error = processes[who].end(STOP)
        said = "" if stop == signal.SIGKILL else "gptoss-jax: stopped; nothing was written\n"
        assert ended == status and error.endswith(said), error
    # The first step is finished, and process 0 has kept it.
    kept = {"a", *(f"a/out.progress{file}" for file in ("", "/run", "/state"))} if moment == "step" else set()
    assert [set(tree(process.cwd)) for process in processes] == [kept, *[set()] * (len(processes) - 1)]


def test_one_does_not_come(model: Path, rows: Path, run: Run) -> None:
    """The others say so, and can be interrupted while they wait."""
    argv = ["profile", model, "--data", rows, *OPTIONS]
    first, second = run(*argv, ids=(0, 1), of=3, moments={1: "start"}, wait=WAIT)
    second.wait_for_moment()
    time.sleep(1)
    second.popen.send_signal(signal.SIGINT)
    status, error = second.end(LAST_WORDS)
    assert (status, error.strip()) == (128 + signal.SIGINT, "gptoss-jax: stopped; nothing was written")
    assert "not all 3 processes met at 127.0.0.1:" in first.refused(STOP)
    assert tree(first.cwd) == tree(second.cwd) == {}


def test_killed_processes_go_on(model: Path, rows: Path, run: Run, tmp_path: Path) -> None:
    """Process 0 keeps what is finished. Without --batch-size the others take it from there, too."""
    argv = ["profile", model, "--data", rows, *OPTIONS, "--eaft", "--mesh", "data=2,expert=2", "--resume"]
    out, kept = tmp_path / "0" / "profile", Progress(tmp_path / "0" / "profile")

    def results() -> dict[str, Any]:
        artifacts = made(out)
        artifacts.pop("report.md")
        del artifacts["profile.json"]["command"], artifacts["profile.json"]["options"]["coordinator"]
        return artifacts

    processes = run(*argv, "--batch-size", 6, devices=2)
    assert all(process.done() for process in processes)
    expected = results()
    shutil.rmtree(out)
    first, second = run(*argv, "--batch-size", 6, devices=2, moments={0: "late step"})
    first.wait_for_moment()
    first.popen.kill()
    assert re.search(FIRST_GONE, second.end(STOP)[1])
    assert kept.state().units and not out.exists()
    for _ in range(2):  # the second time it is complete, though process 1 has nothing of it
        first, second = run(*argv, devices=2)
        assert first.done() and second.done()
        assert results() == expected
        assert [file.name for file in first.cwd.iterdir()] == ["profile"] and tree(second.cwd) == {}


def test_settings_differ(model: Path, rows: Path, run: Run) -> None:
    """Slurm says which processes they are."""
    processes = run("profile", model, "--data", rows, own={1: ["--max-seq-length", 64]}, slurm=True)
    line = "gptoss-jax: process 1 has --max-seq-length 64, process 0 has 2048: all processes need the same\n"
    assert [process.refused() for process in processes] == [line, line]


@pytest.mark.parametrize("differs", ["model", "rows"])
def test_contents_differ(differs: str, model: Path, rows: Path, run: Run, tmp_path: Path) -> None:
    """Of the same name on two hosts."""
    for name in "01":
        shutil.copytree(model, tmp_path / name / "model")
        shutil.copy(rows, tmp_path / name)
    if differs == "model":
        poke(tmp_path / "1" / "model", "model.norm.weight", (0,), 7)
    else:
        with open(tmp_path / "1" / "rows.jsonl", "a") as file:
            file.write('{"text": "more", "domain": "a"}\n')
    processes = run("profile", "model", "--data", "rows.jsonl", *OPTIONS)
    what = {"model": "the model's fingerprint", "rows": "the rows' hash"}[differs]
    lines = [process.refused() for process in processes]
    assert lines[0] == lines[1] and f"process 1 has {what} " in lines[0]
    assert not [process for process in processes if (process.cwd / "profile").exists()]


def test_numbers_that_do_not_fit(model: Path, rows: Path, run: Run) -> None:
    """JAX lets a process in that expects more of them."""
    processes = run("profile", model, "--data", rows, own={1: ["--num-processes", 3]})
    line = "gptoss-jax: process 1 has --num-processes 3, process 0 has 2: all processes need the same\n"
    assert [process.refused() for process in processes] == [line, line]


# Without processes of their own from here on.

START = ("--num-processes", 2, "--process-id")
BAD_STARTS = {
    "no-port": (("--coordinator", "host", *START, 0), "10.0.0.1:1234"),
    "port-too-large": (("--coordinator", "host:70000", *START, 0), "10.0.0.1:1234"),
    "no-numbers": (("--coordinator", "127.0.0.1:9"), "--num-processes"),
    "no-coordinator": ((*START, 0), "--coordinator"),
    "number-too-large": (("--coordinator", "127.0.0.1:9", *START, 2), "the last is 1"),
    "no-platform": (("--coordinator", "auto"), "host:port"),
    "port-in-use": (("--coordinator", "127.0.0.1:PORT", *START, 0), "in use"),
}


@pytest.mark.parametrize(("where", "says"), BAD_STARTS.values(), ids=BAD_STARTS)
def test_bad_start(
    where: tuple[Any, ...], says: str, model: Path, rows: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jax._src.clusters.ClusterEnv._cluster_types", [])
    with socket.create_server(("", 0)) as taken:
        line = " ".join(map(str, where)).replace("PORT", str(taken.getsockname()[1]))
        refused("profile", model, "--data", rows, *line.split(), says=(says,))


OWNERS = {
    "inside": ([[0, 0], [0, 0], [1, 1], [1, 1]], [(0, 2, True, (0, 1)), (1, 2, True, (2, 3))]),
    "across": ([[0, 1]], [(0, 1, True, (0,)), (0, 1, False, (0,))]),
    "both": ([[0, 1], [2, 3]], [(0, 2, True, (0,)), (0, 2, False, (0,)), (1, 2, True, (1,)), (1, 2, False, (1,))]),
}


def mesh_of(owners: list[list[int]]) -> Any:
    return Mock(spec=Mesh, devices=np.vectorize(lambda p: SimpleNamespace(process_index=p))(owners))


@pytest.mark.parametrize(("owners", "shares"), OWNERS.values(), ids=OWNERS)
def test_shares(owners: list[list[int]], shares: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """`owners` is the process of each device, [data, expert]."""
    for process, expected in enumerate(shares):
        monkeypatch.setattr(jax, "process_index", lambda index=process: index)
        assert hosts.share(mesh_of(owners)) == hosts.Share(*expected, len(owners))


def test_uneven_shares() -> None:
    with pytest.raises(HostsError, match="unevenly"):
        hosts.share(mesh_of([[0, 0], [0, 1], [1, 1]]))


def test_own_rows() -> None:
    rows = np.arange(24).reshape(8, 3)
    np.testing.assert_array_equal(hosts.Share(1, 2, True, (1, 3), 4).own(rows), rows[[2, 3, 6, 7]])


def test_lengths_that_serve_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "exchange", lambda own: [own, [128], [64, 64, 256]])
    assert hosts.agree_lengths([64, 128]) == [128, 128, 256]
