"""Rankings, keep-sets, profiles and output paths that cannot be used are refused, and nothing is written."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from .bad_input import RANKING, Refused, case, dump, table
from .commands import FINGERPRINTS

ROW = RANKING[0]
TWICE, OUT_OF_RANGE, NEGATIVE = [6, 5, 4, 3, 2, 1, 1], [7, 5, 4, 3], [-1, 5, 4, 3]


def with_row(row: Any) -> list[Any]:
    """A ranking whose layer 2 is `row`."""
    return [ROW, ROW, row, ROW]


def written(**changes: Any) -> dict[str, Any]:
    """An object as `rank` writes it, but for what is changed."""
    return {"kind": "ranking", "version": 1, "layers": [ROW] * 4, "criterion": "reap", "domains": {}} | changes


# What the file holds; an answer to --keep 4.
RANKINGS = [
    case("expert twice", with_row(TWICE), "ranking.json", "layer 2", "expert 1 twice"),
    case("expert out of range", with_row(OUT_OF_RANGE), "layer 2", "expert 7", "0 to 6"),
    case("expert negative", with_row(NEGATIVE), "layer 2", "expert -1", "0 to 6"),
    case("expert beyond 64 bits", with_row([2**70]), "layer 2", "0 to 6"),
    case("truth values", with_row([True, False, 2, 3]), "layer 2", "expert True", "0 to 6"),
    case("fractions", with_row([1.0, 2.0, 3.0, 4.0]), "layer 2", "expert 1.0", "0 to 6"),
    case("text", with_row(["1", "2", "3", "4"]), "layer 2", "expert '1'", "0 to 6"),
    case("lists of lists", with_row([[1], [2], [3], [4]]), "layer 2", "expert [1]"),
    case("null", with_row([None]), "layer 2", "expert None"),
    case("gap", with_row([3, 1, 2, 0, 6, 5]), "layer 2 lacks expert 4"),
    case("no expert", with_row([]), "layer 2 lacks expert 0"),
    case("layer is no list", with_row(5), "ranking.json", "list for each layer"),
    case("too few layers", [ROW] * 3, "ranking.json", "3 layers", "4"),
    case("too many layers", [ROW] * 5, "ranking.json", "5 layers", "4"),
    case("empty list", [], "0 layers"),
    case("empty object", {}, "0 layers"),
    case("text alone", "ranking", "list for each layer"),
    case("number alone", 5, "list for each layer"),
    case("null alone", None, "list for each layer"),
    case("other keys", {"a": ROW, "b": ROW, "c": ROW, "d": ROW}, "layer_0", "found a, b, c, d"),
    case("layer left out", {f"layer_{i}": ROW for i in (0, 1, 3, 4)}, "layer_0", "layer_4"),
    case("keep is null", {"keep": None}, "list for each layer"),
    case("keep-sets", written(kind="keep_sets"), "ranking.json", "holds keep-sets", "--keep-sets"),
    case("unknown kind", written(kind="profile"), "ranking.json", "kind 'profile'", "ranking, keep_sets"),
    case("kind is no text", written(kind=[]), "ranking.json", "kind []"),
    case("newer version", written(version=2), "ranking.json", "version 2", "reads version 1"),
    case("no version", written(version=None), "ranking.json", "version None"),
    case("version is a truth value", written(version=True), "ranking.json", "version True"),
    case("object without layers", written(layers=None), "ranking.json", "list for each layer"),
    case("object with a gap", written(layers=with_row([0])), "layer 2 lacks expert 1"),
    case("criterion is no text", written(criterion=5), "'criterion' is not a text"),
    case("domains are a list", written(domains=["a"]), "'domains' is not an object of domains and their weights"),
    case("weight is text", written(domains={"a": "1"}), "'domains' is not"),
    case("weight is not a number", written(domains={"a": float("nan")}), "'domains' is not"),
    case("weight beyond floats", written(domains={"a": 10**400}), "'domains' is not"),
    case("seed is a fraction", written(seed=0.5), "'seed' is not a whole number"),
    case("counts for other layers", written(counts=[[1] * 7] * 3), "'counts' has not one entry for each expert"),
    case("counts for other experts", written(counts=[[1] * 6] * 4), "'counts' has not one entry for each expert"),
    case("count negative", written(counts=[[-1] * 7] * 4), "'counts' holds what is not a number of tokens"),
    case("reasons are no texts", written(reasons=[[1] * 7] * 4), "'reasons' holds what is not a text or null"),
]


@pytest.mark.parametrize(("content", "says"), RANKINGS)
def test_ranking(content: Any, says: tuple[str, ...], tiny_mxfp4: Path, tmp_path: Path, refused: Refused) -> None:
    file = dump(tmp_path / "ranking.json", content)
    refused("prune", tiny_mxfp4, "--ranking", file, "--keep", 4, "--out", "out", says=says)


FILES = [
    case("cut", b"[[1, 2", "ranking.json", "not a JSON file"),
    case("empty", b"", "ranking.json", "not a JSON file"),
    case("no UTF-8", b"\xff\xfe", "ranking.json", "not a JSON file"),
    case("endless number", b"[[" + b"9" * 5000 + b"]]", "ranking.json", "not a JSON file"),
    case("nested too deep", b"[" * 200_000, "ranking.json", "not a JSON file"),
]


@pytest.mark.parametrize("option", ["--ranking", "--keep-sets"])
@pytest.mark.parametrize(("content", "says"), FILES)
def test_no_json(
    option: str, content: bytes, says: tuple[str, ...], tiny_mxfp4: Path, tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "ranking.json").write_bytes(content)
    keep = ["--keep", 4] if option == "--ranking" else []
    refused("prune", tiny_mxfp4, option, "ranking.json", *keep, "--out", "out", says=says)


KEEP_SETS = [
    case("unequal lengths", [[0, 1, 2, 3], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3]], "keep 4, 3, 4, 4", "same number"),
    case("expert twice", [[0, 1, 1]] * 4, "layer 0", "expert 1 twice"),
    case("too few layers", {"keep": [[0, 1, 2]] * 3}, "3 layers", "4"),
    case("below top-k", [[0, 1]] * 4, "keeping 2", "3 → 2", "--lower-top-k"),
    case("no expert", [[]] * 4, "keep.json", "layer 0 keeps no expert"),
    case("a ranking", written(), "keep.json", "holds a ranking", "--ranking and --keep"),
    case("newer version", written(kind="keep_sets", version=2), "keep.json", "version 2", "reads version 1"),
]


@pytest.mark.parametrize(("content", "says"), KEEP_SETS)
def test_keep_sets(content: Any, says: tuple[str, ...], tiny_mxfp4: Path, tmp_path: Path, refused: Refused) -> None:
    refused("prune", tiny_mxfp4, "--keep-sets", dump(tmp_path / "keep.json", content), "--out", "out", says=says)


@pytest.mark.parametrize(("option", "writes"), [("--ranking", "rank"), ("--keep-sets", "select")])
def test_missing_file(option: str, writes: str, tiny_mxfp4: Path, tmp_path: Path, refused: Refused) -> None:
    keep = ["--keep", 4] if option == "--ranking" else []
    says = ("gone.json", "no such file", f"`gptoss-jax {writes}` writes one")
    refused("prune", tiny_mxfp4, option, "gone.json", *keep, says=says)
    refused("prune", tiny_mxfp4, option, tmp_path, *keep, says=("not a JSON file",))


def test_no_expert_at_all(tiny_mxfp4: Path, tmp_path: Path, refused: Refused) -> None:
    keep = dump(tmp_path / "keep.json", [[]] * 4)
    refused("prune", tiny_mxfp4, "--keep-sets", keep, "--lower-top-k", "--out", "out", says=("keep.json",))


PRUNE = [
    case("keep all and more", ["--keep", 8], "--keep 8", "7 experts"),
    case("keep none", ["--keep", 0], "--keep 0", "7 experts"),
    case("keep none, top-k lowered", ["--keep", 0, "--lower-top-k"], "--keep 0", "7 experts"),
    case("keep negative", ["--keep", -1], "--keep -1", "7 experts"),
    case("keep is text", ["--keep", "x"], "--keep is 'x'", "a per cent of them as 50%"),
    case("keep is a fraction", ["--keep", "4.5"], "--keep", "'4.5'"),
    case("keep is a strange per cent", ["--keep", "-5%"], "--keep is '-5%'", "a per cent of them as 50%"),
    case("keep is endless", ["--keep", "50.0000001%"], "--keep is '50.0000001%'"),
    case("keep less than one", ["--keep", "14%"], "--keep 14%", "7 experts", "keep 1 to that many"),
    case("keep more than all", ["--keep", "150%"], "--keep 150%", "7 experts"),
    case("keep below top-k", ["--keep", 2], "keeping 2", "3 that each token uses", "3 → 2", "--lower-top-k"),
    case("no keep", [], "--ranking with --keep"),
    case("both", ["--keep", 4, "--keep-sets", "ranking.json"], "either"),
    case("unknown format", ["--keep", 4, "--format", "fp8"], "--format", "same, mxfp4"),
    case("unknown option", ["--keep", 4, "--bogus"], "--bogus", "gptoss-jax prune --help"),
    case("shards of no size", ["--keep", 4, "--max-shard-size", "big"], "--max-shard-size", "'big'", "5GB"),
    case("shards of negative size", ["--keep", 4, "--max-shard-size", "-5GB"], "--max-shard-size", "5GB"),
    case("shards without size", ["--keep", 4, "--max-shard-size", ""], "--max-shard-size", "5GB"),
    case("shards in unknown units", ["--keep", 4, "--max-shard-size", "5TB"], "--max-shard-size", "'5TB'"),
    case("two points", ["--keep", 4, "--max-shard-size", "1.2.3GB"], "--max-shard-size"),
    case("no digit", ["--keep", 4, "--max-shard-size", ".GB"], "--max-shard-size"),
    case("endless", ["--keep", 4, "--max-shard-size", "9" * 400], "--max-shard-size"),
    case("shards of 0", ["--keep", 4, "--max-shard-size", "0GB"], "--max-shard-size"),
    case("domain is a path", ["--keep", 4, "--domain", "../up"], "--domain"),
    case("domain of two lines", ["--keep", 4, "--domain", "a\nb: c"], "--domain"),
    case("domain too long", ["--keep", 4, "--domain", "a" * 300], "--domain"),
]


@pytest.mark.parametrize(("options", "says"), PRUNE)
def test_options(
    options: list[Any], says: tuple[str, ...], tiny_mxfp4: Path, ranking: Path, tmp_path: Path, refused: Refused
) -> None:
    refused("prune", tiny_mxfp4, "--ranking", ranking, *options, says=says)


COMMANDS = [
    case("unknown command", ["fly"], "'fly'"),
    case("unknown option", ["--bogus"], "--bogus"),
    case("model alone", ["profile", "model"], "--data", "gptoss-jax profile --help"),
    case("no model", ["prune"], "MODEL", "gptoss-jax prune --help"),
    case("no profile", ["rank"], "PROFILE", "gptoss-jax rank --help"),
    case("two models", ["prune", "a", "b"], "b", "gptoss-jax prune --help"),
    case("unknown criterion", ["rank", ".", "--criterion", "best"], "--criterion is 'best'", "one of reap, "),
    case("option without value", ["rank", ".", "--out"], "--out"),
    case("no command", [], "gptoss-jax --help"),
]


@pytest.mark.parametrize(("argv", "says"), COMMANDS)
def test_commands(argv: list[str], says: tuple[str, ...], refused: Refused) -> None:
    refused(*argv, says=says)


@pytest.mark.parametrize("argv", [["fly"], ["--bogus"]])
def test_where_help_is(argv: list[str], refused: Refused) -> None:
    error = refused(*argv, says=("see gptoss-jax --help",))
    assert len(error) < 120


# Profiles.


def rows(order: Any) -> dict[str, Any]:
    return {name: column[order] for name, column in table().items()}


TABLES = [
    case("row missing", rows(np.arange(28) != 5), "profile.parquet", "every expert of every layer"),
    case("last row missing", rows(np.arange(27)), "profile.parquet", "every expert of every layer"),
    case("shuffled", rows(np.arange(28)[::-1]), "profile.parquet", "every expert of every layer"),
    case("row twice", rows([0, *range(28)]), "profile.parquet", "every expert of every layer"),
    case("no rows", rows([]), "profile.parquet", "not a saliency table"),
    case("no layers", {k: v for k, v in table().items() if k != "layer"}, "profile.parquet", "layer"),
    case("no counts", {k: v for k, v in table().items() if k != "count"}, "profile.parquet", "count"),
    case("layers are text", table() | {"layer": ["a"] * 28}, "profile.parquet", "not a saliency table"),
    case("no gate_norm_sum", {k: v for k, v in table().items() if k != "gate_norm_sum"}, "'gate_norm_sum'", "lacks"),
    case("layers are null", table() | {"layer": [None] * 28}, "profile.parquet"),
    case("sums are text", table() | {"gate_norm_sum": ["a"] * 28}, "gate_norm_sum"),
    case("sums are not numbers", table() | {"gate_norm_sum": [np.nan] * 28}, "gate_norm_sum"),
    case("sums are null", table() | {"gate_norm_sum": [1.0, None] * 14}, "gate_norm_sum"),
    case("sums are lists", table() | {"gate_norm_sum": [[1.0]] * 28}, "gate_norm_sum"),
    case("counts negative", table() | {"count": np.arange(-28, 0)}, "count"),
]


@pytest.mark.parametrize(("columns", "says"), TABLES)
def test_table(columns: dict[str, Any], says: tuple[str, ...], tmp_path: Path, refused: Refused) -> None:
    pq.write_table(pa.table(columns), tmp_path / "profile.parquet")
    refused("rank", "profile.parquet", says=says)


def by_domain(profile: Path, names: Any = ("a", "b")) -> None:
    tables = [pa.table({"domain": pa.array([name] * 28, pa.string())} | table()) for name in names]
    pq.write_table(pa.concat_tables(tables), profile / "saliency_by_domain.parquet")


def test_profile_that_lacks_something(profile: Path, tmp_path: Path, refused: Refused) -> None:
    refused("rank", "gone", says=("gone", "no such file"))
    refused("rank", tmp_path, says=("saliency.parquet", "no such file", "is no profile"))
    refused("rank", profile, "--domain", "a", says=("saliency_by_domain.parquet", "--domain-column"))
    refused("rank", profile / "saliency.parquet", "--domain", "a", says=("saliency.parquet", "domain"))
    refused("rank", profile, "--criterion", "eaft_reap", says=("'eaft_gate_norm_sum'", "--eaft"))
    by_domain(profile)
    refused("rank", profile, "--domain", "c", says=("no domain 'c'", "a, b"))
    (profile / "profile.json").write_text("{")
    refused("rank", profile, says=("profile.json", "not a JSON file"))
    (profile / "saliency.parquet").write_text("no Parquet")
    refused("rank", profile, says=("saliency.parquet", "not a saliency table"))


def test_domain_that_is_null(profile: Path, refused: Refused) -> None:
    by_domain(profile, ("a", None))
    refused("rank", profile, "--domain", "c", says=("no domain 'c'", "a"))


def test_seed(profile: Path, refused: Refused) -> None:
    refused("rank", profile, "--criterion", "random", "--seed", -1, says=("--seed",))


def test_table_that_claims_to_be_huge(tmp_path: Path, refused: Refused) -> None:
    pq.write_table(pa.table({"layer": [2**45], "expert": [0], "count": [1]}), tmp_path / "huge.parquet")
    refused("rank", "huge.parquet", says=("huge.parquet", "every expert of every layer"))


# Where the output goes.


ALL = pytest.mark.parametrize(
    "command", ["profile", "merge", "prune", "rank", "select", "convert", "report", *FINGERPRINTS]
)


@ALL
def test_out_exists(argv: list[Any], tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    refused(*argv, "--out", "folder", says=("folder", "exists", "--overwrite"))
    refused(*argv, "--out", "file", says=("file", "exists", "--overwrite"))


@ALL
def test_out_below_a_file(argv: list[Any], tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "file").write_text("mine")
    refused(*argv, "--out", "file/out", says=("file/out", "--out"))


@ALL
def test_out_deep_below_a_file(argv: list[Any], tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "file").write_text("mine")
    refused(*argv, "--out", "file/deep/out", says=("file/deep/out", "--out"))


@ALL
def test_out_where_nothing_can_be(argv: list[Any], refused: Refused) -> None:
    if not Path("/proc/self").exists():
        pytest.skip("needs a folder in which nobody can write, not even root")
    refused(*argv, "--out", "/proc/out", says=("/proc/out", "--out"))


@ALL
def test_out_too_long(argv: list[Any], refused: Refused) -> None:
    refused(*argv, "--out", "a" * 300, says=("aaa", "--out"))


@pytest.mark.parametrize("command", ["profile", "rank"])
def test_out_is_here(argv: list[Any], refused: Refused) -> None:
    refused(*argv, "--out", ".", "--overwrite", says=("--out",))


def test_rank_over_a_folder(profile: Path, refused: Refused) -> None:
    refused("rank", profile, "--out", profile, "--overwrite", says=("profile", "--out"))


@pytest.mark.parametrize("command", ["prune", "profile", "convert"])
@pytest.mark.parametrize("out", ["model", "model/.", "other/../model", "link", "."])
def test_out_is_the_model(command: str, out: str, argv: list[Any], tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "link").symlink_to("model")
    refused(*argv, "--out", out, "--overwrite", says=("--out",))


@pytest.mark.parametrize("command", ["profile", "prune", "convert"])
def test_out_in_the_model(argv: list[Any], refused: Refused) -> None:
    refused(*argv, "--out", "model/out", says=("model/out", "--out"))


def test_out_is_an_input(model: Path, rows_jsonl: Path, profile: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "data").mkdir()
    shutil.copy(rows_jsonl, tmp_path / "data" / "rows.jsonl")
    argv = ["profile", model, "--data", "data", "--max-seq-length", 64]
    refused(*argv, "--out", "data", "--overwrite", says=("--out",))


def test_ranking_over_its_profile(profile: Path, refused: Refused) -> None:
    table = profile / "saliency.parquet"
    refused("rank", table, "--out", table, "--overwrite", says=("--out",))
