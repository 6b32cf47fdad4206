"""The models of the family: what nano's routers decide while it answers, and what is measured of it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import gptoss_jax as gj
from convert.card import model_name
from convert.sources import NANO, open_source
from gptoss_jax.config import Config
from gptoss_jax.data.remarks import Remarks
from gptoss_jax.data.rows import row_hashes
from gptoss_jax.fingerprints.folder import Activations
from gptoss_jax.run import reading
from gptoss_jax.run.options import Data
from gptoss_jax.selection.origin import Origin, rows_as_text
from gptoss_jax.selection.ranking import rank

from ..families.results import Results
from .questions import BENCHMARK

# How a family's experts are ranked. Of five ways this one's soft prunes answered most of the calibration questions
# themselves, 12 experts of 16: 68 %, and 43 % with the ranking of the published family (docs/measurements.md).
RANKED = {"by": "specificity", "segment": "think"}
SEEDS = range(3)  # of `random`
GREEDY = {"dtype": "float32", "max_new_tokens": 128}


@dataclass(frozen=True)
class Member:
    """One model of the family."""

    family: str
    keep: int
    keep_sets: gj.KeepSets
    config: Config
    """Of the model before it is cut."""

    @property
    def name(self) -> str:
        """The published form."""
        return model_name(self.config, self.keep, self.family)

    @property
    def parameters(self) -> int:
        """After the cut."""
        return self.config.num_parameters(self.keep)


def recorded(rows: Path, families: Sequence[str], out: Path) -> Activations:
    """The activation dataset of nano's answers to the rows, whose domains are the families."""
    if not out.exists():
        domains = {family: [f"{BENCHMARK}/{family}"] for family in families}
        gj.fingerprint.record(NANO, rows, domains, out=out, resume=True, temperature=0, batch_size=32, **GREEDY)
    return Activations.open(out)


def members(dataset: Activations, rows: Path, families: Sequence[str], keep: int) -> list[Member]:
    """Of each family, the experts that the thoughts of its answers to the rows use more than all answers do."""
    source = open_source(NANO)
    asked = reading.read(Data(data=str(rows)), reading.tokenizer_of(source), Remarks())
    # The evaluation makes sure that it asks nothing of this.
    hashes = rows_as_text(row_hashes(asked))
    found = []
    for family in families:
        ranking = gj.fingerprint.rank(dataset, family, **RANKED)
        ranking = replace(ranking, origin=replace(ranking.origin, calibration_rows=hashes))
        found.append(Member(family, keep, ranking.keep(keep), source.config))
    return found


def drawn(keep: int) -> dict[str, gj.KeepSets]:
    """Keep-sets of that size drawn at random, by their names."""
    source = open_source(NANO)
    columns = {"count": np.ones((source.config.num_layers, source.config.num_experts))}
    origin = Origin(model_fingerprint=source.fingerprint())
    return {f"random {seed}": rank(columns, "random", seed, origin).keep(keep) for seed in SEEDS}


def measured(some: Sequence[Member], rows: Path, out: Path) -> Results:
    """All members of a size on the questions of all their families, which pass nano together, each as a soft prune."""
    if not out.exists():
        sets = {member.family: member.keep_sets for member in some} | drawn(some[0].keep)
        # Cards go to other people, who have no use for the name of a file here.
        records = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
        options = {"answer_column": "answer", "domain_column": "category", "seq_len": (256,), "batch_size": 64}
        gj.evaluate(NANO, records, keep_sets=sets, out=out, resume=True, replies=len(records), **options, **GREEDY)
    return Results.read(out)
