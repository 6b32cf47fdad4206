"""`eval` against transformers: perplexity, divergence, agreement; soft prunes, checkpoints, stored baselines, kills.

Letters: see `gptoss_jax.config`.
"""

import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import gptoss_jax as gj
from convert.sources import open_source
from gptoss_jax.config import TINY
from gptoss_jax.data import tokens
from gptoss_jax.data.groups import Groups
from gptoss_jax.data.rows import Row
from gptoss_jax.devices.placement import here
from gptoss_jax.errors import BaselineError, ResumeError
from gptoss_jax.evaluation import job
from gptoss_jax.evaluation.blocks import Blocks
from gptoss_jax.evaluation.compare import Top, compare
from gptoss_jax.evaluation.measure import Measured
from gptoss_jax.evaluation.sides import Request
from gptoss_jax.run import engine
from gptoss_jax.run.judging import judged
from gptoss_jax.selection.keep_sets import KeepSets

from . import oracle
from .conftest import conversation

pytestmark = pytest.mark.slow

L, E = TINY.num_layers, TINY.num_experts
RNG = np.random.default_rng(5)
FOUR = KeepSets([sorted(RNG.permutation(E)[:4].tolist()) for _ in range(L)])
FEW = KeepSets([sorted(RNG.permutation(E)[:5].tolist()) for _ in range(L)])
ALL = KeepSets([[*range(E)]] * L)
ROWS = [{"id": f"r{i}", "domain": "ab"[i % 2], "text": conversation(i), "answer": f"It is {2 * i}."} for i in range(5)]
LENGTH = 96  # of blocks: every document is cut by one
ENGINES = pytest.mark.parametrize("name", ["resident", "streamed"])


@pytest.fixture(scope="module")
def pruned(tiny_mxfp4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that FOUR leaves, with the tokenizer of the model."""
    return gj.prune(str(tiny_mxfp4), FOUR, "four", out=tmp_path_factory.mktemp("pruned") / "four").folder  # type: ignore[return-value]


@pytest.fixture(scope="module")
def measured(tiny_mxfp4: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Measured, Any]]:
    """Arrays of passes, kept by what was asked."""
    found: dict[str, Any] = {}

    def run(keep_sets: dict[str, KeepSets], model: Path = tiny_mxfp4, baseline: Any = None, **options: Any) -> Any:
        key = repr((sorted(keep_sets), model, baseline, sorted(options.items())))
        if key not in found:
            folder = tmp_path_factory.mktemp("passes")
            options = {"seq_len": (LENGTH,), "dtype": "float32", **options}
            request = Request(str(model), keep_sets, *judged(data=ROWS, **options), baseline)
            sides = job.sides(request, open_source)
            rows = job.material(request, sides)
            kept = job.Progress(folder / "out")
            kept.begin({}, False)
            found[key] = job.measure(sides, rows.blocks, request.placing, kept), sides, rows
        return found[key]

    return run


def log_p(logits: np.ndarray) -> np.ndarray:
    """The logarithm of the softmax, in float64."""
    wide = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def expected(folder: Path, blocks: Blocks) -> Iterator[np.ndarray]:
    """transformers' log-probabilities behind each token of each document's piece of each block, [tokens, V]."""
    model = oracle.load(folder)
    for ids, segments in zip(blocks.whole.tokens.ids, blocks.whole.tokens.segments, strict=True):
        for segment in range(1, segments.max() + 1):
            yield log_p(oracle.forward(model, ids[segments == segment]).logits)


def scored_by_loop(folder: Path, baseline: Path, blocks: Blocks) -> dict[str, list[float]]:
    """NLL, divergence and agreement of each scored token, piece by piece of documents."""
    result: dict[str, list[float]] = {"nats": [], "kl": [], "agrees": []}
    ours, theirs = expected(folder, blocks), expected(baseline, blocks)
    whole = blocks.whole
    for ids, segments, weights in zip(whole.tokens.ids, whole.tokens.segments, whole.weights, strict=True):
        for segment in range(1, segments.max() + 1):
            q, p = next(ours), next(theirs)
            here = np.flatnonzero(segments == segment)
            for n, at in enumerate(here[1:]):
                if weights[at]:
                    result["nats"].append(-q[n, ids[at]])
                    result["kl"].append(float((np.exp(p[n]) * (p[n] - q[n])).sum()))
                    result["agrees"].append(float(q[n].argmax() == p[n].argmax()))
    return result


@ENGINES
def test_equals_transformers(name: str, tiny_mxfp4: Path, pruned: Path, measured: Any) -> None:
    found, sides, rows = measured({"all": ALL, "four": FOUR, "few": FEW}, engine=name)
    blocks = rows.blocks[LENGTH]
    scored = found.scored(blocks, sides.places)
    theirs = scored_by_loop(pruned, tiny_mxfp4, blocks)
    ours = scored.others["four"]
    assert len(ours.nats) == len(theirs["nats"]) > 100
    np.testing.assert_allclose(ours.nats, theirs["nats"], atol=1e-5)
    np.testing.assert_allclose(ours.kl, theirs["kl"], rtol=0.02, atol=1e-8)  # experts of random weights change little
    assert (ours.best == scored.baseline.best).tolist() == [bool(x) for x in theirs["agrees"]]
    perplexity = np.exp(np.mean(theirs["nats"]))
    assert abs(np.exp(ours.nats.mean()) / perplexity - 1) < 1e-5
    # What keeps all is the baseline, to the last bit.
    for field in ("nats", "entropy", "best"):
        np.testing.assert_array_equal(getattr(scored.others["all"], field), getattr(scored.baseline, field))
    assert not scored.others["all"].kl.any() and scored.others["few"].kl.any()


def test_divergences_of_a_trained_model_equal_those_of_transformers(tmp_path: Path) -> None:
    """nano, of whose experts a third changes much."""
    kept, nano = KeepSets([[0, 2, 3, 5, 7, 8, 9, 12, 13, 14, 15]] * 6), Path(str(gj.open("nano").source.folder))
    folder = gj.prune("nano", kept, "some", out=tmp_path / "some").folder
    request = Request("nano", {"some": kept}, *judged(data=ROWS, seq_len=(LENGTH,), dtype="float32"))
    sides = job.sides(request, open_source)
    blocks = job.material(request, sides).blocks
    kept_ = job.Progress(tmp_path / "out")
    kept_.begin({}, False)
    found = job.measure(sides, blocks, request.placing, kept_).scored(blocks[LENGTH], sides.places)
    theirs = scored_by_loop(Path(str(folder)), nano, blocks[LENGTH])
    ours = found.others["some"]
    assert np.mean(theirs["kl"]) > 0.05
    np.testing.assert_allclose(ours.kl, theirs["kl"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours.nats, theirs["nats"], rtol=1e-5, atol=1e-5)
    assert (ours.best == found.baseline.best).tolist() == [bool(x) for x in theirs["agrees"]]


@ENGINES
def test_a_soft_prune_is_the_cut_checkpoint(name: str, tiny_mxfp4: Path, pruned: Path, measured: Any) -> None:
    """In logits, hence in all that follows; the checkpoint stands beside another model."""
    soft, sides, rows = measured({"all": ALL, "four": FOUR, "few": FEW}, engine=name)
    hard, _, _ = measured({}, pruned, str(tiny_mxfp4), engine=name)
    real = rows.blocks[LENGTH].scored.real
    for field in ("nats", "entropy", "kl"):
        a, b = soft.model[LENGTH][field][:, sides.places["four"]][real], hard.model[LENGTH][field][:, 0][real]
        np.testing.assert_allclose(a, b, atol=2e-6, err_msg=field)
        np.testing.assert_allclose(
            hard.baseline[LENGTH]["nats"][:, 0][real], soft.model[LENGTH]["nats"][:, 0][real], atol=2e-6
        )


def test_across_documents_blocks_are_plain_text(tiny_mxfp4: Path, measured: Any) -> None:
    found, _, rows = measured({"four": FOUR}, cross_document=True, keep="all")
    blocks = rows.blocks[LENGTH]
    real, model = blocks.scored.real, oracle.load(tiny_mxfp4)
    nats = []
    whole = blocks.whole
    for ids, segments, weights in zip(whole.tokens.ids, whole.tokens.segments, whole.weights, strict=True):
        ids = ids[segments > 0]
        p = log_p(oracle.forward(model, ids).logits)
        # EOS, which stands behind each document, is not kept.
        nats += [-p[at - 1, ids[at]] for at in range(1, len(ids)) if weights[at]]
    np.testing.assert_allclose(found.model[LENGTH]["nats"][:, 0][real], nats, atol=1e-5)


def test_experts_below_the_active_ones_are_the_cut_checkpoint(tiny_mxfp4: Path, tmp_path: Path, measured: Any) -> None:
    """Two experts of a model that uses three a token: the gates of the two are renormalised."""
    two = KeepSets([[1, 4]] * L)
    hard = gj.prune(str(tiny_mxfp4), two, "two", out=tmp_path / "two", lower_top_k=True).folder
    soft, sides, rows = measured({"two": two})
    cut_, _, _ = measured({}, hard, str(tiny_mxfp4))
    real = rows.blocks[LENGTH].scored.real
    a, b = soft.model[LENGTH]["nats"][:, sides.places["two"]][real], cut_.model[LENGTH]["nats"][:, 0][real]
    np.testing.assert_allclose(a, b, atol=2e-6)


def test_blocks_cut_the_stream_and_score_each_kept_token_once() -> None:
    tokenizer = tokens.load_tokenizer(Path(str(gj.open("nano").source.folder)))
    rows = [Row(row["text"]) for row in ROWS]
    documents = tokens.encode(rows, tokenizer, Groups([""]), 2048, None)
    weighed = [[*zip(d.token_ids, d.weights, strict=True), (7, 0.0)] for d in documents]
    stream = [(i, w, n) for n, document in enumerate(weighed) for i, w in document]
    for length in (20, 33):
        blocks = Blocks(documents, length, eos=7)
        wanted = []
        for first in range(0, len(stream), length + 1):
            piece = stream[first : first + length + 1]
            wanted += [(i, n) for (_, _, before), (i, w, n) in pairwise(piece) if w and before == n]
        scored = blocks.scored
        assert list(zip(scored.targets[scored.real], scored.rows[scored.real], strict=True)) == wanted
        assert len(blocks) == -(-len(stream) // (length + 1))
        assert len(Blocks(documents, length, 7, most=2).scored.at) == 2


@pytest.mark.parametrize(("length", "longest"), [(60, 40), (200, 201)])
def test_whole_rows_are_expected_from_their_beginning(length: int, longest: int) -> None:
    """Every kept token but the first of its row is scored once, and before it stands all that the row has there."""
    tokenizer = tokens.load_tokenizer(Path(str(gj.open("nano").source.folder)))
    documents = tokens.encode([Row(row["text"]) for row in ROWS], tokenizer, Groups([""]), 2048, longest)
    blocks = Blocks(documents, length, eos=7, whole_rows=True)
    batch, scored, found = blocks.whole, blocks.scored, []
    assert batch.shape[1] <= length + 1 and len(blocks) == len(scored.at)
    for block, place in zip(*np.nonzero(scored.real), strict=True):
        at, row = int(scored.at[block, place]), int(scored.rows[block, place])
        is_before = batch.tokens.segments[block] == batch.tokens.segments[block, at]
        before, ids = batch.tokens.ids[block, : at + 1][is_before[: at + 1]], documents[row].token_ids
        assert before.tolist() == ids[: len(before)].tolist()
        assert batch.tokens.positions[block, at] == len(before) - 1
        assert scored.targets[block, place] == ids[len(before)]
        found.append((row, len(before)))
    kept = [(row, at) for row, d in enumerate(documents) for at in range(1, len(d.token_ids)) if d.weights[at]]
    assert sorted(found) == kept
    assert len(Blocks(documents, length, 7, most=1, whole_rows=True)) == 1


def test_a_stored_baseline_needs_no_model(tmp_path: Path) -> None:
    """Perplexities and agreement are the same; divergences are over 64 tokens, the true one and the rest."""
    options: dict[str, Any] = {"seq_len": (LENGTH, 40), "dtype": "float32"}
    file, kept = tmp_path / "full.baseline", {"some": KeepSets([[0, 2, 3, 5, 7, 8, 9, 12]] * 6)}
    gj.evaluate("nano", ROWS, write_baseline=file, **options)
    stored = gj.evaluate("nano", ROWS, keep_sets=kept, baseline=file, **options)
    whole = gj.evaluate("nano", ROWS, keep_sets=kept, **options)
    for length in options["seq_len"]:
        a, b = (found.entries[0].quality[length].estimates for found in (stored, whole))
        for name in ("ppl", "ppl_baseline", "ppl_difference", "agreement", "p_difference", "conflict_difference"):
            assert a[name].value == pytest.approx(b[name].value, rel=1e-5, abs=1e-5), name
        assert 0.9 * b["kl"].value < a["kl"].value <= b["kl"].value + 1e-6
    with pytest.raises(BaselineError, match="other rows"):
        gj.evaluate("nano", ROWS[1:], keep_sets=kept, baseline=file, **options)
    with pytest.raises(BaselineError, match="no blocks of 41 tokens: give --seq-len 96, 40"):
        gj.evaluate("nano", ROWS, keep_sets=kept, baseline=file, **options | {"seq_len": (41,)})


def test_divergences_from_a_stored_baseline_are_those_over_its_tokens() -> None:
    """By hand, over a vocabulary of 90 of which 64 are named, and one of 50, all of which are."""
    rng = np.random.default_rng(3)
    for size in (90, 50):
        unembedding = rng.normal(size=(size, 8)).astype(np.float32)
        base, other = rng.normal(size=(2, 1, 5, 8)).astype(np.float32)
        targets = rng.integers(0, size, (1, 5)).astype(np.int32)
        place = here()
        arrays = (jnp.asarray(x) for x in (base[:, None], other[:, None], targets, unembedding))
        first, second, ids, head = arrays
        top = compare(first, ids, head, None, place, size, keep_top=True).top
        kept = Top(*(x[:, 0] for x in top))
        ours = np.asarray(compare(second, ids, head, kept, place, size).kl)[0, 0]
        p, q = log_p(base[0] @ unembedding.T), log_p(other[0] @ unembedding.T)
        for n in range(5):
            named = sorted({*np.argsort(-p[n])[:64].tolist(), int(targets[0, n])})
            rest = np.setdiff1d(np.arange(size), named)
            wanted = (np.exp(p[n, named]) * (p[n, named] - q[n, named])).sum()
            if len(rest):
                ours_, theirs = (np.log(np.exp(x[n, rest]).sum()) for x in (p, q))
                wanted += np.exp(ours_) * (ours_ - theirs)
            assert ours[n] == pytest.approx(wanted, rel=1e-4, abs=1e-6)


class Killed(BaseException):
    """Goes past everything that handles errors, as SIGKILL does."""


@ENGINES
@pytest.mark.parametrize("after", [0, 3, 9])
def test_a_killed_run_goes_on(
    name: str, after: int, tiny_mxfp4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"seq_len": (LENGTH, 40), "dtype": "float32", "engine": name, "batch_size": 4}
    options |= {"replies": 2, "max_new_tokens": 4}

    def run(out: Path, **more: Any) -> bytes:
        gj.evaluate(str(tiny_mxfp4), ROWS, keep_sets={"four": FOUR}, out=out, **options, **more)
        return (out / "eval.json").read_bytes()

    whole, real, left = run(tmp_path / "whole"), engine.Timed.__call__, [after]

    def dies(self: engine.Timed, *arguments: Any) -> Any:
        if not left[0]:
            raise Killed
        left[0] -= 1
        return real(self, *arguments)

    monkeypatch.setattr(engine.Timed, "__call__", dies)
    with pytest.raises(Killed):
        run(tmp_path / "killed")
    monkeypatch.undo()
    if after:
        with pytest.raises(ResumeError, match="--resume"):
            run(tmp_path / "killed")
    assert run(tmp_path / "killed", resume=True) == whole
    assert {p.name for p in tmp_path.iterdir()} == {"whole", "killed"}


def test_replies_are_those_of_the_cut_checkpoint(tiny_mxfp4: Path, pruned: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "dtype": "float32"}
    gj.evaluate(
        str(tiny_mxfp4), ROWS, keep_sets={"four": FOUR}, out=tmp_path / "out", replies=4, seq_len=(LENGTH,), **options
    )
    lines = [json.loads(line) for line in (tmp_path / "out" / "replies.jsonl").read_text().splitlines()]
    for name, folder in ((None, tiny_mxfp4), ("four", pruned)):
        theirs = {row["id"]: _answer(folder, row["text"], options["max_new_tokens"]) for row in ROWS}
        ours = {line["id"]: line["text"] for line in lines if line["model"] == name}
        assert len(ours) == 4 and all(theirs[key] == text for key, text in ours.items())


def _answer(folder: Path, text: str, count: int) -> str:
    """The greedy reply of transformers to what stands before the assistant's last words."""
    tokenizer = tokens.load_tokenizer(folder)
    # The last words follow what the function said.
    asked = text[: text.index("<|start|>assistant", text.index("functions.add to=assistant"))] + "<|start|>assistant"
    ids = tokenizer(asked, add_special_tokens=False)["input_ids"]
    found = oracle.greedy(oracle.load(folder), ids, count).tolist()
    stops = set(json.loads((folder / "generation_config.json").read_text())["eos_token_id"])
    end = next((n + 1 for n, i in enumerate(found) if i in stops), len(found))
    return str(tokenizer.decode(found[:end]))
