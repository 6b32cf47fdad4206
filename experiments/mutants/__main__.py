"""Mutants: small faults put into the code, one at a time, and whether the tests notice.

    pip install -e '.[test,mutants]'
    python -m experiments.mutants run WORK --sample 400
    python -m experiments.mutants report WORK

The faults are those of cosmic-ray. Its own runner starts a process for each mutant, which here spends seconds on
imports; this one imports the large packages once, and forks before any computation. A mutant is a file in a copy of
the tree, so that processes which tests start meet it too. A run that was stopped goes on where it was.

Text is no fault here: strings and what stands in a `raise` stay as they are, and so do annotations.
"""

import json
import time
from collections import Counter
from pathlib import Path

import click

from experiments.mutants.faults import ROOMS, sample
from experiments.mutants.known import EQUIVALENT
from experiments.mutants.runner import Runner

STATES = ("killed", "timed out", "survived", "equivalent")


def _results(work: Path) -> dict[str, dict[str, str]]:
    """The last result of each mutant."""
    file = work / "results.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {result["name"]: result for result in map(json.loads, lines)}


@click.group()
def main() -> None:
    """Put small faults into the code, and see whether the tests notice."""


@main.command()
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--sample", "size", default=400, show_default=True, help="How many mutants are drawn.")
@click.option("--seed", default=14, show_default=True, help="Which ones.")
@click.option("--minutes", default=float("inf"), help="No mutant is begun after so many minutes.")
@click.option("--survivors", is_flag=True, help="Judge those again that survived, after tests were added.")
def run(work: Path, size: int, seed: int, minutes: float, survivors: bool) -> None:
    """Judge each mutant of the sample that WORK has no result of; results are appended to WORK/results.jsonl."""
    work.mkdir(parents=True, exist_ok=True)
    done, end = _results(work), time.monotonic() + 60 * minutes
    left = [m for m in sample(size, seed) if m.name not in EQUIVALENT]
    if survivors:
        left = [m for m in left if done.get(m.name, {}).get("state") == "survived"]
    else:
        left = [m for m in left if m.name not in done]
    click.echo(f"{len(left)} mutants to judge")
    runner = Runner(work)
    for mutant in left:
        if time.monotonic() > end:
            return
        start = time.monotonic()
        state, by = runner.judge(mutant)
        result = {"name": mutant.name, "line": mutant.line, "state": state, "by": by, "operator": mutant.operator}
        result["seconds"] = round(time.monotonic() - start, 1)
        with (work / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(result, ensure_ascii=False) + "\n")
        click.echo(f"{state} after {result['seconds']} s: {mutant.name} {by}")


@main.command()
@click.argument("work", type=click.Path(path_type=Path))
def report(work: Path) -> None:
    """Count what became of the mutants by room, and list those that survived."""
    results = _results(work).values()
    states = {r["name"]: "equivalent" if r["name"] in EQUIVALENT else r["state"] for r in results}
    counts = Counter((next(room for room in ROOMS if name.startswith(room)), state) for name, state in states.items())
    counts.update({("all", state): number for state, number in Counter(states.values()).items()})
    click.echo(
        f"| room | {' | '.join(STATES)} | survived of those that mean something else |\n|---|---:|---:|---:|---:|---:|"
    )
    for room in (*ROOMS, "all"):
        numbers = [counts[room, state] for state in STATES]
        share = numbers[2] / max(sum(numbers[:3]), 1)
        click.echo(f"| {room} | {' | '.join(map(str, numbers))} | {share:.1%} |")
    for name, state in states.items():
        if state in ("survived", "equivalent"):
            click.echo(f"- {state}: `{name}` {EQUIVALENT.get(name, '')}")


if __name__ == "__main__":
    main()
