"""How tests compile, and programs that see several devices where there is one CPU."""

import os
from importlib.metadata import version

# Programs run a few times here: compiling them without what makes them fast takes half off the time of modules that
# compile much.
QUICKLY = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# Code of a program in one piece takes an eighth less; both cores are busy anyway. Later XLA gains nothing by that,
# knows one way of emitting fusions, and refuses the flag of the other.
if version("jaxlib").startswith("0.10."):
    QUICKLY += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


def seen(count: int) -> dict[str, str]:
    """The environment's variable by which a program sees so many devices."""
    return {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"}
