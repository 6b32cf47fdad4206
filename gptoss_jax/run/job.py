"""The job `profile`: rows and a model's source become a profile in a folder. Letters: see `config`."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax

from ..data.dataset import Dataset
from ..data.rows import Row, prompts_hash
from ..devices import hosts
from ..errors import OptionError, OutputError, ResumeError, UserError
from ..files import atomic
from ..files.paths import AnyPath, is_local, is_path, place, storage_errors
from ..network.source import Source
from ..reports.rates import rate
from ..routing.tables import About
from ..statistics.eaft import EaftOptions
from . import artifacts, choose, stable, tracing
from .artifacts import INFO
from .bar import bar
from .choose import Choice, Place
from .engine import Engine, Unit
from .measure import measure
from .options import Counting, Data, Options, Placing, as_dict, check_together, declared_options, flag_of
from .profile import Profile
from .progress import Progress
from .reading import Wanted, make_dataset, tokenizer_of
from .steps import Asked
from .tracing import Traced, Tracing

REASON = "engine_reason"  # in profile.json, and beside the settings of an unfinished run


@dataclass(frozen=True)
class Request:
    """What is asked of the job."""

    model: str
    """The model's name, as the user gave it."""
    data: Data
    counting: Counting
    placing: Placing
    command: str = ""
    """What makes the profile again."""
    trace: AnyPath | None = None
    """The folder for a trace of what each token chose, where one is asked for."""
    wanted: Wanted | None = None
    """Says of each row whether it may be taken; by default all may."""

    def __post_init__(self) -> None:
        check_together(self.data, self.counting)
        if self.trace is not None and self.placing.coordinator:
            raise OptionError("--trace does not go with --coordinator, whose processes have rows of their own: use one")
        if not is_path(self.data.data) and not len(self.data.data):
            raise OptionError("--data is empty: name a file, a folder or a hub id")

    @property
    def options(self) -> tuple[Options, ...]:
        """All of them."""
        return self.data, self.counting, self.placing

    def values(self) -> dict[str, Any]:
        """All options by their names, as profile.json has them."""
        values = as_dict(*self.options)
        data = self.data.data
        if not isinstance(data, str):
            values["data"] = str(data) if is_path(data) else f"{len(data)} records given in Python"
        return values

    def by_flag(self, resumed: bool) -> dict[str, Any]:
        """All options by the names that users know; with `resumed` those that a run that goes on must share."""
        values, flags = self.values(), {}
        for some in self.options:
            for name, declared in declared_options(type(some)).items():
                if declared.resumed or not resumed:
                    flags[flag_of(type(some), name)] = values[name]
        return flags


@dataclass(frozen=True)
class Finished:
    """What the job gives."""

    profile: Profile | None
    """None where the run was complete already, in processes that have nothing of it."""
    said: str
    """One line for the user; empty in the processes that do not speak."""


def start(request: Request, **settings: Any) -> None:
    """Join the other processes, where there are any; HostsError where their options or `settings` differ."""
    named = {f"--{name}": value for name, value in settings.items()}
    join(request.placing, {"MODEL": request.model, **named, **request.by_flag(resumed=False)})


def join(placing: Placing, settings: dict[str, Any]) -> None:
    """Join the other processes, where there are any; HostsError where their settings, by the names that users know,
    differ in more than which process this is."""
    if placing.coordinator:
        own = ("--coordinator", "--process-id")
        shared = {name: value for name, value in settings.items() if name not in own}
        hosts.start(placing.coordinator, placing.num_processes, placing.process_id, shared)


def run(
    request: Request,
    open_source: Callable[[str], Source],
    target: AnyPath,
    overwrite: bool = False,
    resume: bool = False,
    tell: Callable[[str], Any] = lambda line: None,
) -> Finished:
    """Profile the model over the rows that the request names, and write the artifacts to `target`.

    `tell` is given what a user should know, line by line, in process 0, before the first step.
    """
    writes = hosts.is_first()
    kept = Progress(target)
    standing = hosts.exchange(_standing(target) if resume and writes else {})[0]
    began = hosts.exchange((kept.begun() or (not overwrite and standing)) if resume and writes else {})[0]
    trace = None if request.trace is None else Tracing.begin(request.trace, kept, target, overwrite, bool(began))
    # Files of a remote output come one after the other, the one that is asked for here last.
    overwrite = overwrite or bool(began and not standing and not is_local(target))
    if writes and (overwrite or not standing):
        atomic.try_folder(target, overwrite)
    source = open_source(request.model)
    if writes:
        _check_apart(target, source, request.data.data)
        if trace is not None:
            with tracing.named():
                _check_apart(trace.target, source, request.data.data)
    request, choice = _adopt(began, request, source)
    given = choose.place(
        source, choice.engine, request.placing, request.data.max_seq_length, Asked(swap=request.counting.swap)
    )
    request = replace(request, placing=given.placing)
    tokenizer = tokenizer_of(source)
    dataset = make_dataset(
        request.data, request.counting, source.config, tokenizer, choice.engine, given, request.wanted
    )
    if writes:
        for remark in dataset.remarks:
            tell(remark)
    info = _info(request, source, dataset, given, choice)
    settings = _computed(info, request, dataset.rows)
    hosts.agree(settings)
    info["settings_hash"] = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    complete = _is_complete(target, overwrite, standing, trace, info["settings_hash"])
    if writes:
        kept.begin({**settings, REASON: choice.reason}, resume)
    if complete:
        finished = Finished(None, "")
        with hosts.first_alone():
            if writes:
                finished = Finished(Profile.open(target), f"is complete; report: {target / 'report.md'}")
    else:
        if writes:
            tell(f"{_told(dataset)}; engine {choice.engine}: {choice.reason}; {choose.needs(source, choice, given)}")
        finished = _measured(request, source, tokenizer, choice, given, dataset, kept, info, target, overwrite, trace)
    if writes:
        kept.remove()
    return finished


def _measured(
    request: Request,
    source: Source,
    tokenizer: Any,
    choice: Choice,
    given: Place,
    dataset: Dataset,
    kept: Progress,
    info: dict[str, Any],
    target: AnyPath,
    overwrite: bool,
    trace: Tracing | None,
) -> Finished:
    """Measure what is not measured yet, and write."""
    keep = stable.number(request.data.until_stable, source.config.num_experts)
    with keeping(kept):
        state, eaft = kept.state(), eaft_options(request.counting)
        engine = choose.build(source, choice.engine, given, kept)
        if trace is not None:
            engine = Traced(engine, kept, state, About.of(source))
        total = dataset.tokens_of_process * (2 if eaft else 1)
        with bar(total, "tokens", shown=hosts.is_first(), done=state.tokens) as advance:
            move = partial(_advance, advance, engine)
            if keep is None:
                sums, took = measure(engine, dataset, kept, state, move, eaft, request.counting.swap)
            else:
                sums, took, used = stable.measure(engine, dataset, kept, state, move, keep, request.counting.swap)
                found = stable.figures(state.curve, keep, len(dataset.rows))
                info = {**info, **_of_rows(used), "until_stable": found}
        profile = Profile(artifacts.completed(info, sums, took), sums)
        if trace is not None:
            trace.write(dataset, state, kept, tokenizer, About.of(source), info)
        with hosts.first_alone():
            if hosts.is_first():
                with atomic.new_folder(target, overwrite, last=INFO) as folder:
                    profile.write(folder)
    domains, until = len(profile.sums.domains), f"{info['until_stable']['said']}; " if keep else ""
    said = (
        f"{took.total_tokens:,} tokens at {rate(took.tokens_per_s, ',')} tokens/s; "
        f"{domains} domain{'s' * (domains > 1)}; {until}engine {choice.engine}: {choice.reason}; "
        f"peak memory {took.peak_rss_bytes / choose.GIB:.2f} GiB; report: {target / 'report.md'}"
        f"{'' if trace is None else f'; trace: {trace.target}'}"
    )
    return Finished(replace(profile, folder=target), said if hosts.is_first() else "")


def _told(dataset: Dataset) -> str:
    """What has been read."""
    return (
        f"{len(dataset.rows):,} rows: {dataset.total_tokens:,} tokens, of which {dataset.kept:,} count; "
        f"{dataset.truncated:,} rows truncated, {dataset.empty:,} without a kept token"
    )


def _advance(advance: Callable[..., Any], engine: Engine, unit: Unit) -> None:
    """Move the bar by a unit; where units are layers of batches it says which layer is at work."""
    advance(unit.tokens, f"layer {unit.first_layer + 1} of {engine.num_layers}: " if engine.keeps_units else "")


def _check_apart(target: AnyPath, source: Source, data: Any) -> None:
    atomic.check_apart(target, source.folder, or_inside=True)
    if data and is_path(data):
        atomic.check_apart(target, place(str(data)))


def _standing(target: AnyPath) -> dict[str, Any]:
    """What is taken from the finished profile that stands there: the hash of its settings, and what `_adopt` needs."""
    try:
        with storage_errors(target):
            data = (target / INFO).read_bytes()
        info = json.loads(data.decode("utf-8"))
        own = {"--engine": info["engine"], "--batch-size": info["options"]["batch_size"], REASON: info[REASON]}
        return {"settings_hash": info["settings_hash"], **own}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _is_complete(
    target: AnyPath, overwrite: bool, standing: dict[str, Any], trace: Tracing | None, settings_hash: str
) -> bool:
    """Whether all that the run with these settings writes stands; OutputError where another run's is in the way."""
    is_own = standing.get("settings_hash") == settings_hash
    if standing and not overwrite and not is_own:
        raise OutputError(f"{target}: exists already, and is not of this run: give another --out")
    is_traced = trace is None or trace.is_whole(settings_hash)
    if trace is not None and is_own and not is_traced and not overwrite:
        raise OutputError(f"{target}: exists already, and its trace {trace.target} does not: give another --out")
    return is_own and is_traced


def _adopt(began: Any, request: Request, source: Source) -> tuple[Request, Choice]:
    """The engine, from a run that began where the user leaves it open, as is the batch size: memory may have it decided
    otherwise today."""
    choice = choose.choose(source, request.placing)
    if not began:
        return request, choice
    placing = replace(request.placing, batch_size=request.placing.batch_size or began["--batch-size"])
    if placing.engine in ("auto", began["--engine"]):
        choice = Choice(began["--engine"], began[REASON])
    return replace(request, placing=placing), choice


@contextmanager
def keeping(kept: Progress) -> Iterator[None]:
    """A block whose errors say that what is finished is not lost."""
    try:
        yield
    except UserError as error:
        if isinstance(error, ResumeError) or not kept.exists():
            raise
        raise type(error)(f"{error}; what is finished is kept: the same command with --resume goes on") from error


def eaft_options(counting: Counting) -> EaftOptions | None:
    """How EAFT weighs tokens, where it is asked for."""
    return EaftOptions(*counting.eaft_quantiles, *counting.eaft_weights) if counting.eaft else None


def _info(request: Request, source: Source, dataset: Dataset, given: Place, choice: Choice) -> dict[str, Any]:
    """What profile.json says of the run before it is measured."""
    return {
        "model": request.model,
        "model_fingerprint": source.fingerprint(),
        "config": source.config.to_json(),
        "quantized": source.quantized,
        "command": request.command,
        "versions": artifacts.versions(),
        "options": request.values(),
        "platform": jax.default_backend(),
        "devices": [str(device) for device in given.mesh.devices.flat],
        "mesh": dict(given.mesh.shape),
        "processes": jax.process_count(),
        "engine": choice.engine,
        REASON: choice.reason,
        **_of_rows(dataset),
    }


def _of_rows(dataset: Dataset) -> dict[str, Any]:
    """What profile.json says of the rows."""
    number, truncated, empty = len(dataset.rows), dataset.truncated, dataset.empty
    return {
        "rows": number,
        "truncated_rows": truncated,
        "empty_rows": empty,
        "prompts_hash": prompts_hash(dataset.rows),
        "warnings": [*dataset.remarks, *artifacts.data_warnings(number, truncated, empty)],
    }


def _computed(info: dict[str, Any], request: Request, rows: Sequence[Row]) -> dict[str, Any]:
    """All that decides what a run computes, to the bit, by the names that users know."""
    return {
        "the model's fingerprint": info["model_fingerprint"],
        "the rows' hash": info["prompts_hash"],
        "the hash of the rows' domains": prompts_hash(Row(row.domain, row.id) for row in rows),
        "the versions": {name: info["versions"][name] for name in ("gptoss-jax", "jax")},
        "the mesh": info["mesh"],
        "the platform": info["platform"],
        **request.by_flag(resumed=True),
        "--engine": info["engine"],
        **({} if request.trace is None else {"--trace": True}),
    }
