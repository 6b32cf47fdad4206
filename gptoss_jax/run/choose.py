"""Which engine runs a profile, and on what."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from ..devices import hosts
from ..devices import mesh as sharding
from ..devices.hosts import Share
from ..errors import HostsError, MemoryLimitError, MeshError, UserError
from ..network.source import Source, load
from . import memory
from . import steps as forward
from . import streamed as stream
from .engine import Engine
from .progress import Progress
from .resident import Resident
from .streamed import Streamed

GIB = 1 << 30


class Choice(NamedTuple):
    """An engine by its name, and why it is that one."""

    engine: str
    reason: str


def choose(source: Source, options: dict[str, Any]) -> Choice:
    """The engine that the user names; else the resident one where all weights fit into memory."""

    if options["engine"] == "streamed":
        return Choice("streamed", "asked for")
    if jax.device_count() > 1 or options["mesh"] or options["mapping"] == "pmap" or options["weights"] != "bf16":
        return Choice("resident", "options of the resident engine are given, or there are several devices")
    needed = memory.resident_bytes(source.config, options["weights"], options["dtype"])
    limit = options["memory_gib"] * GIB if options["memory_gib"] else memory.available()
    fits = needed <= limit
    if options["engine"] == "resident":
        if options["memory_gib"] and not fits:
            raise MemoryLimitError(
                f"--memory-gib {limit / GIB:.3g} is too little for all weights at once, which need {needed / GIB:.1f}: "
                "use --engine streamed"
            )
        return Choice("resident", "asked for")
    relation = "fits into" if fits else "is more than"
    what = "--memory-gib" if options["memory_gib"] else "free memory"
    amounts = f"all weights at once need {needed / GIB:.1f} GiB, which {relation} the {limit / GIB:.1f} GiB of {what}"
    return Choice("resident" if fits else "streamed", amounts)


def place(source: Source, engine: str, options: dict[str, Any]) -> tuple[Mesh, Share]:
    """The mesh over all devices, and this process' share of the rows; sets what --batch-size leaves open."""

    config = source.config
    if engine == "streamed":
        _check_streamed(options)
        mesh = sharding.make(config, 1, 1)
        limit = int(options["memory_gib"] * GIB) if options["memory_gib"] else None
        weights = stream.weights_form(source)
        length = options["max_seq_length"]
        activation_bytes = int(options["activation_gib"] * GIB)
        tokens = memory.streamed_tokens(config, weights, options["dtype"], limit, activation_bytes, length)
        rows = max(1, tokens // length)
        if limit and (options["batch_size"] or 0) > rows:
            raise MemoryLimitError(
                f"--batch-size {options['batch_size']} is too much for --memory-gib {limit / GIB:.3g}: at most {rows}"
            )
        options["batch_size"] = options["batch_size"] or rows
        return mesh, hosts.share(mesh)
    pmap = options["mapping"] == "pmap"
    if pmap and jax.process_count() > 1:
        raise MeshError("--map pmap maps over the cores of one host: with many processes use --map mesh")
    sizes = options["mesh"] or ((jax.device_count(), 1) if pmap else sharding.default_sizes(config, jax.device_count()))
    if pmap and sizes[1] > 1:
        raise MeshError(f"--map pmap holds all experts on each core: expert={sizes[1]} needs --map mesh")
    mesh = sharding.make(config, *sizes)
    options["batch_size"] = options["batch_size"] or 4 * sizes[0]
    sharding.check_batch(options["batch_size"], sizes[0])
    return mesh, hosts.share(mesh)


def _check_streamed(options: dict[str, Any]) -> None:

    if jax.process_count() > 1:
        raise HostsError("--engine streamed is one process: leave out --coordinator, or use --engine resident")
    if jax.device_count() > 1:
        raise MeshError(
            f"--engine streamed runs on one device, and there are {jax.device_count()}: use resident with --mesh"
        )
    for name, flag in (("mesh", "--mesh"), ("mapping", "--map pmap"), ("weights", "--weights mxfp4")):
        if options[name] not in (None, "mesh", "bf16"):
            raise UserError(f"{flag} means nothing with --engine streamed: leave it out")


def build(source: Source, engine: str, options: dict[str, Any], mesh: Mesh, progress: Progress) -> Engine:
    """The engine, with what it holds loaded."""

    if engine == "streamed":
        return Streamed(source, options["dtype"], progress, int(options["activation_gib"] * GIB))
    mapping: Callable[[Any], Any] = partial(
        forward.pmapped if options["mapping"] == "pmap" else forward.mapped, mesh=mesh
    )
    return Resident(load(source, options["dtype"], mesh, options["weights"]), mapping)
