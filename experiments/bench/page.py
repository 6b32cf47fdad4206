"""How large a page is, and how soon a browser shows it: profiles of 12 domains at the shapes of gpt-oss-20b and -120b,
with 50 prompts of a trace, all of made-up numbers, which pack worse than real ones.

    python -m experiments.bench.page
"""

import re
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

import gptoss_jax as gj
from convert.sources import NANO, locate
from gptoss_jax.config import PRESETS, Config
from gptoss_jax.routing.tables import About, Routed, tokenizer_hash
from gptoss_jax.routing.traces import Writer
from gptoss_jax.run.profile import Profile
from gptoss_jax.statistics.store import Sums
from gptoss_jax.statistics.sums import DECLARED, GATE_BINS, Statistics

from ..screenshots import browsing, chromium

DOMAINS, FOLDS, PROMPTS, TOKENS = 12, 10, 50, 400


@click.command()
def main() -> None:
    """Print the table."""
    click.echo("| shape | MB | of them arrays | seconds to write | seconds to open |")
    click.echo("|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("gpt-oss-20b", "gpt-oss-120b"):
            config, at = PRESETS[name], Path(folder) / name
            at.mkdir()
            trace(config, at / "trace")
            start = time.perf_counter()
            file = Path(str(gj.report(profile(config), at / "trace", model=NANO, out=at / "page.html")))
            took, text = time.perf_counter() - start, file.read_text(encoding="utf-8")
            arrays = re.search(r'id="arrays">([^<]*)<', text)
            assert arrays is not None
            sizes = f"{len(text.encode()) / 1e6:.2f} | {len(arrays[1]) / 1e6:.2f}"
            click.echo(f"| {config.num_layers} × {config.num_experts} | {sizes} | {took:.1f} | {opened(file):.2f} |")


def profile(config: Config) -> Profile:
    """One that nothing was counted for."""
    rng, L, E = np.random.default_rng(0), config.num_layers, config.num_experts
    sizes = {"L": L, "G": DOMAINS * FOLDS, "J": 1, "E": E, "k": config.top_k, "b": GATE_BINS}
    shapes = {name: (L, *(sizes[x] for x in of.axes.split())) for name, of in DECLARED.items()}
    drawn: dict[str, Any] = {
        name: rng.integers(1, 9999, shape) if DECLARED[name].integer else rng.exponential(size=shape)
        for name, shape in shapes.items()
        if not DECLARED[name].asked
    }
    drawn["tokens"] = np.full((L, DOMAINS * FOLDS), 9999)
    sums = Sums(Statistics(**drawn), {}, [f"domain {n}" for n in range(DOMAINS)], np.arange(9, dtype=np.uint64), FOLDS)
    info = {"num_layers": L, "num_experts": E, "top_k": config.top_k, "model": "made up", "model_fingerprint": "0" * 64}
    return Profile(
        info | {"rows": 9, "kept_tokens": 9, "options": {"keep": "all"}, "warnings": [], "command": "none"}, sums
    )


def trace(config: Config, folder: Path) -> None:
    """Prompts whose tokens chose experts at random."""
    rng, folder_of = np.random.default_rng(0), Path(str(locate(NANO)))
    about = About(config.num_layers, config.top_k, config.num_experts, "0" * 64, tokenizer_hash(folder_of))
    folder.mkdir()
    writer = Writer(folder, about)
    for number in range(PROMPTS):
        shape = (TOKENS, config.num_layers)
        experts = rng.random((*shape, config.num_experts)).argsort(-1)[..., : config.top_k]
        gates = -np.sort(-rng.dirichlet(np.ones(config.top_k), shape))
        ids, positions = rng.integers(0, 400, TOKENS), np.arange(TOKENS)
        ints, segments = (ids.astype(np.int32), positions.astype(np.int32)), rng.integers(0, 4, TOKENS).astype(np.uint8)
        writer.add(
            Routed(str(number), *ints, segments, positions > 99, experts.astype(about.expert_type), np.float16(gates))
        )
    writer.finish({"model": "made up"})


def opened(file: Path) -> float:
    """Seconds until both plots of the overview are there; NaN where there is no browser."""
    if chromium() is None:
        return float("nan")
    with browsing() as browser:
        window = browser.new_page()
        start = time.perf_counter()
        window.goto(f"file://{file}")
        window.wait_for_selector("#concentration svg")
        return time.perf_counter() - start


if __name__ == "__main__":
    main()
