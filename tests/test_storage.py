"""Remote storage, by fsspec's own file system in memory: model, rows and artifacts by URL."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from upath import UPath
from upath.registry import register_implementation

import gptoss_jax as gj
from gptoss_jax.errors import OutputError, StorageError
from gptoss_jax.files import atomic as outputs
from gptoss_jax.files.paths import local_folder, place

from .bad_input import RANKING, SHORT, Program, Refused, dump, tree

pytestmark = pytest.mark.slow


@pytest.fixture
def bucket(tiny_mxfp4: Path, rows_jsonl: Path) -> Iterator[UPath]:
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


def tree_of(remote: UPath) -> dict[str, bytes]:
    """Every file below a remote folder."""
    files = remote.fs.find(remote.path)
    return {name.removeprefix(f"{remote.path}/"): remote.fs.cat_file(name) for name in files}


def files_of(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(folder).items() if data is not None}


@pytest.mark.parametrize("command", ["prune", "convert"])
def test_a_checkpoint_for_a_bucket_is_that_of_a_folder(
    command: str, bucket: UPath, program: Program, argv: list[Any], tmp_path: Path
) -> None:
    argv = [command, bucket / "model", *argv[2:]]
    assert program(*argv, "--out", "here") == (0, "")
    assert program(*argv, "--out", bucket / "runs/there") == (0, "")
    assert tree_of(bucket / "runs/there") == files_of(tmp_path / "here")
    assert gj.open(bucket / "runs/there").config == gj.open(tmp_path / "here").config


def test_the_way_from_profile_to_checkpoint_goes_through_a_bucket(
    bucket: UPath, program: Program, refused: Refused, rows_jsonl: Path, tmp_path: Path
) -> None:
    ends = [rows_jsonl.read_text().splitlines(keepends=True)[part] for part in (slice(0, 4), slice(4, 8))]
    for number, rows in enumerate(ends):
        (bucket / f"{number}.jsonl").write_text("".join(rows))
        data = ["--data", bucket / f"{number}.jsonl", *SHORT]
        assert program("profile", bucket / "model", *data, "--out", bucket / f"part{number}") == (0, "")
    for out in (bucket, tmp_path):
        assert program("merge", bucket / "part0", bucket / "part1", "--out", out / "all") == (0, "")
        assert program("rank", bucket / "all", "--out", out / "ranking.json") == (0, "")
        ranked = ["--ranking", out / "ranking.json", "--keep", 4]
        assert program("prune", bucket / "model", *ranked, "--out", out / "cut") == (0, "")
    assert tree_of(bucket / "cut") == files_of(tmp_path / "cut")
    assert (bucket / "ranking.json").read_bytes() == (tmp_path / "ranking.json").read_bytes()
    assert (bucket / "all/saliency.parquet").read_bytes() == (tmp_path / "all/saliency.parquet").read_bytes()
    refused("rank", bucket / "all", "--out", bucket / "ranking.json", says=("memory://bucket/ranking.json", "exists"))
    refused("rank", bucket / "all", "--out", bucket / "cut", "--overwrite", says=("is a directory",))
    refused("rank", bucket / "all", "--out", "memory://", says=("whole bucket",))
    assert program("rank", bucket / "all", "--out", bucket / "ranking.json", "--overwrite") == (0, "")
    with pytest.raises(OutputError, match="where the input"):
        gj.prune(bucket / "model", RANKING, out=bucket / "model", overwrite=True)


def test_what_stood_at_a_remote_path_is_replaced_whole(bucket: UPath) -> None:
    """Shards of before would be those that the index does not name."""
    for name in ("config.json", "model-9-of-9.safetensors", "deep/file"):
        (bucket / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (bucket / "out" / name).write_text("old")
    with outputs.new_folder(bucket / "out", overwrite=True, last="config.json") as folder:
        (folder / "config.json").write_text("new")
        assert len(tree_of(bucket / "out")) == 3
    assert tree_of(bucket / "out") == {"config.json": b"new"}


class Failing(MemoryFileSystem):
    """A storage that fails as packages of storages do, with an exception of its own, at files of some names."""

    protocol = "failing"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(super()._strip_protocol(str(path).removeprefix("failing:/")))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if "unlucky" in path:
            raise RuntimeError("the server hung up")
        return super()._open(path, mode, **options)


class FailingPath(UPath):
    """Its paths, as of any storage that has no class of its own there."""


@pytest.fixture
def failing() -> Iterator[UPath]:
    fsspec.register_implementation("failing", Failing, clobber=True)
    register_implementation("failing", FailingPath, clobber=True)
    root = UPath("failing://bucket")
    yield root
    if root.exists():
        root.fs.rm("/bucket", recursive=True)


def test_an_output_that_did_not_arrive_whole_is_known(
    failing: UPath, refused: Refused, program: Program, model: Path, tmp_path: Path
) -> None:
    (model / "unlucky.json").write_text("{}")
    keep = ["--keep-sets", dump(tmp_path / "keep.json", [[0, 1, 2, 3]] * 4)]
    error = refused("prune", model, *keep, "--out", failing / "cut", says=("hung up", "nothing there is complete"))
    assert str(failing / "cut") in error
    assert "cut/README.md" in tree_of(failing) and "cut/config.json" not in tree_of(failing)
    refused("prune", model, *keep, "--out", failing / "cut", says=("is not complete: it lacks config.json",))
    refused("generate", failing / "cut", "--prompt", "1", says=("config.json: no such file",))
    (model / "unlucky.json").unlink()
    assert program("prune", model, *keep, "--out", failing / "cut", "--overwrite") == (0, "")
    assert gj.open(failing / "cut").config.num_experts == 4


def test_a_storage_that_fails_is_one_line(
    failing: UPath, refused: Refused, model: Path, profile: Path, ranking: Path, rows_jsonl: Path, tmp_path: Path
) -> None:
    for path in (model, profile, ranking):
        for file in [path] if path.is_file() else path.iterdir():
            copy = failing / "unlucky" / (f"{path.name}/{file.name}" if path.is_dir() else path.name)
            MemoryFileSystem._open(copy.fs, copy.path, "wb", data=file.read_bytes())
    url, keep = "failing://bucket/unlucky", ["--ranking", ranking, "--keep", 4]
    for argv in (
        ["profile", f"{url}/model", "--data", rows_jsonl, "--out", "made"],
        ["profile", model, "--data", rows_jsonl, "--out", f"{url}/out"],
        ["prune", f"{url}/model", *keep],
        ["prune", model, "--ranking", f"{url}/ranking.json", "--keep", 4],
        ["prune", model, *keep, "--out", f"{url}/out"],
        ["convert", model, "--to", "hf", "--out", f"{url}/out"],
        ["rank", f"{url}/profile", "--out", "made"],
        ["rank", profile, "--out", f"{url}/out.json"],
        ["merge", f"{url}/profile", f"{url}/profile", "--out", "made"],
        ["generate", model, "--messages", f"{url}/ranking.json"],
        ["plan", f"{url}/model", "--topology", "v5e:2x4"],
    ):
        refused(*argv, says=("bucket/unlucky", "the server hung up"))


def test_no_space_for_the_copy_says_where(bucket: UPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(OutputError, match=rf"no space left on device in {tmp_path}.* set TMPDIR"):  # noqa: SIM117
        with outputs.new_folder(bucket / "out", last="x"), open("/dev/full", "w") as full:
            full.write("x")
    assert not list(tmp_path.iterdir()) and not (bucket / "out").exists()


def test_an_orbax_checkpoint_is_read_from_this_machine(
    bucket: UPath, program: Program, refused: Refused, tiny_mxfp4: Path, tmp_path: Path
) -> None:
    assert program("convert", tiny_mxfp4, "--to", "orbax", "--out", bucket / "orbax") == (0, "")
    refused("generate", bucket / "orbax", "--prompt", "1", says=("memory://bucket/orbax", "copy it there"))
    here = shutil.copytree(tiny_mxfp4, tmp_path / "here")
    shutil.rmtree(here)
    for name, data in tree_of(bucket / "orbax").items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(data)
    assert gj.open(here).config == gj.open(tiny_mxfp4).config
