"""Orbax checkpoints: the model's arrays, saved from one mesh and restored onto any other.

The folder is that of a Hugging Face checkpoint, with the arrays in the place of shards:

    config.json, tokenizer.json, …   as in the source
    orbax/                           a tree of arrays, the parameters of `gptoss_jax.network.model.GptOss`
    orbax.index.json                 the size of each file below orbax/
"""

import gc
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from threading import Thread
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import tensorstore
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.config import Config, Form
from gptoss_jax.devices import mesh as sharding
from gptoss_jax.errors import CheckpointError, reason
from gptoss_jax.files.paths import AnyPath, is_local
from gptoss_jax.kernels.mxfp4 import dequantise
from gptoss_jax.network.source import Source, Weights, abstract, split_path

from . import published
from .folder import copy_others, pruned_config, read_config, write_config
from .shards import ORBAX, Rows, sound

INDEX = "orbax.index.json"
UNUSABLE = "no usable index", "copy the folder again"
PACKED = "layers/moe/experts/gate_up_packed"
SAVED_AT_ONCE = 1 << 30  # bytes; each save takes a while by itself
CHUNK_BYTES = 64 << 20  # of arrays outside layers
CACHE_BYTES = 256 << 20  # of chunks that were read: rows of the router and of biases are asked for one by one


class OrbaxCheckpoint:
    """Reads arrays on demand; implements `tensors.AnyCheckpoint`."""

    four_bits: Form = "mxfp4"

    def __init__(self, folder: AnyPath):
        if not is_local(folder):
            raise CheckpointError(
                f"{folder}: Orbax checkpoints are read from this machine's file systems: copy it there"
            )
        self.folder = folder
        self.config_json, self.config = read_config(folder)
        _check_files(folder)
        self._root = folder.absolute() / ORBAX  # Orbax takes no relative paths
        with _damage(folder):
            (manifest,) = self._root.glob("*/manifest.ocdbt")
            self._arrays = _open(manifest.parent)
        self.quantized = PACKED in self._arrays
        self._check()

    @cached_property
    def tensors(self) -> Mapping[str, Rows]:
        """The tensors of the Hugging Face form, rearranged from parts of the arrays."""
        return published.tensors(self)

    def load(self, wanted: Weights) -> Weights:
        """The arrays as wanted, on whatever mesh; each process reads the chunks that hold its devices' parts."""
        # The largest first: Orbax holds the parts of the one that it restores twice.
        order = sorted(wanted, key=lambda path: wanted[path].size, reverse=True)
        return {path: self._placed(path, wanted[path]) for path in order}

    def read(self, path: str, index: tuple[Any, ...]) -> np.ndarray:
        """A part of one array as it is stored."""
        with _damage(self.folder):
            return self._arrays[path][index].read().result()

    def rows(self, path: str, ids: np.ndarray) -> np.ndarray:
        """Rows of a parameter outside the layers; each is read once."""
        distinct, places = np.unique(ids, return_inverse=True)
        return self.read(path, (distinct,))[places]

    def fingerprint(self) -> str:
        """SHA-256 over config, array table and the first values of each array in each layer.

        Of values, not of files: Orbax names files by chance and writes the time into them, and other meshes
        make other chunks, so that every save of one model would have another fingerprint.
        """
        digest = hashlib.sha256(json.dumps(self.config_json, sort_keys=True).encode())
        for path, array in sorted(self._arrays.items()):
            every = (slice(None),) if path.startswith("layers/") else ()
            head = self.read(path, every + (0,) * (array.ndim - len(every) - 1))
            digest.update(f"\n{path} {array.dtype.name} {array.shape}\n".encode() + head.tobytes())
        return digest.hexdigest()

    def _placed(self, path: str, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        layer, inner = split_path(path)
        if layer.isdigit():
            # Outside a mesh: one layer of the stack, on one device.
            array = jax.device_put(self._layer(f"layers/{inner}", int(layer), wanted), wanted.sharding)
        elif path in self._arrays:
            array = self._restored(path, wanted)
        elif self.quantized:
            array = self._dequantised(path, wanted)
        else:
            raise CheckpointError(f"{self.folder}: its experts are BF16: --weights mxfp4 needs a checkpoint in MXFP4")
        if array.dtype != jnp.uint8 and not _all_finite(array):
            raise CheckpointError(f"{self.folder}: {path} holds NaN or infinity: convert the model again")
        return array

    def _layer(self, path: str, layer: int, wanted: jax.ShapeDtypeStruct) -> Any:
        if path in self._arrays or not self.quantized:
            return self.read(path, (layer,)).astype(wanted.dtype)
        name = path.removesuffix("_kernel")
        packed, scales = (self.read(f"{name}_{part}", (slice(layer, layer + 1),)) for part in ("packed", "scales"))
        return _kernels(jnp.asarray(packed), jnp.asarray(scales), wanted.shape[1:-1], wanted.dtype)[0]

    def _restored(self, path: str, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        options = ocp.options.PyTreeOptions(loading=ocp.options.PyTreeOptions.Loading(partial_load=True))
        with _damage(self.folder), ocp.Context(pytree_options=options):
            loaded = ocp.load(self._root, unflatten_dict({path: wanted}, sep="/"))
        (array,) = jax.tree.leaves(jax.block_until_ready(loaded))
        _let_go()
        return array

    def _dequantised(self, path: str, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        """A kernel [L, E, …, I] as floats, from codes and scales [L, E, I / 2 or 32, O]."""
        name, split = path.removesuffix("_kernel"), _of_experts(wanted.sharding)
        parts = (f"{name}_{part}" for part in ("packed", "scales"))
        stored = [
            self._restored(part, jax.ShapeDtypeStruct(self._arrays[part].shape, jnp.uint8, sharding=split))
            for part in parts
        ]
        kernels = partial(_kernels, outputs=wanted.shape[2:-1], dtype=wanted.dtype)
        return jax.jit(kernels, out_shardings=wanted.sharding)(*stored)

    def _check(self) -> None:
        one = sharding.make(self.config, 1, 1, jax.devices()[:1])
        expected = plan(self.config, one, "mxfp4" if self.quantized else "bf16")
        other = "config.json and weights are of different models"
        for path, leaf in expected.items():
            if (found := self._arrays.get(path)) is None:
                raise CheckpointError(f"{self.folder / ORBAX}: {path} is missing: {other}")
            if (found.shape, found.dtype.name) != (leaf.shape, leaf.dtype.name):
                raise CheckpointError(
                    f"{self.folder / ORBAX}: {path} is {found.dtype.name} {list(found.shape)}, "
                    f"expected {leaf.dtype} {list(leaf.shape)}: {other}"
                )
        for path in sorted(self._arrays.keys() - expected.keys()):
            raise CheckpointError(f"{self.folder / ORBAX}: {path} is no parameter of this GPT-OSS model: {other}")


def plan(config: Config, mesh: Mesh, form: Form) -> dict[str, jax.ShapeDtypeStruct]:
    """All parameters by their paths, split over `mesh`, experts in the form `weights`, "bf16" or "mxfp4"."""
    return sharding.by_path(abstract(config, mesh, jnp.bfloat16, form))


def nbytes(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes of an array to be."""
    return leaf.size * leaf.dtype.itemsize


def write(
    source: Source,
    folder: Path,
    wanted: dict[str, jax.ShapeDtypeStruct],
    progress: Callable[[int], Any] = lambda nbytes: None,
) -> list[str]:
    """Write into `folder` the checkpoint that `plan` laid out, with its config and other files.

    A group of parameters after the other is loaded and saved: the largest must fit in memory a few times, the
    model need not. All processes of the mesh call this; the folder is complete when it has returned on all of
    them. OSError where it cannot be written. Returns, on process 0, the names of files that were left out.
    """
    root = folder.absolute() / ORBAX
    # In a thread, which is waited for when a signal ends this one: Orbax has more of them, that would go on
    # writing while the folder is being removed.
    with _system_errors(), ThreadPoolExecutor(1) as thread:
        thread.submit(root.parent.exists).result()  # a signal while its thread starts would leave that unwaited for
        for group in _groups(wanted):
            arrays = source.load(group)
            thread.submit(_save, root, unflatten_dict(arrays, sep="/")).result()
            del arrays
            _let_go()
            progress(sum(map(nbytes, group.values())))
        thread.submit(ocp.partial.finalize, root).result()
    if jax.process_index():
        return []
    files = {p: p.stat().st_size for p in (folder / ORBAX).rglob("*") if p.is_file()}
    sizes = {p.relative_to(folder).as_posix(): size for p, size in sorted(files.items())}
    (folder / INDEX).write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
    write_config(folder, pruned_config(source.config_json, source.config.num_experts, PACKED in wanted))
    return copy_others(source.folder, folder)


def _groups(wanted: dict[str, jax.ShapeDtypeStruct]) -> Iterator[dict[str, jax.ShapeDtypeStruct]]:
    """Parameters of up to SAVED_AT_ONCE bytes, or a larger one alone."""
    group: dict[str, jax.ShapeDtypeStruct] = {}
    for path, leaf in wanted.items():
        if group and sum(map(nbytes, [*group.values(), leaf])) > SAVED_AT_ONCE:
            yield group
            group = {}
        group[path] = leaf
    yield group


def _save(root: Path, tree: Any) -> None:
    options = ocp.options.ArrayOptions.Saving(
        scoped_storage_options_creator=_chunks,
        # Codes of MXFP4 do not compress. Of BF16 a fifth would go, for twice the work at each restore.
        use_compression=False,
    )
    with ocp.Context(array_options=ocp.options.ArrayOptions(saving=options)):
        ocp.partial.save(root, tree)


def _open(folder: Path) -> dict[str, tensorstore.TensorStore]:
    """Every array by its path, for a part of it: Orbax, which restores whole ones, wrote Zarr arrays in OCDBT."""
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}
    keys = tensorstore.KvStore.open(store, context=context).result().list().result()
    names = [key.decode().removesuffix("/zarr.json") for key in keys if key.endswith(b"/zarr.json")]
    specs = {name: {"driver": "zarr3", "kvstore": {**store, "path": f"{name}/"}} for name in names}
    arrays = {name: tensorstore.open(spec, context=context, read=True).result() for name, spec in specs.items()}
    return {name.replace(".", "/"): array for name, array in arrays.items()}


def _let_go() -> None:
    """Free what JAX copied from: it does so in a callback of Python's collector, as late as that comes by."""
    # In a thread: an interrupt that falls into the callback is lost.
    collection = Thread(target=gc.collect, args=(0,))
    collection.start()
    collection.join()


def _chunks(path: Any, array: Any) -> Any:
    """What is read at once: of layers no more than one, of experts' kernels no more than one expert's."""
    name = sharding.path_of(path)
    storage = ocp.options.ArrayOptions.Saving.StorageOptions
    if not name.startswith("layers/"):
        return storage(chunk_byte_size=CHUNK_BYTES)
    return storage(shard_axes=(0, 1) if "experts/" in name and not name.endswith("_bias") else (0,))


def _of_experts(kernels: Any) -> Any:
    """The sharding of codes [L, E, …] for that of their kernels, which have another number of axes.

    Layers and experts lie alike in both; along inputs, codes have no order that could be split as theirs.
    """
    if len(kernels.device_set) == 1:
        return SingleDeviceSharding(*kernels.device_set)
    return NamedSharding(kernels.mesh, P(*kernels.spec[:2]))


def _kernels(packed: jax.Array, scales: jax.Array, outputs: tuple[int, ...], dtype: Any) -> jax.Array:
    def one_layer(parts: tuple[jax.Array, jax.Array]) -> jax.Array:
        values = dequantise(*parts, dtype)
        return jnp.moveaxis(values.reshape(*values.shape[:2], *outputs), 1, -1)

    # A layer at a time: unpacking has temporaries of several times its result.
    return jax.lax.map(one_layer, (packed, scales))


@jax.jit
def _all_finite(array: jax.Array) -> jax.Array:
    # The largest magnitude is NaN where any value is; a mask of all values would be an array of its own.
    return jnp.isfinite(jnp.abs(array).max())


def _check_files(folder: Path) -> None:
    """CheckpointError where a file is missing or of another size: Orbax would say so late, or not at all."""
    for name, size in read_index(folder / INDEX).items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file}: {INDEX} names this file, but it is missing: copy the folder again")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file}: {file.stat().st_size} bytes, {INDEX} says {size}: copy it again")


def read_index(file: Path) -> dict[str, int]:
    """The size of each file below orbax/ by its path in the checkpoint; CheckpointError where it is no such table."""
    with sound(str(file), *UNUSABLE):
        return parse_index(file.read_bytes(), str(file))


def parse_index(data: bytes, where: str = INDEX) -> dict[str, int]:
    """The same from the file's bytes."""
    with sound(where, *UNUSABLE):
        sizes: dict[str, int] = json.loads(data)
        for name, size in sizes.items():
            if not name.startswith(f"{ORBAX}/") or ".." in name.split("/") or not name.isprintable():
                raise ValueError(f"{name!r} is no file below {ORBAX}/")
            if type(size) is not int or size < 0:
                raise ValueError(f"{name} has {size!r} bytes")
        return sizes


@contextmanager
def _damage(folder: Path) -> Iterator[None]:
    """CheckpointError for whatever Orbax and TensorStore raise: it means that files are damaged."""
    try:
        with _quiet():
            yield
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # of many classes, down to Exception itself
        where, what = folder / ORBAX, reason(error)[:200]
        raise CheckpointError(f"{where}: cannot be read ({what}): convert the model again") from error


@contextmanager
def _system_errors() -> Iterator[None]:
    """OSError where the system refused to write: Orbax has the error's number in a text."""
    try:
        with _quiet():
            yield
    except ValueError as error:
        number = re.search(r"os_error_code='(\d+)'", str(error))
        if not number:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Orbax logs each error with tracebacks of its threads; the exception says it once."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)
