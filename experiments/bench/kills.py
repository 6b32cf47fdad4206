"""SIGKILL at random moments of profile, prune, select and heal, which then go on: is what they end with what one run
makes?

    python -m experiments.bench.kills

A run is killed one to three times and then ends by itself: prune by the same command, the others with --resume. The
moments are uniform over the work: from the first file that a process writes, for before it there is nothing to lose,
for as long as an unbroken run goes on after its own. After each kill nothing half-made may stand under the final name;
at the end all bytes are compared with the unbroken run's, but for what a run measures of itself.
"""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import click

from convert.sources import NANO, open_source

from .. import checkpoints, tokenizers
from ..nano import QUESTIONS
from ..nano.families import read
from ..nano.specialise import write_rows

FIGURES = ("seconds", "compile_seconds", "tokens_per_s", "peak_rss_bytes")  # of profile.json and heal.json: measured
UNFINISHED = "out.progress"  # the folder of a run that goes on
THROUGHPUT = b"- Forward throughput"
COLUMNS = ("within", "after", "compared", "differing", "half", "left over")
POLL_S = 0.01


def prepare(folder: Path) -> dict[str, list[str]]:
    """Make the inputs; the commands by their names."""
    nano = open_source(NANO)
    write_rows(folder / "rows.jsonl", Path(str(nano.folder)), read(QUESTIONS / "calibration.jsonl")[::4])
    # 0.8 GB: to write half of its experts takes about as long as to start the program.
    sizes = {"hidden_size": 2048, "expert_hidden_size": 2048, "num_experts": 32, "num_layers": 4}
    wide = replace(nano.config, layer_types=nano.config.layer_types[:4], **sizes)
    (folder / "wide").mkdir()
    checkpoints.write_random(folder / "wide", wide, max_shard_bytes=50 * 10**6)
    tokenizers.write_small(folder / "wide", wide.vocab_size)
    (folder / "keep.json").write_text(json.dumps([list(range(0, wide.num_experts, 2))] * wide.num_layers))
    data = ["--data", "../rows.jsonl", "--domain-column", "family", "--max-seq-length", "128", "--eaft"]
    profile = ["profile", NANO, *data, "--out", "out", "--resume", "--engine"]
    (folder / "half.json").write_text(json.dumps([list(range(0, nano.config.num_experts, 2))] * nano.config.num_layers))
    rows = ["--data", "../rows.jsonl", "--max-seq-length", "128", "--out", "out", "--resume"]
    greedy = ["select", NANO, *rows, "--rule", "greedy", "--keep", "8", "--keep", "12"]
    heal = ["heal", NANO, *rows, "--keep-sets", "../half.json", "--steps", "20", "--batch-size", "4"]
    return {
        "profile, streamed": [*profile, "streamed", "--batch-size", "1"],
        "profile, resident": [*profile, "resident", "--batch-size", "2"],
        "prune": ["prune", "../wide", "--keep-sets", "../keep.json", "--out", "out"],
        "select --rule greedy": [*greedy, "--batch-size", "4"],
        "heal, resident": [*heal, "--engine", "resident"],
        "heal, streamed": [*heal, "--engine", "streamed"],
    }


def start(words: list[str], place: Path) -> "subprocess.Popen[bytes]":
    """The program, in a folder of its own."""
    command = [sys.executable, "-m", "gptoss_jax.cli", *words]
    path = {"PYTHONPATH": os.getcwd()} | {"TRANSFORMERS_VERBOSITY": "error"}
    return subprocess.Popen(command, cwd=place, env=os.environ | path, stdout=subprocess.DEVNULL)


def wait_for_work(process: "subprocess.Popen[bytes]", place: Path) -> None:
    """Wait for the first file that the process writes, or for its end."""
    before = versions(place)
    while process.poll() is None and versions(place) == before:
        time.sleep(POLL_S)


def complete(words: list[str], place: Path) -> tuple[float, float]:
    """A run that nobody kills: its seconds, and those from the first file that it writes on."""
    begin = time.perf_counter()
    process = start(words, place)
    wait_for_work(process, place)
    wrote = time.perf_counter()
    status = process.wait()
    assert status == 0, f"gptoss-jax {' '.join(words)}: exit status {status}"
    end = time.perf_counter()
    return end - begin, end - wrote


def made(place: Path) -> dict[str, str]:
    """The SHA-256 of each file that stands under its final name, without what a run measures of itself."""
    digests = {}
    for file in sorted(place.rglob("*")):
        name = file.relative_to(place)
        if file.is_dir() or any(part == UNFINISHED or part.startswith(".") for part in name.parts):
            continue
        data = file.read_bytes()
        if file.name in ("profile.json", "heal.json"):
            data = json.dumps({k: v for k, v in json.loads(data).items() if k not in FIGURES}).encode()
        if file.name == "SHA256SUMS":
            data = b"".join(line for line in data.splitlines() if not line.endswith(b"heal.json"))
        if file.name == "report.md":
            data = b"".join(line for line in data.splitlines() if not line.startswith(THROUGHPUT))
        digests[str(name)] = hashlib.sha256(data).hexdigest()
    return digests


def versions(place: Path) -> dict[str, int]:
    """When each file was written. One that is renamed or removed meanwhile is not among them."""
    found = {}
    for folder, _, names in os.walk(place):
        for name in names:
            with suppress(FileNotFoundError):
                found[f"{folder}/{name}"] = os.lstat(f"{folder}/{name}").st_mtime_ns
    return found


def round_of_kills(words: list[str], place: Path, moments: list[float], expected: dict[str, str]) -> Counter[str]:
    """Kill so many runs, one after the other, then have one end and compare."""
    counts: Counter[str] = Counter()
    place.mkdir()
    for moment in moments:
        process = start(words, place)
        wait_for_work(process, place)
        try:
            assert process.wait(moment) == 0
            break  # less was left to do than of the unbroken one
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        there = made(place)
        finished = there.keys() == expected.keys()
        counts["after" if finished else "within"] += 1
        counts["half"] += any(expected.get(name) != digest for name, digest in there.items())
        if finished:
            break
    if made(place).keys() != expected.keys() or (place / UNFINISHED).exists():
        complete(words, place)
    counts["compared"] += 1
    counts["differing"] += made(place) != expected
    counts["left over"] += {path.name for path in place.iterdir()} != {Path(name).parts[0] for name in expected}
    shutil.rmtree(place)
    return counts


@click.command()
@click.option("--kills", default=34, show_default=True, help="Of each command, at least.")
@click.option("--only", multiple=True, help="Of the commands, by their names in the table.")
@click.option("--seed", default=0, show_default=True)
def main(kills: int, only: tuple[str, ...], seed: int) -> None:
    """Print one row of the table for each command."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        commands = prepare(folder)
        click.echo(f"| command | unbroken, s | of work, s | kills | {' | '.join(COLUMNS)} |")
        click.echo("|---|" + "---:|" * (3 + len(COLUMNS)))
        for command, words in commands.items():
            if only and command not in only:
                continue
            rng = random.Random(f"{command} {seed}")
            place = folder / "place"
            place.mkdir()
            complete(words, place)  # a first time, with everything still to be read from the disk
            shutil.rmtree(place)
            place.mkdir()
            (seconds, work), expected = complete(words, place), made(place)
            shutil.rmtree(place)
            counts: Counter[str] = Counter()
            while (done := sum(counts[column] for column in COLUMNS[:2])) < kills:
                moments = [rng.uniform(0, work) for _ in range(rng.randint(1, 3))]
                counts += round_of_kills(words, place, moments, expected)
            cells = " | ".join(str(counts[column]) for column in COLUMNS)
            click.echo(f"| {command} | {seconds:.1f} | {work:.1f} | {done} | {cells} |")


if __name__ == "__main__":
    main()
