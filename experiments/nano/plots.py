"""The curves of a training, and what families ask of experts, as pictures."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from .specialise import Specialisation


def read_log(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def training(log: list[dict[str, Any]], file: Path) -> None:
    """Losses by family, router entropy by layer, and the most and least loaded expert of each layer."""
    from matplotlib.figure import Figure

    steps = [line["step"] for line in log]
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    losses, entropies, loads = figure.subplots(1, 3)
    for family in log[0]["families"]:
        losses.plot(steps, [line["families"][family] for line in log], label=family, linewidth=1)
    losses.set(title="loss of replies, nats a token", xlabel="step", yscale="log")
    losses.legend(fontsize=7)
    for layer, entropy in enumerate(np.array([line["router_entropy"] for line in log]).T):
        entropies.plot(steps, entropy, label=f"layer {layer}", linewidth=1)
    entropies.set(title="router entropy, nats", xlabel="step")
    entropies.legend(fontsize=7)
    load_NLE = np.array([line["load"] for line in log]) * len(log[0]["load"][0])
    for layer in range(load_NLE.shape[1]):
        loads.plot(steps, load_NLE[:, layer].max(-1), color=f"C{layer}", linewidth=1)
        loads.plot(steps, load_NLE[:, layer].min(-1), color=f"C{layer}", linewidth=1, linestyle="--")
    loads.set(title="load over an even share: most (—), least (- -)", xlabel="step")
    figure.savefig(file, dpi=110)


def families(found: Specialisation, file: Path) -> None:
    """Each family's share by expert, a picture for each layer."""
    from matplotlib.figure import Figure

    num_layers = found.shares.shape[1]
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    for layer, axes in enumerate(figure.subplots(2, -(-num_layers // 2), sharex=True, sharey=True).flat):
        image = axes.imshow(found.shares[:, layer], aspect="auto", cmap="viridis", vmin=0, vmax=found.shares.max())
        axes.set(title=f"layer {layer}", yticks=range(len(found.families)), yticklabels=found.families)
    figure.colorbar(image, ax=figure.axes, label="share of a family's pairs")
    figure.supxlabel("expert")
    figure.savefig(file, dpi=110)
