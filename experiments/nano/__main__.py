"""Makes nano from nothing; stopped at any time, the same command goes on.

    make nano, or python -m experiments.nano OUT [--seed 1]

OUT/model is what ships, as gptoss_jax/nano, and OUT/calibration.jsonl and OUT/evaluation.jsonl are the questions of the
demo, in experiments/nano/questions; OUT also has the log and the states of the training, its pictures, and the weights
in BF16.
"""

import os
import random
from itertools import islice
from pathlib import Path

import click

from gptoss_jax.errors import UserError
from gptoss_jax.files.atomic import new_folder

from .. import tokenizers
from ..measure import program
from . import evaluate, plots, specialise
from .card import card
from .corpus import Corpus, plain_text
from .families import ENGLISH, FAMILIES, draw, pick, write
from .network import CONFIG, Recipe
from .publish import write_bf16
from .train import LOG, train

TOKENIZER_TEXTS = 20_000  # conversations
SHIPPED = 50  # instances of each family, of calibration and of evaluation, that the demo takes
FORMS = {"BF16": "bf16", "MXFP4": "model"}  # of the weights, and their folders


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--questions", type=click.IntRange(1), default=200, show_default=True, help="Of each family, to score.")
@click.option("--seed", default=0, show_default=True, help="Of first weights, training texts and questions.")
def main(out: Path, questions: int, seed: int) -> None:
    """Tokenizer, training, checkpoints, measurements and card."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    recipe, tokenizer = Recipe(), out / "tokenizer"
    if not tokenizer.exists():
        with new_folder(tokenizer) as folder:
            examples = islice(draw(random.Random(seed), "train", [*FAMILIES, ENGLISH]), TOKENIZER_TEXTS)
            tokenizers.write_small(folder, CONFIG.vocab_size, [plain_text(e) for e in examples])
    try:
        model = train(out / "training", Corpus(tokenizer, recipe.rows, recipe.length, seed), CONFIG, recipe, seed)
    except UserError as error:
        click.echo(f"nano: {error}", err=True)
        raise SystemExit(2) from None
    with new_folder(out / "bf16", overwrite=True) as folder:
        write_bf16(folder, model, tokenizer)
    to_mxfp4 = ("convert", out / "bf16", "--to", "hf", "--format", "mxfp4", "--out", out / "model", "--overwrite")
    program(*to_mxfp4)

    log = plots.read_log(out / "training" / LOG)
    held_out = {split: pick(split, list(FAMILIES), questions, seed) for split in ("calibration", "evaluation")}
    for split in held_out:
        write(out / f"{split}.jsonl", pick(split, list(FAMILIES), SHIPPED, seed))
    scores = {form: evaluate.score(out / name, held_out["evaluation"]) for form, name in FORMS.items()}
    found = specialise.measure(out / "model", held_out["calibration"], out)
    plots.training(log, out / "training.png")
    plots.families(found, out / "experts.png")
    text = card(CONFIG, recipe, log, scores, found)
    (out / "bf16" / "README.md").write_text(text, encoding="utf-8")
    program(*to_mxfp4)  # again with the card, whose digest SHA256SUMS then has
    click.echo(text)


if __name__ == "__main__":
    main()
