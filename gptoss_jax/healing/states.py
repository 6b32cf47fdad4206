"""States of a training in Orbax's form, in the folder of the run's progress, from which a killed run goes on."""

import json
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp

from ..devices import hosts
from ..errors import ResumeError, reason
from ..files.paths import AnyPath, is_local, upload
from ..run import progress
from ..run.progress import Progress, empty

STATES = "states"


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
        start, before = time.monotonic(), self.line()
        self._save(self._at(number), arrays)
        if hosts.is_first():
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
        at: Any = self._at(number)
        try:
            with tempfile.TemporaryDirectory(prefix="gptoss-jax-") as name:
                if not is_local(at):
                    at.fs.get(at.path, f"{name}/state", recursive=True)
                    at = Path(name) / "state"
                return ocp.load(Path(at).absolute(), jax.tree.map(_abstract, like))
        except Exception as error:  # of several packages
            raise ResumeError(
                f"{self._at(number)}: cannot be read ({reason(error)}): remove {self.kept.folder} to begin anew"
            ) from error

    def _save(self, at: AnyPath, arrays: Any) -> None:
        """Orbax writes to this machine; a remote storage gets a copy."""
        if is_local(at):
            ocp.save(Path(at).absolute(), arrays, overwrite=True)
            return
        with tempfile.TemporaryDirectory(prefix="gptoss-jax-") as name:
            ocp.save(Path(name) / "state", arrays)
            upload(Path(name) / "state", at, last="")

    def _at(self, number: int) -> AnyPath:
        return self.folder / f"{self.name}-{number}"


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
