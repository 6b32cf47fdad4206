"""Paths of this machine, and those that fsspec knows: gs://bucket/folder, s3://…, and others by their scheme."""

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard
from urllib.parse import unquote_to_bytes

from fsspec.registry import known_implementations
from upath import UPath

from ..errors import ConfigError, StorageError, UserError, reason, refusal

AnyPath: TypeAlias = Path | UPath

SCHEME = re.compile(r"(\w[\w+.-]*)://")
OF_THIS_MACHINE = ("file", "local")  # schemes
# Of weights in any form, a model's or a training's.
WEIGHT_SUFFIXES = {
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".gguf",
    ".h5",
    ".msgpack",
    ".npz",
    ".onnx",
    ".onnx_data",
}


def is_local(path: AnyPath) -> TypeGuard[Path]:
    """Whether a path is one of this machine's file systems."""
    return isinstance(path, Path)


def is_path(value: Any) -> TypeGuard[str | AnyPath]:
    """Whether a value is what `place` takes."""
    return isinstance(value, str | Path | UPath)


def place(text: str | AnyPath) -> Any:
    """The path that a user names or gives: nothing else in the program parses paths.

    A path of this machine, with or without file://, is a `Path`; one of a remote storage is a `UPath`. StorageError
    where an address is written wrong, the package of its scheme is missing, its storage cannot be reached, or no file
    system takes the name.
    """
    if not isinstance(text, str | Path):  # it may have options that its text does not tell
        return Path(text.path) if text.protocol in OF_THIS_MACHINE else text
    text = str(text)
    scheme = SCHEME.match(text)
    if not scheme:
        return _local(text)
    if scheme[1] in OF_THIS_MACHINE:
        return _local_by_url(text)
    try:
        path = UPath(text)
        path.exists()
    except Exception as error:  # of the scheme's own package: missing, no such bucket, no right to see it
        raise StorageError(f"{text}: cannot be reached ({reason(error)})") from error
    return path


def _local(text: str) -> Path:
    if not text:
        raise StorageError("an empty text is no path: name a file or a folder")
    if _is_slip(text):
        scheme = text.partition(":")[0].strip()
        mend = f"write {scheme}://…, or ./{text} for a path of this machine"
        raise StorageError(f"{text}: is no address of a storage: {mend}")
    path = _taken(Path(text), text)
    # ./gs:/x is a path of this machine, and must still be one when it is parsed again: `Path` drops the dot.
    return path.absolute() if _is_slip(str(path)) else path


def _is_slip(text: str) -> bool:
    """Whether a text is the address of a storage with a slip, as gs:/bucket, s3:bucket or simplecache::gs://bucket: as
    a path it would become a folder with the name gs:."""
    if text.startswith((".", "/", "~")):
        return False
    scheme, colon, _ = text.partition(":")
    return "://" in text or (bool(colon) and scheme.strip().lower() in known_implementations)


def _local_by_url(url: str) -> Path:
    """The path of file:///folder, in which %20 stands for a space, as RFC 8089 has it."""
    path = url.partition("://")[2].removeprefix("localhost")
    if not path.startswith("/"):
        raise StorageError(f"{url}: is no path of this machine: write file:///folder, with three slashes")
    return _taken(Path(os.fsdecode(unquote_to_bytes(os.fsencode(path)))), url)


def _taken(path: Path, text: str) -> Path:
    """The path, which may be absent; StorageError where no file system takes its name."""
    try:
        path.stat()
    except ValueError as error:
        raise StorageError(f"{text!r}: no file system takes this name ({reason(error)})") from None
    except OSError as error:  # all else is told by whoever reads or writes there
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise StorageError(f"{text}: {refusal(error)}: give another path") from None
    return path


@contextmanager
def storage_errors(path: AnyPath) -> Iterator[None]:
    """StorageError for what the package of a remote storage raises beside OSError, which files raise too."""
    try:
        yield
    except (OSError, UserError):
        raise
    except Exception as error:
        if is_local(path):
            raise
        raise StorageError(f"{path}: cannot be reached ({reason(error)})") from error


@contextmanager
def local_folder(folder: AnyPath) -> Iterator[Path]:
    """A folder of this machine with what `folder` holds beside weights: itself, or a copy for as long as needed."""
    if is_local(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as name:
        for file in folder.iterdir():
            if file.is_file() and file.suffix not in WEIGHT_SUFFIXES:
                (Path(name) / file.name).write_bytes(file.read_bytes())
        yield Path(name)


def upload(folder: Path, target: Any, last: str) -> None:
    """Make `target`, a remote path, hold the files of a folder, and nothing else.

    Of what stood there `last` goes first, and of what is new it comes last: where it stands, all others do.
    """
    files = sorted((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file == folder / last)
    try:
        if last:
            (target / last).unlink(missing_ok=True)
        if target.exists():
            target.fs.rm(target.path, recursive=True)
        for file in files:
            copy = target / file.relative_to(folder).as_posix()
            copy.parent.mkdir(parents=True, exist_ok=True)
            with file.open("rb") as read, copy.open("wb") as write:
                shutil.copyfileobj(read, write)
    except Exception as error:  # of the scheme's own package
        raise StorageError(f"{target}: cannot be written ({reason(error)}): nothing there is complete") from error


def read_json(path: AnyPath) -> Any:
    """A JSON file of a checkpoint; ConfigError where it cannot be read or is no JSON."""
    return parse_json(read_file(path), str(path))


def read_file(path: AnyPath) -> bytes:
    """A small file of a checkpoint; ConfigError where it cannot be read, or is none: a pipe would be waited for."""
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path}: is no file: point at a folder in Hugging Face form")
    try:
        with storage_errors(path):
            return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {refusal(error)}: point at a folder in Hugging Face form") from None


def parse_json(data: bytes, where: str) -> Any:
    """What a JSON file holds; ConfigError where its bytes are no JSON."""
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not valid JSON ({reason(error)}): download the file again") from None
