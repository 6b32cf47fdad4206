"""Paths of this machine, and those that fsspec knows: gs://bucket/folder, s3://…, and others by their scheme."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

from upath import UPath

from ..errors import ConfigError, StorageError, reason

AnyPath: TypeAlias = Path | UPath

SCHEME = re.compile(r"\w[\w+.-]*://")
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


def place(text: str | AnyPath) -> Any:
    """The path that a user names, or gives; StorageError where the package of its scheme is missing."""
    if not isinstance(text, str):
        return text
    if not SCHEME.match(text):
        return Path(text)
    try:
        path = UPath(text)
        path.exists()
    except Exception as error:  # of the scheme's own package: missing, no such bucket, no right to see it
        raise StorageError(f"{text}: cannot be reached ({reason(error)})") from error
    return path


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


def upload(folder: Path, target: AnyPath, last: str) -> None:
    """Copy all files of a folder; `last` comes last, so that where it stands all others do."""
    files = sorted((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.name == last)
    try:
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
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path}: {os.strerror(error.errno or 0).lower()}: point at a folder in Hugging Face form"
        ) from None


def parse_json(data: bytes, where: str) -> Any:
    """What a JSON file holds; ConfigError where its bytes are no JSON."""
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not valid JSON ({reason(error)}): download the file again") from None
