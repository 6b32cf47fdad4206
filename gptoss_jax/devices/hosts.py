"""Many processes as one run: how they start, agree, feed rows, gather results, and end."""

import base64
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from ..errors import HostsError, reason
from . import links

SETTLE = 40  # seconds, more than a connection that was lost may stay unnoticed
HEARTBEAT = 3600  # seconds after which JAX itself ends processes: `links` has done so long before

_links = links.Links()


def start(coordinator: str, num_processes: int | None, process_id: int | None, settings: dict[str, Any]) -> None:
    """Join the other processes; HostsError where they do not come together or their settings differ.

    `coordinator` is host:port of process 0, or "auto" where the platform knows all three (TPU pods, Slurm).
    """
    if coordinator == "auto":
        coordinator, num_processes, process_id = _of_platform()
    assert num_processes is not None and process_id is not None
    host, _, port = coordinator.rpartition(":")
    server = None if process_id else links.listen(int(port))
    free = _links.meet(process_id, num_processes, coordinator, server)
    agree(settings)
    # JAX itself connects within this host alone, by `links.relay`: through no proxy, and with no warning of one.
    os.environ.update(no_grpc_proxy="127.0.0.1")
    jax.config.update("jax_check_proxy_envs", False)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, and not end the process
    try:
        jax.distributed.initialize(
            f"127.0.0.1:{links.relay(host, free) if process_id else free}",
            num_processes,
            process_id,
            initialization_timeout=links.START_TIMEOUT,
            heartbeat_timeout_seconds=HEARTBEAT,
        )
    except Exception as error:  # of many classes
        raise HostsError(f"JAX cannot join the processes: {reason(error)}") from error


def _of_platform() -> tuple[str, int, int]:
    """Coordinator, number of processes, and which of them this is."""
    # JAX has no public way to tell, other than connecting by itself: then it would abort for a lost process.
    from jax._src.clusters import ClusterEnv

    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, links.START_TIMEOUT)
    except Exception as error:  # of many classes
        raise HostsError(f"--coordinator auto: no answer by the platform ({reason(error)}): give host:port") from error
    coordinator, num_processes, process_id, _ = found
    if coordinator is None or num_processes is None or process_id is None:
        raise HostsError("--coordinator auto: this is no platform that JAX knows: give host:port of process 0")
    return coordinator, num_processes, process_id


def agree(settings: dict[str, Any]) -> None:
    """HostsError, the same in all processes, where their settings differ; names the first that does."""
    every = exchange(settings)
    for process, theirs in enumerate(every):
        for name, value in every[0].items():
            if theirs.get(name) != value:
                _links.end()  # all are about to say the same: none is lost
                raise HostsError(
                    f"process {process} has {name} {theirs.get(name)!r}, process 0 has {value!r}: "
                    "all processes need the same"
                )


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return _links.me == 0


def exchange(value: Any) -> list[Any]:
    """What each process has, in their order: anything JSON. All call it at the same place of their work."""
    return _links.exchange(value) if _links.count > 1 else [value]


def agree_lengths(lengths: list[int]) -> list[int]:
    """The batches' lengths that serve all processes: as many as any has, each as long as the longest."""
    return [max(step) for step in zip_longest(*exchange(lengths), fillvalue=0)]


def gather_rows(rows: np.ndarray) -> list[np.ndarray]:
    """The array [n, …] of each process, which may differ in n."""
    texts = exchange(base64.b64encode(rows.tobytes()).decode())
    return [np.frombuffer(base64.b64decode(text), rows.dtype).reshape(-1, *rows.shape[1:]) for text in texts]


def from_first(data: bytes) -> bytes:
    """What process 0 has."""
    return base64.b64decode(exchange(base64.b64encode(data).decode() if is_first() else "")[0])


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
    """Shares in all; processes whose devices have the same `data` indices feed the same one."""
    leads: bool
    """Whether this process is the first that feeds it."""
    data: tuple[int, ...]
    """The `data` indices of this process' devices."""
    data_size: int
    """`data` indices of all."""

    def own(self, rows: np.ndarray) -> np.ndarray:
        """Of the rows [B, …] of a whole batch, those that this process fed, in its order."""
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
    """A block in which process 0 alone has work: the others wait, and it needs them no more."""
    with _links.last_word:
        _links.alone = is_first()
    yield
    _links.end()


def settle(error: Exception) -> None:
    """Wait, where there are other processes, until it has shown whether one was lost and caused this.

    A collective of JAX fails at once in those that are left, with a message that does not say which.
    """
    if _links.count > 1 and isinstance(error, jax.errors.JaxRuntimeError):
        time.sleep(SETTLE)


def leave(status: int, say: Callable[[], Any]) -> None:
    """Say the last word of this process, and end it at once where there are others."""
    _links.leave(status, say)
