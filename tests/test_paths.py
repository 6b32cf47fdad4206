"""Every path that a command takes may be of this machine, of a remote storage, or a file:// address."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from upath import UPath

from gptoss_jax.cli.options import Place, Value
from gptoss_jax.errors import StorageError
from gptoss_jax.evaluation import stored
from gptoss_jax.files.paths import place
from gptoss_jax.run.kinds import ROWS, TEXT

from . import published
from .bad_input import Program, Refused, dump, tree
from .commands import COMMANDS
from .conftest import ONE_STEP, many_rows
from .simulated import summary

# Parameters that take any text and name no path. One that names a path has the type `cli.options.PATH`.
TEXTS = {
    "prompts",
    "category",
    "answer_column",
    "pick",  # a rule, a criterion, or a file that is read as keep-sets are
    "domain",
    "split",
    "subset",
    "text_column",
    "id_column",
    "domain_column",
    "benchmark",
    "benchmark_column",
    "category_column",
    "topology",
    "title",
}
OUTPUTS = ("out", "write_baseline", "trace")
NUMBERS = (click.Choice, click.IntRange, click.types.IntParamType, click.types.BoolParamType)
PARAMETERS = [(name, parameter) for name, command in COMMANDS.items() for parameter in command.params]


def takes_a_path(parameter: click.Parameter) -> bool:
    """Whether it has the type of paths, or names rows, which a folder or a file may hold."""
    of_rows = isinstance(parameter.type, Value) and parameter.type.declared.kind is ROWS
    return isinstance(parameter.type, Place) or of_rows


PATHS = [(name, parameter) for name, parameter in PARAMETERS if takes_a_path(parameter)]
WRITERS = [name for name, parameter in PATHS if parameter.name == "out"]
every_path = pytest.mark.parametrize(
    ("command", "parameter"), [pytest.param(*pair, id=f"{pair[0]}-{pair[1].name}") for pair in PATHS]
)


@pytest.mark.parametrize(("command", "parameter"), PARAMETERS)
def test_whatever_takes_a_text_takes_a_path_of_any_kind_or_is_known_to_name_none(
    command: str, parameter: click.Parameter
) -> None:
    kind = parameter.type
    if takes_a_path(parameter) or isinstance(kind, NUMBERS):
        return
    is_text = kind is click.STRING or (isinstance(kind, Value) and kind.declared.kind is TEXT)
    assert not is_text or parameter.name in TEXTS, f"{command}: {parameter.name}: give it the type PATH"
    assert is_text or isinstance(kind, Value), f"{command}: {parameter.name}: {kind} is no type of this program"


def flag(parameter: click.Parameter) -> str:
    return parameter.opts[0] if isinstance(parameter, click.Option) else parameter.human_readable_name


@pytest.fixture
def words(command: str, argv: list[Any], parameter: click.Parameter, tmp_path: Path) -> list[Any]:
    """A command line that has the parameter."""
    if parameter.name == "keep_sets" and argv[0] in ("profile", "generate"):
        argv = [*argv, "--keep-sets", dump(tmp_path / "keep.json", [[0, 1, 2, 3]] * 4)]
    if parameter.name == "keep_sets" and command == "fingerprint record":
        argv = [*argv, "--keep-sets", dump(tmp_path / "keep.json", [[*range(15)]] * 6)]
    if parameter.name == "trace":
        argv = [*argv, "--trace", tmp_path / "trace"]
    if parameter.name == "keep_sets" and argv[0] == "prune":
        argv = ["prune", argv[1], "--keep-sets", dump(tmp_path / "keep.json", [[0, 1, 2, 3]] * 4)]
    if parameter.name == "eval":
        made = tmp_path / "eval.json"
        made.write_text(stored.to_json(summary()), encoding="utf-8")
        argv = [*argv, "--eval", made]
    if parameter.name == "baseline":
        argv = [*argv, "--baseline", argv[1]]
    if parameter.name == "write_baseline":
        argv = [*(word for word in argv if word not in ("--keep-sets", tmp_path / "kept.json"))]
        argv = [*argv, "--write-baseline", tmp_path / "baseline"]
    if parameter.name == "model" and argv[0] == "report":
        argv = [*argv, "--model", tmp_path / "model"]
    if parameter.name == "model" and argv[0] == "select":
        argv = [*argv[:2], "--budget-gib", 1, "--model", tmp_path / "model"]
    if parameter.name == "data" and argv[0] == "select":
        searched = ["--rule", "greedy", "--data", many_rows(tmp_path), *ONE_STEP[:4], "--overwrite"]
        argv = ["select", tmp_path / "model", "--keep", 4, *searched]
    if parameter.name == "domains":
        argv = [*argv, "--domains", dump(tmp_path / "domains.json", published.DOMAINS)]
    if parameter.name == "messages":
        messages = dump(tmp_path / "messages.json", [{"role": "user", "content": "1 + 1"}])
        argv = ["generate", argv[1], "--messages", messages, "--max-new-tokens", 4]
    if argv[0] == "plan":
        argv = [*argv, "--mesh", "data=2,expert=4"]  # compiles nothing: the model has 7 experts
    return [*argv, "--out", tmp_path / "made"] if command in WRITERS else argv


def done(status: int, error: str) -> bool:
    """Whether the command did what it can do."""
    return status == 0 or (status == 2 and "7 experts" in error)


def place_of(words: list[Any], parameter: click.Parameter) -> int:
    """Where the path stands: an argument is the first word behind the command's own."""
    if isinstance(parameter, click.Option):
        return int(words.index(flag(parameter))) + 1
    return 1 if words[0] in COMMANDS else 2


def with_path(words: list[Any], parameter: click.Parameter, path: str) -> list[Any]:
    at = place_of(words, parameter)
    return [*words[:at], path, *words[at + 1 :]]


def path_of(words: list[Any], parameter: click.Parameter) -> Path:
    return Path(words[place_of(words, parameter)])


@pytest.fixture
def storage() -> Iterator[UPath]:
    root = UPath("memory://walk")
    yield root
    if root.exists():
        root.fs.rm("/walk", recursive=True)


def copied(path: Path, to: UPath) -> UPath:
    for file in [path] if path.is_file() else filter(Path.is_file, path.rglob("*")):
        copy = to / file.relative_to(path.parent).as_posix()
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    return to / path.name


def schemes_in(folder: Path) -> list[str]:
    """What an address that is taken for a path leaves behind."""
    return [p.name for p in folder.rglob("*") if ":" in p.name]


@pytest.mark.slow
@every_path
def test_a_remote_path_is_taken(
    command: str, parameter: click.Parameter, words: list[Any], storage: UPath, program: Program, tmp_path: Path
) -> None:
    local = path_of(words, parameter)
    remote = storage / "made" if parameter.name in OUTPUTS else copied(local, storage)
    status, error = program(*with_path(words, parameter, str(remote)))
    assert done(status, error), error
    assert remote.exists() and (parameter.name not in OUTPUTS or not local.exists()) and not schemes_in(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_file_addresses_are_taken(command: str, argv: list[Any], program: Program, tmp_path: Path) -> None:
    """All of a command's paths at once: what tells one scheme from another is one parser, whose test is below."""
    argv = [*argv, "--mesh", "data=2,expert=4"] if command == "plan" else argv
    words = [*argv, "--out", tmp_path / "made"] if command in WRITERS else argv
    status, error = program(*(word.as_uri() if isinstance(word, Path) else word for word in words))
    assert done(status, error), error
    assert (command not in WRITERS or (tmp_path / "made").exists()) and not schemes_in(tmp_path)


@every_path
def test_an_address_with_a_slip_is_refused(
    command: str, parameter: click.Parameter, words: list[Any], refused: Refused
) -> None:
    named = (flag(parameter),) if isinstance(parameter.type, Place) else ()
    for slip in ("gs:/bucket/x", "s3:bucket", "simplecache::gs://bucket/x", "file://x/y"):
        refused(*with_path(words, parameter, slip), says=(*named, slip))


@every_path
def test_a_name_that_no_file_system_takes_is_refused(
    command: str, parameter: click.Parameter, words: list[Any], refused: Refused, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("x" * 256, "x/" * 2200, "a\0b", "file/x/y", "loop/x/y"):
        refused(*with_path(words, parameter, name), says=(repr(name)[1:-1][:40],))


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("a/b", Path("a/b")),
        ("run:1.jsonl", Path("run:1.jsonl")),
        ("2026-01-01T10:00", Path("2026-01-01T10:00")),
        (Path("a"), Path("a")),
        ("file:///a/b", Path("/a/b")),
        ("file:///a%20b/50%", Path("/a b/50%")),
        ("file://localhost/a", Path("/a")),
        ("local:///a", Path("/a")),
        (UPath("file:///a/b"), Path("/a/b")),
        (UPath("/a/b"), Path("/a/b")),
        ("./gs:/a", Path.cwd() / "gs:/a"),
        ("memory://bucket/a/", UPath("memory://bucket/a")),
        (UPath("memory://bucket/a"), UPath("memory://bucket/a")),
    ],
)
def test_one_parser_of_paths(text: Any, path: Any) -> None:
    found = place(text)
    assert found == path and isinstance(found, Path) == isinstance(path, Path)
    assert place(found) == found, "a path that is parsed again stays the same"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "gs:/bucket/x",
        "gs:bucket",
        "S3:/x",
        " gs://bucket/x",
        "a/gs://x",
        "memory:x",
        "http:/x",
        "file:/x",
        "file:x",
        "file://x",
        "local://x",
        "simplecache::gs://x",
        "nosuchscheme://x",
        Path("gs://bucket/x"),
        "a\0b",
        "x" * 256,
    ],
)
def test_what_is_no_path_is_refused(text: Any) -> None:
    with pytest.raises(StorageError) as caught:
        place(text)
    assert len(str(caught.value).splitlines()) == 1


def test_what_a_name_with_a_colon_would_be_taken_for_is_said() -> None:
    with pytest.raises(StorageError, match=r"gs:/bucket: is no address .* gs://…, or ./gs:/bucket"):
        place("gs:/bucket")


def modes(path: Path) -> dict[str, str]:
    every = [path, *path.rglob("*")]
    return {str(p.relative_to(path)): oct(p.stat().st_mode & 0o7777) for p in every}


@pytest.mark.slow
@pytest.mark.parametrize(("command", "more"), [*((name, []) for name in WRITERS), ("convert", ["--to", "orbax"])])
def test_artifacts_have_the_modes_of_any_file(
    command: str, more: list[str], argv: list[Any], program: Program, tmp_path: Path
) -> None:
    if more:
        argv = [*argv[:2], *more]
    umask = 0o027  # not the usual one
    before = os.umask(umask)
    try:
        status, error = program(*argv, "--out", tmp_path / "above" / "made")
    finally:
        os.umask(before)
    assert status == 0, error
    made = tmp_path / "above"
    wanted = {
        str(p.relative_to(made)): oct((0o777 if p.is_dir() else 0o666) & ~umask) for p in [made, *made.rglob("*")]
    }
    assert modes(made) == wanted and len(wanted) > 1


@pytest.mark.parametrize("command", WRITERS)
def test_a_device_is_no_output(command: str, argv: list[Any], refused: Refused, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refused(*argv, "--out", "pipe", "--overwrite", says=("pipe", "device or a pipe"))


def test_a_name_with_bytes_that_are_no_text_is_written(program: Program, profile: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.json")
    try:
        (tmp_path / name).write_text("")
        (tmp_path / name).unlink()
    except OSError as error:
        assert error.errno == errno.EILSEQ
        pytest.skip("this file system takes text alone")
    assert program("rank", profile, "--out", name) == (0, "")
    assert name in tree(tmp_path)
