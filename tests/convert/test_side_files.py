"""What lies beside the weights: what is carried over, what stays, and what must not be followed or waited for."""

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from convert import checksums
from convert.sources import NANO, locate
from gptoss_jax.errors import CheckpointError
from tests.bad_input import Program, Refused, case, dump

CARRIED = {
    "LICENSE": b"\xff\x00 no text\r\n",
    "USAGE_POLICY": b"be kind\n",
    "vocab.json": b"{}",
    "merges.txt": b"a b\n",
    "tool_chat_template.jinja": b"{{ messages }}",
    "preprocessor_config.json": b"{}",
}
OF_WEIGHTS = {
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.gguf",
    "training_args.bin",
    "optimizer.pt",
    "tf_model.h5",
    "model.onnx",
    "quantize_config.json",
    "hf_quant_config.json",
    "imatrix.dat",
    "params.json",
    "dtypes.json",
    "trainer_state.json",
    "eval_results.json",
    "model.safetensors.sha256",
    "model-00001-of-00002.safetensors.bak",
    ".env",
    ".gitattributes",
}
SHARD = "model-00001-of-00005.safetensors"
COMMANDS = {
    "prune": ["--ranking", "ranking.json", "--keep", 4],
    "convert to hf": ["--to", "hf"],
    "convert to orbax": ["--to", "orbax"],
}
EACH = pytest.mark.parametrize("command", COMMANDS)


def argv(command: str, model: Path | str) -> list[Any]:
    return [command.split()[0], model, *COMMANDS[command], "--out", "out"]


@EACH
def test_what_is_of_the_sources_weights_stays_with_them(
    command: str, model: Path, ranking: Path, tmp_path: Path, program: Program
) -> None:
    for name, content in CARRIED.items():
        (model / name).write_bytes(content)
    for name in OF_WEIGHTS:
        (model / name).write_bytes(b"{}")
    for name in ("original", "metal"):
        (model / name).mkdir()
        (model / name / "model.safetensors").write_bytes(b"of the source")
    status, error = program(*argv(command, model))
    assert status == 0, error
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names.isdisjoint(OF_WEIGHTS | {"original", "metal"})
    assert {name: (tmp_path / "out" / name).read_bytes() for name in CARRIED} == CARRIED
    assert {"tokenizer.json", "generation_config.json", "chat_template.jinja"} <= names
    (line,) = [line for line in error.splitlines() if "not carried over" in line]
    assert f"{', '.join(sorted(OF_WEIGHTS | {'original', 'metal'})[:10])} and {len(OF_WEIGHTS) + 2 - 10} more" in line


@EACH
def test_what_is_rewritten_is_not_called_left_out(command: str, model: Path, ranking: Path, program: Program) -> None:
    (model / "SHA256SUMS").write_text("of the source")
    assert "not carried over" not in program(*argv(command, model))[1]


def test_a_readme_that_speaks_of_another_form_is_told(model: Path, program: Program) -> None:
    (model / "README.md").write_text("MXFP4 experts")
    assert "README.md" not in program("convert", model, "--to", "hf", "--out", "same")[1]
    assert (
        "README.md is that of the source"
        in program("convert", model, "--to", "hf", "--format", "bf16", "--out", "bf16")[1]
    )


# Links.


@pytest.mark.parametrize("name", ["notes.txt", "config.json", "tokenizer.json", SHARD, "folder"])
@pytest.mark.parametrize("command", ["profile", "prune", "convert", "generate"])
def test_a_link_out_of_the_folder_is_refused(
    command: str, name: str, model: Path, tmp_path: Path, request: pytest.FixtureRequest, refused: Refused
) -> None:
    secret = tmp_path / "secret"
    if name == "folder":
        secret.mkdir()
    elif (model / name).exists():
        (model / name).rename(secret)
    else:
        secret.write_text("a key")
    (model / name).symlink_to("../secret")
    arguments = request.getfixturevalue("argv_of")(command)
    refused(*arguments, says=(str(model / name), "link out of the folder", str(secret)))


@pytest.mark.parametrize("name", ["mine", "zero"])
def test_a_link_out_of_a_folder_of_any_name_is_refused(
    name: str, model: Path, ranking: Path, tmp_path: Path, refused: Refused
) -> None:
    """By letters, before and behind the name of the model that ships with the project."""
    (tmp_path / "secret").write_text("a key")
    (model / "notes.txt").symlink_to("../secret")
    model.rename(tmp_path / name)
    refused(*argv("prune", name), says=(f"{name}/notes.txt", "link out of the folder"))


def test_the_model_that_ships_is_found_where_a_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / NANO).mkdir()
    assert (locate(NANO) / "config.json").is_file()
    assert locate(f"./{NANO}").resolve() == tmp_path / NANO


@pytest.fixture
def argv_of(model: Path, rows_jsonl: Path, ranking: Path) -> Callable[[str], list[Any]]:
    made = {
        "profile": ["profile", model, "--data", rows_jsonl, "--out", "out"],
        "prune": argv("prune", model),
        "convert": argv("convert to hf", model),
        "generate": ["generate", model, "--prompt", "1 + 1"],
    }
    return made.__getitem__


def test_links_that_stay_in_the_folder_are_followed(
    model: Path, ranking: Path, tmp_path: Path, program: Program
) -> None:
    (model / "LICENSE").write_text("free")
    (model / "COPYING").symlink_to("LICENSE")
    assert program(*argv("prune", model))[0] == 0
    assert (tmp_path / "out" / "COPYING").read_text() == "free" and not (tmp_path / "out" / "COPYING").is_symlink()


def test_a_folder_that_is_a_link_itself_is_no_matter(
    model: Path, ranking: Path, tmp_path: Path, program: Program
) -> None:
    (tmp_path / "link").symlink_to("model")
    assert program(*argv("prune", "link"))[0] == 0


def hub_cache(model: Path, cache: Path) -> Path:
    """The model as the hub's client lays it out: a snapshot of links to blobs."""
    snapshot, blobs = cache / "snapshots" / "abc123", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        shutil.copy(file, blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


def test_links_of_a_hub_cache_are_its_own(model: Path, ranking: Path, tmp_path: Path, program: Program) -> None:
    snapshot = hub_cache(model, tmp_path / "models--owner--name")
    status, error = program(*argv("prune", snapshot))
    assert status == 0, error
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


def test_a_link_of_a_hub_cache_to_elsewhere_is_refused(
    model: Path, ranking: Path, tmp_path: Path, refused: Refused
) -> None:
    snapshot = hub_cache(model, tmp_path / "models--owner--name")
    (tmp_path / "models--owner--name" / "refs").write_text("a key")
    (snapshot / "notes.txt").symlink_to("../../refs")
    refused(*argv("prune", snapshot), says=("notes.txt", "link out of the folder"))


@pytest.mark.parametrize("disguise", ["blob", "blobs"])
def test_what_looks_as_a_hub_cache_hides_no_link(
    disguise: str, model: Path, ranking: Path, tmp_path: Path, refused: Refused
) -> None:
    """A blob that is a link itself, and a folder blobs that is one."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("a key")
    cache = tmp_path / "models--owner--name"
    snapshot = hub_cache(model, cache)
    if disguise == "blob":
        (cache / "blobs" / "key").symlink_to("../../secret/key")
    else:
        shutil.rmtree(cache / "blobs")
        for file in snapshot.iterdir():
            file.unlink()
            shutil.copy(model / file.name, file)
        (cache / "blobs").symlink_to("../secret")
    (snapshot / "notes.txt").symlink_to("../../blobs/key")
    refused(*argv("prune", snapshot), says=("notes.txt", "link out of the folder", "secret/key"))


def test_folders_named_blobs_are_of_a_hub_cache_alone(
    model: Path, ranking: Path, tmp_path: Path, refused: Refused
) -> None:
    snapshot = hub_cache(model, tmp_path / "models--owner--name")
    other = snapshot.parent.rename(snapshot.parent.with_name("revisions")) / snapshot.name
    refused(*argv("prune", other), says=("link out of the folder", "blobs"))


@pytest.mark.parametrize("target", ["gone.txt", "notes.txt"])
def test_a_link_to_nothing_is_said_to_be_one(model: Path, ranking: Path, refused: Refused, target: str) -> None:
    (model / "notes.txt").symlink_to(target)
    refused(*argv("prune", model), says=("notes.txt", "a link to nothing"))


# What is no file.


@pytest.mark.parametrize("name", ["config.json", SHARD, "tokenizer.json", "notes.txt"])
@pytest.mark.parametrize("command", ["profile", "prune", "convert", "generate", "plan"])
def test_a_pipe_is_refused_and_not_waited_for(
    command: str, name: str, model: Path, argv_of: Callable[[str], list[Any]], refused: Refused
) -> None:
    if command == "plan" and name != "config.json":
        pytest.skip("plan reads config.json alone")
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    arguments = ["plan", model, "--topology", "v5e:2x4"] if command == "plan" else argv_of(command)
    refused(*arguments, says=(name, "is no file" if command == "plan" else "neither file nor folder"))


def test_a_socket_is_no_file_either(
    model: Path, ranking: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model)  # a socket's whole path has few characters
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("notes.txt")
        refused(*argv("prune", model), says=("notes.txt", "neither file nor folder"))


# Digests of names that are no plain text.

ODD = ["back\\slash", "a\\nb", "new\nline", "car\rriage", "\\", "two  spaces", " leading", "ümlaut", "*star"]


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    folder = tmp_path / "odd"
    folder.mkdir()
    for name in ODD:
        (folder / name).write_text(name)
    (folder / os.fsdecode(b"no-\xfftext")).write_bytes(b"bytes")
    checksums.write(folder, {})
    return folder


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="no sha256sum here")
def test_digests_are_those_of_sha256sum(odd: Path) -> None:
    """Line by line what it writes itself, and nothing that it finds wrong."""
    names = sorted(os.fsencode(p.name) for p in odd.iterdir() if p.name != checksums.FILE)
    theirs = subprocess.run(["sha256sum", "--", *names], cwd=odd, capture_output=True, check=True).stdout
    ours = (odd / checksums.FILE).read_bytes()
    assert sorted(ours.splitlines(keepends=True)) == sorted(theirs.splitlines(keepends=True))
    check = subprocess.run(
        ["sha256sum", "--check", "--strict", "--quiet", checksums.FILE], cwd=odd, capture_output=True
    )
    assert (check.returncode, check.stdout, check.stderr) == (0, b"", b"")


def test_digests_of_odd_names_are_read_back(odd: Path) -> None:
    assert set(checksums.parse((odd / checksums.FILE).read_bytes())) == {*ODD, os.fsdecode(b"no-\xfftext")}
    assert checksums.differing(odd) == []
    (odd / "new\nline").write_text("other")
    assert checksums.differing(odd) == ["new\nline"]


def test_without_the_mark_a_backslash_is_itself() -> None:
    """As older programs wrote it, that knew no escapes."""
    assert checksums.parse(b"%s  %s\n" % (b"0" * 64, rb"a\nb")) == {"a\\nb": "0" * 64}


@pytest.mark.parametrize("name", [rb"a\b", rb"a\\\b", b"a\\"])
def test_a_backslash_that_escapes_nothing_is_refused(name: bytes) -> None:
    with pytest.raises(CheckpointError, match="line 1 is no digest"):
        checksums.parse(b"\\%s  %s\n" % (b"0" * 64, name))


def test_odd_names_come_through_a_prune(model: Path, ranking: Path, tmp_path: Path, program: Program) -> None:
    for name in ODD:
        (model / name).write_bytes(name.encode())
    status, error = program(*argv("prune", model), "--verify")
    assert status == 0, error
    assert {name: (tmp_path / "out" / name).read_bytes() for name in ODD} == {name: name.encode() for name in ODD}


# The mapping of a model that was pruned before.

FIRST = [[0, 2, 3, 5, 6], [1, 2, 4, 5, 6], [0, 1, 2, 3, 4], [2, 3, 4, 5, 6]]
SECOND = [[0, 1, 2, 4], [0, 2, 3, 4], [1, 2, 3, 4], [0, 1, 2, 3]]
BOTH = [[0, 2, 3, 6], [1, 4, 5, 6], [1, 2, 3, 4], [2, 3, 4, 5]]


def once(program: Program, model: Path | str, kept: list[list[int]], out: str, tmp_path: Path) -> Path:
    dump(tmp_path / "keep.json", kept)
    status, error = program("prune", model, "--keep-sets", "keep.json", "--out", out)
    assert status == 0, error
    return tmp_path / out


def mapping(folder: Path) -> Any:
    return json.loads((folder / "expert_mapping.json").read_text())


@pytest.mark.parametrize("between", ["nothing", "orbax", "bf16"])
def test_pruning_twice_keeps_the_numbers_of_the_original(
    between: str, model: Path, tmp_path: Path, program: Program
) -> None:
    source: Path | str = once(program, model, FIRST, "first", tmp_path)
    if between != "nothing":
        form = ["--to", "orbax"] if between == "orbax" else ["--to", "hf", "--format", "bf16"]
        assert program("convert", source, *form, "--out", "between")[0] == 0
        source = "between"
    twice = once(program, source, SECOND, "twice", tmp_path)
    assert mapping(twice) == {str(i): {str(old): new for new, old in enumerate(kept)} for i, kept in enumerate(BOTH)}
    card = " ".join((twice / "README.md").read_text(encoding="utf-8").split())
    assert "the model that was pruned here had been pruned before" in card
    if between == "nothing":
        at_once = once(program, model, BOTH, "at-once", tmp_path)
        names = {file.name for file in at_once.iterdir()} - {"README.md", "SHA256SUMS"}
        assert {name: (twice / name).read_bytes() for name in names} == {n: (at_once / n).read_bytes() for n in names}
        assert "pruned before" not in (at_once / "README.md").read_text(encoding="utf-8")


def whole(layers: int = 4, experts: int = 7) -> Any:
    return {str(i): {str(2 * j): j for j in range(experts)} for i in range(layers)}


def first(old: str, new: Any) -> Any:
    """A sound one but for the first expert of layer 1."""
    return whole() | {"1": {old: new} | {str(j): j for j in range(1, 7)}}


MAPPINGS = [
    case("no JSON", b"{", "no mapping"),
    case("a list", [], "no mapping"),
    case("empty", {}, "its layers are not 0 to 3"),
    case("fewer layers", whole(layers=3), "its layers are not 0 to 3"),
    case("more layers", whole(layers=5), "its layers are not 0 to 3"),
    case("layers in another order", dict(reversed(whole().items())), "its layers are not 0 to 3"),
    case("fewer experts", whole(experts=6), "layer 0 has 6 experts, not each of 0 to 6 once"),
    case("more experts", whole(experts=8), "layer 0 has 8 experts"),
    case("one number twice", whole() | {"2": {str(j): min(j, 5) for j in range(7)}}, "layer 2 has 7 experts"),
    case("a name that is no number", first("a", 0), "no mapping"),
    case("a number in another spelling", first("00", 0), "layer 1 holds"),
    case("a negative number", first("-1", 0), "layer 1 holds"),
    case("a truth value", first("0", False), "layer 1 holds"),
    case("a fraction", first("0", 0.0), "layer 1 holds"),
    case("lists", {str(i): [0, 1, 2, 3, 4, 5, 6] for i in range(4)}, "no mapping"),
    case("endless digits", b'{"0": {"%s": 0}}' % (b"9" * 5000), "no mapping"),
    case("brackets without end", b"[" * 100_000, "no mapping"),
]


@pytest.mark.parametrize(("content", "says"), MAPPINGS)
def test_a_mapping_of_another_model_is_refused(
    content: Any, says: tuple[str, ...], model: Path, ranking: Path, refused: Refused
) -> None:
    (model / "expert_mapping.json").write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    refused(*argv("prune", model), says=("expert_mapping.json", "or remove it", *says))


def test_a_mapping_need_not_be_in_order(model: Path, ranking: Path, tmp_path: Path, program: Program) -> None:
    dump(model / "expert_mapping.json", {str(i): {str(20 - j): j for j in reversed(range(7))} for i in range(4)})
    twice = once(program, model, BOTH, "out", tmp_path)
    assert mapping(twice)["0"] == {"20": 0, "18": 1, "17": 2, "14": 3}
