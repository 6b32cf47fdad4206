"""The job from the command line to its files, against transformers in float32."""

import hashlib
import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from gptoss_jax.cli import cli
from gptoss_jax.config import TINY
from gptoss_jax.data import tokens
from gptoss_jax.data.groups import Groups
from gptoss_jax.data.remarks import Remarks
from gptoss_jax.data.rows import ColumnNames, Reading, prompts_hash, read_rows, sample
from gptoss_jax.data.sources import records
from gptoss_jax.data.template import Template
from gptoss_jax.statistics.store import read_sums
from gptoss_jax.statistics.tables import read_columns
from tests import oracle
from tests.bad_input import read_shard, shard_of, write_shard

pytestmark = pytest.mark.slow

L, E, K = TINY.num_layers, TINY.num_experts, TINY.top_k


def run_profile(model: Path, data: Path, out: Path, *options: str) -> Path:
    arguments = ["profile", str(model), "--data", str(data), "--dtype", "float32", "--out", str(out)]
    arguments += ["--keep", "assistant", *options]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return out


def rows_and_documents(model: Path, data: Path):
    tokenizer = tokens.load_tokenizer(model)
    reading = Reading(ColumnNames(domain="domain"), lambda: Template(tokenizer), Remarks())
    rows = list(read_rows(records(str(data), "train", None, Remarks()), reading))
    domains = sorted({row.domain for row in rows})
    return rows, tokens.encode(rows, tokenizer, Groups(domains), TINY.vocab_size, None)


def oracle_columns(model: Path, documents) -> dict[str, np.ndarray]:
    """All kept pairs of all documents, each in a forward of its own through transformers, in float64."""
    network = oracle.load(model)
    names = [
        "count",
        "gate_sum",
        "norm_sum",
        "gate_norm_sum",
        "gate_norm_sq_sum",
        "norm_sq_sum",
    ]
    table = {name: np.zeros((L, E)) for name in [*names, "norm_max", "activation_max", "lead_count"]}
    for document in documents:
        reference = oracle.forward(network, document.token_ids)
        for layer in range(L):
            for t in np.flatnonzero(document.weights):
                for j in range(K):
                    at = layer, int(reference.experts[layer][t, j])
                    g, n = float(reference.gates[layer][t, j]), float(reference.norms[layer][t, j])
                    values = [1, g, n, g * n, (g * n) ** 2, n**2]
                    for name, value in zip(names, values, strict=True):
                        table[name][at] += value
                    table["lead_count"][at] += j == 0
                    table["norm_max"][at] = max(table["norm_max"][at], n)
                    peak = float(reference.peaks[layer][t, j])
                    table["activation_max"][at] = max(table["activation_max"][at], peak)
    return table


def assert_equal_columns(ours: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    np.testing.assert_array_equal(ours["count"], expected["count"])
    for name, column in expected.items():
        np.testing.assert_allclose(ours[name], column, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(ours["saliency_mean"], ours["gate_norm_sum"] / np.maximum(1, ours["count"]))


STREAMED = ("--engine", "streamed")
WAYS = [
    (),
    ("--batch-size", "5"),
    ("--pack", "--max-seq-length", "4096"),
    STREAMED,
    (*STREAMED, "--batch-size", "1"),
    (*STREAMED, "--pack", "--max-seq-length", "4096"),
]


@pytest.mark.parametrize("way", WAYS)
def test_statistics_equal_transformers(way: tuple[str, ...], tiny_mxfp4: Path, rows_jsonl: Path, tmp_path: Path):
    """By either engine, padded in batches of any size, or packed: every kept token counts, none sees another row."""
    profile = run_profile(tiny_mxfp4, rows_jsonl, tmp_path / "out", "--domain-column", "domain", *way)
    rows, documents = rows_and_documents(tiny_mxfp4, rows_jsonl)
    assert_equal_columns(read_columns(profile), oracle_columns(tiny_mxfp4, documents))
    odd = [d for row, d in zip(rows, documents, strict=True) if row.domain == "b"]
    assert_equal_columns(read_columns(profile, "b"), oracle_columns(tiny_mxfp4, odd))


@pytest.mark.parametrize(
    "way", [(), ("--pack", "--max-seq-length", "4096"), STREAMED], ids=["padded", "packed", "streamed"]
)
def test_sums_by_fold_equal_transformers(way: tuple[str, ...], tiny_mxfp4: Path, rows_jsonl: Path, tmp_path: Path):
    """Of all rows and of one domain: a row's fold follows from its hash alone."""
    out = run_profile(tiny_mxfp4, rows_jsonl, tmp_path / "out", "--domain-column", "domain", *way)
    sums = read_sums(out / "statistics.safetensors")
    rows, documents = rows_and_documents(tiny_mxfp4, rows_jsonl)
    folds = [int(hashlib.sha256(f"{row.id}\n{row.text}".encode()).hexdigest()[:16], 16) % 10 for row in rows]
    assert sums.folds == 10 and len({*folds}) > 3
    for domain in (None, "b"):
        for fold in range(10):
            some = [
                d
                for d, f, row in zip(documents, folds, rows, strict=True)
                if f == fold and domain in (None, row.domain)
            ]
            ours = {name: column[:, fold] for name, column in sums.by_fold(domain).items()}
            expected = {name: x for name, x in oracle_columns(tiny_mxfp4, some).items() if name in ours}
            assert_equal_columns(ours | columns_of_means(ours), expected)


def columns_of_means(sums: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"saliency_mean": sums["gate_norm_sum"] / np.maximum(1, sums["count"])}


def decided(source: Path, folder: Path) -> Path:
    """A copy with logits 64 times as large: random ones are so even that classes would hang on rounding."""
    shutil.copytree(source, folder)
    shard = shard_of(folder, "lm_head.weight")
    header, tensors = read_shard(shard)
    begin, end = header["lm_head.weight"]["data_offsets"]
    larger = np.frombuffer(tensors[begin:end], ml_dtypes.bfloat16) * ml_dtypes.bfloat16(64)
    write_shard(shard, header, tensors[:begin] + larger.tobytes() + tensors[end:])
    return folder


def test_eaft_sums_equal_transformers(tiny_bf16: Path, rows_jsonl: Path, tmp_path: Path):
    model = decided(tiny_bf16, tmp_path / "model")
    profile = run_profile(model, rows_jsonl, tmp_path / "out", "--eaft", "--eaft-weights", "1.5", "-3", "0.5")
    _, documents = rows_and_documents(model, rows_jsonl)
    network = oracle.load(model)
    references = [oracle.forward(network, d.token_ids) for d in documents]
    scores = []
    for document, reference in zip(documents, references, strict=True):
        for t in np.flatnonzero(document.weights):
            logits = reference.logits[t - 1].astype(np.float64)
            top = np.sort(logits)[-20:]
            q = np.exp(top - top.max()) / np.exp(top - top.max()).sum()
            p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            scores.append((p[document.token_ids[t]], -(q * np.log(q)).sum() / np.log(20)))
    p, entropy = np.array(scores).T
    low_p, low_entropy = np.quantile(p, 0.15), np.quantile(entropy, 0.15)
    weights = np.where(entropy > low_entropy, 0.5, np.where(p >= low_p, 1.5, -3.0))
    expected, kept = np.zeros((L, E)), 0
    for document, reference in zip(documents, references, strict=True):
        for t in np.flatnonzero(document.weights):
            for layer, j in np.ndindex(L, K):
                saliency = reference.gates[layer][t, j] * reference.norms[layer][t, j]
                expected[layer, reference.experts[layer][t, j]] += weights[kept] * saliency
            kept += 1
    np.testing.assert_allclose(read_columns(profile)["eaft_gate_norm_sum"], expected, rtol=1e-4, atol=1e-4)


def test_profile_json_says_what_was_run(tiny_mxfp4: Path, rows_jsonl: Path, tmp_path: Path):
    options = ["--domain-column", "domain", "--domain", "a", "--max-seq-length", "64", "--skip-first", "1"]
    profile = run_profile(tiny_mxfp4, rows_jsonl, tmp_path / "out", *options)
    info = json.loads((profile / "profile.json").read_text())
    rows, documents = rows_and_documents(tiny_mxfp4, rows_jsonl)
    chosen = [(r, d) for r, d in zip(rows, documents, strict=True) if r.domain == "a"]
    assert (info["num_layers"], info["num_experts"]) == (L, E)
    assert info["top_k"] == K and info["engine"] == "resident" and info["rows"] == 6
    assert info["prompts_hash"] == prompts_hash(sample(rows, ("a",), None, 0))
    assert info["total_tokens"] == sum(min(64, len(d.token_ids)) for _, d in chosen)
    assert info["truncated_rows"] == sum(len(d.token_ids) > 64 for _, d in chosen) > 0
    assert info["kept_tokens"] == sum(int((d.weights[-64:][1:] > 0).sum()) for _, d in chosen)
    assert info["seconds"] > 0 and info["tokens_per_s"] > 0 and info["peak_rss_bytes"] > 1 << 20
    assert any("truncated" in warning for warning in info["warnings"])
    assert info["options"]["max_seq_length"] == 64 and info["versions"]["jax"]


def test_all_artifacts_are_there(tiny_mxfp4: Path, rows_jsonl: Path, tmp_path: Path):
    profile = run_profile(tiny_mxfp4, rows_jsonl, tmp_path / "out")
    names = {"saliency.parquet", "ranking_by_layer.json", "report.md", "profile.json", "usage.parquet"}
    pictures = {"saliency.svg", "concentration.svg"}
    assert {p.name for p in profile.iterdir()} == {*names, *pictures, "statistics.safetensors"}
    assert pq.read_table(profile / "saliency.parquet").num_rows == L * E
    ranking = json.loads((profile / "ranking_by_layer.json").read_text())
    assert [sorted(layer) for layer in ranking] == [list(range(E))] * L


def test_rows_beyond_128_tokens_count_to_their_end(tiny_mxfp4: Path, tmp_path: Path):
    """Counts grow by top-k for each kept token, however late it stands."""
    data = tmp_path / "long.jsonl"
    text = (
        "<|start|>user<|message|>" + "why " * 300 + "<|end|><|start|>assistant<|message|>" + "no " * 90 + "<|return|>"
    )
    data.write_text(json.dumps({"text": text}) + "\n")
    profile = run_profile(tiny_mxfp4, data, tmp_path / "out")
    info = json.loads((profile / "profile.json").read_text())
    assert info["total_tokens"] > 300
    counts = read_columns(profile)["count"].sum(1)
    assert (counts == info["kept_tokens"] * K).all() and info["kept_tokens"] >= 90
