"""SHA256SUMS: the digest of every file of a checkpoint, in the form that `sha256sum --check` reads."""

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gptoss_jax.errors import CheckpointError
from gptoss_jax.files.atomic import let_go

FILE = "SHA256SUMS"
PIECE_BYTES = 4 << 20
LINE = re.compile(r"(?P<escaped>\\?)(?P<digest>[0-9a-f]{64}) [ *](?P<name>[^/\0]+)")
# What a line of the list cannot hold as it is: the line begins with a backslash then, and the name has these.
BACKSLASH = "\\"
ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}
CHARACTERS = {escape: character for character, escape in ESCAPES.items()}


def write(folder: Path, known: Mapping[str, str]) -> None:
    """Write the digests of all files; those `known` by name are taken as given, and not read again."""
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    lines = [_line(known.get(name) or digest(folder / name), name) for name in names]
    (folder / FILE).write_bytes(os.fsencode("".join(lines)))  # names need not be text


def _line(digest: str, name: str) -> str:
    escaped = "".join(ESCAPES.get(character, character) for character in name)
    return f"{'' if escaped == name else BACKSLASH}{digest}  {escaped}\n"


def differing(folder: Path, progress: Callable[[int], Any] = lambda nbytes: None) -> list[str]:
    """Names of the files whose bytes, read again from the disk, have another digest than was written."""
    wanted = parse((folder / FILE).read_bytes(), str(folder / FILE))
    for name in wanted:
        with open(folder / name, "rb") as file:
            # The page cache would give back what was written, not what arrived. It keeps what is not on the disk.
            os.fsync(file.fileno())
            let_go(file.fileno())
    return [name for name, expected in wanted.items() if digest(folder / name, progress) != expected]


def parse(data: bytes, where: str = FILE) -> dict[str, str]:
    """The digest of each file by its name; CheckpointError where the bytes are no such list."""
    found: dict[str, str] = {}
    for number, line in enumerate(os.fsdecode(data).removesuffix("\n").split("\n"), 1):
        match = LINE.fullmatch(line)
        name = match and (_unescaped(match["name"]) if match["escaped"] else match["name"])
        if not match or name is None or name in found:
            raise CheckpointError(f"{where}: line {number} is no digest of a further file: copy the checkpoint again")
        found[name] = match["digest"]
    return found


def _unescaped(name: str) -> str | None:
    """The name itself; None where it holds a backslash that begins no escape."""
    if re.sub(r"\\[\\nr]", "", name).count(BACKSLASH):
        return None
    return re.sub(r"\\[\\nr]", lambda escape: CHARACTERS[escape[0]], name)


def digest(file: Path, progress: Callable[[int], Any] = lambda nbytes: None) -> str:
    """SHA-256 of a file; `progress` gets the bytes of each piece read."""
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(PIECE_BYTES):
            found.update(piece)
            progress(len(piece))
    return found.hexdigest()
