"""`select --rule greedy`: every layer's experts are eliminated by what their going changes when the layer runs."""

import functools
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptoss_jax as gj
from convert.hf import Checkpoint
from gptoss_jax.config import TINY
from gptoss_jax.data.tokens import load_tokenizer
from gptoss_jax.network.batch import Tokens
from gptoss_jax.network.source import load
from gptoss_jax.run.progress import Progress
from gptoss_jax.selection.ranking import Ranking

from .bad_input import Program, Refused, case, poke
from .conftest import ROWS
from .test_swap import HERE

L, E = TINY.num_layers, TINY.num_experts
OPTIONS = {"max_seq_length": 64, "batch_size": 3, "dtype": "float32", "domain_column": "domain"}


def line(model: Path, rows: Path, *more: object) -> list[object]:
    argv = ["select", model, "--rule", "greedy", "--data", rows, "--domain-column", "domain", "--dtype", "float32"]
    return [*argv, "--max-seq-length", 64, "--batch-size", 3, "--keep", 4, *more]


def found(model: Path, rows: Any, **options: Any) -> gj.KeepSets:
    return gj.select(str(model), **({"keep": 4, "rule": "greedy", "data": rows} | OPTIONS | options))


def changes(model: Path, rows: list[dict[str, str]], rule: str = "greedy") -> np.ndarray:
    """float64 [tokens, L, E]: by how much each layer's output changes without each expert, of the stream behind it, by
    the rule: the layer runs again, a row at a time."""
    network, tokenizer = load(Checkpoint(model), "float32"), load_tokenizer(model)
    step = jax.jit(lambda m, tokens: m(tokens, HERE, lambda output: output.hidden).layers)
    embedding = np.asarray(network.embedding[...], np.float64)
    bias, all_ = network.layers.moe.router.bias[...], []
    for row in rows:
        ids = np.array(tokenizer(row["text"], add_special_tokens=False)["input_ids"][-64:], np.int32)
        padded = np.pad(ids, (0, 64 - len(ids)))[None]
        tokens = Tokens(padded, np.arange(64, dtype=np.int32)[None], (np.arange(64) < len(ids)).astype(np.int32)[None])
        hidden = functools.partial(step, tokens=tokens)
        with jax.default_matmul_precision("highest"):
            whole = np.asarray(hidden(network), np.float64)[:, 0, : len(ids)]
            of_row = np.zeros((len(ids), L, E))
            for layer, expert in np.ndindex(L, E):
                network.layers.moe.router.bias[...] = bias.at[layer, expert].set(-jnp.inf)
                change = np.asarray(hidden(network)[layer], np.float64)[0, : len(ids)] - whole[layer]
                of_row[:, layer, expert] = (change**2).sum(-1) / (whole[layer] ** 2).sum(-1)
        network.layers.moe.router.bias[...] = bias
        if rule == "greedy_cosine":
            before = np.concatenate([embedding[ids][None], whole[:-1]])
            norms = np.linalg.norm(before, axis=-1) * np.linalg.norm(whole, axis=-1)
            of_row *= (1 - (before * whole).sum(-1) / norms).T[..., None]
        all_.append(of_row)
    return np.concatenate(all_)


def first_to_go(model: Path, rows: list[dict[str, str]], **options: Any) -> list[tuple[int, float]]:
    """Of each layer the expert that goes first, and what is lost then."""
    whole = found(model, rows, **(options | {"keep": E}))
    assert whole.losses is not None
    worst = [int(np.nanargmin(np.array(of_layer, float))) for of_layer in whole.losses]
    return [(layer_[at], losses[at]) for layer_, losses, at in zip(whole.layers, whole.losses, worst, strict=True)]  # type: ignore[misc]


@pytest.mark.parametrize("rule", ["greedy", "greedy_cosine"])
def test_who_goes_first_is_whose_absence_changes_the_layer_least(rule: str, tiny_bf16: Path) -> None:
    expected = changes(tiny_bf16, ROWS[:6], rule).mean(0)
    for layer, (expert, loss) in enumerate(first_to_go(tiny_bf16, ROWS[:6], rule=rule)):
        assert expert == int(expected[layer].argmin())
        assert loss == pytest.approx(expected[layer].min(), rel=1e-3)  # differences of float32's


def test_domains_count_by_their_weights_or_the_worst_decides(tiny_bf16: Path) -> None:
    rows = ROWS[:6]
    names = sorted({row["domain"] for row in rows})
    of_each = {name: changes(tiny_bf16, [row for row in rows if row["domain"] == name]).mean(0) for name in names}
    mix = dict(zip(names, (3.0, 1.0), strict=False))
    mixed = sum(weight * of_each[name] for name, weight in mix.items()) / 4
    worst = np.max([of_each[name] for name in names], axis=0)
    for options, expected in (({"domain": mix}, mixed), ({"blend": "maxmin"}, worst)):
        for layer, (expert, loss) in enumerate(first_to_go(tiny_bf16, rows, **options)):
            assert expert == int(expected[layer].argmin())
            assert loss == pytest.approx(expected[layer].min(), rel=1e-3)


def test_rows_of_the_named_domains_alone_are_read(tiny_bf16: Path) -> None:
    one = [row for row in ROWS if row["domain"] == "a"]
    assert found(tiny_bf16, ROWS, domain="a").layers == found(tiny_bf16, one).layers


def test_engines_agree(tiny_mxfp4: Path) -> None:
    resident, streamed = (found(tiny_mxfp4, ROWS, engine=engine) for engine in ("resident", "streamed"))
    assert resident.layers == streamed.layers
    ours, theirs = (np.array(sets.losses, float) for sets in (resident, streamed))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_sets_of_all_numbers_are_of_one_elimination(program: Program, tiny_mxfp4: Path, rows_jsonl: Path) -> None:
    assert program(*line(tiny_mxfp4, rows_jsonl, "--keep", 6))[0] == 0
    config = Checkpoint(tiny_mxfp4).config
    whole = Ranking.read("keep-ranking.json", config)
    for number in (4, 6):
        kept = gj.KeepSets.read(f"keep-{number}.json", config)
        assert kept.layers == whole.keep(number).layers == [sorted(of[:number]) for of in whole.layers]
        assert kept.origin.row_hashes is not None and len(kept.origin.row_hashes) == 12
        assert "by `greedy` over all rows of the data" in str(kept.origin)
    assert whole.losses is not None
    for of_layer in whole.losses:
        assert of_layer[0] is None and all(of_layer[1:])


def test_what_is_written_can_be_pruned_and_refuses_its_own_rows(
    program: Program, refused: Refused, tiny_mxfp4: Path, rows_jsonl: Path
) -> None:
    assert program(*line(tiny_mxfp4, rows_jsonl))[0] == 0
    assert program("prune", tiny_mxfp4, "--keep-sets", "keep.json", "--out", "cut") == (0, "")
    assert program("prune", tiny_mxfp4, "--ranking", "keep-ranking.json", "--keep", 5, "--out", "other") == (0, "")
    assert "by `greedy`" in Path("cut/README.md").read_text(encoding="utf-8")
    judged = ["eval", tiny_mxfp4, "--data", rows_jsonl, "--keep-sets", "keep.json", "--seq-len", 64]
    refused(*judged, says=("keep-sets were chosen by",))


# Options.

OTHER = [row | {"other": row["text"].replace("Adding", "Summing")} for row in ROWS]
WAYS: dict[str, tuple[tuple[object, ...], dict[str, Any]]] = {
    "data": ((), {}),
    "text_column": (("--text-column", "other"), {"text_column": "other"}),
    "id_column": (("--part", "calibration", "--id-column", "key"), {"part": "calibration", "id_column": "key"}),
    "domain_column": (("--domain", "a"), {"domain": "a"}),
    "part": (("--id-column", "key", "--part", "calibration"), {"id_column": "key", "part": "calibration"}),
    "num_rows": (("--num-rows", 4), {"num_rows": 4}),
    "max_seq_length": (("--max-seq-length", 40), {"max_seq_length": 40}),
    "truncate": (("--max-seq-length", 40, "--truncate", "right"), {"max_seq_length": 40, "truncate": "right"}),
    "tokens": (("--tokens", "reply"), {"tokens": "reply"}),
    "dtype": (("--dtype", "bfloat16"), {"dtype": "bfloat16"}),
    "rule": (("--rule", "greedy_cosine"), {"rule": "greedy_cosine"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
def test_an_option_of_a_search_is_that_of_python(name: str, program: Program, tiny_mxfp4: Path, tmp_path: Path) -> None:
    words, options = WAYS[name]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in OTHER), encoding="utf-8")
    assert program(*line(tiny_mxfp4, tmp_path / "rows.jsonl", *words))[0] == 0
    ours = gj.KeepSets.read("keep.json", Checkpoint(tiny_mxfp4).config)
    assert ours == found(tiny_mxfp4, OTHER, **options)
    fewer = dict([*options.items()][:-1])
    assert ours.losses != found(tiny_mxfp4, ROWS[:3] if name == "data" else OTHER, **fewer).losses


# Runs that are stopped.


class Killed(BaseException):
    """Goes past everything that handles errors, as SIGKILL does."""


def stop(program: Program, argv: list[object], after: int) -> bool:
    """Be killed when so many files of the run have been written, if so many are."""
    real, written = Progress.write, []

    def write(self: Progress, name: str, data: Any) -> None:
        if len(written) == after:
            raise Killed
        written.append(name)
        real(self, name, data)

    with pytest.MonkeyPatch.context() as patch, suppress(Killed):
        patch.setattr(Progress, "write", write)
        assert program(*argv)[0] == 0
        return False
    return True


def test_one_of_several_files_is_there_when_it_is_killed(program: Program, tiny_mxfp4: Path, rows_jsonl: Path) -> None:
    argv = [*line(tiny_mxfp4, rows_jsonl, "--keep", 5, "--out", "keep.json"), "--resume"]
    assert program(*argv)[0] == 0
    files = {file: file.read_bytes() for file in (Path("keep-4.json"), Path("keep-5.json"), Path("keep-ranking.json"))}
    for file in files:
        file.unlink()
    real, written = gj.KeepSets.write, []

    def write(self: gj.KeepSets, *arguments: Any) -> None:
        if written:
            raise Killed
        written.append(real(self, *arguments))

    with pytest.MonkeyPatch.context() as patch, suppress(Killed):
        patch.setattr(gj.KeepSets, "write", write)
        program(*argv)
    assert sum(file.exists() for file in files) == 2
    assert program(*argv)[0] == 0
    assert {file: file.read_bytes() for file in files} == files


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["resident", "streamed"])
def test_from_wherever_it_is_killed(
    engine: str, program: Program, tiny_mxfp4: Path, rows_jsonl: Path, tmp_path: Path
) -> None:
    argv = line(tiny_mxfp4, rows_jsonl, "--engine", engine, "--num-rows", 6)
    assert program(*argv, "--out", "whole.json")[0] == 0
    expected = Path("whole.json").read_bytes(), Path("whole-ranking.json").read_bytes()
    after, ended = 1, 0
    while ended < 3:
        if stop(program, [*argv, "--resume"], after):
            assert (tmp_path / "keep.json.progress").exists() and not Path("keep.json").exists()
        else:
            assert (Path("keep.json").read_bytes(), Path("keep-ranking.json").read_bytes()) == expected
            assert not (tmp_path / "keep.json.progress").exists()
            Path("keep.json").unlink(), Path("keep-ranking.json").unlink()
            ended += 1
        after += 3


def test_a_run_of_other_settings_is_not_gone_on_with(
    program: Program, refused: Refused, tiny_mxfp4: Path, rows_jsonl: Path
) -> None:
    argv = line(tiny_mxfp4, rows_jsonl)
    stop(program, argv, 3)
    refused(*argv, says=("unfinished run", "--resume goes on"))
    refused(*argv, "--tokens", "reply", "--resume", says=("--tokens 'all'", "'reply'"))
    refused(*argv, "--num-rows", 5, "--resume", says=("rows' hash",))
    refused(*argv, "--rule", "greedy_cosine", "--resume", says=("--rule ['greedy']", "['greedy_cosine']"))


# Bad input.

BAD = [
    case("no data", lambda argv: without(argv, "--data"), "name them with --data"),
    case("a criterion", lambda argv: [*argv, "--criterion", "frequency"], "--criterion means nothing to --rule greedy"),
    case("coverage", lambda argv: [*argv[:-2], "--coverage", 0.5], "--coverage means nothing to --rule greedy"),
    case("a domain without its column", lambda argv: [*without(argv, "--domain-column"), "--domain", "a"], "column"),
    case("maxmin of one", lambda argv: [*argv, "--blend", "maxmin", "--domain", "a"], "two domains or more"),
    case("maxmin with weights", lambda argv: [*argv, *MAXMIN], "without any"),
    case("few tokens", lambda argv: [*argv, "--num-rows", 1], "too few to choose among 7 experts", "112 or more"),
    case("no such domain", lambda argv: [*argv, "--domain", "none"], "none"),
    case("more than all", lambda argv: [*argv[:-1], 8], "--keep 8", "7 experts"),
    case("another model", lambda argv: [*argv, "--model", "nano"], "--model goes with a profile"),
    case("little memory", lambda argv: [*argv, "--memory-gib", 0.01], "--memory-gib 0.01 is too little"),
    case("beside candidates", lambda argv: [*argv, "--pick", "reap"], "--rule greedy", "--pick greedy"),
    case("an unknown rule", lambda argv: [*argv, "--rule", "best"], "--rule is 'best'", "score, greedy, greedy_cosine"),
    case(
        "data for scores",
        lambda argv: [*argv, "--rule", "score"],
        "--data goes with --rule greedy, --rule greedy_cosine and --pick",
    ),
]
MAXMIN = ["--blend", "maxmin", "--domain", "a=2", "--domain", "b"]


def without(argv: list[Any], flag: str) -> list[Any]:
    at = argv.index(flag)
    return [*argv[:at], *argv[at + 2 :]]


Change = Callable[[list[Any]], list[Any]]


@pytest.mark.parametrize(("change", "says"), BAD)
def test_bad_input(change: Change, says: tuple[str, ...], refused: Refused, tiny_mxfp4: Path, rows_jsonl: Path) -> None:
    refused(*change(line(tiny_mxfp4, rows_jsonl)), says=says)


def test_a_file_in_the_way(refused: Refused, tiny_mxfp4: Path, rows_jsonl: Path, tmp_path: Path) -> None:
    (tmp_path / "keep-ranking.json").write_text("{}", encoding="utf-8")
    refused(*line(tiny_mxfp4, rows_jsonl), says=("keep-ranking.json", "exists already"))


def test_weights_that_are_not_finite(program: Program, model: Path, rows_jsonl: Path, tmp_path: Path) -> None:
    """The layers before them are kept."""
    poke(model, "model.layers.2.mlp.experts.down_proj_bias", (3, 1), 3e38)
    status, error = program(*line(model, rows_jsonl, "--engine", "streamed"))
    assert status == 2 and error.count("\n") == 1
    assert "layer 2" in error and "not finite" in error and "--resume goes on" in error
    assert not (tmp_path / "keep.json").exists()
