"""Profile, understand and prune the experts of GPT-OSS in JAX.

    import gptoss_jax as gj

    model = gj.open("nano")
    out = model.forward("What is 12 + 7?")      # logits, hidden states, routing and saliency as arrays

The way through the code, token to saliency to checkpoint: `data` → `network` → `statistics` → `run` → `selection`;
the package `convert` reads and writes checkpoints; `interface` holds what is named here, and `cli` calls it.

Importing this package imports no JAX, so that the command line answers at once.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .interface import fingerprint
    from .interface.checkpoints import convert, prune
    from .interface.choosing import rank, select
    from .interface.healing import heal
    from .interface.jobs import generate, merge, plan, profile
    from .interface.judging import evaluate
    from .interface.model import Model, open
    from .interface.showing import plot, report, show
    from .routing.traces import Trace
    from .run.forward import Forward
    from .run.profile import Profile
    from .selection.keep_sets import KeepSets
    from .selection.ranking import Ranking

# Where each name of the Python interface comes from, or the module that it names; it is imported when it is first used.
PUBLIC = {
    **dict.fromkeys(["generate", "merge", "plan", "profile"], "interface.jobs"),
    **dict.fromkeys(["convert", "prune"], "interface.checkpoints"),
    **dict.fromkeys(["rank", "select"], "interface.choosing"),
    "evaluate": "interface.judging",
    "fingerprint": "interface.fingerprint",
    "heal": "interface.healing",
    "open": "interface.model",
    **dict.fromkeys(["plot", "report", "show"], "interface.showing"),
    "Forward": "run.forward",
    "KeepSets": "selection.keep_sets",
    "Model": "interface.model",
    "Profile": "run.profile",
    "Ranking": "selection.ranking",
    "Trace": "routing.traces",
}
__all__ = [
    "Forward",
    "KeepSets",
    "Model",
    "Profile",
    "Ranking",
    "Trace",
    "convert",
    "evaluate",
    "fingerprint",
    "generate",
    "heal",
    "merge",
    "open",
    "plan",
    "plot",
    "profile",
    "prune",
    "rank",
    "report",
    "select",
    "show",
]


def hindrance() -> str | None:
    """Why nothing of this can run here, and what to do, in one line; None where it can."""
    if sys.platform == "win32":
        return "runs on Linux and macOS, and not on Windows: install it in WSL"
    beside = Path(__file__).resolve().parents[1] / "convert"
    found = find_spec("convert")
    if found is None or found.origin is None:
        return f"the package `convert`, which belongs beside it, is missing at {beside}: install gptoss-jax again"
    if Path(found.origin).resolve().parent != beside:
        return f"{found.origin} hides this program's own package `convert`: rename it, or work in another folder"
    return None


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if why := hindrance():
        raise ImportError(f"gptoss-jax: {why}")
    module = import_module(f".{PUBLIC[name]}", __name__)
    return module if PUBLIC[name].endswith(f".{name}") else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})
