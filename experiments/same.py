"""Do the commands still write what they wrote at an earlier commit, byte for byte?

    python -m experiments.same 7d3010c [--plan]

Every command runs twice on nano and on a checkpoint whose dimensions all differ, once with the code of that commit and
once with that of the working tree, in folders of the same names. Compared are all files, as bytes, but for what may
differ: what a run measures of itself, versions and command lines, the version of the store of sums, the origin that
rankings carry, and the words of a pruned model's card.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import safetensors.numpy

from convert.sources import NANO, open_source
from gptoss_jax.config import TINY

from . import checkpoints, tokenizers
from .nano import QUESTIONS
from .nano.families import read
from .nano.specialise import write_rows

# Of profile.json: measured (free memory is the engine's reason), or names and versions.
FREE = {
    "engine_reason",
    "seconds",
    "compile_seconds",
    "tokens_per_s",
    "peak_rss_bytes",
    "versions",
    "command",
    "settings_hash",
}
MERGED = "merged {parts}"  # stands for the command that adds profiles, whose name changed


def commands(model: str) -> dict[str, list[str]]:
    """The command lines by the names of what they write, in an order in which each finds its inputs."""
    rows = ["--data", "rows.jsonl", "--max-seq-length", "128", "--num-rows", "24"]
    domains = [*rows, "--domain-column", "family", "--keep", "all"]
    few = ["profile", model, *rows, "--keep", "assistant", "--batch-size", "4"]
    return {
        "padded": [*few, "--skip-first", "1"],
        "by domain, EAFT": ["profile", model, *domains, "--eaft", "--batch-size", "8", "--dtype", "float32"],
        "packed": ["profile", model, *domains, "--pack", "--batch-size", "4"],
        "streamed": ["profile", model, *domains, "--engine", "streamed", "--eaft"],
        "part": ["profile", model, *domains[:5], "7", *domains[6:], "--seed", "1", "--domain", "times"],
        "other": ["profile", model, *domains[:5], "7", *domains[6:], "--seed", "2", "--domain", "legs"],
        "sum": [MERGED, "part", "other"],
        "ranking": ["rank", "by domain, EAFT", "--criterion", "eaft_reap"],
        "ranking of a domain": ["rank", "by domain, EAFT", "--domain", "times"],
        "cut": ["prune", model, "--ranking", "padded/ranking_by_layer.json", "--keep", "4", "--domain", "some"],
        "cut, BF16": ["prune", model, "--keep-sets", "keep.json", "--format", "bf16", "--domain", "some"],
        "BF16": ["convert", model, "--to", "hf", "--format", "bf16"],
        "orbax": ["convert", model, "--to", "orbax"],
        "back": ["convert", "orbax", "--to", "hf"],
        "text": ["generate", model, "--prompt", "What is 12 + 7?", "--prompt", "2 + 2", "--max-new-tokens", "24"],
    }


def run(tree: Path, folder: Path, name: str, words: list[str]) -> None:
    """One command with the code of a tree; what it prints becomes a file too."""
    if words[0] == MERGED:
        merges = ["merge"] if (tree / "gptoss_jax" / "interface").is_dir() else ["profile", "--merge"]
        words = [*merges, *words[1:]]
    out = [] if words[0] in ("generate", "plan") else ["--out", name]
    variables = {"PYTHONPATH": str(tree), "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    with (folder / f"{name}.out").open("w") as printed:
        command = [sys.executable, "-m", "gptoss_jax.cli", *words, *out]
        subprocess.run(command, cwd=folder, env=os.environ | variables, stdout=printed, check=True)


def of_profile(data: bytes) -> Any:
    """profile.json without what may differ."""
    info = {name: value for name, value in json.loads(data).items() if name not in FREE}
    for part in info.get("merged", []):
        del part["command"]
    return info


def of_store(data: bytes) -> Any:
    """Tensors and domains."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    domains = json.loads(header["domains"]) if "domains" in header else json.loads(header["store"])["domains"]
    tensors = safetensors.numpy.load(data)
    return domains, {name: (x.dtype, x.shape, x.tobytes()) for name, x in tensors.items()}


def of_report(data: bytes) -> Any:
    """Without throughput, and the lines of what makes it again."""
    text = re.sub(r"(?s)## Reproduce\n.*?## Router", "", data.decode())
    return [line for line in text.splitlines() if not line.startswith("- Forward throughput")]


def of_ranking(data: bytes) -> Any:
    """The layers."""
    raw = json.loads(data)
    return raw["layers"] if isinstance(raw, dict) else raw


def of_plan(data: bytes) -> Any:
    """What both commits say, but for the time."""
    said = json.loads(data)
    return {name: said[name] for name in said if name != "compile_seconds" and not name.startswith("largest_batch_")}


COMPARED: dict[str, Callable[[bytes], Any]] = {
    r"(?!text|plan).*\.out": lambda data: None,
    r".*/profile.json": of_profile,
    r".*/statistics.safetensors": of_store,
    r".*/report.md": of_report,
    r"ranking.*": of_ranking,
    r"cut.*/README.md": lambda data: None,
    r"cut.*/SHA256SUMS": lambda data: [line for line in data.splitlines() if not line.endswith(b"  README.md")],
    r"plan.*\.out": of_plan,
    r"orbax/.*": lambda data: None,  # files named by chance; "back" has their content
}


def differing(one: Path, other: Path, name: str) -> tuple[int, list[str]]:
    """How many files of a command's were compared, and the names of those that differ."""
    files = [{p.relative_to(f).as_posix() for p in f.rglob("*") if p.is_file()} for f in (one, other)]
    of_command = [{f for f in some if f == name or f.startswith((f"{name}/", f"{name}.out"))} for some in files]
    wrong = sorted(of_command[0] ^ of_command[1]) if not name.startswith("orbax") else []
    for file in sorted(of_command[0] & of_command[1]):
        view = next((view for pattern, view in COMPARED.items() if re.fullmatch(pattern, file)), lambda data: data)
        if view((one / file).read_bytes()) != view((other / file).read_bytes()):
            wrong.append(file)
    return len(of_command[0] & of_command[1]), wrong


@contextmanager
def earlier(commit: str, folder: Path) -> Iterator[Path]:
    """The tree of a commit, in `folder`."""
    tree = folder / "before"
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", tree, commit], check=True)
    try:
        yield tree
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", tree], check=True)


def prepare(folder: Path) -> None:
    """The inputs of all commands: rows, a keep-set for either model, and the checkpoint."""
    write_rows(folder / "rows.jsonl", Path(str(open_source(NANO).folder)), read(QUESTIONS / "calibration.jsonl")[::4])
    checkpoints.write_random(folder / "tiny", TINY, seed=1, max_shard_bytes=150_000)
    tokenizers.write_small(folder / "tiny", TINY.vocab_size)


@click.command()
@click.argument("commit")
@click.option("--plan", is_flag=True, help="Also plan, which takes minutes.")
def main(commit: str, plan: bool) -> None:
    """Print one row for each command and model; exit status 1 where anything differs."""
    here, differences = Path.cwd(), 0
    click.echo("| command | model | files | equal |\n|---|---|---:|---|")
    with tempfile.TemporaryDirectory() as name, earlier(commit, Path(name)) as before:
        (Path(name) / "tiny").mkdir()
        prepare(Path(name))
        for model, (layers, kept) in {"nano": (6, 8), "../tiny": (TINY.num_layers, 5)}.items():
            sides = [Path(name) / f"{side} {Path(model).name}" for side in ("old", "new")]
            for side in sides:
                side.mkdir()
                (side / "keep.json").write_text(json.dumps([list(range(1, kept + 1))] * layers))
                (side / "rows.jsonl").write_bytes((Path(name) / "rows.jsonl").read_bytes())
            todo = commands(model)
            if plan and model == "nano":
                todo["plan"] = ["plan", "gpt-oss-20b", "--topology", "v5e:2x4", "--json"]
            for command, words in todo.items():
                for tree, side in zip((before, here), sides, strict=True):
                    run(tree, side, command, words)
                compared, wrong = differing(*sides, command)
                differences += len(wrong)
                verdict = f"no: {', '.join(wrong)}" if wrong else "yes"
                click.echo(f"| {words[0]}: {command} | {Path(model).name} | {compared} | {verdict} |")
    sys.exit(bool(differences))


if __name__ == "__main__":
    main()
