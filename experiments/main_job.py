"""The main job on real input: 20b's names, formats and layer shapes, the true tokenizer, real conversations.

    python -m experiments.main_job DATA OUT

DATA holds gptoss20b/ (the published small files) and text/ (question sets). Weights are random, two of 20b's
24 layers: profile by domain, rank, prune to 12 experts for each domain; then transformers loads one of the
results and compares it, in float32, with the full model whose other experts are masked. Needs the test extra.
"""

import gc
import json
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from gptoss_jax.config import GPT_OSS_20B
from gptoss_jax.data.spellings import harmony_of
from gptoss_jax.data.template import Template
from gptoss_jax.data.tokens import load_tokenizer, token_ids
from gptoss_jax.files.atomic import new_folder

from . import checkpoints, tokenizers
from .measure import program

DOMAINS = ("maths", "medicine", "law", "science")
KEEP = 12
SMALL_FILES = ("chat_template.jinja", "generation_config.json", "special_tokens_map.json", "tokenizer_config.json")


def write_model(folder: Path, published: Path, layers: int) -> None:
    """A checkpoint of 20b's first layers with random weights and the published small files."""
    config = replace(GPT_OSS_20B, num_layers=layers, layer_types=GPT_OSS_20B.layer_types[:layers])
    checkpoints.write_random(folder, config)
    tokenizers.write_published(folder)
    for name in SMALL_FILES:
        shutil.copyfile(published / name, folder / name)


def transformers_logits(folder: Path, token_ids: np.ndarray, keep_sets: list[list[int]] | None) -> np.ndarray:
    """float32 logits of one row, with all experts outside the keep-sets masked where they are given."""
    import torch
    from transformers import AutoModelForCausalLM

    network, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    problems = {name: keys for name, keys in info.items() if keys}
    click.echo(f"transformers loads {folder}: {problems or 'no missing, unexpected or mismatched key'}")
    for layer, kept in enumerate(keep_sets or []):
        bias: Any = network.model.layers[layer].mlp.router.bias
        dropped = torch.tensor([e not in kept for e in range(len(bias))])
        bias.data[dropped] = -torch.inf
    with torch.no_grad():
        return network(torch.tensor(token_ids[None]).long()).logits[0].numpy()


@click.command()
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--num-rows", type=click.IntRange(1), default=200, show_default=True)
def main(data: Path, out: Path, num_rows: int) -> None:
    """Run the main job; what an earlier run left in OUT is replaced, but for the model and the rows."""
    model, rows = out / "model", out / "rows.jsonl"
    if not model.exists():
        with new_folder(model) as folder:
            write_model(folder, data / "gptoss20b", layers=2)
    if not rows.exists():
        subprocess.run([sys.executable, "-m", "experiments.real_rows", data / "text", rows], check=True)
    columns = ("--text-column", "messages", "--domain-column", "domain")
    sizes = ("--num-rows", num_rows, "--max-seq-length", 512, "--batch-size", 16)
    program(
        "profile",
        model,
        "--data",
        rows,
        "--keep",
        "assistant",
        *columns,
        *sizes,
        "--out",
        out / "profile",
        "--overwrite",
    )
    for domain in DOMAINS:
        ranking = out / f"{domain}.json"
        program("rank", out / "profile", "--domain", domain, "--out", ranking, "--overwrite")
        program("prune", model, "--ranking", ranking, "--keep", KEEP, "--out", out / domain, "--overwrite")

    record = json.loads(rows.read_text(encoding="utf-8").splitlines()[0])
    tokenizer = load_tokenizer(model)
    text = harmony_of(record["messages"], Template(tokenizer), warnings.warn)
    ids = token_ids(text, tokenizer, len(tokenizer))
    mapping = json.loads((out / "science" / "expert_mapping.json").read_text(encoding="utf-8"))
    cut = transformers_logits(out / "science", ids, None)
    gc.collect()
    masked = transformers_logits(model, ids, [[int(old) for old in layer] for layer in mapping.values()])
    click.echo(
        f"{len(ids)} tokens: logits up to {np.abs(masked).max():.3g}, cut − masked {np.abs(cut - masked).max():.1e}"
    )


if __name__ == "__main__":
    main()
