"""Our profile beside what is run today: transformers with statistics summed in the experts' own forward.

    python -m experiments.checkpoints MODEL --preset 20b --layers 2
    python -m experiments.bench.today MODEL --texts TEXT_FOLDER      # as experiments.real_rows takes it
    python -m experiments.bench.today MODEL --only-experts           # transformers' own ways beside the one that sums

Same checkpoint, same rows, each side in a process of its own, in turns; every token counts on both. Rows are full,
so neither side pads. transformers runs in bfloat16 (it unpacks MXFP4 while it loads), with its eager attention, the
only one that it has for sinks on CPU, and twice: as users call it, with logits, and without the unembedding, which no
statistic needs. Its loop over experts, its fastest way on CPU, sums counts, gates and norms from the outputs that it
has computed anyway; ours sums more than these.

A rate is of forward steps alone: ours without compiling, theirs without the first batch, which warms up. Both sides'
counts are compared, and must agree to 99 %: bfloat16 rounds a few choices the other way. Needs the test extra.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from .. import measure

# The process of transformers imports this file too: what only one side needs is imported where it is used.
COLUMNS = ("count", "gate_sum", "norm_sum", "gate_norm_sum")
CALLS = {"logits": "transformers, with logits", "hidden": "transformers, without the unembedding"}
AGREEMENT = 0.99


class Run(NamedTuple):
    """What one process took, and what it found."""

    tokens_per_s: float
    whole_s: float
    forward_s: float
    compile_s: float
    peak_gib: float
    tokens: int
    sums: dict[str, np.ndarray]
    """By column, [L, E]."""

    @property
    def rest_s(self) -> float:
        """Imports, loading, tokenising and writing."""
        return self.whole_s - self.forward_s - self.compile_s


# transformers' side: one process, which prints what it found as JSON.


def summing_forward(experts: Any, hidden_TD: Any, chosen_TK: Any, gates_TK: Any) -> Any:
    """transformers' forward of the experts, which also adds to `experts.sums` [E, 4], in the order of COLUMNS."""
    import torch

    output_TD = torch.zeros_like(hidden_TD)
    for expert in chosen_TK.unique().tolist():
        token_M, rank_M = torch.where(chosen_TK == expert)
        gate_up_MI = hidden_TD[token_M] @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
        out_MD = experts._apply_gate(gate_up_MI) @ experts.down_proj[expert] + experts.down_proj_bias[expert]
        gate_M = gates_TK[token_M, rank_M]
        norm_M = torch.linalg.vector_norm(out_MD, dim=-1, dtype=torch.float32)
        pairs_4M = torch.stack([torch.ones_like(norm_M), gate_M.float(), norm_M, gate_M * norm_M])
        experts.sums[expert] += pairs_4M.sum(1, dtype=torch.float64)
        output_TD.index_add_(0, token_M, out_MD * gate_M[:, None])
    return output_TD


def run_transformers(model: Path, rows: Path, call: str, length: int, batch_size: int) -> dict[str, Any]:
    """Load, replace the experts' forward, and pass all rows through."""
    import torch
    import transformers
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    start = time.perf_counter()
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    load_s = time.perf_counter() - start
    replaced: Any = GptOssExperts
    replaced.forward = summing_forward
    experts = [layer.mlp.experts for layer in network.model.layers]
    for module in experts:
        module.sums = torch.zeros(module.num_experts, len(COLUMNS), dtype=torch.float64)

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    texts = [json.loads(line)["text"] for line in rows.read_text(encoding="utf-8").splitlines()]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    assert all(len(ids) >= length for ids in encoded), "rows are full, so that no side pads"
    ids_BS = torch.tensor([ids[-length:] for ids in encoded])
    step = network if call == "logits" else network.model
    seconds = []
    with torch.inference_mode():
        for batch in ids_BS.split(batch_size):
            start = time.perf_counter()
            step(input_ids=batch, use_cache=False)
            seconds.append(time.perf_counter() - start)
    status = Path("/proc/self/status").read_text().splitlines()
    return {
        "tokens": ids_BS.numel(),
        "tokens_per_s": ids_BS[batch_size:].numel() / sum(seconds[1:]),
        "load_s": load_s,
        "forward_s": sum(seconds),
        "peak_rss_bytes": next(int(line.split()[1]) << 10 for line in status if "VmHWM" in line),
        "sums": {name: [module.sums[:, i].tolist() for module in experts] for i, name in enumerate(COLUMNS)},
        "how": f"torch {torch.__version__} with {torch.get_num_threads()} threads, transformers "
        f"{transformers.__version__} with {network.config._attn_implementation} attention",
    }


def time_experts(model: Path, tokens: int, rounds: int) -> None:
    """One layer with random weights: transformers' own implementations beside the forward that sums.

    Not its batched_mm, which copies the weights of its experts for every token: 50 MB a pair at 20b's shape.
    """
    import torch
    from transformers import AutoConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        layer = GptOssMLP(config).to(torch.bfloat16)
    layer = layer.to_empty(device="cpu").requires_grad_(False)
    for values in layer.parameters():
        values.normal_(0, 0.02)
    experts = layer.experts
    experts.sums = torch.zeros(experts.num_experts, len(COLUMNS), dtype=torch.float64)

    def own(name: str) -> Callable[..., Any]:
        def forward(experts: Any, *arguments: Any) -> Any:
            config._experts_implementation = name
            return experts(*arguments)

        return forward

    ways = {"eager": own("eager"), "grouped_mm": own("grouped_mm"), "the loop that sums": summing_forward}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        x = torch.randn(tokens, config.hidden_size, dtype=torch.bfloat16)
        _, gates, chosen = layer.router(x)
        for round_ in range(rounds + 1):
            for name, forward in ways.items():
                start = time.perf_counter()
                forward(experts, x, chosen, gates)
                if round_:  # the first one warms up
                    seconds[name].append(time.perf_counter() - start)
    click.echo(f"\n| experts of one layer, {tokens:,} tokens | median s | least s |\n|---|---:|---:|")
    for name, taken in seconds.items():
        click.echo(f"| {name} | {np.median(taken):.2f} | {min(taken):.2f} |")


# Our side, and the two together.


def conversations(model: Path, texts: Path | None) -> Iterator[Iterator[str]]:
    """Harmony text by source: of public question sets where their folder is given, else of Python's reference."""
    import random

    from gptoss_jax.data.spellings import harmony_of
    from gptoss_jax.data.template import Template
    from gptoss_jax.data.tokens import load_tokenizer

    from .. import real_rows
    from ..nano import corpus, families

    tokenizer = load_tokenizer(model)
    if texts is None:
        paragraphs = families.draw(random.Random(0), "train", [families.ENGLISH])
        yield ("".join(corpus.prompt_and_reply(paragraph, tokenizer)) for paragraph in paragraphs)
        return
    template = Template(tokenizer)
    sources = [real_rows.maths(texts), real_rows.medicine(texts)]
    for source in [*sources, *(real_rows.multiple_choice(texts, domain) for domain in real_rows.SUBJECTS)]:
        yield (harmony_of(row["messages"], template, warnings.warn).text for row in source)


def write_rows(file: Path, model: Path, texts: Path | None, num_rows: int, length: int) -> None:
    """Rows of at least `length` tokens, each joined from conversations of one source, the sources in turn."""
    from gptoss_jax.data.tokens import load_tokenizer

    tokenizer = load_tokenizer(model)
    sources = list(conversations(model, texts))
    lines = []
    for number in range(num_rows):
        text, tokens = "", 0
        while tokens < length:
            more = "".join(islice(sources[number % len(sources)], 1))
            if not more:
                raise click.ClickException(f"{texts}: holds too little text for {num_rows} rows of {length} tokens")
            text += more
            tokens = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        lines.append(json.dumps({"id": str(number), "text": text}))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def ours(model: Path, rows: Path, length: int, options: list[str]) -> Run:
    """One profile by the command line."""
    from gptoss_jax.files.parquet import read_parquet

    out = rows.parent / "profile"
    data = ("--data", rows, "--max-seq-length", length, "--keep", "all")
    cost = measure.program("profile", model, *data, *options, "--out", out, "--overwrite")
    info = json.loads((out / "profile.json").read_text(encoding="utf-8"))
    assert info["kept_tokens"] == info["total_tokens"], "all tokens count, as on the other side"
    table = read_parquet((out / "saliency.parquet").read_bytes())
    shape = info["num_layers"], info["num_experts"]
    sums = {name: table[name].to_numpy().reshape(shape).astype(float) for name in COLUMNS}
    steps = info["tokens_per_s"], cost.seconds, info["seconds"], info["compile_seconds"]
    return Run(*steps, cost.peak_gib, info["total_tokens"], sums)


def theirs(model: Path, rows: Path, length: int, batch_size: int, call: str) -> tuple[Run, str]:
    """One process of transformers, and a line on how it ran."""
    command = [sys.executable, "-m", "experiments.bench.today", model, "--only-transformers", call]
    command += ["--rows", rows, "--length", length, "--batch-size", batch_size]
    start = time.perf_counter()
    done = subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE)
    whole_s = time.perf_counter() - start
    found = json.loads(done.stdout.splitlines()[-1])
    sums = {name: np.array(values) for name, values in found["sums"].items()}
    peak_gib = found["peak_rss_bytes"] / 2**30
    run = Run(found["tokens_per_s"], whole_s, found["forward_s"], 0.0, peak_gib, found["tokens"], sums)
    click.echo(f"{CALLS[call]}: {measure.Cost(whole_s, peak_gib)}")
    return run, f"{found['how']}; its last run loaded for {found['load_s']:.0f} s"


def agreement(run: Run, other: Run) -> dict[str, float]:
    """1 less the total variation of each column, over all layers."""
    differences = {name: np.abs(run.sums[name] - other.sums[name]).sum() for name in COLUMNS}
    return {name: float(1 - d / (run.sums[name] + other.sums[name]).sum()) for name, d in differences.items()}


def check(run: Run, other: Run) -> dict[str, float]:
    """Both saw the same tokens and chose the same experts, or there is nothing to compare."""
    assert run.tokens == other.tokens, f"{run.tokens} and {other.tokens} tokens"
    agree = agreement(run, other)
    if agree["count"] < AGREEMENT:
        raise click.ClickException(f"counts agree to {agree['count']:.2%} only: the two compute different things")
    return agree


def show(runs: dict[str, list[Run]]) -> None:
    """Medians of each side, then of the pairs' ratios with the least and the largest of them."""

    def median(values: Iterator[float]) -> float:
        return float(np.median(list(values)))

    click.echo("\n| side | tokens/s, steady | whole process, s | forward | compiling | all else | peak, GiB |")
    click.echo("|---|---:|---:|---:|---:|---:|---:|")
    for name, some in runs.items():
        rate = median(run.tokens_per_s for run in some)
        fields = ("whole_s", "forward_s", "compile_s", "rest_s")
        seconds = " | ".join(f"{median(getattr(run, field) for run in some):.0f}" for field in fields)
        click.echo(f"| {name} | {rate:,.0f} | {seconds} | {median(run.peak_gib for run in some):.2f} |")
    mine, *others = runs
    click.echo(f"\n| {mine} over | tokens/s | whole process, s | peak | pairs |\n|---|---:|---:|---:|---:|")
    for name in others:
        cells = []
        for field in ("tokens_per_s", "whole_s", "peak_gib"):
            ratios = [getattr(a, field) / getattr(b, field) for a, b in zip(runs[mine], runs[name], strict=True)]
            cells.append(f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        click.echo(f"| {name} | {' | '.join(cells)} | {len(runs[name])} |")


def compare(model: Path, rows: Path, length: int, batch_size: int, pairs: int, options: list[str]) -> None:
    """All sides in turns, every second time backwards, and the tables."""
    mine = f"gptoss-jax {shlex.join(options)}"
    names = [mine, *CALLS.values()]
    runs: dict[str, list[Run]] = {name: [] for name in names}
    how = ""
    for pair in range(pairs):
        for name in names[:: -1 if pair % 2 else 1]:
            if name == mine:
                runs[name].append(ours(model, rows, length, options))
            else:
                call = next(call for call, label in CALLS.items() if label == name)
                run, how = theirs(model, rows, length, batch_size, call)
                runs[name].append(run)
        agree = [check(runs[mine][-1], runs[name][-1]) for name in CALLS.values()]
        shown = ", ".join(f"{column} {min(a[column] for a in agree):.2%}" for column in COLUMNS)
        click.echo(f"pair {pair + 1}, load average {os.getloadavg()[0]:.1f}: agreement of {shown}")
    click.echo(f"\n{runs[mine][0].tokens:,} tokens; {how}")
    show(runs)


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.option("--texts", type=click.Path(path_type=Path, exists=True), help="Question sets.  [default: Python's docs]")
@click.option("--num-rows", type=click.IntRange(2), default=20, show_default=True)
@click.option("--length", type=click.IntRange(1), default=512, show_default=True, help="Tokens a row.")
@click.option("--batch-size", type=click.IntRange(1), default=4, show_default=True, help="Of transformers, in rows.")
@click.option("--engine", default="streamed", show_default=True, help="Of ours.")
@click.option("--ours", "more", default="", help='Further options of ours, e.g. "--batch-size 16".')
@click.option("--pairs", type=click.IntRange(1), default=5, show_default=True)
@click.option("--only-experts", is_flag=True, help="Time transformers' implementations of the experts and stop.")
@click.option("--only-transformers", type=click.Choice(list(CALLS)), hidden=True)
@click.option("--rows", type=click.Path(path_type=Path, exists=True), hidden=True)
def main(model: Path, num_rows: int, length: int, batch_size: int, pairs: int, **options: Any) -> None:
    """Print the tables."""
    if options["only_experts"]:
        time_experts(model, batch_size * length, pairs)
        return
    if num_rows <= batch_size:
        raise click.BadParameter("the first batch warms up: give more rows than --batch-size")
    if options["only_transformers"]:
        rows, call = options["rows"], options["only_transformers"]
        click.echo(json.dumps(run_transformers(model, rows, call, length, batch_size)))
        return
    os.environ["JAX_PLATFORMS"] = "cpu"  # as the other side; nor is time spent on looking for TPUs
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        write_rows(rows, model, options["texts"], num_rows, length)
        words = ["--engine", options["engine"], *shlex.split(options["more"])]
        compare(model, rows, length, batch_size, pairs, words)


if __name__ == "__main__":
    main()
