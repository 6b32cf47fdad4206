"""The jobs of the command line as functions, with the same names and defaults. Letters: see `config`."""

import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.sources import NANO, locate

from ..config import PRESETS, Config
from ..data.conversation import Conversation, Message
from ..data.harmony import HarmonyText
from ..data.messages import Say
from ..data.spellings import of_value
from ..devices import mesh as sharding
from ..devices import topologies
from ..errors import DataError, InputError, MeshError, OptionError, ProfileError
from ..files import atomic
from ..files.paths import AnyPath, is_path, place, read_json
from ..generation.answer import Answer, Reply
from ..generation.traced import traced
from ..network.source import Source
from ..pods import plan as pods
from ..pods import words
from ..run import job
from ..run import merge as merging
from ..run.options import SIDE_BY_SIDE, Answering, Placing, Sampling, Slice, named, taken
from ..run.profile import Profile
from .model import Model, as_model


def profile(
    model: Any,
    data: Any,
    *,
    out: str | AnyPath | None = None,
    trace: str | AnyPath | None = None,
    overwrite: bool = False,
    resume: bool = False,
    **options: Any,
) -> Profile:
    """Run rows through a model and return the statistics of its experts.

    Args:
        model: an open model, or the name of one.
        data: a path or hub id as --data takes it, or a list of records: dictionaries of columns.
        out: a folder for the artifacts; without it nothing is written, and the profile can be saved later.
        trace: a folder for which experts each token chose, with their gates, which `Trace.open` reads.
        overwrite: replaces existing folders, at the end.
        resume: goes on with the unfinished run beside `out`, if there is one.
        **options: those of the command `profile`, by their names there with underscores, as domain_column="domain".
            An open model's dtype and weights are its own where they are not given.

    Raises what the command line says in one line: OptionError, DataError, OutputError and others of `errors`.

    Example:
        >>> import gptoss_jax as gj
        >>> rows = [{"text": "2 + 2 = 4"}, {"text": "3 + 3 = 6"}]
        >>> gj.profile("nano", rows, keep="all", max_seq_length=64).columns()["count"].shape
        (6, 16)
    """
    opened = as_model(model)
    data = str(data) if is_path(data) else data
    if isinstance(model, Model):
        options = {"dtype": opened.dtype, "weights": opened.weights} | options
    chosen = named(data=data, **options)
    request = job.Request(
        opened.name, *chosen, command=_call(opened.name, data, options), trace=None if trace is None else place(trace)
    )

    def source(_: str) -> Source:
        return opened.source

    if out is not None:
        target = place(out)
        job.start(request, out=str(target), overwrite=overwrite, resume=resume)
        return _of_process(job.run(request, source, target, overwrite, resume))
    with tempfile.TemporaryDirectory() as folder:
        found = _of_process(job.run(request, source, Path(folder) / "profile"))
    return Profile(found.info, found.sums)


def _of_process(finished: job.Finished) -> Profile:
    if finished.profile is None:
        raise ProfileError("the profile was complete already, and process 0 alone has it: open it there")
    return finished.profile


def _call(model: str, data: Any, options: dict[str, Any]) -> str:
    """What makes the profile again, for its report."""
    shown = repr(data) if isinstance(data, str) else "records"
    return f"gptoss_jax.profile({', '.join([repr(model), shown, *(f'{n}={v!r}' for n, v in options.items())])})"


def merge(
    profiles: Sequence[Profile | str | AnyPath],
    *,
    out: str | AnyPath | None = None,
    overwrite: bool = False,
    command: str | None = None,
) -> Profile:
    """Add finished profiles over different rows of one model: open ones, or their folders.

    ProfileError names what cannot be added, and why. With `out` the result is saved there; `command` is what its report
    says makes it again, where that is not this call.

    Example:
        >>> import gptoss_jax as gj
        >>> parts = [gj.profile("nano", [{"text": f"{n} + 1"}], keep="all", max_seq_length=64) for n in (1, 2)]
        >>> gj.merge(parts).info["rows"]
        2
    """
    target = None if out is None else place(out)
    if target is not None:
        atomic.check_free(target, overwrite)
    opened = [profile if isinstance(profile, Profile) else Profile.open(profile) for profile in profiles]
    merged = merging.merge(opened, command or f"gptoss_jax.merge({[str(p.folder or 'profile') for p in opened]})")
    if target is None:
        return merged
    atomic.check_apart(target, *(p.folder for p in opened if p.folder is not None))
    return merged.save(target, overwrite)


def answer(model: Any, prompts: Sequence[Any], answering: Answering, sampling: Sampling, placing: Placing) -> Answer:
    """What `generate` runs, for whoever wants to see replies while they grow."""
    if not prompts:
        raise InputError("the list of prompts is empty: give what the user says, messages, or a list of either")
    said: dict[str, None] = {}
    asked = [_asked(prompt, number, said.setdefault) for number, prompt in enumerate(prompts, 1)]
    return Answer(as_model(model).source, asked, answering, sampling, placing, said)


def tracing(answer: Answer, trace: AnyPath | None, overwrite: bool, resume: bool) -> AbstractContextManager[None]:
    """A block in which replies grow, and behind which their trace is written, where one is asked for."""
    if trace is None:
        if overwrite or resume:
            raise OptionError("--overwrite and --resume go with --trace: without it generate writes nothing")
        return nullcontext()
    return traced(answer, trace, overwrite, resume)


def _asked(prompt: Any, number: int, say: Say) -> Conversation | HarmonyText:
    """What one prompt asks: words of the user, messages, or a record that holds them."""
    if isinstance(prompt, str):
        return Conversation((Message("user", prompt),))
    try:
        found = of_value(prompt if isinstance(prompt, Mapping) else list(prompt), "it", {}, say)
    except DataError as error:
        raise DataError(f"prompt {number}: {error}") from None
    return HarmonyText(found) if isinstance(found, str) else found


def generate(
    model: Any,
    prompts: Any,
    *,
    trace: str | AnyPath | None = None,
    overwrite: bool = False,
    resume: bool = False,
    **options: Any,
) -> list[Reply]:
    """Answer prompts, of which many run side by side.

    Args:
        model: an open model, or the name of one.
        prompts: what the user says, or a list of messages; or a list of either.
        trace: a folder for which experts each token chose, with their gates, which `Trace.open` reads; prompts are
            numbered there from 1.
        overwrite: replaces an existing folder of `trace`, at the end.
        resume: goes on with the unfinished run beside `trace`, if there is one.
        **options: those of the command `generate`, as temperature=0 or max_new_tokens=64. An open model's dtype and
            weights are its own where they are not given.

    DataError where a prompt is empty or leaves no room; OptionError for an option that does not exist.

    Example:
        >>> import gptoss_jax as gj
        >>> (reply,) = gj.generate("nano", "What is 12 + 7?", temperature=0, max_new_tokens=32)
        >>> len(reply.token_ids) <= 32
        True
    """
    opened = as_model(model)
    if isinstance(model, Model):
        options = {"dtype": opened.dtype, "weights": opened.weights} | options
    answering, sampling = taken(Answering, options), taken(Sampling, options)
    placing = taken(Placing, {name: options.pop(name) for name in SIDE_BY_SIDE if name in options})
    if options:
        raise OptionError(f"there is no option {min(options)!r} of generate")
    is_one = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], dict))
    going = answer(opened, [prompts] if is_one else prompts, answering, sampling, placing)
    with tracing(going, None if trace is None else place(trace), overwrite, resume):
        deque(going.grow(), maxlen=0)
    return [going.reply(number) for number in range(len(going.prompts))]


PUBLISHER = "openai/"  # of the models in PRESETS, whose hub ids begin with it


@dataclass(frozen=True)
class Planned:
    """What `plan` found."""

    figures: dict[str, Any]
    """The object that `plan --json` prints."""
    fits: bool
    refusal: MeshError | None
    """Why the step does not fit, by how much, and what would; None where it fits."""


def plan(
    model: str, topology: str, *, progress: Callable[[pods.Case], Any] = lambda case: None, **options: Any
) -> Planned:
    """Compile the profile step for a TPU slice, and say what it takes there. No TPU and no weights are needed.

    Args:
        model: gpt-oss-20b, gpt-oss-120b (openai/ may stand before them), nano, or a folder that holds config.json.
        topology: a TPU slice, as v5e:2x4.
        progress: is told of each step before it is compiled.
        **options: mesh=(data, expert), batch_size, max_seq_length and weights, as of the command `plan`.

    MeshError where the slice does not exist, or sizes do not divide.

    Example:
        >>> import gptoss_jax as gj
        >>> gj.plan("gpt-oss-20b", "v5e:2x4").fits               # doctest: +SKIP
        True
    """
    asked = Slice(topology=topology, **options)
    config = _config(model)
    data, expert = asked.mesh or sharding.default_sizes(config, len(topologies.devices(topology)))
    case = pods.Case(config, topology, data, expert, asked.weights, asked.batch_size, asked.max_seq_length)
    case.mesh()

    def compile_step(case: pods.Case) -> pods.Compiled:
        progress(case)
        return pods.compile_step(case)

    compiled = compile_step(case)
    largest = pods.largest_batch(compiled, compile_step)
    refusal = None if compiled.fits else words.refusal(compiled, largest)
    return Planned(pods.figures(compiled, largest), compiled.fits, refusal)


def _config(model: str) -> Config:
    folder = locate(model) if model == NANO else place(model)
    if not folder.exists() and (preset := PRESETS.get(model.removeprefix(PUBLISHER))):
        return preset
    path = folder / "config.json"
    return Config.from_json(read_json(path), str(path))
