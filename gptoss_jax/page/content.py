"""All that a page says, as its programs read it."""

from contextlib import suppress
from typing import Any

from ..errors import ProfileError
from ..evaluation import stored
from ..selection.budgets import weight_bytes
from ..selection.evidence import stored_model
from .answers import replies_of, traces_of
from .artifacts import Things
from .experts import keep_sets_of, profile_of, ranking_of, words
from .fingerprints import fingerprint_of
from .packing import Packed
from .traced import traced_of


def content(things: Things, tokenizer: Any, packed: Packed, title: str, command: str, version: str) -> dict[str, Any]:
    """The page's JSON; its arrays are in `packed`. A `tokenizer` is needed where there are traces."""
    sizes = things.sizes
    profiles = [profile_of(name, profile, packed) for name, profile in things.profiles.items()]
    profiles += [fingerprint_of(name, given, packed) for name, given in things.fingerprints.items()]
    models = dict.fromkeys(profile["model"] for profile in profiles)
    profiles += [traced_of(name, trace, packed) for name, trace in things.traces.items()]
    evaluations = [
        {
            "name": name,
            **stored.to_dict(summary),
            "length": next(iter(summary.setting.blocks)),
            "replies": replies_of(things.folders.get(name)),
        }
        for name, summary in things.evaluations.items()
    ]
    return {
        "title": title or ", ".join(models),
        "command": command,
        "version": version,
        "sizes": {"layers": sizes.num_layers, "experts": sizes.num_experts, "top_k": sizes.top_k, **_bytes(things)},
        "profiles": profiles,
        "keep_sets": [keep_sets_of(name, sets, sizes.num_experts, packed) for name, sets in things.keep_sets.items()],
        "rankings": [ranking_of(name, ranking, packed) for name, ranking in things.rankings.items()],
        "evaluations": evaluations,
        "healings": [{"name": name, **healing} for name, healing in things.healings.items()],
        **(traces_of(things.traces, tokenizer, packed) if things.traces else {}),
        "warnings": _warnings(things, profiles),
        **words(),
    }


def _bytes(things: Things) -> dict[str, list[int]]:
    """Those of a checkpoint in which 0, 1, … E experts of each layer stay; nothing where no profile knows its model's
    sizes."""
    for profile in things.profiles.values():
        with suppress(ProfileError):
            config, quantized = stored_model(profile.info)
            return {"bytes": [weight_bytes(config, kept, quantized) for kept in range(config.num_experts + 1)]}
    return {}


def _warnings(things: Things, profiles: list[dict[str, Any]]) -> list[str]:
    """What a reader should know before they compare: what profiles warned of, and what is of another model."""
    found = [f"{one['name']}: {line}" for one in profiles for line in one["warnings"]]
    first, *others = profiles
    prints = {one["name"]: one["fingerprint"] or None for one in others}
    prints |= {name: one.origin.model_fingerprint for name, one in (things.keep_sets | things.rankings).items()}
    prints |= {name: summary.setting.model_fingerprint for name, summary in things.evaluations.items()}
    if not (own := first["fingerprint"]):
        return found  # a dataset that was imported does not say of which model it is
    return found + [
        f"{name} is of another model than {first['name']}, or of what keep-sets leave of it"
        for name, print_ in prints.items()
        if print_ not in (None, own)
    ]
