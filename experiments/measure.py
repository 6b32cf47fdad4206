"""Time and memory of a whole process, as the operating system accounts for them."""

import os
import shlex
import subprocess
import sys
import time
from typing import Any, NamedTuple

import click


class Cost(NamedTuple):
    """What a process took."""

    seconds: float
    peak_gib: float

    def __str__(self) -> str:
        return f"{self.seconds:.0f} s, {self.peak_gib:.2f} GiB at peak"


def program(*arguments: Any) -> Cost:
    """Run the command line of the project; show the call and its cost."""
    words = [str(argument) for argument in arguments]
    click.echo(f"$ gptoss-jax {shlex.join(words)}")
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "gptoss_jax.cli", *words])
    # wait4 gives this child's own accounting; the peak of all children would mix the runs.
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    unit = 1 if sys.platform == "darwin" else 1024
    cost = Cost(time.perf_counter() - start, usage.ru_maxrss * unit / 2**30)
    click.echo(f"  {cost}")
    return cost
