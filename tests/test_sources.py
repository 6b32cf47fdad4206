"""Folders, splits, globs and hub datasets: which files are read, against `datasets`, and what is told of the others."""

import gzip
import json
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from upath import UPath

from gptoss_jax.data.remarks import Remarks
from gptoss_jax.data.sources import find, records
from gptoss_jax.errors import DataError, UserError

from .bad_input import SHORT, Program, Refused
from .conftest import conversation


def lay_out(folder: Any, names: Iterable[str]) -> Any:
    """A folder of files that each hold one row: their name."""
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        row = json.dumps({"text": name}).encode() + b"\n"
        file.write_bytes(gzip.compress(row) if name.endswith(".gz") else row)
    return folder


def read(source: Any, split: str = "train", subset: str | None = None) -> list[str]:
    return [record["text"] for _, record in records(source, split, subset, Remarks())]  # type: ignore[index]


def told(source: Any, split: str = "train") -> list[str]:
    remarks = Remarks()
    assert list(records(source, split, None, remarks))
    return remarks.lines()


def refusal(source: Any, split: str = "train", subset: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        read(source, split, subset)
    return str(caught.value)


# Splits

LAYOUTS = {
    "no words": ["a.jsonl", "b.jsonl", "c/d.jsonl"],
    "files": ["train.jsonl", "test.jsonl"],
    "files, and one of no split": ["train.jsonl", "test.jsonl", "other.jsonl"],
    "files in a folder": ["data/train.jsonl", "data/dev.jsonl"],
    "files with numbers": ["train0.jsonl", "train_1.jsonl", "test 2.jsonl", "train-of-all.jsonl"],
    "words inside names": ["my_training_file.jsonl", "my-val.jsonl", "x.evaluation.y.jsonl"],
    "longer words": ["trainer.jsonl", "contest.jsonl", "devil.jsonl", "retrain.jsonl"],
    "capitals": ["TRAIN.jsonl", "Test.jsonl"],
    "compressed": ["train.jsonl.gz", "a.valid.jsonl.gz"],
    "shards": ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl"],
    "shards of other splits": ["data/train-00000-of-00001.jsonl", "data/train_sft-00000-of-00001.jsonl", "test.jsonl"],
    "shards elsewhere": ["train-00000-of-00001.jsonl", "random-00000-of-00001.jsonl", "test-00000-of-00001.jsonl"],
    "folders": ["train/a.jsonl", "test/b.jsonl", "test/c/d.jsonl"],
    "folders before files": ["train/test.jsonl", "eval/train.jsonl", "dev.jsonl"],
    "folders below others": ["a/b/train/c/d.jsonl", "a/b/validation/x.jsonl", "a/y.jsonl"],
    "words inside folders": ["the-train-part/a.jsonl", "test_1/b.jsonl", "1.dev/c.jsonl"],
    "one file in two splits": ["train_test.jsonl", "train.jsonl"],
    "no train": ["validation.jsonl", "testing.jsonl"],
    "hidden": [".train/a.jsonl", "__test__/b.jsonl", ".test.jsonl", "c.jsonl", ".ipynb_checkpoints/c-checkpoint.jsonl"],
    "a configuration": ["config.json", "a.jsonl"],
    "brackets": ["train[1].jsonl", "test*.jsonl", "train/[x].jsonl"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_are_those_of_datasets(layout: str, tmp_path: Path) -> None:
    import datasets

    folder = lay_out(tmp_path / "data set", LAYOUTS[layout])
    theirs = datasets.load_dataset(str(folder), streaming=True)
    for split, rows in theirs.items():
        assert sorted(read(folder, split)) == sorted(row["text"] for row in rows), split
    error = refusal(folder, "nosuchsplit")
    assert "there is no split 'nosuchsplit'" in error
    there = "all of it is train" if [*theirs] == ["train"] else f"choose with --split one of {', '.join(theirs)}"
    assert (
        sorted(error.rpartition(" one of ")[2].split(", ")) == sorted(theirs) if "one of" in error else there in error
    )


def test_a_folder_without_train_lists_its_splits(tmp_path: Path) -> None:
    folder = lay_out(tmp_path, ["dev.jsonl", "test.jsonl"])
    assert refusal(folder).endswith("there is no split 'train': choose with --split one of validation, test")
    for number in range(21, 0, -1):
        lay_out(folder, [f"data/{number:02}-00000-of-00001.jsonl"])
    assert refusal(folder).endswith(f"choose with --split one of {', '.join(f'{n:02}' for n in range(1, 21))}")


def test_files_of_other_splits_and_of_none_are_told(tmp_path: Path) -> None:
    folder = lay_out(tmp_path, ["train.jsonl", "test_1.jsonl", "test_2.jsonl", "other.jsonl"])
    assert told(folder) == [
        "left out of the data, of no split: 1 file, other.jsonl",
        "left out of the data, of split test: 2 files, test_1.jsonl; test_2.jsonl",
    ]
    assert told(folder, "test")[1] == "left out of the data, of split train: 1 file, train.jsonl"


@pytest.mark.parametrize("name", ["test.jsonl", "rows.jsonl"])
def test_one_file_is_train_whatever_its_name(name: str, tmp_path: Path) -> None:
    """As with data_files of `datasets`."""
    file = lay_out(tmp_path, [name]) / name
    assert read(file) == [name]
    assert refusal(file, "test").endswith("there is no split 'test': all of it is train: leave --split out")


def test_what_datasets_saved_is_read_without_its_caches(tmp_path: Path) -> None:
    import datasets

    of = {
        split: datasets.Dataset.from_dict({"text": [f"{split} {i}" for i in range(5)]})
        for split in ("train_sft", "gen")
    }
    datasets.DatasetDict(of).save_to_disk(tmp_path / "saved", num_shards={"train_sft": 2, "gen": 1})
    loaded = datasets.load_from_disk(str(tmp_path / "saved"))
    for split in of:
        assert read(tmp_path / "saved", split) == loaded[split]["text"]
    assert "train_sft" in refusal(tmp_path / "saved") and "gen" in refusal(tmp_path / "saved")
    alone = tmp_path / "saved" / "gen"
    loaded["gen"].map(lambda row: {"text": row["text"] + "!"})  # leaves a cache beside the data
    assert [name for name in os.listdir(alone) if name.startswith("cache-")]
    assert read(alone) == loaded["gen"]["text"]
    assert [line.split(":")[0] for line in told(alone)] == ["left out of the data, a cache of `datasets`"]


# What is no data


def test_what_is_left_out_of_a_folder_is_told(tmp_path: Path) -> None:
    quiet = ["README.md", "LICENSE", "_SUCCESS", ".gitattributes", ".a.jsonl.crc", "dataset_info.json", "state.json"]
    hidden = [".ipynb_checkpoints/a-checkpoint.jsonl", ".a.jsonl", "__MACOSX/a.jsonl"]
    about = ["license.txt", "README.txt", "LICENSE-apache.txt"]
    other = ["a.jsonl~", "#a.jsonl#", "a.jsonl.swp", "notes.docx", "a.zip", "b.jsonl.7z"]
    folder = lay_out(tmp_path, ["a.jsonl", *quiet, *hidden, *about, *other, "config.json"])
    (folder / "linked").symlink_to(folder)
    (folder / "broken.jsonl").symlink_to(folder / "nowhere.jsonl")
    os.mkfifo(folder / "pipe.jsonl")
    assert read(folder) == ["a.jsonl"]
    assert {line.partition(": ")[0]: line.partition(": ")[2].partition(",")[0] for line in told(folder)} == {
        "left out of the data, hidden": "3 files",
        "left out of the data, a text about it": "3 files",
        "left out of the data, of no kind that is read": "7 files",  # the link to a folder among them
        "left out of the data, a configuration": "1 file",
        "left out of the data, no file but a link, a pipe or a device": "2 files",
    }


def test_names_that_only_sound_so_are_data(tmp_path: Path) -> None:
    names = ["license.jsonl", "readers.txt", "_a.jsonl", "state.json", "licensed.txt", "a..b.jsonl", "note.txt"]
    assert {name for _, name in find(lay_out(tmp_path, names), "train").left_out} == set()
    assert len(find(tmp_path, "train").files) == len(names)


def test_links_to_files_are_read(tmp_path: Path) -> None:
    """The cache of the hub is made of them."""
    lay_out(tmp_path, ["blobs/0123.jsonl"])
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot/a.jsonl").symlink_to("../blobs/0123.jsonl")
    assert read(tmp_path / "snapshot") == ["blobs/0123.jsonl"]


def test_a_file_beside_its_compressed_form_is_refused(tmp_path: Path) -> None:
    folder = lay_out(tmp_path, ["a.jsonl", "a.jsonl.gz"])
    assert "a.jsonl and a.jsonl.gz are one file twice" in refusal(folder)
    assert read(folder / "a.jsonl") == ["a.jsonl"]


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    for names in ([], ["README.md"], [".hidden.jsonl"], ["a.docx"]):
        assert "holds no data: give .jsonl" in refusal(lay_out(tmp_path, names))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    lay_out(tmp_path, ["a.jsonl", "closed/b.jsonl"])
    (tmp_path / "closed").chmod(0)
    assert "cannot be read: Permission denied" in refusal(tmp_path)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "rows.jsonl"
    os.mkfifo(pipe)
    said: list[str] = []
    asking = threading.Thread(target=lambda: said.append(refusal(pipe)), daemon=True)
    asking.start()
    asking.join(20)
    assert said and "is a pipe or a device" in said[0]
    assert "is a pipe or a device" in refusal("/dev/zero")


@pytest.mark.parametrize("name", ["x" * 300 + ".jsonl", "a\0b.jsonl", "a/" * 3000, "a\ud800.jsonl"])
def test_names_that_no_file_system_takes_are_one_line(name: str) -> None:
    assert "\n" not in refusal(name)


# Globs


def test_a_glob_takes_all_that_it_matches(tmp_path: Path) -> None:
    names = ["a.jsonl", "test.jsonl", "b.json", "c/d.jsonl", "c/e/f.jsonl", ".g.jsonl", "h.md", "__i/j.jsonl"]
    folder = lay_out(tmp_path / "x", names)
    assert read(f"{folder}/*.jsonl") == ["a.jsonl", "test.jsonl"]
    assert read(f"{folder}/[ab].*") == ["a.jsonl", "b.json"]
    assert read(f"{folder}/*/*.jsonl") == ["c/d.jsonl"]
    assert read(f"{folder}/**/*.jsonl") == ["a.jsonl", "c/d.jsonl", "c/e/f.jsonl", "test.jsonl"]
    assert read(f"{folder}/**") == ["a.jsonl", "b.json", "c/d.jsonl", "c/e/f.jsonl", "test.jsonl"]
    assert read(f"{folder}/.*.jsonl") == [".g.jsonl"]
    assert read(f"{folder}/__*/*.jsonl") == ["__i/j.jsonl"]
    assert told(f"{folder}/*")[1:] == ["left out of the data, of no kind that is read: 1 file, h.md"]


def test_a_glob_is_relative_where_it_is_given_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(lay_out(tmp_path, ["a.jsonl", "b/c.jsonl"]))
    assert (read("*.jsonl"), read("b/*")) == (["a.jsonl"], ["b/c.jsonl"])


def test_a_path_that_exists_is_no_glob(tmp_path: Path) -> None:
    lay_out(tmp_path, ["a[1].jsonl", "a1.jsonl", "b[1]/c.jsonl", "b1/d.jsonl"])
    assert read(tmp_path / "a[1].jsonl") == ["a[1].jsonl"]
    assert read(tmp_path / "b[1]") == ["b[1]/c.jsonl"]
    assert read(tmp_path / "b[1]" / "*") == ["b1/d.jsonl"]


def test_a_glob_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    lay_out(tmp_path, ["a.jsonl", "b/c.md"])
    assert "matches none" in refusal(f"{tmp_path}/*.parquet")
    assert "holds no data" in refusal(f"{tmp_path}/b/*")
    assert "no such file" in refusal(f"{tmp_path}/a**b")  # which some Pythons do not take for a pattern
    assert "there is no split 'test'" in refusal(f"{tmp_path}/*.jsonl", "test")


# Remote


def test_folders_splits_and_globs_are_read_by_url() -> None:
    bucket = UPath("memory://sources")
    names = ["train/a.jsonl", "train/b.jsonl.gz", "test/c.jsonl", ".d/e.jsonl", "f.docx"]
    try:
        lay_out(bucket, names)
        assert read("memory://sources") == read(bucket) == names[:2]
        assert read("memory://sources/", "test") == names[2:3]
        assert read("memory://sources/train/*.gz") == names[1:2]
        assert read("memory://sources/test/c.jsonl") == names[2:3]
        assert "left out of the data, of split test: 1 file, test/c.jsonl" in told("memory://sources")
        assert "validation" not in refusal("memory://sources", "validation").partition("one of")[2]
    finally:
        bucket.fs.rm("/sources", recursive=True)


# Lists and hub datasets


def test_a_list_of_records_has_no_splits_and_no_subsets() -> None:
    rows = [{"text": "a"}, {"text": "b"}]
    assert read(rows) == ["a", "b"]
    assert "a list of records: there is no split 'test'" in refusal(rows, "test")
    assert "has no subsets" in refusal(rows, subset="x")


def test_files_and_folders_have_no_subsets(tmp_path: Path) -> None:
    assert "has no subsets" in refusal(lay_out(tmp_path, ["a.jsonl"]), subset="x")
    assert "has no subsets" in refusal(tmp_path / "a.jsonl", subset="x")


CARD = """---
configs:
- config_name: easy
  data_files: easy.jsonl
- config_name: hard
  data_files: [{split: train, path: hard.jsonl}, {split: held_out, path: more.jsonl}]
- config_name: parts
  data_dir: parts
- config_name: loose
  data_files: [{split: train, path: ["loose/**", "./easy.*"]}]
---
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A dataset of two subsets, which the library reads in the place of the hub's."""
    import datasets

    names = ["easy.jsonl", "hard.jsonl", "more.jsonl", "parts/train.jsonl", "loose/a.jsonl"]
    folder, load = lay_out(tmp_path / "of hub", names), datasets.load_dataset
    (folder / "README.md").write_text(CARD)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *rest, **options: load(str(folder), *rest, **options))
    return "owner/name"


def test_a_copy_of_a_hub_dataset_has_the_subsets_of_its_card(tmp_path: Path) -> None:
    import datasets

    names = ["easy.jsonl", "hard.jsonl", "more.jsonl", "parts/train.jsonl", "parts/test.jsonl", "loose/b/c.jsonl"]
    folder = lay_out(tmp_path, names)
    (folder / "README.md").write_text(CARD)
    for subset in ("easy", "hard", "parts", "loose"):
        for split, rows in datasets.load_dataset(str(folder), subset, streaming=True).items():
            assert sorted(read(folder, split, subset)) == sorted(row["text"] for row in rows)
    assert refusal(folder).endswith("has subsets: give --subset one of easy, hard, parts, loose")
    assert refusal(folder, subset="other").endswith("give --subset one of easy, hard, parts, loose")
    assert refusal(folder, "test", "hard").endswith("choose with --split one of train, held_out")
    (folder / "README.md").write_text(CARD.replace("config_name: hard", "config_name: default"))
    assert read(folder) == ["hard.jsonl"]
    (folder / "README.md").write_text(CARD.replace("config_name: hard", "name: hard"))
    assert "README.md declares subsets that cannot be understood" in refusal(folder)
    (folder / "README.md").write_text("# A card\n\nconfigs: none\n---\n")
    assert len(read(folder)) == 1  # parts/train.jsonl, by the word in its name


@pytest.mark.parametrize(
    "configs",
    [
        *("3", "[3]", "[{}]", "[", "null", "&x [*x]", "!!python/object:a.b {}", "[{config_name: a}]"),
        *("[{config_name: a, data_files: [3]}]", "[{config_name: a, data_dir: 3}]"),
        "[{config_name: 1, data_files: a}, {config_name: 2}]",
    ],
)
def test_cards_of_strangers_are_refused_or_declare_nothing(configs: str, tmp_path: Path) -> None:
    (lay_out(tmp_path, ["a.jsonl"]) / "README.md").write_text(f"---\nconfigs: {configs}\n---\n")
    try:
        assert read(tmp_path) == ["a.jsonl"]
    except DataError as error:
        assert "README.md declares" in str(error) or "--subset one of 1, 2" in str(error) or "no split" in str(error)


def test_subsets_of_hub_datasets(hub: str) -> None:
    assert read(hub, subset="easy") == ["easy.jsonl"]
    assert read(hub, "held_out", "hard") == ["more.jsonl"]
    assert "owner/name has subsets: give --subset one of ['easy', 'hard', 'parts', 'loose']" in refusal(hub)
    assert "'easy', 'hard'" in refusal(hub, subset="other")
    assert "'train', 'held_out'" in refusal(hub, "other", "hard")


def test_rows_of_hub_datasets_say_where_they_stand(hub: str) -> None:
    ((where, _),) = records(hub, "train", "hard", Remarks())
    assert where == "owner/name subset hard split train, row 1"


# The program


def test_the_program_tells_what_it_left_out(tiny_mxfp4: Path, tmp_path: Path, program: Program) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("train.jsonl", "test.\x1b[2J.jsonl"):
        (folder / name).write_text(json.dumps({"text": conversation(1)}) + "\n")
    status, error = program("profile", tiny_mxfp4, "--data", "data", *SHORT, "--out", "out")
    line = "left out of the data, of split test: 1 file, test.\N{REPLACEMENT CHARACTER}[2J.jsonl"
    assert (status, error) == (0, f"gptoss-jax: {line}\n")
    assert line in json.loads((tmp_path / "out/profile.json").read_text())["warnings"]
    assert f"- {line}\n" in (tmp_path / "out/report.md").read_text()
    assert json.loads((tmp_path / "out/profile.json").read_text())["rows"] == 1


def test_one_line_of_30_megabytes_is_not_printed(tiny_mxfp4: Path, tmp_path: Path, refused: Refused) -> None:
    long = "x" * (30 << 20)
    for name, content in (
        ("a.jsonl", f'{{"text": "{long}'),
        ("b.jsonl", long),
        ("c.csv", f'text\n"{long}'),
        ("d.json", f"[{long}"),
    ):
        (tmp_path / name).write_text(content)
        assert len(refused("profile", tiny_mxfp4, "--data", name, says=(name,))) < 300


def test_splits_and_subsets_that_are_not_there(tiny_mxfp4: Path, tmp_path: Path, refused: Refused) -> None:
    lay_out(tmp_path / "data", ["train.jsonl", "test.jsonl"])
    refused("profile", tiny_mxfp4, "--data", "data", "--split", "dev", says=("'dev'", "--split one of train, test"))
    refused("profile", tiny_mxfp4, "--data", "data/train.jsonl", "--split", "test", says=("all of it is train",))
    refused("profile", tiny_mxfp4, "--data", "data", "--subset", "x", says=("--subset",))
