"""What every way of choosing gives: keep-sets with what a user should know of them, and their files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..config import Config
from ..errors import OptionError
from ..files import atomic
from ..files.paths import AnyPath, place
from ..run.choosing import Keeping
from ..selection import budgets
from ..selection.keep_sets import KeepSets
from ..selection.ranking import checked_number


@dataclass(frozen=True)
class Selected:
    """Keep-sets, and what their choice costs."""

    keep_sets: KeepSets
    coverage: Mapping[str, float]
    """Of each domain the mean over layers of the mass that is kept of it, over what its own best experts, as many,
    would keep; worst first."""
    remarks: tuple[str, ...]
    """Lines that a user should read."""
    file: AnyPath | None = None
    """Where they are written."""


def numbers(keep: Any, num_experts: int) -> list[int]:
    """The numbers that are meant by one or several values."""
    counts = [checked_number(one, num_experts) for one in (keep if isinstance(keep, list | tuple) else [keep])]
    if len({*counts}) < len(counts):
        raise OptionError(f"--keep: of {num_experts} experts two of the numbers are the same: give each once")
    return counts


def affordable(keeping: Keeping, config: Config, quantized: bool, format: str) -> tuple[list[int], tuple[str, ...]]:
    """The most experts that the budget has room for, and what that takes."""
    quantize = quantized if format == "same" else format == "mxfp4"
    beside = budgets.cache_bytes(config, keeping.context, keeping.rows or 1) if keeping.context else 0
    assert keeping.budget_gib is not None
    most = budgets.most_experts(config, keeping.budget_gib, quantize, beside)
    taken = budgets.weight_bytes(config, most, quantize)
    cache = f" and {beside / budgets.GIB:.4f} GiB of KV cache" if beside else ""
    return [most], (f"{most} experts a layer take {taken / budgets.GIB:.4f} GiB of weights{cache}",)


def written(
    found: Sequence[Selected], counts: Sequence[int], out: str | AnyPath | None, overwrite: bool
) -> list[Selected]:
    """The keep-sets in the order of `counts`, each in its file where one is named."""
    of_count = {len(one.keep_sets.layers[0]): one for one in found}
    ordered = [of_count[count] for count in counts]
    if out is None:
        return ordered
    files = files_of(counts, place(out))
    for one, file in zip(ordered, files, strict=True):
        one.keep_sets.write(file, overwrite)
    return [replace(one, file=file) for one, file in zip(ordered, files, strict=True)]


def files_of(counts: Sequence[int], out: AnyPath) -> list[AnyPath]:
    """The file itself for one number; for several those beside it with the number in their name."""
    if len(counts) == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{count}{out.suffix}") for count in counts]


def check_files(counts: Sequence[int], out: AnyPath, overwrite: bool) -> None:
    for file in files_of(counts, out):
        atomic.check_free(file, overwrite)
