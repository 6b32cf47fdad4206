"""The folder of an activation dataset: what importing writes and ranking reads.

| file | holds |
|---|---|
| `summaries.parquet` | for each group of answers, segment, layer and expert how often it was chosen: `summaries` |
| `answers.parquet` | a row for each answer whose text is known |
| `traces` | of recorded answers the experts of every token |
| `dataset.json` | what it is, of which model, from where, how much of it there is, its domains |
| `README.md` | the same for people, and for `datasets.load_dataset` |
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..errors import FingerprintError, reason, refusal, shown
from ..files.atomic import new_folder
from ..files.parquet import parquet_bytes, read_parquet
from ..files.paths import AnyPath, place, storage_errors
from .domains import are_domains
from .summaries import Summary, of_table, to_table

INFO, SUMMARIES, ANSWERS, CARD = "dataset.json", "summaries.parquet", "answers.parquet", "README.md"
KIND, VERSION = "activations", 1
OF_ANSWER = pa.schema(
    {
        **dict.fromkeys(["prompt_id", "benchmark", "category", "prompt", "reply", "think", "answer"], pa.string()),
        **dict.fromkeys(["think_tokens", "answer_tokens"], pa.int64()),
        **dict.fromkeys(["finished", "repetition"], pa.bool_()),
    }
)
TRACES = "traces"  # the folder of the trace of recorded answers
COUNTED = {
    "contents": "The tokens of a segment are those of the contents alone: thoughts stand between `<|message|>` and the "
    "end of messages in the channel analysis, answers in the channel final. A reply's last token, which never runs "
    "through the network, does not count.",
    "messages": "The tokens of a segment are those of its message with header and marks, from `<|start|>`: thoughts "
    "without `<|end|>`, answers with `<|return|>`. All of an answer that is not finished is thought. The last token of "
    "an answer has no routing, and counts as a token all the same, as the two that stand in the prompt do.",
}
"""What `counted` of dataset.json says, for the card."""


@dataclass(frozen=True)
class Activations:
    """An activation dataset: which experts groups of answers used."""

    summaries: Sequence[Summary]
    answers: Sequence[Mapping[str, Any]]
    """Rows of OF_ANSWER."""
    info: Mapping[str, Any]
    """What dataset.json says beside kind and version."""
    hash: str
    """SHA-256 of its summaries.parquet, also before that is written."""

    @classmethod
    def of(
        cls, summaries: Sequence[Summary], answers: Sequence[Mapping[str, Any]], info: Mapping[str, Any]
    ) -> "Activations":
        """One that is in no folder yet."""
        return cls(summaries, answers, info, hashlib.sha256(parquet_bytes(to_table(summaries))).hexdigest())

    @property
    def domains(self) -> Mapping[str, Sequence[str]]:
        """Names benchmark/category by domain; empty where none are given."""
        return self.info.get("domains") or {}

    def save(self, out: str | AnyPath, overwrite: bool = False) -> None:
        """Write the folder, whole or not at all; OutputError where it exists or cannot be written."""
        with new_folder(place(out), overwrite, last=INFO) as folder:
            self.write(folder)

    def write(self, folder: Path) -> None:
        """Write all files into a folder that is there."""
        (folder / SUMMARIES).write_bytes(parquet_bytes(to_table(self.summaries)))
        answers = pa.Table.from_pylist([dict(row) for row in self.answers], OF_ANSWER)
        (folder / ANSWERS).write_bytes(parquet_bytes(answers))
        (folder / CARD).write_text(self.card(), encoding="utf-8")
        said = {"kind": KIND, "version": VERSION, **self.info}
        (folder / INFO).write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def open(cls, folder: str | AnyPath) -> "Activations":
        """Read the folder; FingerprintError where it is none, or its files are damaged."""
        path = place(folder)
        info = _info(path)
        data = _bytes(path / SUMMARIES)
        try:
            summaries = of_table(read_parquet(data))
            answers = read_parquet(_bytes(path / ANSWERS)).select(OF_ANSWER.names).to_pylist()
        except (ValueError, KeyError, pa.ArrowException) as error:
            raise FingerprintError(f"{path}: its tables cannot be read ({reason(error)}): make it again") from None
        return cls(summaries, answers, info, hashlib.sha256(data).hexdigest())

    def card(self) -> str:
        """README.md."""
        info = self.info
        # A table without rows is one that datasets cannot load.
        configs = [("summaries", SUMMARIES), *([("answers", ANSWERS)] if self.answers else [])]
        if info["counted"] == "contents":
            configs.append((TRACES, f"{TRACES}/*.parquet"))
        head = "".join(f"- config_name: {name}\n  data_files: {file}\n" for name, file in configs)
        lines = [
            f"Which of {info['num_experts']} experts in each of {info['num_layers']} layers the answers of a GPT-OSS "
            f"used: {info['groups']:,} groups by benchmark, category, finished and repetition, {info['samples']:,} "
            f"answers in all. Of {info['answers']:,} answers the texts are here.",
            COUNTED[info["counted"]],
            "`count_frequency` is the share of a segment's tokens that chose the expert, `prob_density` the sum of its "
            "gates over the segment's tokens; both are means over `sample_count` answers. `count` and `gate_sum` are "
            "sums over all their tokens, and null where means alone are known.",
            '```python\nimport datasets\n\ndatasets.load_dataset(FOLDER, "summaries")\n```',
        ]
        return f"---\nconfigs:\n{head}---\n\n# Activations\n\n" + "\n\n".join(lines) + "\n"


def _info(path: AnyPath) -> dict[str, Any]:
    file = path / INFO
    try:
        raw = json.loads(_bytes(file).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FingerprintError(f"{file}: not valid JSON ({reason(error)}): make the dataset again") from None
    said = raw if isinstance(raw, dict) else {}
    if said.pop("kind", None) != KIND:
        raise FingerprintError(f"{file}: is of no activation dataset: `gptoss-jax fingerprint import` writes one")
    if (version := said.pop("version", None)) != VERSION:
        raise FingerprintError(f"{file}: is of version {shown(version)}, this program reads {VERSION}: make it again")
    if said.get("domains") is not None and not are_domains(said["domains"]):
        raise FingerprintError(f"{file}: its 'domains' are no lists of benchmark/category by name: mend them")
    return said


def _bytes(file: AnyPath) -> bytes:
    try:
        with storage_errors(file):
            return file.read_bytes()
    except OSError as error:
        what = "is no activation dataset, or a part of one: `gptoss-jax fingerprint import` writes one"
        raise FingerprintError(f"{file}: {refusal(error)}: {file.parent} {what}") from None
