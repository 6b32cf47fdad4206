"""What a page has of a healing: heal.json, which stands in the folder of a checkpoint that `heal` wrote."""

import json
from typing import Any

from ..errors import InputError, reason, refusal
from ..files.paths import AnyPath, storage_errors
from ..run.distilling import HEAL
from .packing import known

NUMBERS = ("value", "low", "high")


def read(path: AnyPath) -> dict[str, Any]:
    """What the page shows of the heal.json of a folder, or of that file. InputError where it is none."""
    file = path / HEAL if path.is_dir() else path
    said = json_of(file, "heal again")
    try:
        domains = {name: of for name, of in said["domains"].items() if name} or {"": said["overall"]}
        return {
            "is_kept": bool(said["is_kept"]),
            "command": str(said["command"]),
            "rows": int(said["learnt_rows"]),
            "steps": [int(step) for step in said["curve"]["steps"]],
            "held": known(float(kl) for kl in said["curve"]["held"]),
            "changes": [{"name": name, **_change(of)} for name, of in domains.items()],
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{file}: is no {HEAL} that `gptoss-jax heal` writes ({reason(error)}): heal again") from None


def json_of(file: AnyPath, remedy: str) -> Any:
    """What a JSON file holds; InputError, which ends with what to do, where it cannot be read or is none."""
    try:
        with storage_errors(file):
            return json.loads(file.read_bytes().decode("utf-8"))
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({refusal(error)})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not a JSON file ({reason(error)}): {remedy}") from None


def _change(of: dict[str, Any]) -> dict[str, Any]:
    """Of a single row no interval is known, whose ends are then null."""
    sides = ("pruned", "healed", "difference")
    return {"rows": int(of["rows"]), **{side: known(float(of[side][name]) for name in NUMBERS) for side in sides}}
