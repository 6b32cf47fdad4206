"""Commands with the code of an earlier commit and with that of the working tree, in turns: are steps as fast as before?

    python -m experiments.bench.pairs 7d3010c [--model MODEL] [--pairs 5]

MODEL is a checkpoint of two layers of gpt-oss-20b's shape (`python -m experiments.checkpoints MODEL --preset 20b
--layers 2`). Of `profile` the time of its steps is compared, as profile.json has it; of `generate` that of the whole
process. Ratios are those of a pair, which runs within the same minute or two.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from convert.sources import NANO, open_source

from ..nano import QUESTIONS
from ..nano.families import read
from ..nano.specialise import write_rows
from ..same import earlier


def seconds(tree: Path, folder: Path, words: list[str]) -> tuple[float, float]:
    """What is compared of one run, and the processor time of its whole process."""
    variables = {"PYTHONPATH": str(tree), "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    start = time.perf_counter()
    command = [sys.executable, "-m", "gptoss_jax.cli", *words]
    with subprocess.Popen(command, cwd=folder, env=os.environ | variables, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, words
    whole = time.perf_counter() - start
    made = folder / "out" / "profile.json"
    compared = json.loads(made.read_text())["seconds"] if words[0] == "profile" else whole
    return compared, usage.ru_utime + usage.ru_stime


@click.command()
@click.argument("commit")
@click.option("--model", help="Two layers of 20b's shape; without it nano alone is run.")
@click.option("--pairs", type=click.IntRange(1), default=5, show_default=True)
def main(commit: str, model: str | None, pairs: int) -> None:
    """Print one row for each command: now over before, median and range."""
    with tempfile.TemporaryDirectory() as name, earlier(commit, Path(name)) as before:
        folder, out = Path(name), ["--out", "out", "--overwrite"]
        write_rows(folder / "rows.jsonl", Path(str(open_source(NANO).folder)), read(QUESTIONS / "calibration.jsonl"))
        data = ["--data", "rows.jsonl", "--keep", "all", "--max-seq-length", "256", "--engine", "resident"]
        prompts = [word for n in range(16) for word in ("--prompt", f"What is {n} + 7?")]
        cases = {
            "profile nano, 400 rows": ["profile", NANO, *data, "--batch-size", "32", *out],
            "generate nano, 16 prompts": ["generate", NANO, *prompts, "--max-new-tokens", "256", "--temperature", "0"],
        }
        if model:
            wide = ["profile", str(Path(model).resolve()), *data, "--num-rows", "64", "--batch-size", "16", *out]
            cases["profile two layers of 20b, 64 rows"] = wide
        click.echo(
            "| command | before, s | now, s | now / before | processor time, now / before |\n|---|---:|---:|---|---|"
        )
        for case, words in cases.items():
            runs: dict[Path, list[tuple[float, float]]] = {before: [], Path.cwd(): []}
            for pair in range(pairs + 1):
                for tree in list(runs) if pair % 2 else list(runs)[::-1]:
                    runs[tree].append(seconds(tree, folder, words))
            old, new = (times[1:] for times in runs.values())  # the first pair reads the disk
            shown = [[b[i] / a[i] for a, b in zip(old, new, strict=True)] for i in range(2)]
            ratios = [f"{statistics.median(r):.3f} ({min(r):.3f} to {max(r):.3f})" for r in shown]
            middle = [statistics.median(t[0] for t in times) for times in (old, new)]
            click.echo(f"| {case} | {middle[0]:.2f} | {middle[1]:.2f} | {ratios[0]} | {ratios[1]} |")


if __name__ == "__main__":
    main()
