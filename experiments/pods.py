"""The profile step compiled for TPU slices, as docs/pods.md and docs/measurements.md show it.

    python -m experiments.pods FILE.jsonl

A case takes up to a minute or two on two cores. What FILE holds already is not compiled again, so a run that
was stopped goes on; the table of all that it holds is printed at the end.
"""

import json
import os
from pathlib import Path
from typing import Any

import click

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # TPUs are compiled for, not run on

from gptoss_jax.config import GPT_OSS_20B, GPT_OSS_120B
from gptoss_jax.pods import plan

CONFIGS = {"20b": GPT_OSS_20B, "120b": GPT_OSS_120B}
CASES = [
    # model, slice, data, expert, weights, rows, length
    ("20b", "v5e:2x2", 1, 4, "bf16", 16, 2048),
    ("20b", "v5e:2x2", 4, 1, "mxfp4", 16, 2048),
    ("20b", "v5e:2x4", 1, 8, "bf16", 16, 2048),
    ("20b", "v5e:2x4", 2, 4, "bf16", 16, 2048),
    ("20b", "v5e:2x4", 8, 1, "mxfp4", 16, 2048),
    ("20b", "v5e:2x4", 2, 4, "bf16", 2, 16384),
    ("20b", "v5e:16x16", 64, 4, "bf16", 512, 2048),
    ("20b", "v6e:2x2", 2, 2, "bf16", 16, 2048),
    ("20b", "v6e:2x2", 2, 2, "bf16", 2, 16384),
    ("20b", "v5p:2x2x1", 4, 1, "bf16", 16, 2048),
    ("20b", "v5p:2x2x1", 2, 2, "bf16", 2, 16384),
    ("20b", "tpu7x:2x2x1", 8, 1, "bf16", 16, 2048),
    ("20b", "tpu7x:2x2x1", 2, 4, "bf16", 2, 16384),
    ("120b", "v5e:2x4", 1, 8, "mxfp4", 4, 2048),
    ("120b", "v5e:2x4", 1, 8, "mxfp4", 16, 2048),
    ("120b", "v5e:16x16", 32, 8, "mxfp4", 512, 2048),
    ("120b", "v6e:4x4", 2, 8, "bf16", 16, 2048),
    ("120b", "v6e:4x4", 4, 4, "mxfp4", 16, 2048),
    ("120b", "v5p:2x2x2", 2, 4, "bf16", 16, 2048),
]


def measure(case: plan.Case) -> dict[str, Any]:
    """The figures of one case, as `plan --json` has them; its largest batch is not searched for."""
    compiled = plan.compile_step(case)
    return plan.figures(compiled, plan.Largest((compiled,)))


def row(model: str, said: dict[str, Any]) -> str:
    """One line of the table."""
    gib, mesh = 1 << 30, said["mesh"]
    head = f"| {model} {said['weights']}, {said['topology']}, {mesh['data']} × {mesh['expert']} | "
    head += f"{said['batch']} × {said['seq_len']:,} | "
    if not said["fits"]:
        needed, has = said["needed_bytes_per_chip"] / gib, said["memory_bytes_per_chip"] / gib
        return f"{head}needs {needed:.1f} | {has:.2f} | | | {said['compile_seconds']:.0f} | |"
    measured, expected = said["collective_bytes_per_layer"], said["expected_collective_bytes_per_layer"]
    return (
        f"{head}{said['weight_bytes_per_chip'] / gib:.2f} + {said['temp_bytes_per_chip'] / gib:.2f} | "
        f"{said['memory_bytes_per_chip'] / gib:.2f} | "
        f"{said['compiled_matmul_flops'] / said['active_matmul_flops']:.3f} | "
        f"{measured / 1e6:.1f}{'' if measured == expected else f' ({expected / 1e6:.1f})'} | "
        f"{said['compile_seconds']:.0f} | {said['estimated_tokens_per_s']:,.0f} |"
    )


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
def main(file: Path) -> None:
    """Compile what FILE lacks, append it, and print the table."""
    known = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {tuple(case): said for case, said in known}
    for case in CASES:
        if case not in done:
            model, *rest = case
            done[case] = measure(plan.Case(CONFIGS[model], *rest))
            with file.open("a") as out:
                out.write(json.dumps([case, done[case]]) + "\n")
            click.echo(row(model, done[case]), err=True)
    columns = (
        "model, slice, data × expert",
        "rows",
        "weights + temporaries, GiB a chip",
        "of",
        "FLOPs, compiled / active",
        "exchanged, MB a layer and chip",
        "compiled in, s",
        "roofline, tokens/s",
    )
    click.echo(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for case in CASES:
        click.echo(row(case[0], done[case]))


if __name__ == "__main__":
    main()
