"""Plots for papers, as matplotlib draws them: what the page shows, to be saved as PDF or SVG. Letters: see `config`."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..errors import OptionError
from ..evaluation.summary import Summary
from ..run.profile import Profile
from ..selection.criteria import scores
from ..selection.keep_sets import KeepSets, are_kept
from ..selection.mixes import Mix
from .experts import criteria_of

INCH = 2.54  # cm
WIDTH, ROW, CURVES = 16 / INCH, 0.42 / INCH, 8 / INCH  # of a figure; the height of a layer, and that of curves
# Of Okabe and Ito, as on the page.
BLUE, GREY = "#0072b2", "#888888"


def experts(profile: Profile, criterion: str = "reap", domain: Mix = None, keep_sets: KeepSets | None = None) -> Any:
    """The heat map: each expert's score as a share of the highest of its layer. × no token chose it; with keep-sets
    what they drop is pale."""
    columns = profile.columns(domain)
    score_LE = scores(columns, criterion, 0)
    share_LE = score_LE / np.maximum(score_LE.max(1, keepdims=True), np.finfo(float).tiny)
    L, E = share_LE.shape
    never_LE = columns["count"] == 0
    alpha_LE = np.ones((L, E)) if keep_sets is None else 0.25 + 0.75 * are_kept(keep_sets.layers, E)
    figure, axes = _figure(ROW * L + 3 / INCH)
    shown = np.ma.masked_array(share_LE, never_LE)
    image = axes.imshow(shown, cmap="cividis", vmin=0, vmax=1, aspect="auto", alpha=alpha_LE, interpolation="nearest")
    for layer, expert in np.argwhere(never_LE):
        axes.text(expert, layer, "×", ha="center", va="center", fontsize=6)
    axes.set(xlabel="expert", ylabel="layer")
    figure.colorbar(image, label=f"{criterion}, share of the layer's highest")
    return figure


def concentration(profile: Profile, domain: Mix = None) -> Any:
    """The share of a layer's Σ g·n that its first experts hold, a curve for each layer."""
    mass_LE = -np.sort(-profile.columns(domain)["gate_norm_sum"], axis=1)
    share_LE = np.cumsum(mass_LE, 1) / np.maximum(mass_LE.sum(1, keepdims=True), np.finfo(float).tiny)
    L, E = share_LE.shape
    figure, axes = _figure(CURVES)
    from matplotlib import colormaps

    for layer, share_E in enumerate(share_LE):
        colour = colormaps["cividis"](layer / max(1, L - 1))
        axes.plot(range(E + 1), [0, *share_E], color=colour, linewidth=0.8)
    axes.plot([0, E], [0, 1], color=GREY, linestyle="--", linewidth=0.8)
    axes.set(xlabel="experts, those with most of it first", ylabel="share of Σ g·n", xlim=(0, E), ylim=(0, 1))
    return figure


def mass(profile: Profile, domain: Mix = None, keep_sets: Mapping[str, KeepSets] | None = None) -> Any:
    """The share of Σ g·n that goes against how many experts stay, by criterion, in the mean over layers; dashed what
    experts drawn at random drop, and ◆ keep-sets by their names."""
    mass_LE = profile.columns(domain)["gate_norm_sum"]
    share_LE = mass_LE / np.maximum(mass_LE.sum(1, keepdims=True), np.finfo(float).tiny)
    E = share_LE.shape[1]
    figure, axes = _figure(CURVES)
    for criterion in criteria_of(profile):
        order_LE = np.array(profile.rank(criterion, domain).layers)
        held_LE = np.cumsum(np.take_along_axis(share_LE, order_LE, 1), 1)
        axes.plot(range(E + 1), [1, *1 - held_LE.mean(0)], label=criterion, linewidth=1)
    axes.plot([0, E], [1, 0], color=GREY, linestyle="--", linewidth=0.8, label="random, expected")
    for name, sets in (keep_sets or {}).items():
        gone = 1 - (share_LE * are_kept(sets.layers, E)).sum(1).mean()
        at = float(np.mean([*map(len, sets.layers)]))
        axes.plot([at], [gone], marker="D", color="black", markersize=4)
        axes.annotate(name, (at, gone), xytext=(5, 0), textcoords="offset points", fontsize=7, va="center")
    axes.set(xlabel="experts kept of each layer", ylabel="share of Σ g·n that goes", xlim=(0, E), ylim=(0, 1))
    axes.legend(fontsize=7)
    return figure


def quality(summary: Summary) -> Any:
    """The KL of the baseline from each model against how many experts stay, with its interval, at the first sequence
    length; grey are experts drawn at random."""
    figure, axes = _figure(CURVES)
    for entry in (entry for entry in summary.entries if entry.experts):
        kl = next(iter(entry.quality.values())).estimates["kl"]
        at, colour = float(np.mean(entry.experts)), GREY if entry.is_control else BLUE
        ends = [[kl.value - kl.low], [kl.high - kl.value]]
        axes.errorbar([at], [kl.value], yerr=ends, fmt="o" if entry.passes else "x", color=colour, markersize=4)
        axes.annotate(entry.name, (at, kl.value), xytext=(5, 0), textcoords="offset points", fontsize=7, va="center")
    axes.set(xlabel="experts kept of each layer", ylabel="KL of the baseline, nats a token")
    axes.set_ylim(bottom=0)
    # Older evaluations do not say it of checkpoints.
    if rest := [entry.name for entry in summary.entries if not entry.experts]:
        axes.set_title(f"of an unknown number of experts, not drawn: {', '.join(rest)}", fontsize=7)
    return figure


KINDS: dict[str, tuple[type, Callable[..., Any]]] = {
    "experts": (Profile, experts),
    "concentration": (Profile, concentration),
    "mass": (Profile, mass),
    "quality": (Summary, quality),
}
"""The plots by their names, each with what it is of."""


def _figure(height: float) -> tuple[Any, Any]:
    """A figure of that height in inches, and its axes. OptionError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise OptionError("plots need matplotlib: install gptoss-jax[notebook]") from None
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()
