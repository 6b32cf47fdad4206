"""What long commands draw on a terminal: whether it fits, how often it changes, and how true the time left is.

    python -m experiments.bench.terminal

Commands run on nano, each long enough to be watched, once in 80 columns and once in 200.
"""

import codecs
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import click

ROOT = Path(__file__).parents[2]
ROWS, PROMPTS = 3000, 300
COLUMNS = (80, 200)
SHARES = (10, 50)  # per cent of a bar behind which the time left is looked at
SHORT = ("--dtype", "float32", "--max-seq-length", "256")
TIMES = re.compile(r"(\d+)%\|.*\[([\d:]+)<([\d:]+), ")
COMMANDS = {
    "profile, resident": ("profile", "nano", "--data", "rows.jsonl", "--engine", "resident", *SHORT),
    "profile, streamed": ("profile", "nano", "--data", "rows.jsonl", "--engine", "streamed", *SHORT),
    "select --rule greedy": ("select", "nano", "--rule", "greedy", "--data", "rows.jsonl", "--keep", "8", *SHORT),
    "eval": ("eval", "nano", "--data", "rows.jsonl", "--keep-sets", "keep.json", "--seq-len", "256", *SHORT[:2]),
    "generate": ("generate", "nano", "--messages", "prompts.jsonl", "--max-new-tokens", "64", *SHORT[:2]),
    "heal": ("heal", "nano", "--keep-sets", "keep.json", "--data", "some.jsonl", *SHORT),
}


class Frame(NamedTuple):
    """What stands in the last line of the terminal, and since when."""

    at: float
    text: str


@click.command()
@click.option("--command", type=click.Choice([*COMMANDS]), multiple=True, default=[*COMMANDS], help="[default: all]")
@click.option("--show", is_flag=True, help="Print what was drawn too: the first frames, some between, and the last.")
def main(command: tuple[str, ...], show: bool) -> None:
    """Print the table."""
    behind = "".join(f" | time left at {share} %, true" for share in SHARES)
    click.echo(f"| command | columns | seconds | frames | widest{behind} |")
    click.echo("|---|" + "---:|" * (4 + len(SHARES)))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write(folder)
        for name, columns in product(command, COLUMNS):
            measure(name, columns, folder, show)


def measure(name: str, columns: int, folder: Path, show: bool) -> None:
    """Run a command and print its line."""
    out = folder / f"{name} {columns}".replace(" ", "-")
    where = [] if name == "generate" else ["--out", str(out)]
    start = time.monotonic()
    status, frames = drawn([*COMMANDS[name], *where], columns, folder)
    took = time.monotonic() - start
    if status:
        raise RuntimeError(f"{name} ended with {status}: {frames[-1].text}")
    widest = max(len(frame.text) for frame in frames if TIMES.search(frame.text))
    cells = [name, str(columns), f"{took:.0f}", str(len(frames)), str(widest)]
    click.echo(f"| {' | '.join([*cells, *(left(frames, share) for share in SHARES)])} |")
    if show:
        some = [*frames[:3], *frames[3 :: max(1, len(frames) // 5)], *frames[-2:]]
        click.echo("\n".join(f"    {frame.at - start:6.1f} s  {frame.text}" for frame in some))


def write(folder: Path) -> None:
    """What the commands read."""
    text = "<|start|>user<|message|>{0} + {1}?<|end|><|start|>assistant<|channel|>final<|message|>{2} is{3}<|return|>"
    rows = [
        {"id": str(n), "text": text.format(n, n + 7, 2 * n + 7, " what it gives, so I think" * (n % 9))}
        for n in range(ROWS)
    ]
    for file, lines in (("rows", rows), ("some", rows[: ROWS // 10])):
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    prompts = [[{"role": "user", "content": f"What is {n} + {n + 7}?"}] for n in range(PROMPTS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (folder / "keep.json").write_text(json.dumps([[*range(8)]] * 6))


def drawn(words: Sequence[object], columns: int, folder: Path) -> tuple[int, list[Frame]]:
    """The program with standard error on a terminal of so many columns: its status, and all that was drawn there."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    command = [sys.executable, "-m", "gptoss_jax", *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    frames: list[Frame] = []
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=slave) as process:
        os.close(slave)
        # A character may come in two parts.
        decoder, rest = codecs.getincrementaldecoder("utf-8")(), ""
        while True:
            try:
                part = os.read(master, 1 << 16)
            except OSError:  # Linux says so where the other side is closed
                break
            if not part:
                break
            *lines, rest = re.split(r"[\r\n]+", rest + decoder.decode(part))
            frames += [Frame(time.monotonic(), text.rstrip()) for text in lines if text.strip()]
    os.close(master)
    return process.returncode, frames + ([Frame(time.monotonic(), rest)] if rest.strip() else [])


def left(frames: list[Frame], share: int) -> str:
    """The time left that the first frame behind a share of the longest bar says, and how much it was."""
    bars: list[list[tuple[float, int, float]]] = [[]]
    for at, text in frames:
        if found := TIMES.search(text):
            if bars[-1] and int(found[1]) < bars[-1][-1][1]:
                bars.append([])
            bars[-1].append((at, int(found[1]), seconds(found[3])))
    bar = max(bars, key=lambda bar: bar[-1][0] - bar[0][0])
    at, _, said = next(one for one in bar if one[1] >= share)
    return f"{said:.0f} s, {bar[-1][0] - at:.0f} s"


def seconds(clock: str) -> float:
    """Of a text as 1:02:03."""
    found = 0
    for part in clock.split(":"):
        found = 60 * found + int(part)
    return found


if __name__ == "__main__":
    main()
