"""Profiles over different rows, added: equal to one over all rows, in any order, and refused where they do not add."""

import hashlib
import json
import random
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from upath import UPath

from gptoss_jax.data.groups import FOLDS, MAX_DOMAINS, MAX_JOINT
from gptoss_jax.data.rows import Row, row_hashes
from gptoss_jax.errors import ProfileError
from gptoss_jax.statistics import store
from gptoss_jax.statistics.store import read_sums, write_sums
from gptoss_jax.statistics.sums import DECLARED, Statistics
from gptoss_jax.statistics.tables import read_columns

from .bad_input import Program, Refused, case, dump, edit, read_shard, write_shard
from .conftest import conversation
from .made_up import OPTIONS, E, Finished, K, L, some_sums
from .test_profile import run_profile

SAME_BYTES = ("saliency.parquet", "saliency_by_domain.parquet", "ranking_by_layer.json", "statistics.safetensors")

# Against profiles of the same rows in one run.

PARTS = {"one": range(5), "two": range(5, 9), "three": range(9, 12)}


def rows_of(numbers: range, domains: bool) -> str:
    rows = [{"id": f"r{i}", "text": conversation(i), "domain": "ab"[i % 2] if domains else None} for i in numbers]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def profiles(tiny_mxfp4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Profiles of three parts, the last without domains, and of all their rows."""
    folder = tmp_path_factory.mktemp("profiles")
    texts = {name: rows_of(numbers, domains=name != "three") for name, numbers in PARTS.items()}
    for name, text in {**texts, "all": "".join(texts.values())}.items():
        (folder / f"{name}.jsonl").write_text(text)
        options = [] if name == "three" else ["--domain-column", "domain"]
        run_profile(
            tiny_mxfp4,
            folder / f"{name}.jsonl",
            folder / name,
            "--max-seq-length",
            "64",
            "--batch-size",
            "12",
            *options,
        )
    return folder


def assert_equal_profiles(ours: Path, expected: Path) -> None:
    """Counts and maxima equal, sums to 1e-6, by domain too."""
    for domain in (None, "a", "b"):
        table, theirs = read_columns(ours, domain), read_columns(expected, domain)
        assert list(table) == list(theirs)
        for name, column in theirs.items():
            if name == "count":
                np.testing.assert_array_equal(table[name], column)
            np.testing.assert_allclose(table[name], column, rtol=1e-6, err_msg=name)
    usage, theirs = (pq.read_table(folder / "usage.parquet").to_pylist() for folder in (ours, expected))
    assert [row for row in usage if "_count" in row["kind"]] == [row for row in theirs if "_count" in row["kind"]]
    info, theirs = (json.loads((folder / "profile.json").read_text()) for folder in (ours, expected))
    same = ("num_layers", "top_k", "rows", "truncated_rows", "empty_rows", "total_tokens", "kept_tokens", "engine")
    for name in (*same, "kept_tokens_by_domain", "model", "model_fingerprint"):
        assert info[name] == theirs[name], name
    assert info["warnings"] == theirs["warnings"]
    sums, theirs = (read_sums(folder / "statistics.safetensors") for folder in (ours, expected))
    assert list(sums.domains) == list(theirs.domains) == ["", "a", "b"]
    np.testing.assert_array_equal(sums.row_hashes, theirs.row_hashes)
    np.testing.assert_array_equal(sums.statistics.tokens, theirs.statistics.tokens)
    assert sums.folds == theirs.folds == FOLDS
    for name, column in theirs.by_fold("a").items():
        np.testing.assert_allclose(sums.by_fold("a")[name], column, rtol=1e-6, err_msg=name)


@pytest.mark.slow
def test_equals_one_profile_of_all_rows(profiles: Path, program: Program, tmp_path: Path) -> None:
    """Merged at once, or a merge with another; rows without a domain are in the total alone."""
    one, two, three = (profiles / name for name in PARTS)
    for argv in ([one, two, three, "--out", "flat"], [one, three, "--out", "some"], ["some", two, "--out", "nested"]):
        assert program("merge", *argv) == (0, "")
    for name in ("flat", "nested"):
        assert_equal_profiles(tmp_path / name, profiles / "all")
        assert {p.name for p in (tmp_path / name).iterdir()} == {p.name for p in (profiles / "all").iterdir()}
    assert read_columns(tmp_path / "flat")["count"].sum() > sum(
        read_columns(tmp_path / "flat", domain)["count"].sum() for domain in "ab"
    )


def test_sums_hold_each_row_by_its_hash(profiles: Path) -> None:
    expected = sorted(
        int.from_bytes(hashlib.sha256(f"r{i}\n{conversation(i)}".encode()).digest()[:8], "big") for i in range(12)
    )
    sums = read_sums(profiles / "all" / "statistics.safetensors")
    assert sums.row_hashes.tolist() == expected


# Of made-up numbers.


@pytest.fixture
def two(finished: Finished) -> list[Path]:
    return [finished("a", 1, "xy"), finished("b", 2, "y")]


def merged(program: Program, *argv: Any) -> dict[str, Any]:
    assert program("merge", *argv, "--out", "out", "--overwrite") == (0, "")
    return json.loads(Path("out/profile.json").read_text())


def test_order_changes_no_byte(finished: Finished, program: Program, tmp_path: Path) -> None:
    parts = [finished("a", 1, "xy"), finished("b", 2, ["", "x"]), finished("c", 3, "zx")]
    contents = set()
    for order in permutations(parts):
        merged(program, *order)
        contents.add(tuple((tmp_path / "out" / name).read_bytes() for name in SAME_BYTES))
    assert len(contents) == 1


def test_sums_read_back_are_those_written(tmp_path: Path) -> None:
    sums = some_sums(1, ["", "x"], range(3), eaft=True)
    columns_first = replace(sums, statistics=replace(sums.statistics, count=np.asfortranarray(sums.statistics.count)))
    write_sums(tmp_path / "a", sums)
    write_sums(tmp_path / "b", columns_first)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    back = read_sums(tmp_path / "a")
    for name, tensor in vars(sums.statistics).items():
        np.testing.assert_array_equal(getattr(back.statistics, name), tensor, strict=True)
    np.testing.assert_array_equal(back.weighted["eaft"], sums.weighted["eaft"], strict=True)
    np.testing.assert_array_equal(back.row_hashes, sums.row_hashes, strict=True)
    assert list(back.domains) == ["", "x"]


def test_counts_are_read_as_far_as_float64_tells_them_apart(tmp_path: Path) -> None:
    sums = some_sums(1, [""], range(3))
    most = np.full_like(sums.statistics.tokens, 2**53)
    write_sums(tmp_path / "a", replace(sums, statistics=replace(sums.statistics, tokens=most)))
    np.testing.assert_array_equal(read_sums(tmp_path / "a").statistics.tokens, most)


def test_sums_with_folds_are_those_of_a_loop_over_groups(tmp_path: Path) -> None:
    """Of a domain, of a fold, and of all rows; also when they are read back."""
    write_sums(tmp_path / "store", some_sums(1, ["", "x", "y"], range(3), eaft=True, swap=True, folds=FOLDS))
    sums = read_sums(tmp_path / "store")
    assert sums.folds == FOLDS and list(sums.by_domain()) == ["x", "y"]
    for name, statistic in DECLARED.items():
        own, reduce = getattr(sums.statistics, name), np.maximum if statistic.largest else np.add
        total = getattr(sums.total()[0], name)
        np.testing.assert_array_equal(total, reduce.reduce(own, axis=1))
        for d, domain in enumerate(["", "x", "y"]):
            groups = [d] if name == "coactivation" else [d * FOLDS + fold for fold in range(FOLDS)]
            if domain:
                expected = reduce.reduce([own[:, g] for g in groups], axis=0)
                np.testing.assert_allclose(getattr(sums.by_domain()[domain][0], name), expected, err_msg=name)
            if statistic.by_expert and not statistic.largest:
                expected = np.stack([own[:, g] for g in groups], axis=1)
                np.testing.assert_array_equal(sums.by_fold(domain)[name], expected)
    weighted = sums.weighted["eaft"]
    np.testing.assert_array_equal(sums.by_fold("y")["eaft_gate_norm_sum"], weighted[:, 2 * FOLDS :])
    np.testing.assert_allclose(sums.by_fold()["eaft_gate_norm_sum"].sum(1), sums.total()[1]["eaft"])
    np.testing.assert_allclose(sums.by_domain()["x"][1]["eaft"], weighted[:, FOLDS : 2 * FOLDS].sum(1))
    assert {"norm_max", "activation_max", "gate_mean"}.isdisjoint(sums.by_fold())


def test_folds_are_added_one_by_one(finished: Finished, program: Program) -> None:
    parts = [finished("a", 1, "xy", folds=FOLDS, eaft=True), finished("b", 2, "y", folds=FOLDS, eaft=True)]
    info = merged(program, *parts)
    assert not any("folds" in warning for warning in info["warnings"])
    a, b, both = (read_sums(Path(name) / "statistics.safetensors") for name in (*parts, "out"))
    for name, sums in both.by_fold("y").items():
        np.testing.assert_allclose(sums, a.by_fold("y")[name] + b.by_fold("y")[name], err_msg=name)
    np.testing.assert_array_equal(both.by_fold("x")["count"], a.by_fold("x")["count"])
    np.testing.assert_array_equal(
        both.statistics.norm_max[:, FOLDS + 3],
        np.maximum(a.statistics.norm_max[:, FOLDS + 3], b.statistics.norm_max[:, 3]),
    )


@pytest.mark.parametrize(("folds", "left", "says"), [(5, 5, "b has 5"), (1, 1, "b has none")])
def test_folds_that_not_all_have_are_given_up_and_said(
    folds: int, left: int, says: str, finished: Finished, program: Program
) -> None:
    parts = [finished("a", 1, folds=FOLDS), finished("b", 2, folds=folds)]
    (warning,) = (warning for warning in merged(program, *parts)["warnings"] if "folds" in warning)
    assert "folds are kept as far as all merged profiles have them" in warning and "a has 10" in warning
    assert says in warning
    a, b, both = (read_sums(Path(name) / "statistics.safetensors") for name in (*parts, "out"))
    assert both.folds == left
    of_a = a.by_fold()["gate_sum"]
    expected = np.stack([of_a[:, fold::left].sum(1) for fold in range(left)], axis=1) + b.by_fold()["gate_sum"]
    np.testing.assert_allclose(both.by_fold()["gate_sum"], expected)
    np.testing.assert_array_equal(both.total()[0].norm_max, np.maximum(a.total()[0].norm_max, b.total()[0].norm_max))


def test_profile_json_of_a_merge(finished: Finished, program: Program, tmp_path: Path) -> None:
    first, second = finished("a", 1), finished("b", 2, max_seq_length=32, data="other.jsonl")
    edit(second / "profile.json", engine="streamed")
    infos = {p.name: json.loads((p / "profile.json").read_text()) for p in (first, second)}
    info = merged(program, first, second)
    hashes = sorted(i["prompts_hash"] for i in infos.values())
    assert info["prompts_hash"] == hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    assert [part["prompts_hash"] for part in info["merged"]] == hashes
    assert {Path(p["folder"]).name: p["command"] for p in info["merged"]} == {"a": "profile a", "b": "profile b"}
    assert (info["rows"], info["truncated_rows"], info["empty_rows"]) == (8, 2, 2)
    assert (info["seconds"], info["compile_seconds"], info["peak_rss_bytes"]) == (5, 4, 2)
    assert info["tokens_per_s"] == info["total_tokens"] / 5 == sum(i["total_tokens"] for i in infos.values()) / 5
    assert info["engine"] == "resident, streamed"
    # An option that these profiles are older than has the value with which they were made.
    newer = {"keep_thinking": False, "swap": False, "part": "all"}
    expected = OPTIONS | {"max_seq_length": "several", "data": "several"} | newer
    assert info["options"] == expected
    assert "--max-seq-length is not the same in all merged profiles: 32, 64" in info["warnings"]
    assert info["command"].startswith("gptoss-jax merge ") and info["versions"]["jax"]
    report = (tmp_path / "out" / "report.md").read_text()
    assert "- Dataset: 2 profiles merged\n" in report and f"  - `{first}`: 4 rows\n" in report
    assert "- Rows: 8\n- Max seq length: several\n" in report
    assert "```bash\nprofile " in report and info["command"] + "\n```" in report


def test_differences_are_still_told_when_merged_again(finished: Finished, program: Program, tmp_path: Path) -> None:
    merged(program, finished("a", 1), finished("b", 2, max_seq_length=32))
    (tmp_path / "out").rename(tmp_path / "ab")
    info = merged(program, "ab", finished("c", 3, max_seq_length=32))
    assert "--max-seq-length is not the same in all merged profiles: 32, several" in info["warnings"]


def assert_added(column: str, parts: list[Path], out: Path) -> None:
    """Over all rows, and in the domain that all parts have."""
    for domain in (None, "y"):
        expected = sum(read_columns(part, domain)[column] for part in parts)
        np.testing.assert_allclose(read_columns(out, domain)[column], expected)


def test_sums_of_eaft_are_added(finished: Finished, program: Program, tmp_path: Path) -> None:
    parts = [finished("a", 1, "xy", eaft=True), finished("b", 2, "y", eaft=True)]
    info = merged(program, *parts)
    assert_added("eaft_gate_norm_sum", parts, tmp_path / "out")
    assert any("--eaft" in warning for warning in info["warnings"])
    assert info["tokens_per_s"] == 2 * info["total_tokens"] / info["seconds"]


def test_sums_of_swap_are_added(finished: Finished, program: Program, tmp_path: Path) -> None:
    """Profiles that were not asked for them have none, and nobody is told of it."""
    parts = [finished("a", 1, "xy", swap=True), finished("b", 2, "y", swap=True)]
    asked = merged(program, *parts)
    assert_added("swap_sum", parts, tmp_path / "out")
    plain = merged(program, finished("c", 1, "xy"), finished("d", 2, "y"))
    assert "swap_sum" not in read_columns(tmp_path / "out")
    assert asked["warnings"] == plain["warnings"]


def test_profiles_of_a_remote_storage(two: list[Path], program: Program, tmp_path: Path) -> None:
    merged(program, *two)
    bucket = UPath("memory://merge")
    try:
        for file in (file for folder in two for file in folder.iterdir()):
            copy = bucket / file.parent.name / file.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
        assert program("merge", bucket / "a", bucket / "b", "--out", bucket / "out") == (0, "")
        for name in SAME_BYTES:
            assert (bucket / "out" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    finally:
        bucket.fs.rm("/merge", recursive=True)


# What does not add.

SETTINGS = [
    case("keep", {"keep": "all"}, "--keep all", "assistant"),
    case("channel weights", {"channel_weights": {"final": 1.0}}, "--channel-weights", "final"),
    case("skip first", {"skip_first": 1}, "--skip-first 1", "has 0"),
    case("eaft", {"eaft": True}, "--eaft True", "False"),
    case("swap", {"swap": True}, "--swap True", "False"),
]


@pytest.mark.parametrize(("options", "says"), SETTINGS)
def test_settings_of_what_counts(
    options: dict[str, Any], says: tuple[str, ...], finished: Finished, refused: Refused
) -> None:
    a, b = finished("a", 1), finished("b", 2, **options)
    refused("merge", a, b, "--out", "out", says=(str(a), str(b), *says))


def test_settings_of_eaft(finished: Finished, refused: Refused, program: Program) -> None:
    """Matter where there are sums of EAFT."""
    a, b = finished("a", 1, eaft=True), finished("b", 2, eaft=True, eaft_weights=[1.0, -1.0, 0.25])
    refused("merge", a, b, "--out", "out", says=("--eaft-weights", "-1.0", "-2.0"))
    merged(program, finished("c", 3), finished("d", 4, eaft_weights=[1.0, -1.0, 0.25]))


def test_rows_in_two_parts(finished: Finished, refused: Refused) -> None:
    a, b, c = finished("a", 1), finished("b", 2, rows=range(20, 24)), finished("c", 3, rows=range(22, 26))
    refused("merge", a, b, c, "--out", "out", says=(f"{b} and {c} share 2 rows",))


def test_one_folder_twice(two: list[Path], tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "link").symlink_to("a")
    refused("merge", *two, "link", says=("link is named twice",))
    refused("merge", "a", "./b/../a", says=("named twice",))


def test_another_model(two: list[Path], refused: Refused) -> None:
    edit(two[1] / "profile.json", model_fingerprint="g")
    refused("merge", *two, says=(f"{two[1]} is a profile of another model than {two[0]}",))


def test_no_finished_profile(two: list[Path], tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "gone", "a/report.md"):
        refused("merge", "a", name, says=(name, "profile.json"))
    (two[1] / "statistics.safetensors").unlink()
    refused("merge", *two, says=(str(two[1]), "statistics.safetensors", "profile its rows again"))


def test_too_many_domains(finished: Finished, refused: Refused) -> None:
    domains = [str(n) for n in range(MAX_DOMAINS)]
    a, b = finished("a", 1, domains[:200]), finished("b", 2, ["more", *domains[200:]])
    refused("merge", a, b, says=(f"{MAX_DOMAINS + 1} domains", str(MAX_DOMAINS)))


def test_out(two: list[Path], tmp_path: Path, refused: Refused) -> None:
    refused("merge", *two, "--out", "a", says=("a: exists already",))
    refused("merge", *two, "--out", "a", "--overwrite", says=("a: is where the input",))
    refused("merge", *two, "--out", tmp_path, "--overwrite", says=("--out",))


ARGV = [
    case("one profile", ["merge", "a"], "two or more"),
    case("no profile", ["merge"], "PROFILES", "gptoss-jax merge --help"),
    case("data", ["merge", "a", "b", "--data", "rows.jsonl"], "--data", "gptoss-jax merge --help"),
    case("two models", ["profile", "a", "b", "--data", "rows.jsonl"], "(b)", "gptoss-jax profile --help"),
    case("no data", ["profile", "a"], "--data", "gptoss-jax profile --help"),
]


@pytest.mark.parametrize(("argv", "says"), ARGV)
def test_command_line(argv: list[str], says: tuple[str, ...], two: list[Path], refused: Refused) -> None:
    refused(*argv, says=says)


# Damaged files.

INFOS = [
    case("no object", [], "lists no options"),
    case("no options", {"options": ...}, "lists no options"),
    case("options lack one", {"options": {}}, "lacks the option"),
    case("fingerprint missing", {"model_fingerprint": ...}, "'model_fingerprint'"),
    case("command is a list", {"command": ["a"]}, "'command'"),
    case("rows are text", {"rows": "4"}, "'rows'"),
    case("rows are true", {"rows": True}, "'rows'"),
    case("other rows", {"rows": 5}, "'rows'", "statistics.safetensors"),
    case("other tokens", {"total_tokens": 5}, "'total_tokens'", "statistics.safetensors"),
    case("other kept tokens", {"kept_tokens": 5}, "'kept_tokens'", "statistics.safetensors"),
    case("other eaft", {"options": OPTIONS | {"eaft": True}}, "'eaft'", "statistics.safetensors"),
    case("other swap", {"options": OPTIONS | {"swap": True}}, "'swap'", "statistics.safetensors"),
    case("no time", {"seconds": 0}, "'seconds'"),
    case("seconds are no number", {"seconds": float("nan")}, "'seconds'"),
    case("endless seconds", {"compile_seconds": 10**400}, "'compile_seconds'"),
    case("negative", {"truncated_rows": -1}, "'truncated_rows'"),
    case("hash of another kind", {"prompts_hash": "\ud800"}, "'prompts_hash'"),
]


@pytest.mark.parametrize(("changes", "says"), INFOS)
def test_profile_json(changes: Any, says: tuple[str, ...], two: list[Path], refused: Refused) -> None:
    file = two[1] / "profile.json"
    if isinstance(changes, dict):
        edit(file, **changes)
    else:
        dump(file, changes)
    refused("merge", *two, says=(str(file), *says))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 200_000, b'{"rows": ' + b"9" * 5000 + b"}"])
def test_profile_json_that_is_none(content: bytes, two: list[Path], refused: Refused) -> None:
    (two[1] / "profile.json").write_bytes(content)
    refused("merge", *two, says=(str(two[1]), "not a JSON file"))


def some_tensors(domains: list[str]) -> dict[str, np.ndarray]:
    """Those of a store of the first version."""
    sums = some_sums(2, domains, range(4))
    return of_version(1, vars(sums.statistics) | {"row_hashes": sums.row_hashes})


def of_version(version: int, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without the statistics that came later."""
    return {name: x for name, x in tensors.items() if name not in DECLARED or DECLARED[name].since <= version}


TENSORS = [
    case("one missing", {"count": None}, "'count' is missing"),
    case("no hashes", {"row_hashes": None}, "'row_hashes' is missing"),
    case("one too many", {"more": np.zeros(2)}, "'more' is missing or unknown"),
    case("counts of fractions", {"count": np.ones((L, 1, E))}, "'count' is float64"),
    case("sums of integers", {"norm_sum": np.ones((L, 1, E), np.int64)}, "'norm_sum' is int64"),
    case("hashes of integers", {"row_hashes": np.arange(4)}, "'row_hashes' is int64"),
    case("half precision", {"gate_sum": np.ones((L, 1, E), np.float16)}, "F16"),
    case("fewer layers", {"gate_sum": np.ones((L - 1, 1, E))}, "'gate_sum'", "[1, 1, 5]"),
    case("fewer axes", {"gate_sum": np.ones((L, E))}, "'gate_sum'", "[2, 5]"),
    case("more experts", {"coactivation": np.ones((L, 1, E, E + 1), np.int64)}, "'coactivation'"),
    case("no row", {"row_hashes": np.zeros(0, np.uint64)}, "'row_hashes'"),
    case("other bins", {"gate_histogram": np.zeros((L, 1, 3), np.int64)}, "'gate_histogram'"),
    case("two domains", {name: x for name, x in some_tensors(["", "x"]).items() if name in DECLARED}, "'count'"),
    case("EAFT by layer", {"eaft_gate_norm_sum": np.zeros(L)}, "'eaft_gate_norm_sum'"),
    case("EAFT of no number", {"eaft_gate_norm_sum": np.full((L, 1, E), -np.inf)}, "'eaft_gate_norm_sum'"),
    case("negative count", {"count": np.full((L, 1, E), -1)}, "'count' holds"),
    case("negative sum", {"norm_sum": np.full((L, 1, E), -1.0)}, "'norm_sum' holds"),
    case("no number", {"norm_max": np.full((L, 1, E), np.nan)}, "'norm_max' holds"),
    case("infinite", {"gate_rank_sum": np.full((L, 1, K), np.inf)}, "'gate_rank_sum' holds"),
    case("counts overflow", {"tokens": np.full((L, 1), 2**62)}, "'tokens' holds"),
    case("a count too large", {"count": np.full((L, 1, E), 2**53 + 1)}, "'count' holds"),
    case("sums overflow", {"norm_sq_sum": np.full((L, 1, E), 1e308)}, "'norm_sq_sum' holds"),
]


@pytest.mark.parametrize(("changes", "says"), TENSORS)
def test_tensors(changes: dict[str, Any], says: tuple[str, ...], two: list[Path], refused: Refused) -> None:
    file = two[1] / "statistics.safetensors"
    tensors = {name: tensor for name, tensor in (some_tensors([""]) | changes).items() if tensor is not None}
    safetensors.numpy.save_file(tensors, file, {"domains": '[""]'})
    refused("merge", *two, says=(str(file), *says, "profile its rows again"))


METADATA = [
    case("none", None, "no domains"),
    case("other keys", {"format": "pt"}, "no domains"),
    case("no JSON", {"domains": "["}, "not the sums"),
    case("nested too deep", {"domains": "[" * 200_000}, "not the sums"),
    case("no list", {"domains": '{"x": 1}'}, "no domains"),
    case("numbers", {"domains": "[1]"}, "no domains"),
    case("one too many", {"domains": '["x", "y"]'}, "'count'"),
    case("twice", {"domains": '["x", "x"]'}, "twice"),
    case("no text", {"domains": '["\\ud800"]'}, "surrogate"),
]


@pytest.mark.parametrize(("metadata", "says"), METADATA)
def test_domains(metadata: Any, says: tuple[str, ...], two: list[Path], refused: Refused) -> None:
    file = two[1] / "statistics.safetensors"
    safetensors.numpy.save_file(some_tensors([""]), file, metadata)
    refused("merge", *two, says=(str(file), *says))


def test_bytes_at_random(two: list[Path], tmp_path: Path) -> None:
    """Cut anywhere, or with any byte of its header changed, a file is read as it was or refused."""
    whole = (two[1] / "statistics.safetensors").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    rng, file = random.Random(0), tmp_path / "damaged"
    damaged = [whole[: rng.randrange(len(whole))] for _ in range(50)]
    for _ in range(300):
        changed = bytearray(whole)
        changed[rng.randrange(header)] = rng.randrange(256)
        damaged.append(bytes(changed))
    refusals = 0
    for content in damaged:
        file.write_bytes(content)
        try:
            read_sums(file)
        except ProfileError:
            refusals += 1
    assert refusals > 250


def test_metadata_that_is_null(two: list[Path], refused: Refused) -> None:
    file = two[1] / "statistics.safetensors"
    header, tensors = read_shard(file)
    write_shard(file, header | {"__metadata__": None}, tensors)
    refused("merge", *two, says=(str(file),))


# Other versions of the store.


def test_a_store_of_the_first_version_is_read_and_merged(two: list[Path], program: Program) -> None:
    """It had no number, and its domains as a text of their own."""
    expected = merged(program, *two)
    for folder, domains in zip(two, ('["x", "y"]', '["y"]'), strict=True):
        file = folder / "statistics.safetensors"
        safetensors.numpy.save_file(of_version(1, safetensors.numpy.load_file(file)), file, {"domains": domains})
    info = merged(program, *two)
    later = [name for name, statistic in DECLARED.items() if statistic.since > 1 and not statistic.asked]
    assert len(info["warnings"]) == len(expected["warnings"]) + len(later)
    assert info | {"warnings": expected["warnings"]} == expected


@pytest.mark.parametrize("folds", [None, 0, "2", True, 2])
def test_a_store_with_a_wrong_number_of_folds_is_refused(folds: Any, two: list[Path], refused: Refused) -> None:
    file = two[1] / "statistics.safetensors"
    about = {"version": store.VERSION, "domains": ["y"], "folds": folds}
    safetensors.numpy.save_file(safetensors.numpy.load_file(file), file, {"store": json.dumps(about)})
    refused("merge", *two, says=(str(file), "'count'" if folds == 2 else "number of folds"))


def test_a_store_of_the_version_before_folds_has_none(two: list[Path], program: Program) -> None:
    file = two[1] / "statistics.safetensors"
    expected = read_sums(file)
    safetensors.numpy.save_file(
        of_version(2, safetensors.numpy.load_file(file)), file, {"store": '{"version": 2, "domains": ["y"]}'}
    )
    assert read_sums(file).folds == 1
    np.testing.assert_array_equal(read_sums(file).by_fold()["count"], expected.by_fold()["count"])
    assert program("rank", two[1], "--out", "ranking.json") == (0, "")


def test_a_store_of_a_later_version_is_refused(two: list[Path], refused: Refused) -> None:
    file = two[1] / "statistics.safetensors"
    tensors = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file(tensors, file, {"store": '{"version": 99, "domains": ["y"]}'})
    refused("merge", *two, says=(str(file), "version is 99"))


def test_what_an_older_store_lacks_is_left_out_and_said(
    two: list[Path], program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if `activation_max` had come with the version that is written now."""
    newer = replace(DECLARED["activation_max"], since=store.VERSION)
    monkeypatch.setitem(DECLARED, "activation_max", newer)
    file = two[1] / "statistics.safetensors"
    safetensors.numpy.save_file(of_version(1, safetensors.numpy.load_file(file)), file, {"domains": '["y"]'})
    assert any("activation_max is left out" in warning for warning in merged(program, *two)["warnings"])
    assert "activation_max" not in read_columns(Path("out")) and "norm_max" in read_columns(Path("out"))
    assert program("rank", "out", "--criterion", "reap_l2", "--out", "ranking") == (0, "")


def test_co_activations_of_many_domains_are_kept_together(finished: Finished, program: Program) -> None:
    domains = [str(n) for n in range(MAX_JOINT)]
    info = merged(program, finished("a", 1, domains), finished("b", 2, ["more"]))
    assert any("co-activations are kept for all" in warning for warning in info["warnings"])
    sums, parts = (
        read_sums(Path("out/statistics.safetensors")),
        [read_sums(Path(f"{n}/statistics.safetensors")) for n in "ab"],
    )
    assert sums.statistics.count.shape[1] == MAX_JOINT + 1
    together = sum(part.statistics.coactivation.sum(1, keepdims=True) for part in parts)
    np.testing.assert_array_equal(sums.statistics.coactivation, together)
    kinds = pq.read_table("out/usage_by_domain.parquet")["kind"].to_pylist()
    assert "usage_count" in kinds and "coact_count" not in kinds
    assert "coact_count" in pq.read_table("out/usage.parquet")["kind"].to_pylist()


# Addition.

NUMBERS = st.builds(
    lambda whole, real: Statistics(**{n: whole[i] if DECLARED[n].integer else real[i] for i, n in enumerate(DECLARED)}),
    arrays.arrays(np.int64, (len(DECLARED), 3), elements=st.integers(0, 2**50)),
    arrays.arrays(np.float64, (len(DECLARED), 3), elements=st.floats(0, 1e40)),
)


@pytest.mark.slow
@given(NUMBERS, NUMBERS, NUMBERS)
def test_addition_in_any_order_and_grouping(a: Statistics, b: Statistics, c: Statistics) -> None:
    """Order never matters; grouping does not for integers and maxima, and for sums in the last digits alone."""
    for name, value in vars(a.merge(b)).items():
        np.testing.assert_array_equal(value, getattr(b.merge(a), name), strict=True)
    grouped = a.merge(b.merge(c))
    for name, value in vars(a.merge(b).merge(c)).items():
        exact = DECLARED[name].integer or DECLARED[name].largest
        np.testing.assert_allclose(value, getattr(grouped, name), rtol=0 if exact else 1e-15, err_msg=name)


@given(st.lists(st.tuples(st.text(max_size=3), st.text(max_size=3)), unique=True, max_size=9), st.randoms())
def test_hashes_of_rows_have_no_order(pairs: list[tuple[str, str]], shuffled: random.Random) -> None:
    rows = [Row(text, row_id) for row_id, text in pairs]
    again = list(rows)
    shuffled.shuffle(again)
    assert row_hashes(rows).tolist() == row_hashes(again).tolist() == sorted(row_hashes(rows).tolist())
