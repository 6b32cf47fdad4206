"""`heal`: routers of what is left learn from the whole model; what was not worth it is rolled back."""

import functools
import json
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gptoss_jax as gj
from convert.changed import Changed
from convert.hf import Checkpoint
from convert.mxfp4 import BF16
from gptoss_jax.config import TINY
from gptoss_jax.data.remarks import Remarks
from gptoss_jax.data.rows import is_held_out
from gptoss_jax.errors import StatisticsError
from gptoss_jax.healing import training
from gptoss_jax.healing.deciding import change
from gptoss_jax.healing.loss import Loss
from gptoss_jax.healing.resident import Resident
from gptoss_jax.healing.rows import make_rows
from gptoss_jax.healing.states import States
from gptoss_jax.healing.trained import read
from gptoss_jax.network.source import Masked, load
from gptoss_jax.page import healings
from gptoss_jax.run import progress
from gptoss_jax.run.options import Data
from gptoss_jax.run.progress import Progress
from gptoss_jax.run.reading import read as read_rows
from gptoss_jax.run.reading import tokenizer_of

from .bad_input import Program, Refused, case, dump, tree
from .conftest import conversation

KEPT = [[0, 2, 3, 5, 6], [1, 2, 3, 4, 6], [0, 1, 4, 5, 6], [0, 1, 2, 3, 6]]
ROWS = [
    {"id": f"r{i}", "topic": "ab"[i % 2], "text": conversation(i % 7).replace("plus", f"plus {i},")} for i in range(30)
]
OPTIONS = {"max_seq_length": 64, "batch_size": 4, "dtype": "float32", "rate": 0.03}
ROUTER = ("mlp.router.weight", "mlp.router.bias")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("heal") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return file


def line(model: Path, rows: Path, *more: object) -> list[object]:
    argv = ["heal", model, "--keep-sets", "keep.json", "--data", rows, "--max-seq-length", 64, "--batch-size", 4]
    return [*argv, "--dtype", "float32", "--rate", 0.03, "--steps", 6, "--check-every", 3, "--out", "out", *more]


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return dump(tmp_path / "keep.json", KEPT)


def healed(model: Path, out: Path, rows: Any = ROWS, **options: Any) -> Any:
    return gj.heal(str(model), KEPT, rows, out=out, **(OPTIONS | options))


@pytest.mark.slow
def test_routers_alone_change_and_learn(tiny_mxfp4: Path, tmp_path: Path) -> None:
    found = healed(tiny_mxfp4, tmp_path / "out", steps=20).healing
    assert found.is_kept and found.overall.healed.value < 0.9 * found.overall.pruned.value
    assert found.curve.held[0] == pytest.approx(found.overall.pruned.value, rel=1e-5)
    assert found.curve.held[found.curve.best] == pytest.approx(found.overall.healed.value, rel=1e-5)
    ours = Checkpoint(tmp_path / "out")
    plain = Checkpoint(gj.prune(str(tiny_mxfp4), KEPT, out=tmp_path / "plain").folder)
    assert ours.config == plain.config and ours.tensors.keys() == plain.tensors.keys()
    for name, tensor in ours.tensors.items():
        is_same = np.array_equal(tensor.read(), plain.tensors[name].read())
        assert is_same == (not name.endswith(ROUTER)), name
    said = json.loads((tmp_path / "out" / "heal.json").read_text(encoding="utf-8"))
    assert said["is_kept"] and said["overall"]["rows"] == found.overall.rows
    shown = healings.read(tmp_path / "out")
    assert shown["held"] == found.curve.held and shown["rows"] == found.rows
    of = found.overall.difference
    assert [change["difference"] for change in shown["changes"]] == [[of.value, of.low, of.high]]
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "## Healing" in card and "without retraining" not in card and "nothing was trained" not in card.lower()


@pytest.mark.slow
def test_what_is_written_is_what_was_judged(tiny_mxfp4: Path, tmp_path: Path) -> None:
    """The checkpoint that was written and the soft prune with the values: the same logits."""
    found = healed(tiny_mxfp4, tmp_path / "out", steps=20).healing
    source = Changed(Checkpoint(tiny_mxfp4), found.values)
    soft = gj.open(str(tiny_mxfp4), dtype="float32").forward(
        "What is it?", network=load(Masked(source, KEPT), "float32")
    )
    hard = gj.open(str(tmp_path / "out"), dtype="float32").forward("What is it?")
    np.testing.assert_allclose(soft.logits, hard.logits, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_what_was_not_worth_it_is_rolled_back(program: Program, tiny_mxfp4: Path, rows: Path, kept: Path) -> None:
    """At a rate at which nothing moves, in BF16, by as much as its last bit."""
    assert program(*line(tiny_mxfp4, rows, "--rate", 1e-12))[0] == 0
    assert program("prune", tiny_mxfp4, "--keep-sets", kept, "--out", "plain") == (0, "")
    ours, plain = (Checkpoint(Path(name)).tensors for name in ("out", "plain"))
    assert all(np.array_equal(tensor.read(), plain[name].read()) for name, tensor in ours.items())
    card = Path("out/README.md").read_text(encoding="utf-8")
    assert "It was not worth it" in card and "**The weights are those of the pruned model.**" in card
    assert json.loads(Path("out/heal.json").read_text(encoding="utf-8"))["is_kept"] is False


@pytest.mark.newest
@pytest.mark.slow
def test_engines_find_the_same(tiny_mxfp4: Path, tmp_path: Path) -> None:
    resident, streamed = (
        healed(tiny_mxfp4, tmp_path / engine, steps=3, engine=engine).healing for engine in ("resident", "streamed")
    )
    np.testing.assert_allclose(resident.curve.losses, streamed.curve.losses, rtol=1e-3)
    np.testing.assert_allclose(resident.curve.held, streamed.curve.held, rtol=1e-3)


@pytest.mark.slow
def test_the_most_probable_tokens_teach_as_well(tiny_mxfp4: Path, tmp_path: Path) -> None:
    """What moves among the others is not seen: the divergence is at most the whole one."""
    hidden, top = (healed(tiny_mxfp4, tmp_path / kind, steps=20, teacher=kind).healing for kind in ("hidden", "top"))
    assert 0 < top.curve.losses[0] <= hidden.curve.losses[0]
    assert top.is_kept and top.overall.healed.value < 0.9 * top.overall.pruned.value


@pytest.mark.slow
def test_small_parameters_are_trained_when_asked(tiny_mxfp4: Path, tmp_path: Path) -> None:
    found = healed(tiny_mxfp4, tmp_path / "out", steps=20, train="small", rate=1e-3, check_every=2).healing
    assert found.is_kept and "layers/attention/sinks" in found.values
    ours, whole = Checkpoint(tmp_path / "out"), Checkpoint(tiny_mxfp4)
    for name in ("model.layers.1.self_attn.sinks", "model.norm.weight"):
        assert not np.array_equal(ours.tensors[name].read(), whole.tensors[name].read())
    assert "sinks" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


WAYS: dict[str, tuple[tuple[object, ...], dict[str, Any]]] = {
    "text_column": (("--text-column", "other"), {"text_column": "other"}),
    "id_column": (("--id-column", "key"), {"id_column": "key"}),
    "part": (("--part", "calibration"), {"part": "calibration"}),
    "num_rows": (("--num-rows", 25), {"num_rows": 25}),
    "seed": (("--seed", 3), {"seed": 3}),
    "max_seq_length": (("--max-seq-length", 48), {"max_seq_length": 48}),
    "truncate": (("--max-seq-length", 48, "--truncate", "right"), {"max_seq_length": 48, "truncate": "right"}),
    "tokens": (("--tokens", "all"), {"tokens": "all"}),
    "batch_size": (("--batch-size", 2), {"batch_size": 2}),
    "dtype": (("--dtype", "bfloat16"), {"dtype": "bfloat16"}),
    "weights": (("--weights", "mxfp4"), {"weights": "mxfp4"}),
}


OTHER = [row | {"other": row["text"].replace("Adding", "Summing"), "key": f"k{row['id']}"} for row in ROWS]


@functools.cache
def curve(model: Path, **options: Any) -> dict[str, Any]:
    """How a short healing by Python goes: that without options is beside most of those with one."""
    with tempfile.TemporaryDirectory() as folder:
        return vars(healed(model, Path(folder) / "out", OTHER, steps=6, check_every=3, **options).healing.curve)


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
def test_an_option_of_heal_is_that_of_python(
    name: str, program: Program, tiny_mxfp4: Path, kept: Path, tmp_path: Path
) -> None:
    words, options = WAYS[name]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in OTHER), encoding="utf-8")
    assert program(*line(tiny_mxfp4, tmp_path / "rows.jsonl", *words))[0] == 0
    said = json.loads(Path("out/heal.json").read_text(encoding="utf-8"))["curve"]
    assert said == curve(tiny_mxfp4, **options)
    if name != "weights":  # which give the same numbers
        assert said != curve(tiny_mxfp4, **dict([*options.items()][:-1]))


# Rows.


def some_rows(model: Path, data: Data, keep: str = "reply") -> Any:
    return make_rows(data, keep, Checkpoint(model), KEPT, 4, 1)


def test_a_fifth_is_held_out_by_hash_and_learnt_by_nobody(tiny_mxfp4: Path, rows: Path) -> None:
    data = Data(str(rows), max_seq_length=64)
    found = some_rows(tiny_mxfp4, data)
    every = read_rows(data, tokenizer_of(Checkpoint(tiny_mxfp4)), Remarks())
    assert {row.id for row in found.held} == {row.id for row in every if is_held_out(row)}
    assert {row.id for row in found.learnt} | {row.id for row in found.held} == {row["id"] for row in ROWS}
    numbers = np.concatenate([batch.groups[:, 0] for batch in found.held_batches])
    assert {*numbers.tolist()} == {*range(len(found.held))}
    assert len({batch.shape for batch in found.batches}) == 1
    counted = sum(int((batch.weights != 0).sum()) for batch in found.batches)
    assert counted == found.tokens > 0


def test_rows_of_other_domains_are_only_looked_at(tiny_mxfp4: Path, rows: Path, tmp_path: Path) -> None:
    found = healed(tiny_mxfp4, tmp_path / "out", str(rows), domain_column="topic", domain=("a",), steps=4).healing
    assert found.healed_for == ("a",) and {*found.domains} == {"a", "b"}
    assert found.overall.rows == found.domains["a"].rows and found.domains["b"].rows > 0
    assert "| `b` |" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_a_change_is_paired_by_row() -> None:
    rng = np.random.default_rng(0)
    weight, kl = rng.integers(1, 9, 40).astype(float), rng.exponential(size=40)
    everything = np.ones(40, bool)
    found = change(Loss(kl * weight, weight), Loss(0.9 * kl * weight, weight), everything)
    assert found.is_better and found.written == found.healed
    assert found.difference.value == pytest.approx(-0.1 * (kl * weight).sum() / weight.sum())
    noise = rng.normal(size=40)
    worse = change(Loss(kl * weight, weight), Loss((kl + noise) * weight, weight), everything)
    assert not worse.is_better and worse.written == worse.pruned
    assert worse.pruned.value == pytest.approx((kl * weight).sum() / weight.sum())
    assert not change(Loss(kl, weight), Loss(kl / 2, weight), np.arange(40) < 1).is_better  # one row alone


@pytest.mark.slow
def test_of_several_keep_sets_the_one_is_written_that_heals_best(tiny_mxfp4: Path, tmp_path: Path) -> None:
    other = [[1, 2, 4, 5, 6], [0, 1, 3, 4, 5], [1, 2, 3, 4, 5], [0, 1, 3, 5, 6]]
    alone = {
        name: gj.heal(str(tiny_mxfp4), sets, ROWS, out=tmp_path / name, steps=4, **OPTIONS).healing.overall
        for name, sets in (("one", KEPT), ("other", other))
    }
    both = {"one": gj.KeepSets(KEPT), "other": gj.KeepSets(other)}
    found = gj.heal(str(tiny_mxfp4), both, ROWS, out=tmp_path / "out", steps=4, **OPTIONS)
    assert [one["kl"][0] for one in found.tried] == [of.written.value for of in alone.values()]
    best = min(alone, key=lambda name: alone[name].written.value)
    ours, theirs = (Checkpoint(tmp_path / name).tensors for name in ("out", best))
    assert all(np.array_equal(tensor.read(), theirs[name].read()) for name, tensor in ours.items())
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| `one, healed` | 5 |" in card and "| `other, healed` | 5 |" in card
    assert not (tmp_path / "out.progress").exists()


# Values in the place of a checkpoint's.


@pytest.mark.parametrize("which", ["tiny_mxfp4", "tiny_bf16"])
def test_other_values_are_read_wherever_the_checkpoint_is(which: str, request: pytest.FixtureRequest) -> None:
    source = Checkpoint(request.getfixturevalue(which))
    own = {path: np.asarray(x) for path, x in read(source, "small").items()}
    values = {path: x + np.float32(0.5) for path, x in own.items()}
    ours = Changed(source, values)
    assert Changed(source, {}).fingerprint() != ours.fingerprint() != source.fingerprint()
    for path, value in read(ours, "small").items():  # type: ignore[arg-type]
        np.testing.assert_array_equal(value, values[path].astype(BF16).astype(np.float32))
    whole, streamed = load(ours, "float32"), load(source, "float32")  # type: ignore[arg-type]
    np.testing.assert_array_equal(
        whole.layers.moe.experts.down_kernel[...], streamed.layers.moe.experts.down_kernel[...]
    )
    rounded = values["layers/moe/router/bias"].astype(BF16)
    for layer in range(TINY.num_layers):
        np.testing.assert_array_equal(ours.tensors[f"model.layers.{layer}.mlp.router.bias"].read(), rounded[layer])
    part = ours.tensors["model.layers.0.mlp.router.weight"]
    np.testing.assert_array_equal(part.read(2, 3), part.read()[2:5])


# Runs that are stopped.


class Killed(BaseException):
    """Goes past everything that handles errors, as SIGKILL does."""


def stop(program: Program, argv: list[object], after: int) -> bool:
    """Be killed when so many states have been kept, if so many are."""
    real, kept = States.save, []

    def save(self: States, *arguments: Any, **options: Any) -> None:
        if len(kept) == after:
            raise Killed
        kept.append(arguments[0])
        real(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch, suppress(Killed):
        patch.setattr(States, "save", save)
        assert program(*argv)[0] == 0
        return False
    return True


def made(folder: Path) -> dict[str, bytes | None]:
    """All files, without what is measured."""
    found = tree(folder)
    said = json.loads(found.pop("heal.json") or b"")
    found.pop("SHA256SUMS")  # it has the digest of heal.json
    return found | {"heal.json": json.dumps({k: v for k, v in said.items() if k not in MEASURED}).encode()}


MEASURED = ("peak_rss_bytes", "command")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["resident", "streamed"])
def test_from_wherever_it_is_killed(
    engine: str, program: Program, tiny_mxfp4: Path, rows: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SHARE", 0)  # every state is kept
    argv = line(tiny_mxfp4, rows, "--engine", engine)
    assert program(*argv, "--out", "whole")[0] == 0
    expected = made(Path("whole"))
    for after in (0, 1, 2, 1):
        assert stop(program, [*argv, "--resume"], after)
        assert not Path("out").exists()
    assert program(*argv, "--resume")[0] == 0
    assert made(Path("out")) == expected
    assert not Path("out.progress").exists()


def test_one_that_is_killed_before_it_says_that_it_is_done(
    program: Program, tiny_mxfp4: Path, rows: Path, kept: Path
) -> None:
    argv = line(tiny_mxfp4, rows, "--steps", 1, "--engine", "resident", "--resume")
    with pytest.MonkeyPatch.context() as patch, suppress(Killed):
        patch.setattr(Progress, "remove", killed)
        program(*argv)
    expected = made(Path("out"))
    assert Path("out.progress").exists()
    assert program(*argv)[0] == 0
    assert made(Path("out")) == expected and not Path("out.progress").exists()
    assert program(*argv)[0] == 2  # what is done is not replaced


def killed(self: Progress) -> None:
    raise Killed


def test_a_run_of_other_settings_is_not_gone_on_with(
    program: Program, refused: Refused, tiny_mxfp4: Path, rows: Path, kept: Path
) -> None:
    assert stop(program, line(tiny_mxfp4, rows), 1)
    refused(*line(tiny_mxfp4, rows), says=("unfinished run", "--resume goes on"))
    refused(*line(tiny_mxfp4, rows, "--rate", 0.1), "--resume", says=("--rate 0.03", "0.1"))


def test_a_training_ends_where_looks_do_not_become_better(tiny_mxfp4: Path, tmp_path: Path) -> None:
    found = healed(tiny_mxfp4, tmp_path / "out", steps=40, check_every=1, rate=3.0).healing
    assert len(found.curve.losses) < 40
    assert found.curve.steps[-1] - found.curve.steps[found.curve.best] == training.PATIENCE


# Bad input.

BAD = [
    case("no keep-sets", ["--keep-sets", "none.json"], "none.json", "no such file"),
    case("few rows", ["--num-rows", 3], "held out", "give more rows"),
    case("nothing to learn", ["--text-column", "id"], "--tokens all"),
    case("a rate of none", ["--rate", 0], "--rate is 0"),
    case("fewer steps than none", ["--steps", -1], "--steps is -1"),
    case("little memory", ["--memory-gib", 0.01, "--engine", "resident"], "--memory-gib 0.01 is too little"),
    case("little memory, streamed", ["--memory-gib", 0.5, "--engine", "streamed"], "a step of 256 tokens need"),
    case("an unknown teacher", ["--teacher", "best"], "--teacher is 'best'", "hidden, top"),
    case("a domain without its column", ["--domain", "a"], "--domain needs --domain-column"),
    case("no such domain", ["--domain-column", "topic", "--domain", "c"], "no row is of domain c"),
    case("a context that is too long", ["--max-seq-length", 10**6], "--max-seq-length is above"),
    case("no such model", ["--num-rows", 20, "--data", "nowhere.jsonl"], "nowhere.jsonl"),
]


@pytest.mark.parametrize(("more", "says"), BAD)
def test_bad_input(
    more: list[Any], says: tuple[str, ...], refused: Refused, tiny_mxfp4: Path, rows: Path, kept: Path
) -> None:
    refused(*line(tiny_mxfp4, rows, *more), says=says)


def test_keep_sets_of_another_model(refused: Refused, tiny_mxfp4: Path, rows: Path, tmp_path: Path) -> None:
    dump(tmp_path / "keep.json", [[0, 1, 2, 3]] * 6)
    refused(*line(tiny_mxfp4, rows), says=("keep.json", "has 6 layers, the model has 4"))


def test_an_output_in_the_way(refused: Refused, tiny_mxfp4: Path, rows: Path, kept: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    refused(*line(tiny_mxfp4, rows), says=("out", "exists already"))


def test_a_loss_that_is_not_finite(program: Program, tiny_mxfp4: Path, rows: Path, kept: Path) -> None:
    real = Resident.gradients
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Resident, "gradients", lambda *arguments: real(*arguments)._replace(loss=np.nan))
        status, error = program(*line(tiny_mxfp4, rows))
    assert status == 2 and error.count("\n") == 1 and "step 1: the loss is not finite" in error
    assert not Path("out").exists()


def test_a_router_that_leaves_the_range(tiny_mxfp4: Path, tmp_path: Path) -> None:
    with pytest.raises(StatisticsError, match=r"leaves the range of BF16|not finite"):
        healed(tiny_mxfp4, tmp_path / "out", steps=4, check_every=1, rate=3e38)


def test_progress_is_emptied_folders_and_all(tmp_path: Path) -> None:
    kept = Progress(tmp_path / "out")
    kept.write("x", b"1")
    (kept.folder / "states" / "deep").mkdir(parents=True)
    (kept.folder / "states" / "deep" / "file").write_bytes(b"2")
    kept.remove()
    assert not kept.folder.exists()
