"""The published 12-expert science model in form: 20b's layers and experts, in small, cut by the real ranking."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from experiments import checkpoints, tokenizers
from gptoss_jax.cli import cli
from gptoss_jax.config import GPT_OSS_20B, TINY
from tests.oracle import needs_torch

CONFIG = replace(TINY, num_layers=24, num_experts=32, top_k=4, layer_types=GPT_OSS_20B.layer_types)


@pytest.mark.parametrize("form", ["mxfp4", "bf16"])
def test_the_real_science_ranking_makes_the_model(form: str, shared: Path, tmp_path: Path, monkeypatch):
    torch = needs_torch()
    from transformers import AutoModelForCausalLM

    (tmp_path / "model").mkdir()
    checkpoints.write_random(tmp_path / "model", CONFIG)
    tokenizers.write_small(tmp_path / "model", CONFIG.vocab_size)
    monkeypatch.chdir(tmp_path)
    file = shared / "data" / "fingerprint" / "topical_analytics" / "science.json"
    arguments = ["prune", "model", "--ranking", str(file), "--keep", "12", "--domain", "science", "--format", form]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output

    millions = CONFIG.num_parameters(12) / 1e6
    made = tmp_path / f"gpt-oss-{millions:.1f}m-specialized-science-pruned-moe-only-12-experts"
    ranking = json.loads(file.read_text())
    mapping = json.loads((made / "expert_mapping.json").read_text())
    for layer in range(24):
        best = sorted(ranking[f"layer_{layer}"][:12])
        assert mapping[str(layer)] == {str(old): new for new, old in enumerate(best)}
    network, info = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    assert sum(p.numel() for p in network.parameters()) == CONFIG.num_parameters(12)
