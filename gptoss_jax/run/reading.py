"""The rows that options ask for, as documents of a model's tokens."""

from collections.abc import Callable
from functools import cache
from typing import Any

from ..config import Config
from ..data import tokens
from ..data.dataset import Dataset, Layout
from ..data.groups import Groups, domains_of, folds_of
from ..data.remarks import Remarks
from ..data.rows import ColumnNames, Reading, Row, in_part, read_rows, sample
from ..data.sources import records
from ..data.template import Template
from ..errors import OptionError, TokenizerError
from ..files.paths import local_folder
from ..network.source import Source
from . import stable
from .choose import Place
from .options import Counting, Data

Wanted = Callable[[Row], bool]
"""Says of a row whether it may be taken."""


def tokenizer_of(source: Source) -> Any:
    """The checkpoint's own tokenizer."""
    with local_folder(source.folder) as folder:
        return tokens.load_tokenizer(folder)


def read(
    data: Data,
    tokenizer: Any,
    remarks: Remarks,
    answer_column: str | None = None,
    wanted: Wanted | None = None,
    domains: tuple[str, ...] = (),
    effort: str = "medium",
) -> list[Row]:
    """The rows that are asked for, in their order; `remarks` get what a user should know of how they were taken.

    `wanted` says of each row whether it may be taken; by default all may. `domains` are columns that together name the
    domain in the place of the option's, `effort` is that of the reasoning where a conversation states none."""
    columns = ColumnNames(data.text_column, domains or data.domain_column, data.id_column, answer_column)
    template = cache(lambda: Template(tokenizer))
    reading = Reading(columns, template, remarks, data.keep_thinking, data.skip_bad_rows, effort)
    stream = read_rows(records(data.data, data.split, data.subset, remarks), reading)
    some = in_part(filter(wanted, stream) if wanted else stream, data.part, remarks)
    return sample(some, data.domain, data.num_rows, data.seed)


def eos_of(tokenizer: Any, config: Config, what: str) -> int:
    """The token behind each packed document; TokenizerError where the model has none."""
    eos = tokenizer.eos_token_id
    if eos is None or eos >= config.vocab_size:
        raise TokenizerError(
            f"{what} needs an eos_token below vocab_size {config.vocab_size}; the tokenizer's is {eos}"
        )
    return int(eos)


def make_dataset(
    data: Data,
    counting: Counting,
    config: Config,
    tokenizer: Any,
    engine: str,
    given: Place,
    wanted: Wanted | None = None,
) -> Dataset:
    """All rows that may be taken, and the batches of this process' share of them."""
    share = given.share
    if data.max_seq_length > config.max_position:
        raise OptionError(f"--max-seq-length is above the model's context of {config.max_position}")
    stable.number(data.until_stable, config.num_experts)  # refused before rows are read
    remarks = Remarks()
    rows = read(data, tokenizer, remarks, wanted=wanted)
    domains = domains_of(rows, data.domain_column)
    groups = Groups(domains, folds_of(len(domains)))
    eos = eos_of(tokenizer, config, "--pack") if data.pack else 0
    documents = tokens.encode(
        # What a packed block holds depends on all rows before it.
        rows if data.pack else rows[share.number :: share.of],
        tokenizer,
        groups,
        vocab_size=config.vocab_size,
        max_length=None if data.pack else data.max_seq_length,
        truncate=data.truncate,
        keep=counting.keep,  # type: ignore[arg-type]
        channel_weights=counting.channel_weights,
    )
    layout = Layout(
        kind="packed" if data.pack else "side by side" if engine == "streamed" else "padded",
        batch_size=given.placing.batch_size or 1,
        length=data.max_seq_length,
        eos=eos,
        cross_document=data.cross_document,
        skip_first=counting.skip_first,
    )
    dataset = Dataset(rows, documents, groups, layout, share, remarks.lines())
    dataset.check_kept()
    return dataset
