"""What is compared on a family's questions: keep-sets by scores, by elimination, picked, and healed."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import gptoss_jax as gj
from convert.hf import Checkpoint
from gptoss_jax.files.atomic import write_file
from gptoss_jax.healing import job
from gptoss_jax.run.distilling import distilled
from gptoss_jax.run.progress import Progress
from gptoss_jax.selection.criteria import ELIMINATIONS

from .material import Questions
from .measure import Values

CRITERIA = ("reap", "swap", "frequency")
SEEDS = range(5)  # of `random`
PICKED_OF = ("greedy", "greedy_cosine", "reap", "swap")
# What is healed, and how: by distillation into the routers, with each layer brought near the whole model's before, or
# into all small parameters.
HEALED = (
    *(("reap", "healed"), ("greedy_cosine", "healed")),
    *(("picked", "healed"), ("picked", "rebuilt"), ("picked", "small")),
)
HOW = {"dtype": "float32", "batch_size": 32, "max_seq_length": 256}
# A step takes 7 rows of 256 tokens, in which replies of several conversations stand side by side.
KD: dict[str, Any] = {"dtype": "float32", "batch_size": 7, "max_seq_length": 256}
WAYS: dict[str, dict[str, Any]] = {
    "healed": KD,
    "rebuilt": KD | {"reconstruct": ("routers", "biases")},
    "small": KD | {"train": "small"},
}


def seeds_of(way: str, seeds: int) -> range:
    """Healing as it is by default is measured with all seeds; with options, with the first."""
    return range(seeds if way == "healed" else 1)


@dataclass(frozen=True)
class Candidate:
    """Keep-sets by their rule, and what was healed of them, if anything was."""

    rule: str
    keep: int
    layers: list[list[int]]
    seed: int | None = None
    """Of the healing."""
    way: str = "healed"
    """The healing's, of `WAYS`."""

    @property
    def name(self) -> str:
        """As its files have it."""
        return f"{self.rule}-{self.keep}" + ("" if self.seed is None else f"-{self.way}-{self.seed}")


class Choices:
    """A family's, each made once in a folder of the work."""

    def __init__(self, model: Path, asked: Questions, work: Path):
        self.model, self.asked, self.folder = model, asked, work / "choices" / asked.family
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config = Checkpoint(model).config

    def all(self, keep: int, seeds: int) -> Iterator[Candidate]:
        """Those of so many experts, and what is healed of them."""
        sets = self.sets(keep)
        for rule, kept in sets.items():
            yield Candidate(rule, keep, kept.layers)
        for rule, way in HEALED:
            for seed in seeds_of(way, seeds):
                yield Candidate(rule, keep, sets[rule].layers, seed, way)

    def sets(self, keep: int) -> dict[str, gj.KeepSets]:
        """Keep-sets by their rules."""
        profile = self._profile()
        found = {name: profile.rank(name).keep(keep) for name in CRITERIA}
        found |= {rule: self.eliminated(rule).keep(keep) for rule in ELIMINATIONS}
        found["picked"] = self._picked(keep)
        return found | {f"random {seed}": profile.rank("random", seed=seed).keep(keep) for seed in SEEDS}

    def values(self, of: Candidate) -> Values:
        """What is healed; nothing where it was rolled back, or nothing is."""
        if of.seed is None:
            return {}
        # Often two rules choose the same: what is healed of it has one file.
        layers = hashlib.sha256(json.dumps(of.layers).encode()).hexdigest()[:16]
        file = self.folder / f"{layers}-{of.way}-{of.seed}.npz"
        if not file.exists():
            chosen = distilled(data=str(self.asked.calibration), seed=of.seed, **WAYS[of.way])
            request = job.Request(self.asked.family, gj.KeepSets(of.layers), *chosen)
            kept = Progress(file)
            healing = job.run(request, Checkpoint(self.model), kept, resume=kept.exists())
            write_file(file.with_suffix(".json"), healing.to_json(), overwrite=True)
            with file.with_suffix(".partial").open("wb") as stream:
                np.savez(stream, **healing.values)  # type: ignore[arg-type]
            file.with_suffix(".partial").rename(file)
            kept.remove()
        with np.load(file) as held:
            return {path: held[path] for path in held.files}

    def _profile(self) -> gj.Profile:
        folder = self.folder / "profile"
        if (folder / "profile.json").exists():
            return gj.Profile.open(folder)
        rows = str(self.asked.calibration)
        return gj.profile(str(self.model), rows, keep="all", swap=True, out=folder, resume=True, **HOW)

    def eliminated(self, rule: str) -> gj.Ranking:
        """All experts, the last one to go first."""
        file, whole = self.folder / f"{rule}.json", self.folder / f"{rule}-ranking.json"
        if not (file.exists() and whole.exists()):
            asked = {"rule": rule, "data": str(self.asked.calibration)}
            gj.select(str(self.model), self.config.top_k, out=file, resume=True, overwrite=True, **asked, **HOW)
        return gj.Ranking.read(whole, self.config)

    def _picked(self, keep: int) -> gj.KeepSets:
        file = self.folder / f"picked-{keep}.json"
        if not file.exists():
            asked = {"pick": PICKED_OF, "data": str(self.asked.calibration)}
            gj.select(str(self.model), keep, out=file, resume=True, **asked, **HOW)
        return gj.KeepSets.read(file, self.config)
