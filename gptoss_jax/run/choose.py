"""Which engine runs a profile, and on what."""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from ..devices import hosts
from ..devices import mesh as sharding
from ..devices.hosts import Share
from ..errors import HostsError, MemoryLimitError, MeshError, UserError
from ..network.model import GptOss, Layer
from ..network.source import Source, load
from . import memory, steps, streamed
from .engine import Engine
from .memory import GIB
from .options import Placing
from .progress import Progress
from .resident import Resident
from .steps import Asked
from .streamed import Streamed

PLAIN = Asked()


class Choice(NamedTuple):
    """An engine by its name, and why it is that one."""

    engine: str
    reason: str


class Place(NamedTuple):
    """What a run has been given to run on."""

    mesh: Mesh
    """The mesh over all devices."""
    share: Share
    """This process' share of the rows."""
    placing: Placing
    """The options, with the batch size that was left open."""


def choose(source: Source, placing: Placing) -> Choice:
    """The engine that the user names; else the resident one where all weights fit into memory."""
    if placing.engine == "streamed":
        return Choice("streamed", "asked for")
    if jax.device_count() > 1 or placing.mesh or placing.mapping == "pmap" or placing.weights != "bf16":
        return Choice("resident", "options of the resident engine are given, or there are several devices")
    needed = memory.resident_bytes(source.config, placing.weights, placing.dtype)
    limit = placing.memory_gib * GIB if placing.memory_gib else memory.available()
    fits = needed <= limit
    if placing.engine == "resident":
        if placing.memory_gib and not fits:
            raise MemoryLimitError(
                f"--memory-gib {limit / GIB:.3g} is too little for all weights at once, which need {needed / GIB:.1f}: "
                "use --engine streamed"
            )
        return Choice("resident", "asked for")
    relation = "fits into" if fits else "is more than"
    what = "--memory-gib" if placing.memory_gib else "free memory"
    amounts = f"all weights at once need {needed / GIB:.1f} GiB, which {relation} the {limit / GIB:.1f} GiB of {what}"
    return Choice("resident" if fits else "streamed", amounts)


def place(source: Source, engine: str, placing: Placing, length: int, asked: Asked = PLAIN) -> Place:
    """The mesh over all devices, and this process' share of the rows, which are of at most `length` tokens; what is
    asked for decides what a layer takes."""
    if engine == "streamed":
        return _place_streamed(source, placing, length, asked)
    mesh = resident_mesh(source, placing)
    data = mesh.shape[sharding.DATA]
    placing = replace(placing, batch_size=placing.batch_size or 4 * data)
    sharding.check_batch(placing.batch_size or 0, data)
    return Place(mesh, hosts.share(mesh), placing)


def resident_mesh(source: Source, placing: Placing) -> Mesh:
    """The mesh over all devices, as it is asked for or as it splits the weights most."""
    config, pmap = source.config, placing.mapping == "pmap"
    if pmap and jax.process_count() > 1:
        raise MeshError("--map pmap maps over the cores of one host: with many processes use --map mesh")
    sizes = placing.mesh or ((jax.device_count(), 1) if pmap else sharding.default_sizes(config, jax.device_count()))
    if pmap and sizes[1] > 1:
        raise MeshError(f"--map pmap holds all experts on each core: expert={sizes[1]} needs --map mesh")
    return sharding.make(config, *sizes)


def check_streamed(placing: Placing) -> None:
    """UserError where options do not go with the streamed engine."""
    if jax.process_count() > 1:
        raise HostsError("--engine streamed is one process: leave out --coordinator, or use --engine resident")
    if jax.device_count() > 1:
        raise MeshError(
            f"--engine streamed runs on one device, and there are {jax.device_count()}: use resident with --mesh"
        )
    for value, flag in (
        (placing.mesh, "--mesh"),
        (placing.mapping, "--map pmap"),
        (placing.weights, "--weights mxfp4"),
    ):
        if value not in (None, "mesh", "bf16"):
            raise UserError(f"{flag} means nothing with --engine streamed: leave it out")


def _place_streamed(source: Source, placing: Placing, length: int, asked: Asked) -> Place:
    check_streamed(placing)
    mesh = sharding.make(source.config, 1, 1)
    limit = int(placing.memory_gib * GIB) if placing.memory_gib else None
    activation_bytes, form = int(placing.activation_gib * GIB), streamed.weights_form(source)
    further = memory.further_bytes(source.config, placing.dtype, asked.swap, asked.grams)
    tokens = memory.streamed_tokens(source.config, form, placing.dtype, limit, activation_bytes, length, *further)
    rows = max(1, tokens // length)
    if limit and (placing.batch_size or 0) > rows:
        raise MemoryLimitError(
            f"--batch-size {placing.batch_size} is too much for --memory-gib {limit / GIB:.3g}: at most {rows}"
        )
    return Place(mesh, hosts.share(mesh), replace(placing, batch_size=placing.batch_size or rows))


def needs(source: Source, choice: Choice, given: Place) -> str:
    """What weights take of a device's memory, and what is free of it, in words."""
    config, dtype, free = source.config, given.placing.dtype, memory.available() / GIB
    if choice.engine == "streamed":
        taken = 2 * memory.weight_bytes(Layer, config, streamed.weights_form(source), dtype)
        return f"two layers at a time take {taken / GIB:.2f} GiB of {free:.1f} free"
    taken = memory.weight_bytes(GptOss, config, given.placing.weights, dtype) // given.mesh.shape[sharding.EXPERT]
    return f"weights take {taken / GIB:.2f} GiB of {free:.1f} free" + " on each device" * (given.mesh.size > 1)


def build(source: Source, engine: str, place: Place, progress: Progress) -> Engine:
    """The engine, with what it holds loaded."""
    placing = place.placing
    if engine == "streamed":
        return Streamed(source, placing.dtype, progress, int(placing.activation_gib * GIB))
    mapping = partial(steps.pmapped if placing.mapping == "pmap" else steps.mapped, mesh=place.mesh)
    return Resident(load(source, placing.dtype, place.mesh, placing.weights), mapping)
