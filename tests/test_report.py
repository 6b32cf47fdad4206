"""What a profile writes: the published report to the letter, tables with the published schemas."""

import json
import re
from collections import Counter, defaultdict
from dataclasses import fields
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptoss_jax.data.batching import Document, padded
from gptoss_jax.devices.placement import Placement
from gptoss_jax.network.experts import Mixture
from gptoss_jax.network.router import Routing
from gptoss_jax.reports.markdown import concentration, profile_report, thin_evidence, top_experts
from gptoss_jax.reports.pictures import HEIGHT, LEFT, TOP, WIDTH, colour, pictures
from gptoss_jax.reports.rates import rate
from gptoss_jax.run import artifacts
from gptoss_jax.selection import ranking as select
from gptoss_jax.statistics.store import Sums
from gptoss_jax.statistics.sums import GATE_BINS, Statistics, layer_statistics
from gptoss_jax.statistics.tables import SALIENCY, columns, read_columns, usage_table
from tests.bad_input import table

L, E, K = 2, 7, 3
DOMAINS = ["law", "maths"]
PUBLISHED_COLUMNS = pa.schema(
    [(name, pa.int64()) for name in ("layer", "expert", "count")]
    + [(n, pa.float64()) for n in ("gate_sum", "norm_sum", "gate_norm_sum", "gate_mean", "norm_mean", "saliency_mean")]
)
USAGE_SCHEMA = pa.schema(
    [
        ("kind", pa.string()),
        ("layer", pa.int64()),
        ("expert_i", pa.int64()),
        ("expert_j", pa.int64()),
        ("value", pa.float64()),
    ]
)
NO_FOLDS = {"count": np.ones((1, 1, 2), np.int64)}
INFO = {
    "model": "openai/gpt-oss-20b",
    "options": {
        "data": "radna0/nemotron-math-v2-harmony-tools",
        "split": "high_part00",
        "text_column": "text",
        "domain": (),
        "batch_size": 1,
        "max_seq_length": 512,
        "keep": "assistant",
    },
    "rows": 20,
    "num_layers": 24,
    "num_experts": 32,
    "top_k": 4,
    "total_tokens": 10240,
    "kept_tokens": 10220,
    "tokens_per_s": 1551.2,
    "prompts_hash": "0eb2ae71419d5bc43e2c554cf1c7a127e355daa1fa4296b90f65437adf7910d9",
    "command": "gptoss-jax profile openai/gpt-oss-20b",
    "warnings": [],
}


@pytest.fixture(scope="module")
def routed() -> tuple[Statistics, list[np.ndarray], np.ndarray]:
    """Statistics of two batches [L, G, …], and the choices [N, k] of each layer's kept tokens, with their gates."""
    rng = np.random.default_rng(0)
    documents = [
        Document(np.ones(n, np.int32), (rng.random(n) < 0.7).astype(np.float32), group=n % 2) for n in (40, 9, 23, 31)
    ]
    measure = jax.jit(layer_statistics, static_argnums=3)
    statistics, choices, gates = None, [[] for _ in range(L)], [[] for _ in range(L)]
    for batch in padded(documents, 2, 64, len(DOMAINS)):
        tokens = batch.weights.size
        layers = []
        for layer in range(L):
            # Expert 5 is never chosen: its logit is below all others.
            logits = rng.standard_normal((tokens, E)).astype(np.float32) - 30 * (np.arange(E) == 5)
            chosen, experts = jax.lax.top_k(jnp.asarray(logits, jnp.float32), K)
            routing = Routing(jnp.asarray(logits, jnp.float32), experts, jax.nn.softmax(chosen, axis=-1))
            norms = jnp.asarray(rng.random((tokens, K)) * 9, jnp.float32)
            mixture = Mixture(jnp.zeros((tokens, 1)), norms, norms / 2, jnp.ones((tokens, K), bool))
            layers.append(measure(routing, mixture, batch, Placement("cpu")))
            kept = batch.weights.reshape(-1) > 0
            choices[layer].append(np.asarray(experts)[kept])
            gates[layer].append(np.asarray(routing.gates_Tk)[kept])
        step = jax.tree.map(lambda *leaves: np.stack(leaves), *layers).to_host()
        statistics = step if statistics is None else statistics.merge(step)
    assert statistics is not None
    return statistics, [np.concatenate(c) for c in choices], np.stack([np.concatenate(g) for g in gates])


@pytest.fixture(scope="module")
def folder(routed: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifacts of a profile of two domains."""
    out = tmp_path_factory.mktemp("profile")
    sums = Sums(routed[0], {}, DOMAINS, np.arange(4, dtype=np.uint64))
    measured = artifacts.Measured(103, 1, seconds=0.5, compile_seconds=0.1, peak_rss_bytes=1 << 30)
    artifacts.write(out, artifacts.completed(INFO | {"warnings": ["a warning"]}, sums, measured), sums)
    return out


def nothing_measured(layers: int, experts: int, top_k: int) -> Statistics:
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys([f.name for f in fields(Statistics)], (layers, experts))
    shapes |= {
        "coactivation": (layers, experts, experts),
        "tokens": (layers,),
        "gate_rank_sum": (layers, top_k),
        "gate_histogram": (layers, GATE_BINS),
        "router_entropy_sum": (layers,),
    }
    return Statistics(**{name: np.zeros(shape, np.int64) for name, shape in shapes.items()})


def headings(report: str) -> list[str]:
    return [line for line in report.splitlines() if line.startswith("## ")]


def section(report: str, heading: str) -> list[str]:
    """The lines under the one heading that starts so, empty ones left out."""
    (body,) = [part for part in re.split(r"^## ", report, flags=re.MULTILINE) if part.startswith(heading)]
    return [line for line in body.splitlines()[1:] if line]


@pytest.fixture
def published(shared: Path) -> str:
    texts = [file.read_text(encoding="utf-8") for file in sorted((shared / "seeds").iterdir())]
    (report,) = [t for t in texts if t.splitlines()[0] == "# 20B REAP-lite saliency profile (GPT-OSS MoE)"]
    return report


@pytest.fixture
def rendered(shared: Path) -> str:
    """The report of the published table, with what the published report says of its run."""
    columns = read_columns(shared / "data" / "seed1" / "20b_reap_saliency.parquet")
    return profile_report(INFO, columns, nothing_measured(24, 32, 4), {"": nothing_measured(24, 32, 4)}, NO_FOLDS)


# The published report


def test_the_published_table_gives_the_published_top_ten(published: str, rendered: str) -> None:
    lines = section(published, "Top experts by layer")
    assert len(lines) == 24
    assert section(rendered, "Top experts by layer") == lines


def test_the_header_names_a_subset() -> None:
    made = {name: np.reshape(column, (4, 7)) for name, column in table().items()}
    info = INFO | {"options": INFO["options"] | {"subset": "easy"}}
    assert f"`{INFO['options']['data']}` subset `easy` split `" in profile_report(
        info, made, nothing_measured(4, 7, 3), {}, NO_FOLDS
    )


def test_the_header_says_that_no_column_was_named() -> None:
    made = {name: np.reshape(column, (4, 7)) for name, column in table().items()}
    info = INFO | {"options": INFO["options"] | {"text_column": None}}
    assert "split `high_part00` col found in each row\n" in profile_report(
        info, made, nothing_measured(4, 7, 3), {}, NO_FOLDS
    )


def test_the_published_table_gives_the_published_concentration(published: str, rendered: str) -> None:
    lines = section(published, "Saliency concentration")
    cells = [cell for line in lines[2:] for cell in line.strip("| ").split(" | ")[1:]]
    assert len(cells) == 72 and all(re.fullmatch(r"0\.\d{3}", cell) for cell in cells)
    assert section(rendered, "Saliency concentration") == lines


def test_the_header_has_the_published_lines(published: str, rendered: str) -> None:
    title, *header = published.partition("\n## ")[0].splitlines()
    own_title, *own_header = rendered.partition("\n## ")[0].splitlines()
    assert own_header == header
    assert own_title.endswith("saliency profile (GPT-OSS MoE)") and title.endswith("saliency profile (GPT-OSS MoE)")


def test_the_published_sections_come_first_in_their_order(published: str, rendered: str) -> None:
    assert headings(rendered)[: len(headings(published))] == headings(published)


# The report's form


def test_the_sections_of_a_report_stand_in_order(folder: Path) -> None:
    assert headings((folder / "report.md").read_text(encoding="utf-8")) == [
        "## Top experts by layer (top 10, ranked by saliency_mean)",
        "## Saliency concentration (by gate_norm_sum mass)",
        "## Artifacts",
        "## Reproduce",
        "## Pictures",
        "## Router",
        "## Domains",
        "## Warnings",
    ]


def test_a_report_of_one_domain_without_warnings_leaves_both_sections_out(routed: Any) -> None:
    total = routed[0].total()
    report = profile_report(INFO, columns(total, {}), total, {"": total}, NO_FOLDS)
    assert headings(report)[-3:] == ["## Reproduce", "## Pictures", "## Router"]
    assert section(report, "Reproduce") == ["```bash", INFO["command"], "```"]


def test_the_header_names_the_domains_and_says_which_tokens_are_kept(routed: Any) -> None:
    total = routed[0].total()
    info = INFO | {"options": INFO["options"] | {"domain": ("law", "maths"), "keep": "all"}}
    report = profile_report(info, columns(total, {}), total, {"": total}, NO_FOLDS)
    assert "- Domain filter: `law, maths`\n" in report
    assert "| Kept (all) tokens: 10,220\n" in report


def test_every_artifact_that_the_report_names_is_written(folder: Path) -> None:
    named = re.findall(r"`([^`]+)`", "\n".join(section((folder / "report.md").read_text(), "Artifacts")))
    assert {*named, "report.md"} == {file.name for file in folder.iterdir()}


def test_top_experts_are_ten_by_mean_and_ties_go_to_the_lower_id() -> None:
    columns = {"count": np.full((1, 12), 2), "gate_norm_sum": np.array([[1.0, 5, 3, 3, 0, 9, 8, 7, 6, 2, 0, 0]])}
    assert top_experts(columns) == ["- layer_0: [5, 6, 7, 8, 1, 2, 3, 9, 0, 4]"]


def test_concentration_is_by_mass_and_not_by_mean() -> None:
    columns = {"count": np.array([[1] * 4 + [100] * 4]), "gate_norm_sum": np.array([[5.0] * 4 + [20.0] * 4])}
    assert concentration(columns)[2:] == ["| 0 | 0.800 | 1.000 | 1.000 |"]


def test_a_layer_without_mass_has_no_share() -> None:
    columns = {"count": np.zeros((1, 4), np.int64), "gate_norm_sum": np.zeros((1, 4))}
    assert concentration(columns)[2:] == ["| 0 | 0.000 | 0.000 | 0.000 |"]


def test_experts_of_the_top_ten_on_few_tokens_are_named() -> None:
    columns = {"count": np.array([[0, 9, 10, 1]]), "gate_norm_sum": np.array([[0.0, 9, 10, 1]])}
    assert thin_evidence(columns) == [
        "layer 0: expert 1 is in the top 10 on 9 tokens",
        "layer 0: expert 3 is in the top 10 on 1 tokens",
    ]


@pytest.mark.parametrize(
    ("a_second", "said"),
    [(1551.2, "1551"), (12345.6, "12346"), (10.0, "10"), (9.96, "10.0"), (4.27, "4.3"), (0.1, "0.1"), (0.031, "0.031")],
)
def test_small_rates_have_decimals(a_second: float, said: str, routed: Any) -> None:
    assert rate(a_second) == said
    total = routed[0].total()
    report = profile_report(INFO | {"tokens_per_s": a_second}, columns(total, {}), total, {"": total}, NO_FOLDS)
    assert f"- Forward throughput: {said} tokens/s\n" in report


# The pictures


def shapes(folder: Path, name: str, kind: str) -> list[ElementTree.Element]:
    return list(ElementTree.parse(folder / name).iter("{http://www.w3.org/2000/svg}" + kind))


def test_the_report_shows_the_pictures_beside_it(folder: Path) -> None:
    shown = re.findall(r"^!\[([^\]]+)\]\(([\w.]+)\)$", (folder / "report.md").read_text(), re.MULTILINE)
    assert [name for _, name in shown] == ["saliency.svg", "concentration.svg"]
    for title, name in shown:
        assert shapes(folder, name, "title")[0].text.startswith(title)


def test_the_heat_map_has_the_colour_of_each_expert(folder: Path) -> None:
    table = read_columns(folder)
    mean = table["saliency_mean"]
    cells = [cell for cell in shapes(folder, "saliency.svg", "rect") if len(cell)]
    assert len(cells) == L * E
    for (layer, expert), cell in zip(np.ndindex(L, E), cells, strict=True):
        says = f"layer {layer}, expert {expert}: {mean[layer, expert]:.3g} on {table['count'][layer, expert]} tokens"
        assert cell[0].text == says
        expected = colour(mean[layer, expert] / mean[layer].max()) if table["count"][layer, expert] else "#ffffff"
        assert cell.get("fill") == expected
        assert float(cell.get("x", "")) == pytest.approx(LEFT + expert * WIDTH / E, abs=0.01)
        assert float(cell.get("y", "")) == pytest.approx(TOP + layer * HEIGHT / L, abs=0.01)


def test_the_scale_grows_lighter() -> None:
    """In every hundredth, by the luminance that all eyes see alike: also without colours its order is seen."""
    channels = np.array([[int(colour(x)[i : i + 2], 16) for i in (1, 3, 5)] for x in np.linspace(0, 1, 101)])
    assert (np.diff(channels @ [0.2126, 0.7152, 0.0722]) > 0).all()
    assert colour(0.0) == "#00204d" and colour(1.0) == "#ffea46"


def test_a_curve_holds_the_shares_of_the_report(folder: Path) -> None:
    table = read_columns(folder)
    even, *lines = shapes(folder, "concentration.svg", "polyline")
    assert len(lines) == L
    for mass, drawn in zip(table["gate_norm_sum"], lines, strict=True):
        points = [tuple(map(float, point.split(","))) for point in drawn.get("points", "").split()]
        shares = [0, *np.cumsum(sorted(mass, reverse=True)) / mass.sum()]
        expected = [(LEFT + WIDTH * n / E, TOP + HEIGHT * (1 - share)) for n, share in enumerate(shares)]
        np.testing.assert_allclose(points, expected, atol=0.06)
    assert even.get("points", "").split()[0] == f"{LEFT:.1f},{TOP + HEIGHT:.1f}"


def test_pictures_of_nothing_and_of_one_layer_are_whole(tmp_path: Path) -> None:
    nothing = {"count": np.zeros((1, 4), np.int64), "gate_norm_sum": np.zeros((1, 4))}
    for name, text in pictures(nothing).items():
        assert "nan" not in text and "inf" not in text
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert shapes(tmp_path, name, "text")


# saliency.parquet


def test_saliency_begins_with_the_published_columns_compressed_by_zstd(folder: Path) -> None:
    file = pq.ParquetFile(folder / SALIENCY)
    assert pa.schema(list(file.schema_arrow)[:9]) == PUBLISHED_COLUMNS
    group = file.metadata.row_group(0)
    assert {group.column(i).compression for i in range(group.num_columns)} == {"ZSTD"}


def test_the_published_saliency_table_has_these_columns(shared: Path) -> None:
    assert pq.read_schema(shared / "data" / "seed1" / "20b_reap_saliency.parquet") == PUBLISHED_COLUMNS


def test_saliency_is_layer_major_and_its_means_are_sums_over_counts(folder: Path) -> None:
    rows = pq.read_table(folder / SALIENCY).to_pylist()
    assert [(row["layer"], row["expert"]) for row in rows] == [(layer, e) for layer in range(L) for e in range(E)]
    assert any(row["count"] == 0 for row in rows)
    for row in rows:
        for mean, total in (("gate_mean", "gate_sum"), ("norm_mean", "norm_sum"), ("saliency_mean", "gate_norm_sum")):
            assert row[mean] == row[total] / max(1, row["count"])


def test_the_ranking_is_the_saliency_tables(folder: Path) -> None:
    ranking = json.loads((folder / select.RANKING).read_text(encoding="utf-8"))
    assert ranking == select.rank(read_columns(folder), "reap").layers
    assert [experts[-1] for experts in ranking] == [5] * L


def test_domains_add_up_to_the_whole(folder: Path) -> None:
    whole, parts = read_columns(folder), [read_columns(folder, name) for name in DOMAINS]
    np.testing.assert_array_equal(sum(part["count"] for part in parts), whole["count"])
    for name in ("gate_sum", "norm_sum", "gate_norm_sum"):
        np.testing.assert_allclose(sum(part[name] for part in parts), whole[name], rtol=1e-12)


# usage.parquet


def usage_of(table: pa.Table) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """Rows by kind and layer."""
    kinds: dict[str, dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in table.to_pylist():
        kinds[row["kind"]][row["layer"]].append(row)
    return kinds


def assert_usage_adds_up(table: pa.Table, kept_tokens: int, top_k: int, experts: int) -> None:
    kinds = usage_of(table)
    for layer, rows in kinds["usage_count"].items():
        usage = {row["expert_i"]: row["value"] for row in rows}
        assert list(usage) == list(range(experts)) and sum(usage.values()) == top_k * kept_tokens
        partners: Counter[int] = Counter()
        for row in kinds["coact_count"][layer]:
            assert row["expert_i"] < row["expert_j"] and row["value"] > 0
            partners[row["expert_i"]] += row["value"]
            partners[row["expert_j"]] += row["value"]
        assert {e: partners[e] for e in usage} == {e: (top_k - 1) * n for e, n in usage.items()}
        assert sum(row["value"] for row in kinds["selected_prob_hist"][layer]) == sum(usage.values())
        # The gates of a token sum to 1.
        assert kinds["selected_prob_mean"][layer][0]["value"] == pytest.approx(1 / top_k, abs=1e-4)


def kinds_in_order(table: pa.Table) -> list[tuple[str, int]]:
    return list(dict.fromkeys((row["kind"], row["layer"]) for row in table.to_pylist()))


def what_is_empty(table: pa.Table) -> set[tuple[str, bool, bool]]:
    """Whether each kind leaves its experts out."""
    return {(row["kind"], row["expert_i"] is None, row["expert_j"] is None) for row in table.to_pylist()}


def test_usage_adds_up(folder: Path, routed: Any) -> None:
    assert_usage_adds_up(pq.read_table(folder / "usage.parquet"), len(routed[1][0]), K, E)


def test_the_published_usage_adds_up_in_the_same_way(shared: Path) -> None:
    table = pq.read_table(shared / "data" / "seed1" / "20b_expert_usage.parquet")
    assert_usage_adds_up(table, 872_749, 4, 32)
    kinds = usage_of(table)
    for layer, rows in kinds["selected_prob_hist"].items():
        # Its bins are as wide as ours: their middles give the mean gate.
        middles = sum((row["expert_i"] + 0.5) / GATE_BINS * row["value"] for row in rows)
        mean = middles / (4 * 872_749)
        assert mean == pytest.approx(kinds["selected_prob_mean"][layer][0]["value"], abs=1e-3)


def test_usage_has_the_published_schema_and_order(shared: Path, routed: Any) -> None:
    published = pq.read_table(shared / "data" / "seed1" / "20b_expert_usage.parquet")
    table = usage_table(routed[0].total())
    assert table.schema.equals(published.schema) and table.schema.equals(USAGE_SCHEMA)
    assert kinds_in_order(table) == [(kind, layer) for kind, layer in kinds_in_order(published) if layer < L]
    assert what_is_empty(table) == what_is_empty(published)


def test_usage_is_what_counting_gives(folder: Path, routed: Any) -> None:
    kinds = usage_of(pq.read_table(folder / "usage.parquet"))
    for layer, (choices, gates) in enumerate(zip(routed[1], routed[2], strict=True)):
        pairs = Counter(tuple(sorted((a, b))) for token in choices.tolist() for a in token for b in token if a < b)
        bins = Counter(int(np.float32(gate) * np.float32(GATE_BINS)) for gate in gates.flat)
        assert {(r["expert_i"], r["expert_j"]): r["value"] for r in kinds["coact_count"][layer]} == pairs
        assert {r["expert_i"]: r["value"] for r in kinds["selected_prob_hist"][layer]} == bins
        for rank in range(2):
            (row,) = kinds[f"selected_prob_top{rank + 1}_mean"][layer]
            assert row["value"] == pytest.approx(gates[:, rank].mean(dtype=np.float64), rel=1e-5)


# profile.json


def test_profile_json_holds_what_was_measured_and_what_was_asked(folder: Path, routed: Any) -> None:
    info = json.loads((folder / "profile.json").read_text(encoding="utf-8"))
    expected: dict[str, Any] = {"num_layers": L, "num_experts": E, "top_k": K, "kept_tokens": len(routed[1][0])}
    assert info | expected == info
    assert (info["total_tokens"], info["seconds"], info["tokens_per_s"]) == (103, 0.5, 206)
    assert info["options"] == json.loads(json.dumps(INFO["options"])) and info["peak_rss_bytes"] == 1 << 30
    assert info["warnings"][0] == "a warning"
