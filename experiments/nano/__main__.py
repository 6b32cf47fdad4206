"""Makes nano from nothing; stopped at any time, the same command goes on.

python -m experiments.nano OUT
"""

import random
from itertools import islice
from pathlib import Path

import click

from gptoss_jax.outputs import new_folder

from .. import tokenizers
from ..measure import program
from .corpus import Corpus, plain_text
from .families import ENGLISH, FAMILIES, draw
from .network import CONFIG, Recipe
from .publish import write_bf16
from .train import train

TOKENIZER_TEXTS = 20_000  # conversations


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--steps", type=click.IntRange(1), default=Recipe().steps, show_default=True)
def main(out: Path, steps: int) -> None:
    """Tokenizer, training, and the checkpoint in BF16 and MXFP4."""
    recipe = Recipe(steps=steps)
    tokenizer = out / "tokenizer"
    if not tokenizer.exists():
        with new_folder(tokenizer) as folder:
            examples = islice(draw(random.Random(0), "train", [*FAMILIES, ENGLISH]), TOKENIZER_TEXTS)
            tokenizers.write_small(folder, CONFIG.vocab_size, [plain_text(e) for e in examples])
    model = train(out / "training", Corpus(tokenizer, recipe.rows, recipe.length), CONFIG, recipe, seed=0)
    with new_folder(out / "bf16", overwrite=True) as folder:
        write_bf16(folder, model, tokenizer)
    program("convert", out / "bf16", "--to", "hf", "--format", "mxfp4", "--out", out / "model", "--overwrite")


if __name__ == "__main__":
    main()
