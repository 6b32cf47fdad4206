"""States of a training in Orbax's form, in the folder of the run's progress, from which a killed run goes on.

Of many processes the first alone writes and reads them: the others need not see its folder.
"""

import json
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from ..devices import hosts
from ..devices.mesh import put
from ..errors import ResumeError, reason
from ..files.paths import AnyPath, is_local, upload
from ..run import progress
from ..run.progress import Progress, empty

STATES = "states"
# Orbax would wait for all processes; its newer functions do so even with this.
ALONE = ocp.options.MultiprocessingOptions(active_processes={0})


class States:
    """The newest state alone is kept. It counts once its line stands in the progress, which names its folder."""

    def __init__(self, kept: Progress, name: str):
        self.kept, self.name = kept, name
        self.folder = kept.folder / STATES
        self._due = 0.0

    def save(self, number: int, arrays: Any, line: Mapping[str, Any], always: bool = True) -> None:
        """Keep arrays and a line beside them, unless others were kept a short while ago; then those before them go."""
        if not hosts.exchange(always or time.monotonic() >= self._due)[0]:
            return
        start, before, on_host = time.monotonic(), self.line(), hosts.gather(arrays)
        if hosts.is_first():
            self._save(self._at(number), on_host)
            self.kept.write(self.name, json.dumps({"number": number, **line}).encode())
        if before is not None and before["number"] != number and hosts.is_first():
            with suppress(Exception):  # it is in nobody's way
                empty(self._at(before["number"]))
        self._due = time.monotonic() + progress.SHARE * (time.monotonic() - start)

    def line(self) -> dict[str, Any] | None:
        """What stands beside the newest state; None where there is none."""
        return self.kept.kept(json.loads, self.name)

    def load(self, number: int, like: Any) -> Any:
        """The arrays of a state, as those of `like` lie."""
        shapes = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
        found = hosts.tree_from_first(self._load(number, shapes) if hosts.is_first() else shapes)
        return jax.tree.map(_placed, found, like)

    def _load(self, number: int, shapes: Any) -> Any:
        at: Any = self._at(number)
        try:
            with tempfile.TemporaryDirectory(prefix="gptoss-jax-") as name, _orbax() as orbax:
                if not is_local(at):
                    at.fs.get(at.path, f"{name}/state", recursive=True)
                    at = Path(name) / "state"
                as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
                return orbax.restore(Path(at).absolute(), ocp.args.PyTreeRestore(shapes, as_numpy))
        except Exception as error:  # of several packages
            raise ResumeError(
                f"{self._at(number)}: cannot be read ({reason(error)}): remove {self.kept.folder} to begin anew"
            ) from error

    def _save(self, at: AnyPath, arrays: Any) -> None:
        """Orbax writes to this machine; a remote storage gets a copy."""
        with tempfile.TemporaryDirectory(prefix="gptoss-jax-") as name, _orbax() as orbax:
            here = Path(at).absolute() if is_local(at) else Path(name) / "state"
            orbax.save(here, ocp.args.PyTreeSave(arrays), force=True)
            if not is_local(at):
                upload(here, at, last="")

    def _at(self, number: int) -> AnyPath:
        return self.folder / f"{self.name}-{number}"


def _orbax() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(multiprocessing_options=ALONE), multiprocessing_options=ALONE)


def _placed(x: np.ndarray, like: jax.Array) -> jax.Array:
    if not like.committed:  # as the count of an optimizer: it goes to wherever a step runs
        return jnp.asarray(x)
    return put(x, like.sharding)
