"""The pictures of a profile's report, as SVG. Letters: see `config`."""

from collections.abc import Iterable

import numpy as np

from ..statistics.tables import Columns

HEAT, CURVES = "saliency.svg", "concentration.svg"
PICTURES = {
    HEAT: "saliency of each expert, as a share of the highest of its layer",
    CURVES: "share of a layer's saliency mass that its first experts hold",
}
# Seven colours of cividis (Nuñez, Anderton and Renslow, 2018), which has the same order for the colour-blind.
SCALE = ((0, 32, 77), (38, 61, 109), (87, 92, 109), (124, 123, 120), (166, 156, 117), (211, 193, 100), (255, 234, 70))
NEVER = "#ffffff"  # of experts that no token chose
WIDTH, HEIGHT, LEFT, TOP = 720, 400, 60, 50  # of the plots, and of what is left of and above them


def pictures(columns: Columns) -> dict[str, str]:
    """The pictures by the names of their files; `columns` are those of a saliency table, each [L, E]."""
    return {HEAT: heat_map(columns), CURVES: curves(columns)}


def heat_map(columns: Columns) -> str:
    """A rectangle for each expert of each layer; the lighter, the higher its mean saliency in the layer."""
    count, mass = columns["count"], columns["gate_norm_sum"]
    mean = mass / np.maximum(1, count)
    share = mean / np.maximum(mean.max(1, keepdims=True), np.finfo(float).tiny)
    L, E = count.shape
    width, height = WIDTH / E, HEIGHT / L
    cells = (
        f'<rect x="{LEFT + e * width:.2f}" y="{TOP + i * height:.2f}" width="{width:.2f}" height="{height:.2f}" '
        f'fill="{colour(share[i, e]) if count[i, e] else NEVER}">'
        f"<title>layer {i}, expert {e}: {mean[i, e]:.3g} on {count[i, e]} tokens</title></rect>"
        for i, e in np.ndindex(L, E)
    )
    return _svg(PICTURES[HEAT] + "; white: never chosen", "expert", "layer", (0, E - 1), (0, L - 1), cells)


def curves(columns: Columns) -> str:
    """A line for each layer, the lighter the later: the share of Σg·n that its n experts with the most of it hold."""
    mass = np.sort(columns["gate_norm_sum"], axis=1)[:, ::-1]
    L, E = mass.shape
    share = np.cumsum(mass, 1) / np.maximum(mass.sum(1, keepdims=True), np.finfo(float).tiny)

    def line(points: Iterable[float], stroke: str, title: str) -> str:
        along = " ".join(f"{LEFT + WIDTH * n / E:.1f},{TOP + HEIGHT * (1 - y):.1f}" for n, y in enumerate(points))
        return f'<polyline points="{along}" fill="none" stroke="{stroke}"><title>{title}</title></polyline>'

    even = line(np.arange(E + 1) / E, "#bbbbbb", "all experts alike")
    lines = (line((0.0, *share[i]), colour(0.85 * i / max(1, L - 1)), f"layer {i}") for i in range(L))
    title = PICTURES[CURVES] + "; dark: first layer, light: last"
    return _svg(title, "experts", "share", (0, E), (1, 0), (even, *lines))


def colour(share: float) -> str:
    """The colour of a number from 0 to 1."""
    places = np.linspace(0, 1, len(SCALE))
    return "#" + "".join(f"{round(np.interp(share, places, part)):02x}" for part in zip(*SCALE, strict=True))


def _svg(title: str, x: str, y: str, across: tuple[int, int], down: tuple[int, int], shapes: Iterable[str]) -> str:
    """A plot with its title, and what its axes are and begin and end with."""
    right, bottom = LEFT + WIDTH, TOP + HEIGHT
    words = [
        (LEFT, TOP - 20, "start", title),
        (LEFT, bottom + 20, "start", across[0]),
        (LEFT + WIDTH / 2, bottom + 20, "middle", x),
        (right, bottom + 20, "end", across[1]),
        (LEFT - 10, TOP + 12, "end", down[0]),
        (LEFT - 10, TOP + HEIGHT / 2, "end", y),
        (LEFT - 10, bottom, "end", down[1]),
    ]
    size = f"{right + 20} {bottom + 40}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" font-family="sans-serif" font-size="14">',
            f'<title>{title}</title><rect width="100%" height="100%" fill="#ffffff"/>',
            *shapes,
            f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#444444"/>',
            *(f'<text x="{at}" y="{below}" text-anchor="{anchor}">{text}</text>' for at, below, anchor, text in words),
            "</svg>\n",
        ]
    )
