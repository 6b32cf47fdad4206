"""One of everything that a page shows, of a tiny model."""

from pathlib import Path

import gptoss_jax as gj
from gptoss_jax.config import TINY
from gptoss_jax.selection.keep_sets import KeepSets

from .conftest import conversation

ROWS = [{"domain": "ab"[n % 2], "text": conversation(n)} for n in range(12)]
SHORT = {"max_seq_length": 64, "batch_size": 4, "dtype": "float32"}
THINGS = ("profile", "keep.json", "random.json", "eval", "full", "pruned")


def make(folder: Path, model: str) -> Path:
    """A folder with a profile, keep-sets, an evaluation with replies, and two traces, and the page of all."""
    profile = gj.profile(model, ROWS, out=folder / "profile", domain_column="domain", keep="all", **SHORT)
    for name, criterion in (("keep", "reap"), ("random", "random")):
        gj.select(profile, 4, criterion, out=folder / f"{name}.json")
    sets = [folder / "keep.json", folder / "random.json"]
    asked = {"keep": "all", "seq_len": (16,), "replies": 3, "max_new_tokens": 5, "dtype": "float32"}
    others = [row | {"text": row["text"].replace("Adding", "Summing")} for row in ROWS]
    gj.evaluate(model, others, keep_sets=sets, out=folder / "eval", **asked)
    say = {"temperature": 0.0, "max_new_tokens": 6, "dtype": "float32"}
    gj.generate(model, ["What is 1 + 2?", "Hello"], trace=folder / "full", **say)
    masked = gj.open(model, dtype="float32").masked(KeepSets.read(sets[0], TINY))
    gj.generate(masked, ["What is 1 + 2?", "Hello"], trace=folder / "pruned", **say)
    gj.report(*(folder / name for name in THINGS), model=model, out=folder / "page.html")
    return folder
