"""Connections of a run's processes with process 0: values go over them, and where one ends a process was lost.

JAX alone would end the others much later, or from inside without a word, and not say which one was lost.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, NoReturn

from ..errors import HostsError, reason

START_TIMEOUT = 120  # seconds that processes wait for one another at the start
# A silent connection is asked after 10 s, then every 5 s, and given up after 3 questions; what was sent may stay
# without an answer for 25,000 ms.
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 25_000}
GRACE = 2  # seconds in which a process may find by itself what made another one stop, and say that


def listen(port: int) -> socket.socket:
    """Where process 0 is reached; HostsError where the port cannot be opened."""
    try:
        return socket.create_server(("", port))
    except OSError as error:
        raise HostsError(f"port {port} cannot be opened ({reason(error)}): give another --coordinator") from None


class Link:
    """A connection with another process: lines of JSON, each [kind, value]."""

    def __init__(self, connection: socket.socket, timeout: int):
        self.connection = connection
        self.lines = connection.makefile("r", encoding="utf-8")
        self.values: SimpleQueue[Any] = SimpleQueue()
        self.sending = threading.Lock()
        connection.settimeout(timeout)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):  # not on all systems
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def tell(self, kind: str, value: Any = None) -> None:
        """Send; where the other end is gone, whoever hears it finds out."""
        with self.sending, suppress(OSError):
            self.connection.sendall(json.dumps([kind, value], default=str).encode() + b"\n")

    def hear(self) -> tuple[str, Any]:
        """What is said next; a kind of "" where the connection ended, or the other end is another program."""
        try:
            kind, value = json.loads(self.lines.readline())
        except (OSError, ValueError, TypeError):
            return "", None
        return kind, value


class Links:
    """This process among those of its run: `to` holds all others in process 0, and process 0 in the others."""

    def __init__(self) -> None:
        self.me, self.count, self.alone = 0, 1, False
        self.to: dict[int, Link] = {}
        self.threads: list[threading.Thread] = []
        self.last_word = threading.Lock()

    def meet(self, me: int, count: int, coordinator: str, server: socket.socket | None) -> int:
        """Connect all; gives a free port of process 0's host, for JAX. HostsError where one does not come."""
        self.me, self.count = me, count
        port = self._receive(server) if server else self._reach(coordinator)
        for process, link in self.to.items():
            link.connection.settimeout(None)
            self.threads.append(threading.Thread(target=self._watch, args=(process, link), daemon=True))
            self.threads[-1].start()
        return port

    def _receive(self, server: socket.socket) -> int:
        deadline = time.monotonic() + START_TIMEOUT
        while missing := set(range(1, self.count)) - set(self.to):
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                link = Link(server.accept()[0], timeout=10)
            except TimeoutError:
                names = ", ".join(map(str, sorted(missing)))
                self._refuse(
                    server, f"process {names} of {self.count} did not come within {START_TIMEOUT} s: start all"
                )
            kind, hello = link.hear()
            if kind != "hello":
                continue
            process, count = hello
            if count != self.count:
                self._refuse(server, f"process {process} has --num-processes {count}, process 0 has {self.count}", link)
            if process not in missing:
                self._refuse(server, f"two processes have --process-id {process}: give each another one", link)
            self.to[process] = link
        server.close()
        with socket.create_server(("", 0)) as free:
            port: int = free.getsockname()[1]
        self.tell("welcome", port)
        return port

    def _refuse(self, server: socket.socket, why: str, *more: Link) -> NoReturn:
        refused = [*self.to.values(), *more]
        for link in refused:
            link.tell("refused", why)
        # Those that come meanwhile would wait for a welcome.
        server.settimeout(GRACE)
        with suppress(TimeoutError):
            while True:
                refused.append(Link(server.accept()[0], timeout=10))
                refused[-1].hear()
                refused[-1].tell("refused", why)
        server.close()
        raise HostsError(why)

    def _reach(self, coordinator: str) -> int:
        host, _, port = coordinator.rpartition(":")
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            try:
                # Process 0 may have begun to wait later.
                link = Link(socket.create_connection((host, int(port)), START_TIMEOUT), timeout=2 * START_TIMEOUT)
            except OSError as error:
                why = reason(error)
            else:
                link.tell("hello", [self.me, self.count])
                kind, value = link.hear()
                if kind == "refused":
                    raise HostsError(value)
                if kind == "welcome":
                    self.to[0] = link
                    return value
                why = "another program answers"
            if time.monotonic() > deadline:
                raise HostsError(f"no process 0 at {coordinator} for {START_TIMEOUT} s ({why}): check --coordinator")
            time.sleep(0.2)

    def tell(self, kind: str, value: Any = None) -> None:
        """Send to all others from process 0, or to it from another."""
        for link in self.to.values():
            link.tell(kind, value)

    def exchange(self, value: Any) -> list[Any]:
        """What each process has, in their order."""
        if self.me:
            self.tell("value", value)
            return self.to[0].values.get()
        values = [value, *(self.to[process].values.get() for process in range(1, self.count))]
        self.tell("value", values)
        return json.loads(json.dumps(values, default=str))  # as the others receive it

    def end(self) -> None:
        """Wait for process 0 to come here; in process 0, for all others to leave."""
        self.tell("end")
        for thread in self.threads:
            thread.join()

    def leave(self, status: int, say: Callable[[], Any]) -> None:
        """Say the last word of this process, unless a loss was it; where there are others, end at once.

        At an ordinary end JAX waits for them, for minutes if one is gone, and then aborts.
        """
        with self.last_word:
            say()
            if self.threads:
                os._exit(status)

    def _watch(self, process: int, link: Link) -> None:
        """Take what a process says; where it ends before it says so, stop this one."""
        while (said := link.hear())[0] == "value":
            link.values.put(said[1])
        kind, value = said
        if kind != "end":
            self._stop(value if kind == "lost" else process)
        elif self.me == 0:
            link.hear()  # until it ends: JAX in the others does not outlive the one in process 0

    def _stop(self, lost: int) -> None:
        time.sleep(GRACE)
        with self.last_word:
            if self.alone:
                return
            self.tell("lost", lost)
            what = f"process {lost} of {self.count} was lost, process {self.me} stops"
            print(f"gptoss-jax: {what}: see what process {lost} said last", file=sys.stderr, flush=True)
            os._exit(2)  # the main thread may wait for ever in a collective


def relay(host: str, port: int) -> int:
    """A port of this host that leads to that one, and stays open when that one ends.

    JAX ends a process from inside, before a word of ours, as soon as its connection with process 0 ends.
    """
    server = socket.create_server(("127.0.0.1", 0))
    held = []  # what nobody holds is closed

    def reach() -> socket.socket:
        while True:
            with suppress(OSError):  # process 0 does not listen yet; JAX would be slow to try again
                return socket.create_connection((host, port))
            time.sleep(0.05)

    def pump(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)

    def serve() -> None:
        while True:
            near, far = server.accept()[0], reach()
            held.append((near, far))
            for ends in ((near, far), (far, near)):
                threading.Thread(target=pump, args=ends, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    return server.getsockname()[1]
