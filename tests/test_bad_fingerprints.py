"""Published files, activation datasets and options that cannot be used are refused, and nothing is written."""

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import gptoss_jax as gj
from gptoss_jax.errors import FingerprintError, InputError

from . import published
from .bad_input import Refused, case, dump, edit
from .published import file_of

GROUP = ("exam", "law", True, True)
SUMMARY, EXAMPLE = "exam/law/True_True.json", "exam/law/True_True_examples.json"


def in_place(raw: Any, path: str, value: Any) -> Any:
    """The value at a path of keys and numbers replaced."""
    key, _, rest = path.partition("/")
    found: Any = int(key) if isinstance(raw, list) else key
    raw[found] = in_place(raw[found], rest, value) if rest else value
    return raw


# The place that is changed, the value there, and what the line says.
CELL = "think_expert_analytics/layer_1/5"
SUMMARIES = [
    case("no list", ("think_expert_analytics", []), SUMMARY, "think_expert_analytics: is []", "an object"),
    case("no count", ("sample_count", None), SUMMARY, "'sample_count' is None", "at least 1"),
    case("count of zero", ("sample_count", 0), "'sample_count' is 0", "at least 1"),
    case("count is a truth value", ("sample_count", True), "'sample_count' is True"),
    case("part of an answer", ("sample_count", 1.5), "'sample_count' is 1.5"),
    case("no tokens", ("num_answer_tokens", "9"), "'num_answer_tokens' is '9'"),
    case("tokens without end", ("num_answer_tokens", float("inf")), "'num_answer_tokens' is inf"),
    case("layer is no object", ("think_expert_analytics/layer_1", 5), "think_expert_analytics, layer_1: is 5"),
    case("layer left out", ("think_expert_analytics", {"layer_0": {}, "layer_2": {}}), "layer_0 and those that follow"),
    case("cell is no object", (CELL, 0.5), "layer_1, expert '5': is 0.5: expected an object"),
    case("share above 1", (f"{CELL}/count_frequency", 1.5), "expert '5': 'count_frequency' is 1.5", "0 to 1.01"),
    case("share below 0", (f"{CELL}/prob_density", -0.1), "'prob_density' is -0.1"),
    case("no share", (f"{CELL}/prob_density", None), "'prob_density' is None"),
    case("no number", (f"{CELL}/count_frequency", float("nan")), "'count_frequency' is nan"),
    case("no id", ("think_expert_analytics/layer_1", {"x": {}}), "layer_1, expert 'x': no id"),
    case("huge id", ("think_expert_analytics/layer_1", {"9999": {}}), "expert '9999'", "below 1,024"),
    case(
        "more layers", ("think_expert_analytics", {f"layer_{i}": {} for i in range(5)}), "different models", "4 layers"
    ),
]
ROUTING = "router_data/2/token_12/layer_1"
EXAMPLES = [
    case("another category", ("category", "art"), EXAMPLE, "'art'", "its path says"),
    case("another flag", ("has_repetition", False), "its path says"),
    case("no prompt", ("original_prompt", None), "'original_prompt' is None"),
    case("row is a text", ("row_index", "5"), "'row_index' is '5'"),
    case("tokens are no texts", ("generated_only", [5]), "'generated_only' is [5]"),
    case("nothing generated", ("generated_only", []), "'full_text' does not end with 'generated_only'"),
    case("other tokens", ("generated_only/0", "x"), "'full_text' does not end with 'generated_only'"),
    case("routing left out", ("router_data", []), "one entry for each generated token but the last"),
    case("routing of another token", ("router_data/2", {"token_99": {}}), "token_99", "expected 'token_12'"),
    case("no layers", ("router_data/2/token_12", {}), "router_data, token_12: has the keys []"),
    case("no experts", (f"{ROUTING}/selected_experts", None), "token_12, layer_1: 'selected_experts' is None"),
    case("an expert twice", (f"{ROUTING}/selected_experts", [1, 1]), "layer_1", "names one twice"),
    case("an expert too few", (ROUTING, {"selected_experts": [1], "selected_probs": [1.0]}), "token_12", "2 experts"),
    case("huge expert", (f"{ROUTING}/selected_experts", [1, 2**40]), "'selected_experts'"),
    case("gate too few", (f"{ROUTING}/selected_probs", [0.5]), "layer_1: 'selected_probs' is [0.5]"),
    case("gate is a text", (f"{ROUTING}/selected_probs", [0.5, "0"]), "'selected_probs'"),
]


@pytest.mark.parametrize(("change", "says"), SUMMARIES)
def test_a_wrong_summary(change: tuple[str, Any], says: tuple[str, ...], tmp_path: Path, refused: Refused) -> None:
    folder = published.write(tmp_path / "files", examples=False)
    file = file_of(folder, GROUP)
    dump(file, in_place(json.loads(file.read_text()), *change))
    refused("fingerprint", "import", folder, says=says)


@pytest.mark.parametrize(("change", "says"), EXAMPLES)
def test_a_wrong_example(change: tuple[str, Any], says: tuple[str, ...], tmp_path: Path, refused: Refused) -> None:
    folder = published.write(tmp_path / "files", summaries=False)
    file = file_of(folder, GROUP, "_examples")
    dump(file, in_place(json.loads(file.read_text()), *change))
    refused("fingerprint", "import", folder, says=says)


FILES = [
    case("empty", b"", "True_True.json: not valid JSON"),
    case("cut", b'{"sample_count": 1, ', "not valid JSON", "download"),
    case("no UTF-8", b'{"\xff": 1}', "not valid JSON"),
    case("endless nesting", b"[" * 100_000, "not valid JSON"),
    case("list", b"[]", "True_True.json: is []: expected an object"),
    case("no segments", b'{"sample_count": 1}', "neither think_expert_analytics nor answer_expert_analytics"),
]


@pytest.mark.parametrize(("data", "says"), FILES)
def test_a_file_that_is_no_summary(data: bytes, says: tuple[str, ...], tmp_path: Path, refused: Refused) -> None:
    folder = published.write(tmp_path / "files")
    file_of(folder, GROUP).write_bytes(data)
    refused("fingerprint", "import", folder, says=says)


def test_sources_that_are_none(published_files: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("no archive")
    whole = tmp_path / "whole.tar.xz"
    with tarfile.open(whole, "w:xz") as archive:
        archive.add(published_files, "files")
    (tmp_path / "cut.tar.xz").write_bytes(whole.read_bytes()[:-400])
    (tmp_path / "cut.tar.gz").write_bytes(b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\x00")
    with tarfile.open(tmp_path / "other.tar", "w") as archive:
        archive.add(tmp_path / "text", "data/quiz/law/notes.json")
    for name, says in {
        "gone": "no such file or folder",
        "empty": "holds no published fingerprints: expected files BENCHMARK/CATEGORY/True_False.json",
        "text": "nor a whole tar archive",
        "cut.tar.xz": "nor a whole tar archive",
        "cut.tar.gz": "nor a whole tar archive",
        "other.tar": "holds no published fingerprints",
    }.items():
        refused("fingerprint", "import", name, says=(name, says))
    refused("fingerprint", "import", whole, published_files, says=("was read already", "give each file once"))
    refused("fingerprint", "import", published_files, "--out", published_files, "--overwrite", says=("--out",))


def test_examples_without_segments(tmp_path: Path) -> None:
    folder, known = published.write(tmp_path / "files", summaries=False), published.answers()
    for group in known:
        file = file_of(folder, group, "_examples")
        raw = json.loads(file.read_text())
        if group != GROUP:
            file.unlink()
            continue
        raw["generated_only"] = ["x"] * len(raw["generated_only"])
        raw["full_text"][-len(raw["generated_only"]) :] = raw["generated_only"]
        dump(file, raw)
    with pytest.raises(FingerprintError, match="none of its 1 examples has thoughts or an answer"):
        gj.fingerprint.import_published(folder)


DOMAIN_FILES = [
    case("no JSON", "{", "domains.json: not valid JSON"),
    case("list", "[]", "holds no domains", "BENCHMARK/CATEGORY"),
    case("nothing", "{}", "holds no domains"),
    case("text", '{"law": "quiz/law"}', "holds no domains"),
    case("no category", '{"law": []}', "holds no domains"),
    case("no benchmark", '{"law": ["law"]}', "holds no domains"),
]


@pytest.mark.parametrize(("text", "says"), DOMAIN_FILES)
def test_wrong_domains(
    text: str, says: tuple[str, ...], published_files: Path, activations: Path, tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "domains.json").write_text(text)
    refused("fingerprint", "import", published_files, "--domains", "domains.json", "--out", "other", says=says)
    refused("fingerprint", "rank", activations, "--domains", "domains.json", "--domain", "law", says=says)


OPTIONS = [
    case("unknown domain", ["--domain", "lore"], "no domain 'lore'", "there are law, art, gone"),
    case("domain that is not there", ["--domain", "gone"], "none of the 1 categories of domain 'gone'"),
    case("unknown category", ["--category", "exam/lore"], "no category 'exam/lore'", "those of exam, quiz"),
    case("category without benchmark", ["--category", "law"], "no category 'law'", "BENCHMARK/CATEGORY"),
    case("both", ["--domain", "law", "--category", "*"], "--category", "--domain"),
    case("unknown segment", ["--segment", "prompt"], "--segment is 'prompt'", "think, answer, both"),
    case("unknown mode", ["--mode", "mixed"], "--mode is 'mixed'", "pure, interleaved"),
    case("unknown weight", ["--weight", "row"], "--weight is 'row'", "sample, token"),
    case("unknown score", ["--by", "reap"], "--by is 'reap'", "frequency, specificity"),
    case(
        "tokens that are not counted", ["--weight", "token"], "--weight token", "7 of 12 summaries", "--weight sample"
    ),
    case("all against all", ["--by", "specificity"], "--by specificity", "--domain"),
    case("too many", ["--keep", 8], "--keep 8", "7 experts"),
    case("none", ["--keep", 0], "--keep 0"),
    case("ranking in the place of keep-sets", ["--keep", 4, "--out", "keep.json"], "keep.json", "--out"),
    case("ranking over a table", ["--out", "activations/summaries.parquet", "--overwrite"], "--out"),
    case("ranking over the dataset", ["--out", "activations", "--overwrite"], "--out"),
]


@pytest.mark.parametrize(("words", "says"), OPTIONS)
def test_wrong_options(words: list[Any], says: tuple[str, ...], activations: Path, refused: Refused) -> None:
    refused("fingerprint", "rank", activations, *words, says=says)


def test_keep_sets_that_stand_there_stay(activations: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "keep.json").write_text("mine")
    refused("fingerprint", "rank", activations, "--keep", 4, says=("keep.json", "exists already"))


def test_a_segment_that_is_not_there(tmp_path: Path, refused: Refused) -> None:
    published.write(tmp_path, examples=False)
    for group in published.GROUPS:
        if group[2]:
            file_of(tmp_path, group).unlink()
    gj.fingerprint.import_published(tmp_path / "data", out=tmp_path / "made")
    refused("fingerprint", "rank", "made", "--segment", "answer", says=("no such segment: there is think alone",))
    refused("fingerprint", "rank", "made", "--domain", "law", says=("no domain 'law'", "--domains"))


INFOS = [
    case("another kind", {"kind": "ranking"}, "dataset.json", "no activation dataset"),
    case("newer", {"version": 2}, "version 2", "reads 1"),
    case("no version", {"version": ...}, "version None"),
    case("wrong domains", {"domains": ["law"]}, "'domains'"),
]


@pytest.mark.parametrize(("change", "says"), INFOS)
def test_wrong_datasets(change: dict[str, Any], says: tuple[str, ...], activations: Path, refused: Refused) -> None:
    edit(activations / "dataset.json", **change)
    refused("fingerprint", "rank", activations, says=says)


@pytest.mark.parametrize("name", ["dataset.json", "summaries.parquet", "answers.parquet"])
def test_half_a_dataset(name: str, activations: Path, tmp_path: Path, refused: Refused) -> None:
    data = (activations / name).read_bytes()
    (activations / name).write_bytes(data[: len(data) // 2])
    refused("fingerprint", "rank", activations, says=("activations", "make"))
    (activations / name).unlink()
    refused("fingerprint", "rank", activations, says=(name, "`gptoss-jax fingerprint import` writes one"))
    (tmp_path / "empty").mkdir()
    for other in ("gone", "empty"):
        refused("fingerprint", "rank", other, says=(other, "no activation dataset"))


def columns(**changes: Any) -> Any:
    def changed(table: pa.Table) -> pa.Table:
        for name, change in changes.items():
            made = change(table[name].to_numpy(zero_copy_only=False).copy())
            table = table.set_column(table.column_names.index(name), name, pa.array(made))
        return table

    return changed


def first(value: Any) -> Any:
    def change(values: np.ndarray) -> np.ndarray:
        values[0] = value
        return values

    return change


TABLES = [
    case("column left out", lambda table: table.drop_columns("tokens"), "lacks the column 'tokens'"),
    case("row left out", lambda table: table.slice(1), "not every expert of every layer"),
    case("no rows", lambda table: table.slice(0, 0), "not every expert of every layer"),
    case("other order", columns(layer=lambda values: values[::-1]), "not every expert of every layer"),
    case("huge layer", columns(layer=first(2**31 - 1)), "not every expert of every layer"),
    case("negative share", columns(count_frequency=first(-1.0)), "'count_frequency' holds what is no share"),
    case("no number", columns(prob_density=first(np.nan)), "'prob_density'"),
    case("unknown segment", columns(segment=first("prompt")), "summary 1 says"),
    case("no samples", columns(sample_count=first(0)), "summary 1 says"),
    case("layer is a text", columns(layer=lambda values: [f"l{v}" for v in values]), "tables cannot be read"),
]


@pytest.mark.parametrize(("change", "says"), TABLES)
def test_wrong_tables(change: Any, says: tuple[str, ...], activations: Path, refused: Refused) -> None:
    file = activations / "summaries.parquet"
    pq.write_table(change(pq.read_table(file)), file)
    refused("fingerprint", "rank", activations, says=("activations", *says))


def test_python_names_what_cannot_be(activations: Path) -> None:
    for call in (
        lambda: gj.fingerprint.import_published(5),
        lambda: gj.fingerprint.import_published([]),
        lambda: gj.fingerprint.rank(5),
        lambda: gj.fingerprint.rank(activations, keep=4),
    ):
        with pytest.raises(InputError):
            call()
    with pytest.raises(FingerprintError, match="domains are"):
        gj.fingerprint.rank(activations, "law", domains={"law": "quiz/law"})
