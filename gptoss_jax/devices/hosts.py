"""Many processes as one run: how they start, agree, feed rows, gather results, and end.

JAX's coordination service, which is on the port of --coordinator, brings the processes together. Where one is lost it
ends the others, and says on standard error which.
"""

import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from ..errors import HostsError, reason

START_TIMEOUT = 120  # seconds that processes wait for one another at the start
HEARTBEAT = 30  # seconds without a word after which JAX takes a process for lost
LAST_WORDS = 5  # seconds in which the others may say what ends them, too
FOREVER = 2**31 - 1  # milliseconds: for one that is lost nobody waits so long
QUESTIONS, ANSWER = 3, 10  # seconds between the questions to process 0, and for its answer

# JAX has no public way to its key-value store and barriers, nor to a process' number before it has devices.
_run: Any = distributed.global_state
_joined = threading.Event()
_exchanges = itertools.count()


def start(coordinator: str, num_processes: int | None, process_id: int | None, settings: dict[str, Any]) -> None:
    """Join the other processes; HostsError where they do not come together or their settings differ.

    `coordinator` is host:port of process 0, or "auto" where the platform knows all three (TPU pods, Slurm).
    """
    if process_id == 0:
        _check_port(int(coordinator.rpartition(":")[2]))
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, and not end the process
    # A proxy of the environment does not lead from host to host: with one JAX waits until its time is over.
    proxies = {name: os.environ.pop(name) for name in list(os.environ) if name.lower().endswith("_proxy")}
    joining: Future[None] = Future()
    where = (None if coordinator == "auto" else coordinator, num_processes, process_id)
    threading.Thread(target=_join, args=(joining, where), daemon=True).start()
    try:
        joining.result(START_TIMEOUT)
    except TimeoutError:
        raise HostsError(
            f"not all {num_processes or ''} processes met at {coordinator} within {START_TIMEOUT} s: start every one, "
            "with the same --coordinator and --num-processes, and a --process-id of its own"
        ) from None
    except Exception as error:  # of many classes
        raise HostsError(f"JAX does not join the processes ({reason(error)}): give --coordinator host:port") from error
    finally:
        os.environ.update(proxies)
    _joined.set()
    agree(settings)
    if not is_first():
        threading.Thread(target=_watch_first, daemon=True).start()


def _check_port(port: int) -> None:
    """HostsError where another program listens on the port of process 0.

    JAX would share it with a run that is under way there, which then ends: its process 0 seems to have started anew.
    """
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise HostsError(f"port {port} cannot be opened ({reason(error)}): give another --coordinator") from None


def _join(joining: "Future[None]", where: tuple[str | None, int | None, int | None]) -> None:
    """Connect in a thread: JAX waits where no signal reaches it, and when its own time is over it aborts."""
    try:
        jax.distributed.initialize(
            *where, initialization_timeout=2 * START_TIMEOUT, heartbeat_timeout_seconds=HEARTBEAT
        )
    except Exception as error:
        joining.set_exception(error)
    else:
        joining.set_result(None)


def _watch_first() -> None:
    """Name process 0 where it does not answer: JAX, which ends this process then, says only DEADLINE_EXCEEDED.

    (A process 0 that is stopped with SIGSTOP shows it. Of all others JAX says the number.)
    """
    client = _run.client  # `leave` takes it away
    said = f"gptoss-jax: process 0 of {_run.num_processes} has not answered for {ANSWER} s\n"
    while True:
        time.sleep(QUESTIONS)
        silence = threading.Timer(ANSWER, sys.stderr.write, (said,))
        silence.start()
        with suppress(jax.errors.JaxRuntimeError):
            client.key_value_try_get("any")
        silence.cancel()


def agree(settings: dict[str, Any]) -> None:
    """HostsError, the same in all processes, where their settings differ; names the first that does."""
    first: dict[str, Any] = {}
    for process, theirs in enumerate(_of_each(settings)):
        first = first or theirs
        for name, value in first.items():
            if theirs.get(name) != value:
                raise HostsError(
                    f"process {process} has {name} {theirs.get(name)!r}, process 0 has {value!r}: "
                    "all processes need the same"
                )


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return _run.process_id == 0


def exchange(value: Any) -> list[Any]:
    """What each process has, in their order: anything JSON. All call it at the same place of their work."""
    return list(_of_each(value))


def _of_each(value: Any) -> Iterator[Any]:
    """What each process has, one after the other, without waiting for those that come after it."""
    if _run.num_processes == 1:
        yield value
        return
    name = f"gptoss_jax/{next(_exchanges)}"
    _run.client.key_value_set(f"{name}/{_run.process_id}", json.dumps(value, default=str))
    for process in range(_run.num_processes):
        yield json.loads(_run.client.blocking_key_value_get(f"{name}/{process}", FOREVER))


def agree_lengths(lengths: list[int]) -> list[int]:
    """The batches' lengths that serve all processes: as many as any has, each as long as the longest."""
    return [max(step) for step in zip_longest(*exchange(lengths), fillvalue=0)]


def gather_rows(rows: np.ndarray) -> list[np.ndarray]:
    """The array [n, …] of each process, which may differ in n."""
    lengths = exchange(len(rows))
    padded = np.zeros((max(lengths), *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    every = multihost_utils.process_allgather(padded.view(np.uint8))
    return [theirs.view(rows.dtype)[:length] for theirs, length in zip(every, lengths, strict=True)]


def from_first(data: bytes) -> bytes:
    """What process 0 has."""
    length = exchange(len(data))[0]
    held = np.frombuffer(data if is_first() else bytes(length), np.uint8)
    return multihost_utils.broadcast_one_to_all(held).tobytes() if length else b""


def tree_from_first(tree: Any) -> Any:
    """The numpy arrays that process 0 has; the others give arrays of the same shapes."""
    return multihost_utils.broadcast_one_to_all(tree)


def gather(tree: Any) -> Any:
    """Global arrays as numpy arrays on every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


@dataclass(frozen=True)
class Share:
    """Which rows of each batch a process feeds."""

    number: int
    of: int
    """How many shares there are; processes whose devices have the same `data` indices feed the same one."""
    leads: bool
    """Whether this process is the first that feeds it."""
    data: tuple[int, ...]
    """The `data` indices of this process' devices."""
    data_size: int
    """How many `data` indices all processes have."""

    def own(self, rows: np.ndarray) -> np.ndarray:
        """The rows, of a whole batch's [B, …], that this process fed, in its order."""
        by_index = rows.reshape(self.data_size, -1, *rows.shape[1:])
        return by_index[list(self.data)].reshape(-1, *rows.shape[1:])


def share(mesh: Mesh) -> Share:
    """This process' share; HostsError where a process holds part of what another one feeds."""
    owner = np.vectorize(lambda device: device.process_index)(mesh.devices)  # [data, expert]
    shares = {int(p): tuple(np.flatnonzero((owner == p).any(1)).tolist()) for p in np.unique(owner)}
    distinct = sorted(set(shares.values()))
    if sum(map(len, distinct)) != len(owner) or len({*map(len, distinct)}) > 1:
        raise HostsError("--mesh splits the devices of a process unevenly over rows: make data larger or smaller")
    mine = shares[jax.process_index()]
    first = min(p for p, theirs in shares.items() if theirs == mine)
    return Share(distinct.index(mine), len(distinct), first == jax.process_index(), mine, len(owner))


@contextmanager
def first_alone() -> Iterator[None]:
    """A block in which process 0 alone has work; the others wait until it is done.

    At its own end JAX waits for five minutes only, whatever its options say, and then ends all: also a process 0 that
    has not written everything.
    """
    yield
    exchange(None)


def settle(error: Exception) -> None:
    """Wait, where there are other processes, until JAX has ended this one, if it was a loss that caused the error.

    When one is killed in a step on CPU, the collective of those that are left fails at once, and does not say which.
    """
    if _run.num_processes > 1 and isinstance(error, jax.errors.JaxRuntimeError):
        time.sleep(HEARTBEAT + 10)


def leave(status: int) -> None:
    """End this process if there are others; after an error wait for them only a little.

    JAX would wait for them, and then blame those that did not come to their end. It ends them as soon as process 0
    does: what fails in all processes, such as a wrong path, would be said by one alone.
    """
    if not jax.distributed.is_initialized():
        return
    if _joined.is_set():  # JAX aborts where one comes to a barrier before that
        with suppress(jax.errors.JaxRuntimeError):
            if status:
                _run.client.wait_at_barrier("gptoss_jax/leave", LAST_WORDS * 1000)
            jax.distributed.shutdown()
    os._exit(status)
