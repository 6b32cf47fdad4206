"""All that a page says, as its programs read it."""

from typing import Any

from ..evaluation import stored
from .answers import replies_of, traces_of
from .artifacts import Things
from .experts import criteria_of, keep_sets_of, profile_of, words
from .packing import Packed


def content(things: Things, tokenizer: Any, packed: Packed, title: str, command: str, version: str) -> dict[str, Any]:
    """The page's JSON; its arrays are in `packed`. A `tokenizer` is needed where there are traces."""
    sizes, criteria = things.sizes, criteria_of(things.profiles)
    models = dict.fromkeys(profile.info["model"] for profile in things.profiles.values())
    evaluations = [
        {"name": name, **stored.to_dict(summary), "replies": replies_of(things.folders[name])}
        for name, summary in things.evaluations.items()
    ]
    return {
        "title": title or ", ".join(models),
        "command": command,
        "version": version,
        "sizes": {"layers": sizes.num_layers, "experts": sizes.num_experts, "top_k": sizes.top_k},
        "profiles": [profile_of(name, profile, criteria, packed) for name, profile in things.profiles.items()],
        "keep_sets": [keep_sets_of(name, sets, sizes.num_experts, packed) for name, sets in things.keep_sets.items()],
        "evaluations": evaluations,
        **(traces_of(things.traces, tokenizer, packed) if things.traces else {}),
        "warnings": _warnings(things),
        **words(criteria),
    }


def _warnings(things: Things) -> list[str]:
    """What a reader should know before they compare: what profiles warned of, and what is of another model."""
    found = [f"{name}: {line}" for name, profile in things.profiles.items() for line in profile.info["warnings"]]
    (first, profile), *others = things.profiles.items()
    prints = {name: other.info["model_fingerprint"] for name, other in others}
    prints |= {name: sets.origin.model_fingerprint for name, sets in things.keep_sets.items()}
    prints |= {name: summary.setting.model_fingerprint for name, summary in things.evaluations.items()}
    prints |= {name: trace.about.model_fingerprint for name, trace in things.traces.items()}
    own = profile.info["model_fingerprint"]
    return found + [
        f"{name} is of another model than {first}, or of what keep-sets leave of it"
        for name, print_ in prints.items()
        if print_ not in (None, own)
    ]
