"""Outputs appear under their final name only when they are complete."""

import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import OutputError, StorageError, UserError, reason, refusal
from .paths import AnyPath, is_local, upload

OLD = "old"  # in a workplace: what stood at the path before


@contextmanager
def new_folder(path: AnyPath, overwrite: bool = False, last: str = "") -> Iterator[Path]:
    """Yield a temporary folder beside `path` that becomes `path` if the block succeeds.

    An existing `path` is refused before anything is written; with `overwrite` it is replaced, at the
    end. If the block fails the temporary folder is removed, and `path` is as it was; if the process is killed, the
    next run that writes `path` sees to that. A remote `path` cannot be renamed to: its files are made in the system's
    temporary folder and copied, `last` after all others, so that without it they are known to be incomplete.
    """
    if not is_local(path):
        with _copied(path, overwrite, last) as folder:
            yield folder
        return
    _end_killed(path)
    check_free(path, overwrite)
    with _new_parents(path), _errors_of(path), _workplace(path) as workplace:
        partial = workplace / "new"
        partial.mkdir()
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                _sync(file)
        check_free(path, overwrite)
        if path.exists():
            path.rename(workplace / OLD)  # a folder with content cannot be replaced in one step
        partial.rename(path)


@contextmanager
def _copied(path: AnyPath, overwrite: bool, last: str) -> Iterator[Path]:
    """`new_folder` for a remote path."""
    check_free(path, overwrite, last)
    with _errors_of(path):
        # That it cannot be written is said before hours of work.
        path.parent.mkdir(parents=True, exist_ok=True)
        trial = path.parent / f".{path.name}.partial"
        replace_file(trial, [])
        with suppress(Exception):  # to write may be allowed, and to remove not
            trial.unlink()
    with tempfile.TemporaryDirectory(prefix="gptoss-jax-") as name:
        try:
            yield Path(name)
        except OSError as error:
            what = f"{path}: {refusal(error)} in {name}, where it is made before it is copied"
            raise OutputError(f"{what}: set TMPDIR to a folder with enough space; nothing was written") from error
        check_free(path, overwrite, last)
        upload(Path(name), path, last)


@contextmanager
def _workplace(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path`, locked while the block runs: the lock ends with the process, however that ends."""
    workplace = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    lock = os.open(workplace, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks on folders, as NFS: there no run can end another
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield workplace
    finally:
        _end(workplace, path)
        os.close(lock)


def _end_killed(path: Path) -> None:
    """End the workplaces of runs that were killed while they wrote `path`."""
    # Eight characters are what tempfile adds.
    for workplace in path.parent.glob(glob.escape(f".{path.name}.partial-") + "?" * 8):
        with suppress(OSError):
            lock = os.open(workplace, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if any(workplace.iterdir()):  # an empty one may have been made just now, and not been locked yet
                    _end(workplace, path)
            finally:
                os.close(lock)


def _end(workplace: Path, path: Path) -> None:
    """Remove a workplace; what was moved out of the way there and has not been replaced comes back."""
    old = workplace / OLD
    if os.path.lexists(old) and not os.path.lexists(path):
        old.rename(path)
    shutil.rmtree(workplace, ignore_errors=True)


class _Undone(Exception):
    """Ends a block whose output is not wanted."""


def try_folder(path: AnyPath, overwrite: bool = False) -> None:
    """OutputError where `new_folder` could not begin, said before hours of work; leaves nothing."""
    with suppress(_Undone), new_folder(path, overwrite):
        raise _Undone


def try_file(path: AnyPath, overwrite: bool = False) -> None:
    """OutputError where `write_file` could not write, said before hours of work; leaves nothing."""
    check_free(path, overwrite)
    if is_local(path):
        with suppress(_Undone), _new_parents(path), _errors_of(path), _partial(path):
            raise _Undone


def write_file(path: AnyPath, content: str | bytes, overwrite: bool = False) -> None:
    """Write bytes, or text in UTF-8, whole or not at all: under a temporary name, to be renamed, where the file is of
    this machine."""
    check_free(path, overwrite)
    data = content.encode() if isinstance(content, str) else content
    if not is_local(path):
        with _errors_of(path):
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, "")
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, [data])
        return
    with _new_parents(path), _errors_of(path), _partial(path) as partial:
        partial.write_bytes(data)
        _sync(partial)
        partial.chmod(0o666 & ~_umask())
        check_free(path, overwrite)
        partial.replace(path)


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """An empty hidden file beside `path`; what the block has not renamed of it is removed."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.partial-", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def check_free(path: AnyPath, overwrite: bool, last: str = "") -> None:
    """OutputError where `path` exists and may not be replaced. A remote folder without its file `last` is one that a
    killed run left."""
    with _errors_of(path):
        if not is_local(path) and not path.name:
            raise OutputError(f"{path}: is a whole bucket: name a folder in it")
        if is_local(path) and Path.cwd().is_relative_to(path.resolve()):
            raise OutputError(f"{path}: is the current folder or holds it: give another --out")
        if not path.exists():
            return
        if is_local(path) and not path.is_file() and not path.is_dir():
            raise OutputError(f"{path}: is a device or a pipe: give another --out")
        if not overwrite:
            is_whole = is_local(path) or not last or (path / last).exists()
            what = "exists already" if is_whole else f"exists already, and is not complete: it lacks {last}"
            raise OutputError(f"{path}: {what}: give another --out, or --overwrite to replace it at the end")


def check_apart(path: AnyPath, *inputs: AnyPath, or_inside: bool = False) -> None:
    """OutputError where writing `path` would replace an input, or, with `or_inside`, lie in its folder."""
    with _errors_of(path):
        for source in inputs:
            written, read = (place.resolve() if is_local(place) else place for place in (path, source))
            over = written == read or written in read.parents
            if over or (or_inside and read in written.parents):
                raise OutputError(f"{path}: is where the input {source} lies: give another --out")


@contextmanager
def _errors_of(path: AnyPath) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = "no space left on the device: free some, or give another --out; nothing was written"
        else:
            message = f"{refusal(error)}: give an --out that can be written"
        raise OutputError(f"{path}: {message}") from error
    except Exception as error:
        if is_local(path) or isinstance(error, UserError):
            raise
        raise StorageError(f"{path}: cannot be written ({reason(error)}): give another --out") from error


@contextmanager
def _new_parents(path: Path) -> Iterator[None]:
    """Make the folders above `path`; if the block fails, remove those that were made."""
    with _errors_of(path):
        missing = [parent for parent in path.absolute().parents if not parent.exists()]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:  # and it is no folder
            raise NotADirectoryError(errno.ENOTDIR, "") from error
    try:
        yield
    except BaseException:
        for parent in missing:
            with suppress(OSError):  # another program may have put something there
                parent.rmdir()
        raise


def let_go(descriptor: int) -> None:
    """Have the page cache drop what it holds of a file, and begin to write what is not on the disk yet."""
    if hasattr(os, "posix_fadvise"):  # macOS has none
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _sync(file: Path) -> None:
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())


def _umask() -> int:
    # The only way to read the umask is to set it.
    mask = os.umask(0)
    os.umask(mask)
    return mask


def replace_file(file: AnyPath, parts: Sequence[bytes | memoryview]) -> None:
    """Write a file so that under its name stands what stood there before or the whole of `parts`; storages of
    objects show nothing else."""
    new = file.with_name(f".{file.name}.new") if is_local(file) else file
    with new.open("wb") as stream:
        for part in parts:
            stream.write(part)
    if is_local(file):
        os.replace(str(new), file)
