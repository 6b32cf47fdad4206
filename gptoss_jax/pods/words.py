"""What `plan` says to a reader."""

from typing import Any

from ..devices import mesh as sharding
from ..errors import MeshError
from ..reports.rates import rate
from .plan import GIB, Compiled, Largest


def table(said: dict[str, Any], tokens: int) -> str:
    """The figures for a reader."""
    compiled, active = (said[f"{kind}_matmul_flops"] / 1e12 for kind in ("compiled", "active"))
    mesh = said["mesh"]
    or_more = " or more" if said["largest_batch"] == max(said["batches_compiled"]) else ""
    lines = [
        ("slice", f"{said['topology']}, {said['chips']} chips, data={mesh['data']} × expert={mesh['expert']}"),
        (
            "step",
            f"{said['batch']} × {said['seq_len']} = {said['tokens_per_step']:,} tokens, {said['weights']} experts",
        ),
        ("weights a chip", f"{said['weight_bytes_per_chip'] / GIB:.2f} GiB"),
        ("temporaries a chip", f"{said['temp_bytes_per_chip'] / GIB:.2f} GiB"),
        ("results a chip", f"{said['output_bytes_per_chip'] / GIB:.4f} GiB"),
        (
            "together",
            f"{said['needed_bytes_per_chip'] / GIB:.2f} of {said['memory_bytes_per_chip'] / GIB:.2f} GiB",
        ),
        ("largest batch", f"{said['largest_batch']} rows of {said['seq_len']}{or_more}"),
        ("  as found", said["largest_batch_found"]),
        (
            "matrix FLOPs a step",
            f"{compiled:.1f} T compiled, {active:.1f} T active: {compiled / active:.3f}",
        ),
        (
            "exchanged a chip",
            f"{said['collective_bytes_per_layer'] / 1e6:.1f} MB a layer, "
            f"{said['collective_bytes_per_step'] / 1e9:.2f} GB a step",
        ),
        ("compiled in", f"{said['compile_seconds']:.0f} s"),
        ("at most, by roofline", f"{rate(said['estimated_tokens_per_s'], ',')} tokens/s"),
        (f"{tokens:,} tokens", f"{tokens / said['estimated_tokens_per_s'] / 3600:.2f} hours at that rate, at least"),
    ]
    width = max(len(name) for name, _ in lines)
    assumed = [f"  - {assumption}" for assumption in said["assumptions"]]
    return "\n".join([*(f"{name:<{width}}  {value}" for name, value in lines), "The rate assumes:", *assumed])


def refusal(compiled: Compiled, largest: Largest) -> MeshError:
    """Why a step does not fit, by how much, and what would."""
    case = compiled.case
    over = compiled.needed_bytes - compiled.memory_bytes
    fits = "fits" if largest.compiled else "should fit, which is extrapolated and not compiled"
    would = [f"--batch-size {largest.batch} {fits}"] if largest.batch else []
    if case.weights == "bf16":
        would.append("--weights mxfp4 holds experts in a quarter")
    chips = case.data * case.expert
    wider = [size for size in sharding.expert_sizes(case.config) if size > case.expert and chips % size == 0]
    if wider:
        would.append(f"--mesh data={chips // wider[0]},expert={wider[0]} holds fewer of them on each chip")
    if not largest.batch:
        would.append("a slice with more chips holds more")
    return MeshError(
        f"a step of {case.batch} × {case.seq_len} tokens needs {compiled.needed_bytes / GIB:.2f} GiB of "
        f"{compiled.memory_bytes / GIB:.2f} on each chip of {case.topology}, {over / GIB:.2f} too much: "
        f"{'; '.join(would)}"
    )
