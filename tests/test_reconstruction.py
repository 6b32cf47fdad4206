"""Layers brought near the whole model's, against loops over tokens and against models that really run."""

import json
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx

from convert.changed import Changed
from convert.hf import Checkpoint
from convert.mxfp4 import BF16
from gptoss_jax.config import TINY
from gptoss_jax.devices.placement import here
from gptoss_jax.errors import StatisticsError
from gptoss_jax.healing import layerwise, reconstruction
from gptoss_jax.healing.layerwise import Grams, loss
from gptoss_jax.healing.reconstruction import DOWN_BIAS, ROUTER_KERNEL, Pass, Sweeps, reconstruct
from gptoss_jax.healing.steps import where
from gptoss_jax.healing.trained import LAYERS, read
from gptoss_jax.network.batch import Batch, Tokens
from gptoss_jax.network.model import GptOss, Layer
from gptoss_jax.network.source import ROUTER_BIAS, Masked, Source, load, load_part
from gptoss_jax.run.progress import Progress

from .bad_input import Program, Refused, case
from .test_heal import KEPT as HEALED_SETS
from .test_heal import Killed, healed, kept, line, made, rows  # noqa: F401  (fixtures are used by name)
from .test_healing import KEPT, batches
from .test_swap import outputs_by_hand, softmax

BOTH = ("routers", "biases")
L, E, D, K = TINY.num_layers, TINY.num_experts, TINY.hidden_size, TINY.top_k
PATHS = {"routers": (LAYERS + ROUTER_KERNEL, LAYERS + ROUTER_BIAS), "biases": (LAYERS + DOWN_BIAS,)}


Streams = list[list[np.ndarray]]
"""The residual stream before the first layer and behind each, of each batch."""


class Swept(NamedTuple):
    """What a pass found, and what it was given and made on its way."""

    found: dict[str, np.ndarray]
    calls: list[Any]
    """Of each layer, what was fitted by, and what that gave."""
    behind: list[Any]
    """The pruned stream behind the last layer, of each batch."""


def values(source: Source) -> dict[str, Any]:
    return read(source, "router", None, BOTH)


@cache
def swept(folder: Path, what: str) -> Swept:
    """A pass in float32."""
    source = Checkpoint(folder)
    name = {"routers": "fitted_router", "biases": "shifts"}[what]
    real, through = getattr(layerwise, name), Sweeps._through
    calls, streams = list[Any](), list[Any]()

    def recorded(*arguments: Any) -> Any:
        calls.append((arguments, result := real(*arguments)))
        return result

    def passed(*arguments: Any, **options: Any) -> Any:
        streams.append(through(*arguments, **options))
        return streams[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconstruction, name, recorded)
        patch.setattr(Sweeps, "_through", passed)
        found = Sweeps(source, "float32", batches(), KEPT).run(what, values(source))
    return Swept(found, calls, streams[-1])


@jax.jit
def _streams(model: GptOss, tokens: Tokens) -> tuple[Any, Any]:
    layers = model(tokens, here(), lambda output: output.hidden).layers
    return model.embed(tokens.ids, here()), layers


def hidden(source: Source) -> Streams:
    """Where the model of all layers runs at once."""
    model = load(source, "float32")
    with jax.default_matmul_precision("highest"):
        found = [jax.device_get(_streams(model, batch.tokens)) for batch in batches()]
    return [[first, *layers] for first, layers in found]


@cache
def whole(folder: Path) -> Streams:
    return hidden(Checkpoint(folder))


def pruned(folder: Path, values: dict[str, Any]) -> Streams:
    return hidden(Masked(Changed(Checkpoint(folder), values), KEPT))  # type: ignore[arg-type]


def weights(batch: Any, whole_BSD: np.ndarray) -> np.ndarray:
    """What each token counts."""
    return np.asarray(batch.weights, np.float64) / (whole_BSD.astype(np.float64) ** 2).sum(-1)


class Token(NamedTuple):
    """A token in a layer, in float64."""

    logits_E: np.ndarray
    outputs_ED: np.ndarray
    target_D: np.ndarray
    weight: float


@jax.jit
def _behind_attention(layer: Layer, x_BSD: jax.Array, batch: Batch, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    at = where(batch, index, TINY)
    x_BSD = x_BSD + layer.attend(x_BSD, *at[:3], here())[0]
    return x_BSD, layer.moe_norm(x_BSD)


def tokens_of(folder: Path, index: int, streams: Streams) -> list[Token]:
    """All tokens in the layer of that index with the source's own values, behind these of the layers before it."""
    layer = load_part(Checkpoint(folder), lambda: Layer(TINY, rngs=nnx.Rngs(0)), "float32", f"layers/{index}/")
    kernel_ED, bias_E = (np.asarray(x[...], np.float64) for x in (layer.moe.router.kernel, layer.moe.router.bias))
    found = []
    for batch, of_whole, of_batch in zip(batches(), whole(folder), streams, strict=True):
        with jax.default_matmul_precision("highest"):
            x_BSD, normed_BSD = _behind_attention(layer, of_batch[index], batch, index)
        normed_TD = np.asarray(normed_BSD, np.float64).reshape(-1, D)
        target_TD = (of_whole[index + 1].astype(np.float64) - np.asarray(x_BSD, np.float64)).reshape(-1, D)
        logits_TE, outputs_TED = normed_TD @ kernel_ED.T + bias_E, outputs_by_hand(layer.moe.experts, normed_TD)
        of_tokens = logits_TE, outputs_TED, target_TD, weights(batch, of_whole[index + 1]).reshape(-1)
        found += [Token(*of_one) for of_one in zip(*of_tokens, strict=True)]
    return found


def distance(folder: Path, index: int, streams: Streams) -> float:
    """The squared distance of streams from the whole model's behind a layer, of all tokens."""
    total = 0.0
    for batch, of_whole, of_batch in zip(batches(), whole(folder), streams, strict=True):
        change_BSD = of_whole[index + 1].astype(np.float64) - of_batch[index + 1]
        total += (weights(batch, of_whole[index + 1]) * (change_BSD**2).sum(-1)).sum()
    return total


# A pass over all layers.


@pytest.mark.slow
def test_biases_are_those_of_a_loop_over_tokens(tiny_mxfp4: Path) -> None:
    first, pass_ = values(Checkpoint(tiny_mxfp4)), swept(tiny_mxfp4, "biases")
    streams = pruned(tiny_mxfp4, first | pass_.found)
    for index, of_layer in enumerate(KEPT):
        gates_NN, rests_ND = np.zeros((len(of_layer), len(of_layer))), np.zeros((len(of_layer), D))
        for token in tokens_of(tiny_mxfp4, index, streams):
            best = sorted(range(len(of_layer)), key=lambda n: -token.logits_E[of_layer[n]])[:K]
            gates_N = np.zeros(len(of_layer))
            gates_N[best] = softmax(token.logits_E[np.array(of_layer)[best]])
            rest_D = token.target_D - gates_N @ token.outputs_ED[of_layer]
            gates_NN += token.weight * np.outer(gates_N, gates_N)
            rests_ND += token.weight * np.outer(gates_N, rest_D)
        ridge = 0.01 * np.trace(gates_NN) / len(of_layer) * np.eye(len(of_layer))
        expected = np.linalg.inv(gates_NN + ridge) @ rests_ND
        ours = pass_.calls[index][1]
        assert np.abs(ours - expected).max() < 1e-4 * np.abs(expected).max()
        before, after = (np.asarray(of[LAYERS + DOWN_BIAS])[index] for of in (first, pass_.found))
        np.testing.assert_array_equal(after[of_layer], (before[of_layer] + ours).astype(BF16).astype(np.float32))
        np.testing.assert_array_equal(np.delete(after, of_layer, 0), np.delete(before, of_layer, 0))


def test_a_routers_loss_is_the_squared_distance_of_streams_that_really_ran(tiny_mxfp4: Path) -> None:
    """Before and after, and of all that Adam passes none is taken that is worse."""
    first, pass_ = values(Checkpoint(tiny_mxfp4)), swept(tiny_mxfp4, "routers")
    streams = pruned(tiny_mxfp4, first | pass_.found)
    improved = 0
    for index, ((start, grams, top_k), (best, losses)) in enumerate(pass_.calls):
        tokens = tokens_of(tiny_mxfp4, index, streams)
        size = sum(token.weight * (token.target_D**2).sum() for token in tokens)
        # Of this layer's values alone it is asked what the old ones would do.
        old = {path: np.array(x) for path, x in pass_.found.items()}
        for path in old:
            old[path][index] = np.asarray(first[path])[index]
        for taken, ran in ((start, pruned(tiny_mxfp4, first | old)), (best, streams)):
            assert float(loss(taken, grams, top_k)) == pytest.approx(distance(tiny_mxfp4, index, ran) / size, rel=1e-5)
        assert float(loss(best, grams, top_k)) == pytest.approx(float(losses.min()), rel=1e-6)
        assert losses.min() <= losses[0] == pytest.approx(float(loss(start, grams, top_k)), rel=1e-6)
        improved += int(losses.min() < losses[0])
    assert improved == L
    for path, x in pass_.found.items():
        dropped = np.array([~np.isin(np.arange(E), of_layer) for of_layer in KEPT])
        np.testing.assert_array_equal(x[dropped], np.asarray(first[path])[dropped])
        np.testing.assert_array_equal(x, x.astype(BF16).astype(np.float32))


@pytest.mark.parametrize("what", BOTH)
def test_what_goes_from_layer_to_layer_is_the_pruned_model_with_its_new_values(what: str, tiny_mxfp4: Path) -> None:
    first, pass_ = values(Checkpoint(tiny_mxfp4)), swept(tiny_mxfp4, what)
    assert {*pass_.found} == {*PATHS[what]}
    for ours, theirs, batch in zip(pass_.behind, pruned(tiny_mxfp4, first | pass_.found), batches(), strict=True):
        is_token = np.asarray(batch.tokens.segments) > 0
        np.testing.assert_allclose(np.asarray(ours)[is_token], theirs[-1][is_token], rtol=1e-4, atol=1e-5)


def test_a_router_that_cannot_become_better_stays() -> None:
    """At a rate with which all that follows is worse."""
    rng = np.random.default_rng(0)
    outputs_TVD = rng.normal(size=(50, 4, D)).astype(np.float32)
    normed_TD = rng.normal(size=(50, D)).astype(np.float32)
    start = {"kernel": rng.normal(size=(3, D)), "bias": rng.normal(size=3)}
    start = {name: x.astype(BF16).astype(np.float32) for name, x in start.items()}
    logits = normed_TD @ start["kernel"].T + start["bias"]
    gates = np.exp(logits - logits.max(1, keepdims=True))
    outputs_TVD[:, 3] = np.einsum("TN,TND->TD", gates / gates.sum(1, keepdims=True), outputs_TVD[:, :3])
    first, second = np.triu_indices(4)
    products = np.einsum("TPD,TPD->TP", outputs_TVD[:, first], outputs_TVD[:, second])
    grams = Grams(normed_TD, products, np.ones(50, np.float32))
    best, losses = layerwise.fitted_router(start, grams, 3, rate=1000.0)
    assert losses[0] == losses.min() < 1e-5
    for name, x in best.items():
        np.testing.assert_array_equal(x, start[name])


# What passes are worth.


class Found:
    """Sweeps that give made-up values, and count."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def run(self, what: str, values: dict[str, Any]) -> dict[str, np.ndarray]:
        self.ran.append(what)
        return {path: np.asarray(values[path]) + np.float32(1) for path in PATHS[what]}


@pytest.mark.parametrize("worse", BOTH)
def test_a_pass_that_does_not_lower_the_divergence_is_left_out(worse: str, tiny_mxfp4: Path, tmp_path: Path) -> None:
    first, progress, sweeps = values(Checkpoint(tiny_mxfp4)), Progress(tmp_path / "out"), Found()

    def held(now: dict[str, Any]) -> float:
        moved = {what for what in BOTH if (now[PATHS[what][0]] != first[PATHS[what][0]]).any()}
        return 1.0 + sum(0.25 if what == worse else -0.25 for what in moved)

    for _ in range(2):  # the second time from what is kept
        found, passes = reconstruct(sweeps, BOTH, first, held, progress)  # type: ignore[arg-type]
        assert {what for what in BOTH if (found[PATHS[what][0]] != first[PATHS[what][0]]).any()} == {*BOTH} - {worse}
        after = {"routers": 1.25 if worse == "routers" else 0.75}
        assert passes[0] == Pass("routers", 1.0, after["routers"])
        assert passes[1] == Pass("biases", passes[0].least, passes[0].least + (0.25 if worse == "biases" else -0.25))
        assert [one.is_kept for one in passes] == [what != worse for what in BOTH]
    assert sweeps.ran == [*BOTH]


@pytest.mark.parametrize("where", ["routers", "biases", "held"])
def test_what_is_not_finite_is_one_line(where: str, tiny_mxfp4: Path, tmp_path: Path) -> None:
    source = Checkpoint(tiny_mxfp4)
    first = values(source)
    if where == "held":
        with pytest.raises(StatisticsError, match="--reconstruct routers: the loss is not finite"):
            reconstruct(Found(), BOTH, first, lambda _: np.nan, Progress(tmp_path / "out"))  # type: ignore[arg-type]
        return
    broken = Changed(source, {"layers/moe_norm/scale": np.full((L, D), np.nan)})
    with pytest.raises(StatisticsError, match=f"--reconstruct {where}: layer 0: the loss is not finite"):
        Sweeps(broken, "float32", batches(), KEPT).run(where, first)  # type: ignore[arg-type]


# The command.


def recorded(patch: pytest.MonkeyPatch) -> list[Any]:
    """What reconstruction gives to the training."""
    from gptoss_jax.healing import job

    seen = list[Any]()

    def run(*arguments: Any) -> Any:
        seen.append(reconstruct(*arguments))
        return seen[-1]

    patch.setattr(job, "reconstruct", run)
    return seen


@pytest.mark.slow
def test_without_steps_what_was_reconstructed_is_written(
    tiny_mxfp4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = recorded(monkeypatch)
    out = tmp_path / "out"
    found = healed(tiny_mxfp4, out, steps=0, reconstruct=BOTH, tokens="all", engine="streamed").healing
    (given, passes), said = seen[0], json.loads((out / "heal.json").read_text(encoding="utf-8"))
    assert found.is_kept and not found.curve.losses and said["options"]["--reconstruct"] == [*BOTH]
    assert [one["what"] for one in said["reconstruction"]] == [*BOTH]
    assert said["reconstruction"][0]["before"] == pytest.approx(found.overall.pruned.value, rel=1e-6)
    assert passes[-1].least == pytest.approx(found.overall.healed.value, rel=1e-6)
    assert passes[-1].least < passes[0].before
    for path, x in given.items():
        np.testing.assert_array_equal(found.values[path], x)
    ours = Checkpoint(out)
    for index, of_layer in enumerate(HEALED_SETS):
        for name, path in (("router.weight", PATHS["routers"][0]), ("experts.down_proj_bias", PATHS["biases"][0])):
            written = ours.tensors[f"model.layers.{index}.mlp.{name}"].read().astype(np.float32)
            np.testing.assert_array_equal(written, np.asarray(given[path])[index][of_layer])
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "the routers' rows and biases were fitted" in card and "the last biases of the experts were fitted" in card
    assert "were trained to expect" not in card
    assert ("so it was left out" in card) == (not all(one.is_kept for one in passes))


@pytest.mark.slow
def test_training_leaves_biases_as_they_were_reconstructed(
    tiny_mxfp4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = recorded(monkeypatch)
    found = healed(tiny_mxfp4, tmp_path / "out", steps=10, rate=0.01, reconstruct=("biases",), tokens="all").healing
    ((given, passes),) = seen
    assert passes[0].is_kept and found.is_kept and found.curve.best > 0
    assert found.curve.held[0] == passes[0].after
    biases, router = PATHS["biases"][0], PATHS["routers"][0]
    np.testing.assert_array_equal(found.values[biases], given[biases])
    assert (found.values[router] != np.asarray(given[router])).any()


@pytest.mark.newest
@pytest.mark.slow
def test_from_between_two_passes(
    program: Program,
    tiny_mxfp4: Path,
    rows: Path,  # noqa: F811
    kept: Path,  # noqa: F811
) -> None:
    more = ("--reconstruct", "biases", "--reconstruct", "routers", "--tokens", "all", "--engine", "streamed")
    argv = line(tiny_mxfp4, rows, *more, "--steps", 0)
    assert program(*argv, "--out", "whole")[0] == 0
    expected, real, ran = made(Path("whole")), Sweeps.run, list[str]()

    def run(self: Sweeps, what: str, values: Any) -> Any:
        ran.append(what)
        if ran == [*BOTH]:
            raise Killed
        return real(self, what, values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sweeps, "run", run)
        with suppress(Killed):
            program(*argv)
        assert ran == [*BOTH] and not Path("out").exists()
        assert program(*argv, "--resume")[0] == 0
    assert ran == ["routers", "biases", "biases"]
    assert made(Path("out")) == expected
    assert not Path("out.progress").exists()


BAD = [
    case("nothing to train", ["--steps", 0], "nothing is to be trained", "--reconstruct"),
    case("something else", ["--reconstruct", "experts"], "--reconstruct is", "one of routers, biases"),
    case(
        "little memory",
        ["--reconstruct", "routers", "--memory-gib", 1.0005, "--engine", "streamed"],
        "two layers, the unembedding and reconstruction need",
    ),
]


@pytest.mark.parametrize(("more", "says"), BAD)
def test_bad_input(
    more: list[Any],
    says: tuple[str, ...],
    refused: Refused,
    tiny_mxfp4: Path,
    rows: Path,  # noqa: F811
    kept: Path,  # noqa: F811
) -> None:
    refused(*line(tiny_mxfp4, rows, *more), says=says)


def test_another_reconstruction_is_not_gone_on_with(
    program: Program,
    refused: Refused,
    tiny_mxfp4: Path,
    rows: Path,  # noqa: F811
    kept: Path,  # noqa: F811
) -> None:
    with pytest.MonkeyPatch.context() as patch, suppress(Killed):
        patch.setattr(Sweeps, "run", _killed_in("biases", Sweeps.run))
        program(*line(tiny_mxfp4, rows, "--reconstruct", "routers", "--reconstruct", "biases"))
    refused(*line(tiny_mxfp4, rows, "--reconstruct", "routers", "--resume"), says=("--reconstruct", "routers"))


def _killed_in(what: str, real: Any) -> Any:
    def run(self: Sweeps, of: str, values: Any) -> Any:
        if of == what:
            raise Killed
        return real(self, of, values)

    return run
