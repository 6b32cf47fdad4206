"""Many processes as one run: how they start, agree, feed rows, gather results, and stop when one is lost."""

import json
import os
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from .errors import HostsError, reason

START_TIMEOUT = 120  # seconds that processes wait for one another at the start
# A connection that is silent is asked after 10 s, then every 5 s, and given up after 3 questions.
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
SETTLE = 40.0  # seconds that an error waits for the watch to say whether a lost process caused it
DONE = 0xFFFFFFFF  # what a process that has finished says, in the place of a number


def start(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
    """Join the other processes; HostsError where they do not come together.

    `coordinator` is host:port of process 0, or "auto" where the platform knows all three (TPU pods, Slurm).
    """
    address = None if coordinator == "auto" else coordinator
    try:
        jax.distributed.initialize(address, num_processes, process_id, initialization_timeout=START_TIMEOUT)
    except Exception as error:  # of many classes: a wrong address, a port in use, a process that does not come
        raise HostsError(
            f"the processes did not come together within {START_TIMEOUT} s ({reason(error)}): check --coordinator, "
            "--num-processes, and that each process has another --process-id"
        ) from error
    if jax.process_count() > 1:
        _watch.begin(address.rpartition(":")[0] if address else None)


def agree(settings: dict[str, Any]) -> None:
    """HostsError where processes were started with different settings; names the first that differs."""
    if jax.process_count() == 1:
        return
    for process, theirs in enumerate(map(json.loads, _gather_texts(json.dumps(settings, default=str)))):
        for name, mine in json.loads(json.dumps(settings, default=str)).items():
            if theirs.get(name) != mine:
                raise HostsError(
                    f"process {jax.process_index()} has {name} {mine!r}, process {process} has {theirs.get(name)!r}: "
                    "start all processes with the same settings"
                )


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return jax.process_index() == 0


def agree_lengths(lengths: list[int]) -> list[int]:
    """The batches' lengths that serve all processes: as many as any has, each as long as the longest."""
    every = gather_rows(np.array(lengths, np.int64))
    steps = max(map(len, every))
    return np.max([np.pad(theirs, (0, steps - len(theirs))) for theirs in every], axis=0, initial=0).tolist()


def gather(tree: Any) -> Any:
    """Global arrays as numpy arrays on every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def gather_numbers(numbers: Any) -> np.ndarray:
    """What each process has, [processes, …]: numbers of the same shape on all."""
    own = np.asarray(numbers)
    if jax.process_count() == 1:
        return own[None]
    # As bytes: JAX would make 32 bits of 64.
    every = multihost_utils.process_allgather(np.frombuffer(own.tobytes(), np.uint8))
    return np.frombuffer(np.asarray(every).tobytes(), own.dtype).reshape(jax.process_count(), *own.shape)


def gather_rows(rows: np.ndarray) -> list[np.ndarray]:
    """The array [n, …] of every process, which may differ in n."""
    counts = gather_numbers(len(rows))
    padded = np.zeros((counts.max(), *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    return [theirs[:count] for theirs, count in zip(gather_numbers(padded), counts, strict=True)]


def _gather_texts(text: str) -> list[str]:
    return [theirs.tobytes().decode() for theirs in gather_rows(np.frombuffer(text.encode(), np.uint8))]


@dataclass(frozen=True)
class Share:
    """Which rows of each batch a process feeds."""

    number: int
    of: int
    """Shares in all; processes whose devices have the same `data` indices feed the same one."""
    leads: bool
    """Whether this process is the first that feeds it."""
    data: tuple[int, ...]
    """The `data` indices of this process' devices."""

    def own(self, rows: np.ndarray, data_size: int) -> np.ndarray:
        """Of the rows [B, …] of a whole batch, those that this process fed, in its order."""
        by_index = rows.reshape(data_size, -1, rows.shape[-1])
        return by_index[list(self.data)].reshape(-1, rows.shape[-1])


def share(mesh: Mesh) -> Share:
    """This process' share; HostsError where a process holds part of what another one feeds."""
    owner = np.vectorize(lambda device: device.process_index)(mesh.devices)  # [data, expert]
    shares = {int(p): tuple(np.flatnonzero((owner == p).any(1)).tolist()) for p in np.unique(owner)}
    distinct = sorted(set(shares.values()))
    if sum(map(len, distinct)) != len(owner) or len({*map(len, distinct)}) > 1:
        raise HostsError("--mesh splits the devices of a process unevenly over rows: make data larger or smaller")
    mine = shares[jax.process_index()]
    first = min(p for p, theirs in shares.items() if theirs == mine)
    return Share(distinct.index(mine), len(distinct), first == jax.process_index(), mine)


def finish() -> None:
    """Wait until process 0 is done, who writes, and all know it: from then on nobody is lost."""
    _watch.end()


def leave(status: int) -> None:
    """End this process at once where others are left: an ordinary end would wait for them, and they for it."""
    if _watch.links:
        _watch.clean_up()
        sys.stderr.flush()
        os._exit(status)


def on_loss(clean_up: Callable[[], Any]) -> None:
    """What this process does before it stops because another one was lost."""
    _watch.clean_up = clean_up


def settle() -> None:
    """Wait, where there are other processes, until the watch has had time to say that one was lost.

    A collective fails at once in those that are left, with a message that does not say which.
    """
    if _watch.links:
        time.sleep(SETTLE)


class _Watch:
    """Connections of all processes with process 0, which end when a process does.

    Process 0 tells the others whose connection ended. JAX's own heartbeats end a process too, later, and from
    inside: nothing could be cleaned up.
    """

    def __init__(self) -> None:
        self.links: dict[int, socket.socket] = {}
        self.clean_up: Callable[[], Any] = lambda: None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.done = False

    def begin(self, host: str | None) -> None:
        """Connect, then watch in a thread; `host` is where the others find process 0."""
        me = jax.process_index()
        server = socket.create_server(("", 0)) if me == 0 else None
        port = server.getsockname()[1] if server else 0
        address = _gather_texts(f"{host or socket.gethostname()} {port}")[0].split()
        if server:
            for _ in range(jax.process_count() - 1):
                link = server.accept()[0]
                self.links[_receive(link)] = link
            server.close()
        else:
            self.links[0] = socket.create_connection((address[0], int(address[1])), START_TIMEOUT)
            self.links[0].settimeout(None)
            self._tell(me)
        for link in self.links.values():
            link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in KEEPALIVE.items():
                if hasattr(socket, name):
                    link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self.thread.start()

    def end(self) -> None:
        """Process 0 says that it is done, the others wait for that and answer."""
        if not self.links:
            return
        self.done = jax.process_index() == 0
        if self.done:
            self._tell(DONE)
        self.thread.join()
        if not self.done:
            self._tell(DONE)
        self.links = {}

    def _tell(self, number: int, but: int | None = None) -> None:
        for process, link in self.links.items():
            with suppress(OSError):  # the other end is gone, and who watches it says so
                if process != but:
                    link.sendall(struct.pack("!I", number))

    def _run(self) -> None:
        waiting = dict(self.links)
        while waiting:
            for link in select.select(list(waiting.values()), [], [])[0]:
                process = next(p for p, other in waiting.items() if other is link)
                said = _receive(link)
                if said == DONE or (said is None and self.done):
                    del waiting[process]
                else:
                    self._stop(process if said is None else said)

    def _stop(self, lost: int) -> None:
        self._tell(lost, but=lost)
        self.clean_up()
        print(
            f"gptoss-jax: process {lost} of {jax.process_count()} was lost, process {jax.process_index()} stops: "
            f"see what process {lost} said last, and start all again; nothing was written",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)  # the main thread may wait for ever in a collective


def _receive(link: socket.socket) -> Any:
    """The next number; None where the connection ended."""
    try:
        data = link.recv(4, socket.MSG_WAITALL)
    except OSError:
        data = b""
    return struct.unpack("!I", data)[0] if len(data) == 4 else None


_watch = _Watch()
