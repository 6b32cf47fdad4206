"""One of everything that a page shows, of a tiny model."""

from contextlib import chdir
from pathlib import Path

import gptoss_jax as gj
from gptoss_jax.config import TINY
from gptoss_jax.selection.keep_sets import KeepSets

from .conftest import conversation

ROWS = [{"domain": "ab"[n % 2], "text": conversation(n)} for n in range(12)]
SHORT = {"max_seq_length": 64, "batch_size": 4, "dtype": "float32"}
THINGS = ("profile", "keep.json", "random.json", "eval", "full", "pruned")


def make(folder: Path, model: str) -> Path:
    """A folder with a profile, keep-sets, an evaluation with replies, and two traces, and the page of all.

    On the page the model is called "tiny", wherever it lies: a path would wrap where another does not."""
    (folder / "tiny").symlink_to(model)
    with chdir(folder):
        _make("tiny")
    return folder


def _make(model: str) -> None:
    profile = gj.profile(model, ROWS, out="profile", domain_column="domain", keep="all", **SHORT)
    sets = ["keep.json", "random.json"]
    for file, criterion in zip(sets, ("reap", "random"), strict=True):
        gj.select(profile, 4, criterion, out=file)
    asked = {
        "keep": "all",
        "domain_column": "domain",
        "seq_len": (16,),
        "replies": 3,
        "max_new_tokens": 5,
        "dtype": "float32",
    }
    others = [row | {"text": row["text"].replace("Adding", "Summing")} for row in ROWS]
    gj.evaluate(model, others, keep_sets=sets, out="eval", **asked)
    say = {"temperature": 0.0, "max_new_tokens": 6, "dtype": "float32"}
    gj.generate(model, ["What is 1 + 2?", "Hello"], trace="full", **say)
    masked = gj.open(model, dtype="float32").masked(KeepSets.read(sets[0], TINY))
    gj.generate(masked, ["What is 1 + 2?", "Hello"], trace="pruned", **say)
    gj.report(*THINGS, model=model, out="page.html")
