"""Remote storage, by fsspec's own file system in memory: model, rows and artifacts by URL."""

import json
from pathlib import Path

import pytest
from upath import UPath

from gptoss_jax.errors import OutputError, StorageError
from gptoss_jax.files import atomic as outputs
from gptoss_jax.files.paths import local_folder, place

from .bad_input import SHORT, Program, Refused

pytestmark = pytest.mark.slow


@pytest.fixture
def bucket(tiny_mxfp4: Path, rows_jsonl: Path) -> UPath:
    root = UPath("memory://bucket")
    for file in [*tiny_mxfp4.iterdir(), rows_jsonl]:
        copy = root / ("rows.jsonl" if file == rows_jsonl else f"model/{file.name}")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    yield root
    root.fs.rm("/bucket", recursive=True)


def test_a_profile_by_urls_is_that_of_files(
    bucket: UPath, program: Program, tiny_mxfp4: Path, rows_jsonl: Path, tmp_path: Path
):
    status, error = program("profile", tiny_mxfp4, "--data", rows_jsonl, *SHORT, "--out", tmp_path / "here")
    assert (status, error) == (0, "")
    rows, out = bucket / "rows.jsonl", bucket / "runs/there"
    status, error = program("profile", bucket / "model", "--data", rows, *SHORT, "--out", out)
    assert (status, error) == (0, "")
    assert {p.name for p in out.iterdir()} == {p.name for p in (tmp_path / "here").iterdir()}
    assert (out / "saliency.parquet").read_bytes() == (tmp_path / "here/saliency.parquet").read_bytes()
    here, there = (json.loads((folder / "profile.json").read_text()) for folder in (tmp_path / "here", out))
    assert (here["model_fingerprint"], here["prompts_hash"]) == (there["model_fingerprint"], there["prompts_hash"])


def test_the_last_file_comes_when_all_others_stand(bucket: UPath):
    with outputs.new_folder(bucket / "out", last="a.json") as folder:
        for name in ("b.txt", "a.json", "c.txt"):
            (folder / name).write_text(name)
        assert not (bucket / "out").exists()
    written = sorted((bucket / "out").iterdir(), key=lambda p: p.stat().as_info()["created"])
    assert written[-1].name == "a.json" and len(written) == 3


def test_an_existing_remote_output_stays(bucket: UPath):
    with pytest.raises(OutputError, match="exists already"), outputs.new_folder(bucket / "model"):
        pass
    assert (bucket / "model/config.json").exists()


def test_weights_stay_where_they_are(bucket: UPath, tiny_mxfp4: Path):
    with local_folder(bucket / "model") as folder:
        names = {p.name for p in folder.iterdir()}
    assert names == {p.name for p in tiny_mxfp4.iterdir() if p.suffix != ".safetensors"}


def test_a_remote_path_that_cannot_be_had_is_one_line(refused: Refused, tiny_mxfp4: Path, rows_jsonl: Path):
    for url in ("gs://bucket/model", "nosuchscheme://x"):
        refused("profile", url, "--data", rows_jsonl, says=(url, "cannot be reached"))
    refused("profile", tiny_mxfp4, "--data", "memory://nothing.jsonl", says=("no such file",))
    refused("profile", "memory://nothing", "--data", rows_jsonl, says=("memory://nothing", "no such folder"))
    assert place("a/b") == Path("a/b")
    with pytest.raises(StorageError):
        place("nosuchscheme://x")
