"""What can go wrong for a user: one class each, raised where it is known, printed by `cli` alone.

Every message is one line that says what is wrong, where, and what to do about it.
"""

import os
import reprlib
from typing import Any

SHOWN = reprlib.Repr()
SHOWN.maxstring = SHOWN.maxother = 60


def reason(error: BaseException) -> str:
    """The first line of another library's message; its class where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def plain(text: str, most: int = 200) -> str:
    """What stands in a file, or names one, for a message: on one line, without what would steer a terminal, and cut
    behind `most` characters."""
    shown = "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text[:most])
    return shown + "…" * (len(text) > most)


def shown(value: Any) -> str:
    """A value of a file as a message shows it: on one line, and not without end."""
    return SHOWN.repr(value)


def refusal(error: OSError) -> str:
    """Why the system refused, in its words. Remote storages raise the same classes, often without a number."""
    if error.errno:
        return os.strerror(error.errno).lower()
    return "no such file or directory" if isinstance(error, FileNotFoundError) else reason(error)


class UserError(Exception):
    """Something that the user can mend. The program exits with status 2."""


class OptionError(UserError):
    """An option has a value that it cannot have, or does not go with another one."""


class InputError(UserError):
    """An argument of a call in Python has a wrong type or shape."""


class ConfigError(UserError):
    """config.json is missing, is of another model type, or lacks a key."""


class CheckpointError(UserError):
    """A weight file is missing, truncated, or disagrees with config.json or the index."""


class TokenizerError(UserError):
    """The tokenizer or the chat template is missing or fails."""


class DataError(UserError):
    """Rows cannot be found or read, or none of their tokens is kept."""


class RankingError(UserError):
    """A ranking or keep-set does not fit the model, or asks for what it cannot have."""


class ProfileError(UserError):
    """A profile lacks what is asked of it, its files cannot be read, or profiles cannot be merged."""


class EvaluationError(UserError):
    """The file of an evaluation cannot be read, or is of other keep-sets."""


class TraceError(UserError):
    """A folder is no trace of routing, is damaged, or is of another model."""


class StatisticsError(UserError):
    """A statistic became NaN or infinite."""


class OutputError(UserError):
    """The output folder exists, or cannot be written."""


class ResumeError(UserError):
    """What an unfinished run has kept is damaged, of other settings, or in the way."""


class MemoryLimitError(UserError):
    """A limit on memory leaves too little room, or does not hold for what was asked."""


class MeshError(UserError):
    """A mesh, a batch or a topology does not divide or does not exist, or a step does not fit."""


class CompilerError(UserError):
    """The compiler says something that is not understood, so that no figure can be had from it."""


class HostsError(UserError):
    """Processes of one run do not come together, or disagree."""


class StorageError(UserError):
    """A path is none that a file system takes, or is of a remote storage that cannot be reached or written."""


class BaselineError(UserError):
    """A stored baseline that cannot be read, or is of other rows."""


class FingerprintError(UserError):
    """An activation dataset, or what one is made of, cannot be read, or lacks what is asked of it."""
