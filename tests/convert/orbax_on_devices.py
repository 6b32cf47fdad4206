"""Orbax checkpoints on eight devices, in one process or several: a program that `tests.convert.test_orbax` runs.

    python -m tests.convert.orbax_on_devices CHECKPOINT OUT [COORDINATOR NUM_PROCESSES PROCESS_ID]

Saves CHECKPOINT, which is in MXFP4, from one mesh, restores it onto others, and prints its fingerprint.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from convert import orbax
from convert.hf import Checkpoint
from gptoss_jax.devices import mesh
from gptoss_jax.network.source import Weights

SAVED_FROM = (2, 4)
MESHES = ((4, 2), (1, 8))
# Splits that no rule asks for: kernels over inputs or outputs, layers over devices.
ODD = {
    "layers/moe/experts/gate_up_kernel": P(None, None, None, "expert", "data"),
    "layers/moe/experts/down_kernel": P("data", "expert", None, None),
    "layers/attention/q_kernel": P(None, "expert", None, "data"),
    "embedding": P(None, ("data", "expert")),
}


def assert_same(ours: Weights, theirs: Weights, what: str) -> None:
    """The parts that this process' devices hold, bit for bit."""
    assert ours.keys() == theirs.keys()
    for path, array in theirs.items():
        assert (ours[path].sharding, ours[path].dtype) == (array.sharding, array.dtype), (what, path)
        for mine, other in zip(ours[path].addressable_shards, array.addressable_shards, strict=True):
            assert mine.index == other.index, (what, path)
            assert np.asarray(mine.data).tobytes() == np.asarray(other.data).tobytes(), (what, path)


def main(checkpoint: str, out: str, *processes: str) -> None:
    if processes:
        jax.distributed.initialize(processes[0], int(processes[1]), int(processes[2]))
    assert jax.device_count() == 8
    source = Checkpoint(Path(checkpoint))
    config = source.config
    devices = mesh.make(config, *SAVED_FROM)
    orbax.write(source, Path(out), orbax.plan(config, devices, "mxfp4"))
    multihost_utils.sync_global_devices("written")
    restored = orbax.OrbaxCheckpoint(Path(out))
    for sizes in MESHES if not processes else MESHES[-1:]:
        wanted = {form: orbax.plan(config, mesh.make(config, *sizes), form) for form in ("mxfp4", "bf16")}
        kernels = {path: leaf for path, leaf in wanted["bf16"].items() if path not in wanted["mxfp4"]}
        assert len(kernels) == 2
        assert_same(restored.load(wanted["mxfp4"]), source.load(wanted["mxfp4"]), f"{sizes}")
        assert_same(restored.load(kernels), source.load(kernels), f"{sizes}")
    for path, spec in ODD.items() if not processes else ():
        shape = orbax.plan(config, devices, "bf16")[path].shape
        odd, whole = (
            {path: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(devices, s))} for s in (spec, P())
        )
        # The other reader knows only the splits that the rules ask for.
        expected = jax.device_put(source.load(whole)[path], odd[path].sharding)
        assert_same(restored.load(odd), {path: expected}, f"{spec}")
    print(restored.fingerprint())


if __name__ == "__main__":
    main(*sys.argv[1:])
