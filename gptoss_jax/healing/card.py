"""What a model card says of a healing."""

from ..evaluation.intervals import LEVEL
from ..run.distilling import NANO_WIDTH
from ..selection.origin import quoted
from .deciding import Change
from .job import Healing
from .reconstruction import Pass

TRAINED = {
    "router": "rows and biases of the routers",
    "small": "rows and biases of the routers, norms, attention's biases and sinks, and experts' biases",
}

RECONSTRUCTED = {
    "routers": "Layer by layer, the routers' rows and biases were fitted to what the whole model has behind the layer",
    "biases": "Layer by layer, the last biases of the experts were fitted to what the whole model has behind the layer",
}


def section(healing: Healing) -> str:
    """The section "Healing", in Markdown: what was trained, and what that changed on rows that were not learnt."""
    how = healing.request.distilling
    parts = [*map(_reconstructed, healing.passes), *([_trained(healing)] if how.steps else [])]
    learnt = f"All of it on {healing.tokens:,} tokens ({how.tokens}) of {healing.rows:,} rows."
    lines = [" ".join([*parts, learnt, "No other weight was changed."])]
    if not healing.is_kept:
        lines.append(
            "It was not worth it: the interval of what changed on the rows that were held out does not exclude zero. "
            "**The weights are those of the pruned model.**"
        )
    lines += [
        "",
        f"KL of the whole model from this one on rows that were held out, in nats a token; in parentheses {LEVEL:.0%} "
        "intervals, paired and clustered by row. The state was chosen on the rows of what was healed for: there the "
        "figures are slightly too good.",
        "",
        "| rows | held out | pruned | healed | difference |",
        "|---|---:|---:|---:|---|",
        _row("healed for" + _names(healing.healed_for), healing.overall),
        *(_row(quoted(name), of) for name, of in healing.domains.items() if name not in healing.healed_for),
    ]
    return "\n".join(["## Healing", "", *lines])


def _reconstructed(one: Pass) -> str:
    """What a pass was and was worth, in sentences."""
    of_rows = f"on rows that were held out the KL was {one.before:.4g} before it and {one.after:.4g} behind it"
    return f"{RECONSTRUCTED[one.what]}: {of_rows}{'' if one.is_kept else ', so it was left out'}."


def _trained(healing: Healing) -> str:
    how, curve = healing.request.distilling, healing.curve
    done = f"{len(curve.losses)} of {how.steps} steps" if len(curve.losses) < how.steps else f"{how.steps} steps"
    return (
        f"The {TRAINED[how.train]} of the kept experts were trained to expect what the whole model expects: {done} of "
        f"Adam, whose rate falls from {how.first_rate:g} as a cosine, that of rows of routers times {NANO_WIDTH} over "
        f"the model's width. Of the states looked at, that after {curve.steps[curve.best]} steps did best on rows that "
        "were held out."
    )


def _names(domains: tuple[str, ...]) -> str:
    return f": {', '.join(map(quoted, domains))}" if any(domains) else ""


def _row(name: str, of: Change) -> str:
    cells = f"{of.pruned.value:.4g} | {of.healed.value:.4g}"
    by = of.difference
    difference = f"{by.value:+.4g} ({by.low:+.4g} to {by.high:+.4g})" if of.rows > 1 else "one row alone"
    return f"| {name} | {of.rows:,} | {cells} | {difference} |"
