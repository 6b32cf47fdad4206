"""Outputs appear under their final name only when they are complete."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import OutputError


@contextmanager
def new_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that becomes `path` if the block succeeds.

    An existing `path` is refused before anything is written; with `overwrite` it is replaced, at the
    end. If the block fails the temporary folder is removed, and `path` is as it was.
    """
    check_free(path, overwrite)
    with _errors_of(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    try:
        with _errors_of(path):
            yield partial
            for file in partial.rglob("*"):
                if file.is_file():
                    _sync(file)
            partial.chmod(0o777 & ~_umask())
            if path.exists():
                # Two renames: a folder with content cannot be replaced in one.
                old = partial.with_name(partial.name + "-old")
                path.rename(old)
                partial.rename(path)
                _remove(old)
            else:
                partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_file(path: Path, text: str, overwrite: bool = False) -> None:
    """Write a text file under a temporary name, then rename it."""
    check_free(path, overwrite)
    with _errors_of(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=f".{path.name}.partial-", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(partial, 0o666 & ~_umask())
            os.replace(partial, path)
        finally:
            Path(partial).unlink(missing_ok=True)


def check_free(path: Path, overwrite: bool) -> None:
    """OutputError where `path` exists and may not be replaced."""
    if path.exists() and not overwrite:
        raise OutputError(f"{path}: exists already: give another --out, or --overwrite to replace it at the end")


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = "no space left on the device: free some or give another --out; nothing was written"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR):
            message = f"{os.strerror(error.errno).lower()}: give an --out that you may write to"
        else:
            raise
        raise OutputError(f"{path}: {message}") from error


def _sync(file: Path) -> None:
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _umask() -> int:
    # The only way to read the umask is to set it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
