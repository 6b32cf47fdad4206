"""The training of nano: steps, their log, and states from which a stopped run goes on to the same result."""

import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from flax import nnx

from gptoss_jax.config import Config
from gptoss_jax.errors import ResumeError
from gptoss_jax.network.batch import Batch
from gptoss_jax.network.model import GptOss

from .corpus import Corpus
from .network import Metrics, Recipe, State, first_weights, optimizer, train_step

SETTINGS, LOG, STATES = "settings.json", "log.jsonl", "states"
LOGGED_EVERY = 25  # steps
SAVED_EVERY = 250  # a multiple, so that a resumed training makes the same lines
# XLA's other library for products, which it takes by default, has half the speed for those of experts with gradients.
COMPILER = {"cpu": {"xla_cpu_experimental_ynn_fusion_type": ""}}


def train(folder: Path, corpus: Corpus, config: Config, recipe: Recipe, seed: int) -> GptOss:
    """The trained model; goes on from the last state in `folder`, if there is one.

    ResumeError where that state is of other sizes or another recipe.
    """
    settings = {"config": config.to_json(), "recipe": recipe._asdict(), "seed": seed}
    _check_settings(folder / SETTINGS, json.loads(json.dumps(settings)))
    graph, parameters = nnx.split(first_weights(config, seed))
    state = State(parameters, optimizer(recipe).init(parameters))
    done = max((int(path.name) for path in (folder / STATES).glob("*") if path.name.isdigit()), default=0)
    if done:
        state = ocp.load(folder.absolute() / STATES / str(done), jax.tree.map(_abstract, state))
    log = Log(folder / LOG, corpus.families, done)
    compiled: dict[bool, Any] = {}
    for step, batch in _batches(corpus, done, recipe.steps):
        round_experts = step >= recipe.decay_from
        if round_experts not in compiled:
            lowered = train_step.lower(state, batch, graph, recipe, round_experts)
            compiled[round_experts] = lowered.compile(COMPILER.get(jax.default_backend()))
        state, metrics = compiled[round_experts](state, batch)
        done = step + 1
        log.add(done, metrics, batch.tokens.count)
        if done % SAVED_EVERY == 0 or done == recipe.steps:
            _save(folder / STATES, done, state)
    return nnx.merge(graph, state.parameters)


class Log:
    """Means over some steps, a line each; those behind the state that a training goes on from are written again."""

    def __init__(self, file: Path, families: list[str], done: int):
        self.file, self.families = file, families
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= done]
        file.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self._begin()

    def _begin(self) -> None:
        self.metrics: list[Metrics] = []
        self.tokens, self.started = 0, time.perf_counter()

    def add(self, step: int, metrics: Metrics, tokens: int) -> None:
        """One step's; a line where it is the last of its some."""
        self.metrics.append(metrics)
        self.tokens += tokens
        if step % LOGGED_EVERY:
            return
        mean = jax.tree.map(lambda *steps: np.mean(steps, axis=0).round(4), *self.metrics)
        seconds = time.perf_counter() - self.started
        line = {
            "step": step,
            "loss": float(mean.loss),
            "families": dict(zip(self.families, mean.family_loss_G.tolist(), strict=True)),
            "router_entropy": mean.router_entropy_L.tolist(),
            "load": mean.load_LE.tolist(),
            "tokens": self.tokens,
            "seconds": round(seconds, 1),
        }
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{step} steps: loss {mean.loss:.3f}, {self.tokens / seconds:,.0f} tokens/s", flush=True)
        self._begin()


def _check_settings(file: Path, settings: dict[str, Any]) -> None:
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    differing = sorted(
        f"{part} {key}" if key else part
        for part in settings
        for key in (settings[part] if isinstance(settings[part], dict) else [""])
        if (before[part].get(key) if key else before[part]) != (settings[part][key] if key else settings[part])
    )
    if differing:
        raise ResumeError(f"{file}: of a training with another {', '.join(differing)}: train in another folder")


def _batches(corpus: Corpus, first: int, last: int) -> Iterator[tuple[int, Batch]]:
    """The steps' batches, the next ones made while a step runs."""
    with ThreadPoolExecutor(1) as pool:
        coming = {step: pool.submit(corpus.batch, step) for step in range(first, min(first + 2, last))}
        for step in range(first, last):
            if step + 2 < last:
                coming[step + 2] = pool.submit(corpus.batch, step + 2)
            yield step, coming.pop(step).result()


def _save(states: Path, done: int, state: State) -> None:
    """The state under the step's number, complete or not at all; then those before it go."""
    ocp.save(states.absolute() / str(done), state)
    for path in states.iterdir():
        if path.name.isdigit() and int(path.name) < done:
            shutil.rmtree(path)


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
