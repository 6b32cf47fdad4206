"""Time and memory of a whole process, as the operating system accounts for them."""

import shlex
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

import click


class Cost(NamedTuple):
    """What a process took."""

    seconds: float
    peak_gib: float

    def __str__(self) -> str:
        return f"{self.seconds:.0f} s, {self.peak_gib:.2f} GiB at peak"


# A child's peak begins with that of the process it was forked from, so a small one stands between.
_BETWEEN = """
import os, sys, time
start = time.perf_counter()
child = os.posix_spawn(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(child, 0)
with open(sys.argv[1], "w") as file:
    file.write(f"{time.perf_counter() - start} {usage.ru_maxrss}")
sys.exit(os.waitstatus_to_exitcode(status) != 0)
"""


def program(*arguments: Any) -> Cost:
    """Run the command line of the project; show the call and its cost."""
    words = [str(argument) for argument in arguments]
    click.echo(f"$ gptoss-jax {shlex.join(words)}")
    with tempfile.NamedTemporaryFile("r") as result:
        command = [sys.executable, "-m", "gptoss_jax.cli", *words]
        subprocess.run([sys.executable, "-ISc", _BETWEEN, result.name, *command], check=True)
        seconds, peak = map(float, result.read().split())
    cost = Cost(seconds, peak * (1 if sys.platform == "darwin" else 1024) / 2**30)
    click.echo(f"  {cost}")
    return cost
