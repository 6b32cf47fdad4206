"""The published science model in form: 20b at full size cut to 12 experts a layer by the real science ranking.

    python -m experiments.science_model DATA OUT

DATA holds gptoss20b/ (the published small files) and fingerprint/topical_analytics/science.json. Weights are
random, in the published MXFP4 form: about 14 GB, and up to 18 GB for each result. Afterwards every kept expert
is compared with the source, byte for byte where it stayed MXFP4.
"""

import hashlib
import json
from pathlib import Path

import click

from convert.hf import Checkpoint
from convert.mapping import all_tensors
from convert.tensors import is_quantized, read_values
from gptoss_jax.config import GPT_OSS_20B
from gptoss_jax.files.atomic import new_folder

from .main_job import write_model
from .measure import program

KEEP = 12


def compare(source: Checkpoint, pruned: Checkpoint) -> int:
    """Compare each kept expert of each tensor with its source by SHA-256; returns how many were compared."""
    mapping = json.loads((pruned.folder / "expert_mapping.json").read_text(encoding="utf-8"))
    compared = 0
    for name, tensor, layer in all_tensors(source.config):
        if layer is None or not tensor.per_expert:
            continue
        for old, new in mapping[str(layer)].items():
            if is_quantized(source, name) and not is_quantized(pruned, name):
                values = tensor.mxfp4_to_hf(read_values(source, name, int(old), 1), source.config)
                pairs = [(values, read_values(pruned, name, new, 1))]
            else:
                parts = [f"{name}_blocks", f"{name}_scales"] if is_quantized(source, name) else [name]
                pairs = [(source.tensors[p].read(int(old), 1), pruned.tensors[p].read(new, 1)) for p in parts]
            for before, after in pairs:
                digests = {hashlib.sha256(array.tobytes()).hexdigest() for array in (before, after)}
                assert len(digests) == 1, (name, old, new)
                compared += 1
    return compared


@click.command()
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path))
def main(data: Path, out: Path) -> None:
    """Write and compare both forms; the full-size model is kept for the next run."""
    model = out / "gpt-oss-20b-random"
    if not model.exists():
        with new_folder(model) as folder:
            write_model(folder, data / "gptoss20b", GPT_OSS_20B.num_layers)
    ranking = data / "fingerprint" / "topical_analytics" / "science.json"
    for form in ("mxfp4", "bf16"):
        folder = out / form
        choice = ("--ranking", ranking, "--keep", KEEP, "--domain", "science")
        program("prune", model, *choice, "--format", form, "--out", folder, "--overwrite")
        size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        compared = compare(Checkpoint(model), Checkpoint(folder))
        click.echo(f"  {form}: {size / 1e9:.2f} GB of weights; {compared:,} slices of kept experts equal the source's")


if __name__ == "__main__":
    main()
