"""What eight devices give: a program of its own, since pytest's process has one device and keeps it.

    python -m tests.on_eight_devices golden      # writes tests/golden/shardings.txt anew

`tests.test_mesh` runs it with a folder for the results, two checkpoints and rows, and asserts on what it wrote.
"""

import io
import json
import os
import re
import sys
from contextlib import redirect_stderr
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from convert import cut
from convert.hf import Checkpoint
from convert.shards import Stored
from gptoss_jax import cli
from gptoss_jax.config import GPT_OSS_20B, GPT_OSS_120B, TINY, Config
from gptoss_jax.data import batching
from gptoss_jax.data.batching import Document
from gptoss_jax.data.groups import Groups
from gptoss_jax.devices import hosts, mesh
from gptoss_jax.devices.placement import Placement, over
from gptoss_jax.evaluation import passes
from gptoss_jax.evaluation.blocks import Blocks
from gptoss_jax.evaluation.compare import Other, Top
from gptoss_jax.generation import resident
from gptoss_jax.generation.continuous import Growing, generate, prompts_of
from gptoss_jax.generation.steps import How
from gptoss_jax.healing import resident as healing
from gptoss_jax.healing import trained
from gptoss_jax.healing.loss import Finals
from gptoss_jax.network import experts, model
from gptoss_jax.network.batch import Batch
from gptoss_jax.network.source import Masked, abstract, load
from gptoss_jax.run import steps as forward
from gptoss_jax.run.options import Sampling
from gptoss_jax.run.progress import Progress
from gptoss_jax.run.resident import Resident
from gptoss_jax.run.steps import Asked, Mapped, Results
from gptoss_jax.statistics.sums import DECLARED

from .devices import seen

# As TINY, but eight devices can share experts and heads; only H is a multiple of another size.
EIGHT = replace(TINY, num_heads=48, num_kv_heads=16, num_experts=24)
MESHES = {"8x1": (8, 1), "4x2": (4, 2), "2x4": (2, 4), "1x8": (1, 8)}
HEALED = ("2x4",)  # over which models are distilled
SPLITS = ("8x1", "2x4", "1x8")  # of rows, of both, of experts: over these models are compared
SPOKEN = ("2x4",)  # over which they generate
SCORED = Asked(scores=True, routing=True, swap=True, grams=True)
ON_ONE_DEVICE = (0, 1, 2)  # experts of the first of eight
# Eight experts of each layer, which four devices can share too when they alone are left.
KEPT = [sorted(np.random.default_rng(i).permutation(EIGHT.num_experts)[:8].tolist()) for i in range(EIGHT.num_layers)]
LENGTHS = (3, 9, 17, 25, 33, 41, 50, 64)
GOLDEN = Path(__file__).parent / "golden" / "shardings.txt"
# What moves arrays between devices, other than sums.
MOVES = re.compile(r" (all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter)(-start)?\(")

# Options of `profile` that the program refuses on eight devices, for TINY, and what its line says.
REFUSED = {
    "more places than devices": (["--mesh", "data=4,expert=4"], ["16 places", "8 devices"]),
    "fewer places than devices": (["--mesh", "data=2,expert=1"], ["2 places", "8 devices"]),
    "experts that do not divide": (["--mesh", "data=4,expert=2"], ["expert=2", "7 experts", "expert may be 1"]),
    "rows that do not divide": (["--mesh", "data=8,expert=1", "--batch-size", "12"], ["12", "data=8", "multiple of 8"]),
    "rows that do not divide, by pmap": (["--map", "pmap", "--batch-size", "12"], ["12", "data=8"]),
    "experts split by pmap": (["--map", "pmap", "--mesh", "data=4,expert=2"], ["--map pmap", "expert=2", "--map mesh"]),
    "pmap over some devices": (["--map", "pmap", "--mesh", "data=4,expert=1"], ["4 places", "8 devices"]),
}


def batch() -> Batch:
    """Eight rows of different lengths, of two folds of two domains, of whose tokens about two thirds are kept."""
    rng = np.random.default_rng(0)
    documents = [
        Document(rng.integers(0, EIGHT.vocab_size, n).astype(np.int32), np.float32(rng.random(n) < 0.7), row % 4)
        for row, n in enumerate(LENGTHS)
    ]
    groups = Groups(["a", "b"], folds=2)
    padded = next(batching.padded(documents, len(LENGTHS), max(LENGTHS), len(groups)))
    return replace(padded, joint=groups.joint)


def run(mapped: Mapped, network: model.GptOss) -> Results:
    return mapped.step(network, jax.tree.map(mapped.put, batch()))


def compiled(mapped: Mapped, network: model.GptOss) -> tuple[Results, list[str]]:
    """What the step gives, and what of its program moves arrays between devices."""
    rows = jax.tree.map(mapped.put, batch())
    program = mapped.step.lower(network, rows).compile()
    return program(network, rows), [line.strip() for line in program.as_text().splitlines() if MOVES.search(line)]


def logits(devices: Any, network: model.GptOss) -> jax.Array:
    """Of all tokens, [B, S, V], computed on all devices."""
    place, rows = over(devices), mesh.rows(devices)
    whole = jax.shard_map(
        lambda m, b: place.gather_experts(m.logits(m(b.tokens, place, lambda layer: None).final)),
        mesh=devices,
        in_specs=(mesh.specs(network), rows.spec),
        out_specs=PartitionSpec(mesh.DATA, None, None),
        check_vma=False,
    )
    return jax.jit(whole)(network, jax.tree.map(lambda x: jax.device_put(x, rows), batch()))


def measure_masked(checkpoint: Checkpoint, pruned: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a masked model gives on two meshes, and what the pruned one that is written to `pruned` does on one."""
    pruned.mkdir()
    cut.write(checkpoint, KEPT, pruned, cut.plan(checkpoint, KEPT, checkpoint.quantized), checkpoint.quantized, 10**9)
    results, facts = {}, {}
    runs = [("2x4", "masked", Masked(checkpoint, KEPT)), ("1x8", "masked", Masked(checkpoint, KEPT))]
    for name, what, source in [*runs, ("2x4", "pruned", Checkpoint(pruned))]:
        devices = mesh.make(source.config, *MESHES[name])
        network = load(source, "float32", devices)
        results[f"{what} {name}"] = {"logits": logits(devices, network)}
        facts[f"{what} {name}"] = {path: shards(x) for path, x in named(network)}
    return results, facts


def measure(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results by name of the run, and facts about the arrays and programs behind them."""
    results: dict[str, Any] = {}
    facts: dict[str, Any] = {"bytes_read": {}, "shards": {}, "specs": {}, "moves": {}}

    def network(name: str, weights: str = "bf16") -> tuple[Any, model.GptOss]:
        devices, before = mesh.make(EIGHT, *MESHES[name]), sum(bytes_read)
        split = load(checkpoint, "float32", devices, weights)
        facts["bytes_read"][f"{name} {weights}"] = sum(bytes_read) - before
        return devices, split

    bytes_read = record_reads()
    one = load(checkpoint, "float32")
    results["one"] = jax.jit(lambda m, b: forward.network_step(m, b, Placement("cpu"), SCORED))(one, batch())
    for name in MESHES:
        devices, split = network(name)
        results[name], facts["moves"][f"scored {name}"] = compiled(forward.mapped(SCORED, devices), split)
        facts["shards"][name] = {path: shards(x) for path, x in named(split)}
        facts["specs"][name] = {path: list(x.sharding.spec) for path, x in named(results[name])}
    devices, whole = network("8x1")
    results["pmap"] = run(forward.pmapped(SCORED, devices), whole)
    devices, four_bits = network("2x4", "mxfp4")
    results["2x4 mxfp4"] = run(forward.mapped(SCORED, devices), four_bits)
    facts["shards"]["2x4 mxfp4"] = {path: shards(x) for path, x in named(four_bits)}

    devices, split = network("1x8")
    plain = forward.mapped(Asked(), devices)
    results["1x8 without scores"], facts["moves"]["1x8"] = compiled(plain, split)
    crowded = load(Masked(checkpoint, [ON_ONE_DEVICE] * EIGHT.num_layers), "float32", devices)
    results["crowded"] = run(plain, crowded)
    drop_pairs()
    forward.mapped.cache_clear()  # it holds the step that drops none
    results["dropped"] = run(forward.mapped(Asked(), devices), crowded)
    return results, facts


def evaluated(checkpoint: Checkpoint, sizes: tuple[int, int], folder: Path) -> dict[str, Any]:
    """What `eval` measures on a mesh: two variants beside the first, beside another model, beside its top tokens."""
    rng, kept = np.random.default_rng(4), np.ones((2, EIGHT.num_layers, EIGHT.num_experts), bool)
    rows = [(rng.integers(0, EIGHT.vocab_size, n).astype(np.int32), rng.random(n) < 0.7) for n in LENGTHS]
    blocks = Blocks([Document(ids, np.float32(weights)) for ids, weights in rows], 24, eos=1)
    for layer, experts_ in enumerate(KEPT):
        kept[1, layer] = np.isin(np.arange(EIGHT.num_experts), experts_)
    devices = mesh.make(EIGHT, *sizes, jax.devices()[: sizes[0] * sizes[1]])
    engine = Resident(load(checkpoint, "float32", devices), partial(forward.mapped, mesh=devices))
    place = passes.Place(devices, hosts.share(devices), 8, "float32", Progress(folder))
    plain, both = passes.Variants(checkpoint), passes.Variants(checkpoint, kept)

    def run(name: str, variants: passes.Variants, **more: Any) -> dict[str, np.ndarray]:
        return passes.run(name, engine, variants, blocks, place, **more)[0]

    base, head = run("base", plain, keep=(passes.FINALS,)), passes.unembedding(checkpoint, devices, "float32")
    top = run("top", plain, keep=(passes.TOP,))
    found = {
        "model": run("model", both),
        "other": run("other", both, baseline=lambda n: Other(base[passes.FINALS][n], head)),
        "of top": run("of top", both, baseline=lambda n: passes.top_of(top, n)),
    }
    real = blocks.scored.real
    return {kind: {name: np.moveaxis(x, 1, -1)[real] for name, x in arrays.items()} for kind, arrays in found.items()}


def generated(checkpoint: Checkpoint, sizes: tuple[int, int], form: str = "bf16") -> dict[str, np.ndarray]:
    """What rows on a mesh say and choose, each with experts of its own; some prompts wait for others to end."""
    rng = np.random.default_rng(6)
    ids = [rng.integers(0, EIGHT.vocab_size, n).astype(np.int32) for n in (*LENGTHS, 150, 12)]
    masks = [np.isin(np.arange(EIGHT.num_experts), kept) for kept in KEPT], np.ones((EIGHT.num_layers, 24), bool)
    asked = [p._replace(kept_LE=np.array(masks[p.number % 2])) for p in prompts_of(ids, EIGHT, 18)]
    how = How(EIGHT, Sampling(temperature=0.0), (), routing=True, masked=True)
    devices = mesh.make(EIGHT, *sizes, jax.devices()[: sizes[0] * sizes[1]])
    network = resident.load(checkpoint, "float32", devices, form)
    decoder = resident.Resident(network, how, devices, batch_size=8, capacity=256)
    found: dict[int, Growing] = {}
    for grown in generate(decoder, asked):
        found |= {growing.prompt.number: growing for growing in grown if growing.done}
    replies = [found[n] for n in range(len(asked))]
    chosen = [reply.chosen for reply in replies]
    return {
        "tokens": np.array([reply.token_ids for reply in replies]),
        "experts": np.concatenate([c.experts for c in chosen]),
        "gates": np.concatenate([c.gates for c in chosen]),
    }


def healed(checkpoint: Checkpoint, sizes: tuple[int, int], kind: Any) -> dict[str, Any]:
    """The loss of distillation by rows, and its gradients by all that is small; rows may not choose all experts."""
    devices = mesh.make(EIGHT, *sizes, jax.devices()[: sizes[0] * sizes[1]])
    engine = healing.Resident(load(checkpoint, "float32", devices), devices, kind)
    kept = np.array([np.isin(np.arange(EIGHT.num_experts), experts_) for experts_ in KEPT])
    batches = [replace(batch(), kept=np.tile(kept, (len(LENGTHS), 1, 1)))]
    given = trained.read(checkpoint, "small", devices)
    # Small random weights expect next to nothing.
    given["final_norm/scale"] *= 16
    teachers = engine.teach(batches)
    found = engine.gradients(given, batches, teachers)
    by_row = engine.losses(given, batches, teachers)
    return {
        "gradients": found.gradients,
        "loss": {"kl": by_row.kl, "weight": by_row.weight, "sum": np.array(found.loss)},
    }


def record_reads() -> list[int]:
    """A list that grows by the bytes of each read of a checkpoint."""
    reads, fill = [], Stored._fill

    def recording(stored: Stored, array: np.ndarray, starts: Any) -> None:
        reads.append(array.nbytes)
        fill(stored, array, starts)

    Stored._fill = recording
    return reads


def drop_pairs() -> None:
    """From here on a device computes one block of each expert, what an even split over its experts fills."""
    sort = experts._sort

    def capped(*args: Any) -> Any:
        pairs = sort(*args)
        return pairs._replace(tiles_E=jax.numpy.minimum(pairs.tiles_E, 1))

    experts._sort = capped


def named(tree: Any) -> list[tuple[str, Any]]:
    return list(mesh.by_path(tree).items())


def shards(array: jax.Array) -> dict[str, Any]:
    parts = [shard.data for shard in array.addressable_shards]
    return {"whole": array.shape, "parts": [p.shape for p in parts], "nbytes": [p.nbytes for p in parts]}


def refusal(folder: Path, *argv: str) -> dict[str, Any]:
    """What the program answers to a command line that it is called with in an empty folder."""
    folder.mkdir()
    os.chdir(folder)
    sys.argv, status = ["gptoss-jax", *argv], 0
    with redirect_stderr(io.StringIO()) as error:
        try:
            cli.main()
        except SystemExit as stop:
            status = stop.code
    return {"status": status, "error": error.getvalue(), "written": os.listdir(folder)}


def shardings() -> str:
    """How the published models are split over data=2, expert=4: one array a line, its shape whole and on a device."""
    lines = []
    for name, config in {"gpt-oss-20b": GPT_OSS_20B, "gpt-oss-120b": GPT_OSS_120B}.items():
        devices = mesh.make(config, 2, 4)
        for weights in ("bf16", "mxfp4"):
            network = abstract(config, devices, form=weights)
            lines += [f"{name}, {weights}", *map(sharding_line, named(network)), ""]
        lines += [f"{name}, statistics by their axes", *statistics_lines(config, devices), ""]
    return "\n".join(lines)


def statistics_lines(config: Config, devices: Any) -> list[str]:
    """A line for each combination of axes and type: all statistics that share these are split alike."""
    arrays = vars(abstract_statistics(config, devices).statistics)
    return sorted({sharding_line((f"L {DECLARED[name].axes}", x)) for name, x in arrays.items() if x is not None})


def abstract_statistics(config: Config, devices: Any) -> Results:
    def step(network: model.GptOss, rows: Batch) -> Results:
        return forward.network_step(network, rows, Placement("cpu"), Asked())

    shapes = jax.eval_shape(step, abstract(config, devices), batch())
    return mesh.sharded(shapes, devices, forward.specs(Asked()))


def sharding_line(entry: tuple[str, Any]) -> str:
    path, x = entry
    split = ",".join(axis or "-" for axis in x.sharding.spec)
    return f"{path} {x.dtype} {list(x.shape)} ({split}) → {list(x.sharding.shard_shape(x.shape))}"


def main(*argv: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    # Read when JAX first asks for devices.
    os.environ.update(seen(8))
    if argv == ("golden",):
        GOLDEN.write_text(shardings(), encoding="utf-8")
        return
    out, checkpoint, tiny, rows = map(Path, argv)
    masked, shards_of_masked = measure_masked(Checkpoint(checkpoint), out / "pruned")
    # Before `measure`, which ends with experts that drop pairs.
    runs = {"one": (1, 1), **MESHES}
    compared = {f"evaluated {n}": evaluated(Checkpoint(checkpoint), runs[n], out / n) for n in ("one", *SPLITS)}
    for name in ("one", *SPOKEN):
        compared[f"generated {name}"] = {"said": generated(Checkpoint(checkpoint), runs[name])}
    compared["generated 2x4 mxfp4"] = {"said": generated(Checkpoint(checkpoint), MESHES["2x4"], "mxfp4")}
    for name in ("one", *HEALED):
        for kind in (Finals, Top):
            compared[f"healed {name} {kind.__name__}"] = healed(Checkpoint(checkpoint), runs[name], kind)
    results, facts = measure(Checkpoint(checkpoint))
    results |= compared
    results |= masked
    facts["shards"] |= shards_of_masked
    arrays = {f"{name}/{path}": x for name, result in results.items() for path, x in named(result)}
    np.savez(out / "results.npz", **arrays)
    facts["shardings"] = shardings()
    facts["refused"] = {
        name: refusal(out / name, "profile", str(tiny), "--data", str(rows), *options)
        for name, (options, _) in REFUSED.items()
    }
    (out / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
