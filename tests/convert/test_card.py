"""The model card of a pruned checkpoint: what it states is true, and its code runs as printed."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from convert import card
from convert.hf import Checkpoint
from gptoss_jax.cli import cli
from gptoss_jax.config import GPT_OSS_20B, GPT_OSS_120B, TINY
from gptoss_jax.errors import UserError

KEEP = 4
KEEP_SETS = [list(range(KEEP))] * TINY.num_layers
TINY_NAME = f"gpt-oss-{TINY.num_parameters(KEEP) / 1e6:.1f}m-specialized-science-pruned-moe-only-{KEEP}-experts"

Card = Callable[..., str]


def prune(model: Path, ranking: Path, *options: str) -> None:
    """Run the command with a ranking of that name, into the folder that it chooses."""
    ranking.write_text(json.dumps([list(range(TINY.num_experts))] * TINY.num_layers))
    arguments = ["prune", str(model), "--ranking", str(ranking), "--keep", str(KEEP), *options]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output


@pytest.fixture
def write_card(tiny_mxfp4: Path) -> Card:
    def write(**changes: Any) -> str:
        arguments = {"domain": "science", "model": "openai/gpt-oss-20b", "quantized": True, "source": "science.json"}
        keep_sets = changes.pop("keep_sets", KEEP_SETS)
        return card.card(Checkpoint(tiny_mxfp4), keep_sets, **(arguments | changes))

    return write


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory, tiny_mxfp4: Path) -> Path:
    """A checkpoint that the command wrote into the working folder, under the name that it gives by itself."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        prune(tiny_mxfp4, home / "science.json")
    return home / TINY_NAME


def front_matter(text: str) -> dict[str, Any]:
    import yaml

    empty, front, _ = text.split("---\n", 2)
    assert not empty
    return yaml.safe_load(front)


def usage_code(text: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return code


def words(text: str) -> str:
    """The text without its line breaks."""
    return " ".join(text.split())


def test_the_folder_is_named_as_published(pruned: Path) -> None:
    assert (pruned / "model.safetensors.index.json").is_file()


def test_the_usage_code_runs_as_printed(pruned: Path) -> None:
    code = usage_code((pruned / "README.md").read_text(encoding="utf-8"))
    assert TINY_NAME in code
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=pruned.parent,
        # One thread: two or more of torch's wait for one another at each tiny product of a busy machine.
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()


def test_front_matter(write_card: Card) -> None:
    front = front_matter(write_card())
    assert front["license"] == "apache-2.0"
    assert front["base_model"] == "openai/gpt-oss-20b"
    assert front["library_name"] == "transformers"
    assert front["pipeline_tag"] == "text-generation"
    assert {"science", "gpt-oss", "mixture-of-experts"} <= set(front["tags"])


def test_a_folder_is_no_base_model(
    pruned: Path, write_card: Card, monkeypatch: pytest.MonkeyPatch, tiny_mxfp4: Path
) -> None:
    assert "base_model" not in front_matter((pruned / "README.md").read_text(encoding="utf-8"))
    monkeypatch.chdir(tiny_mxfp4.parent.parent)
    looks_like_an_id = f"{tiny_mxfp4.parent.name}/{tiny_mxfp4.name}"
    assert "base_model" not in front_matter(write_card(model=looks_like_an_id))


def test_the_domain_is_a_tag(write_card: Card) -> None:
    assert "health_or_medicine" in front_matter(write_card(domain="health_or_medicine"))["tags"]


@pytest.mark.parametrize("domain", ["no", "1", "null"])
def test_a_tag_is_text_whatever_the_domain(write_card: Card, domain: str) -> None:
    """Hubs refuse a card with a tag that is a truth value, a number or nothing."""
    assert domain in front_matter(write_card(domain=domain))["tags"]


@pytest.mark.parametrize("domain", ["law: tax", "law/tax", 'so-called "law"', "two words"])
def test_a_domain_that_no_name_can_hold_is_refused_or_rewritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_mxfp4: Path, domain: str
) -> None:
    """What is accepted gives one folder, whose name may stand in a path, a hub id and quotation marks."""
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    try:
        prune(tiny_mxfp4, tmp_path / "science.json", "--domain", domain)
    except UserError:
        assert not list(Path().iterdir())
        return
    (folder,) = Path().iterdir()
    assert (folder / "config.json").is_file()
    assert re.fullmatch(r"[\w.-]+", folder.name)
    assert f'"{folder.name}"' in usage_code((folder / "README.md").read_text(encoding="utf-8"))


def test_the_name_stands_in_the_card(write_card: Card) -> None:
    assert f"`{TINY_NAME}`" in write_card()
    assert "# Science GPT-OSS Model (4 Experts)\n" in write_card()
    assert "# Health Or Medicine GPT-OSS Model (4 Experts)\n" in write_card(domain="health_or_medicine")


def architecture(text: str) -> dict[str, list[str]]:
    """The rows of the table: what → before, after."""
    rows = re.findall(r"^\| \*\*(.+?)\*\* \| (.+?) \| (.+?) \|$", text, re.MULTILINE)
    return {what: [before, after] for what, before, after in rows}


def test_numbers_before_and_after(write_card: Card) -> None:
    rows = architecture(write_card())
    before, after = (f"{TINY.num_parameters(n):,}" for n in (TINY.num_experts, KEEP))
    assert before != after
    assert [re.search(r"\(([\d,]+)\)", cell)[1] for cell in rows["Total parameters"]] == [before, after]
    assert rows["Experts per layer"] == ["7", "4"]
    assert rows["Experts per token"] == ["3", "3"]
    assert rows["Precision"] == ["MXFP4 experts, BF16 rest"] * 2


def test_parameters_after_are_those_of_the_files(pruned: Path) -> None:
    from convert.shards import find_tensors

    stored = [t for t in find_tensors(pruned).values() if not t.name.endswith("_scales")]
    values = sum(t.nbytes * 2 if t.name.endswith("_blocks") else t.nbytes // 2 for t in stored)
    assert f"({values:,})" in architecture((pruned / "README.md").read_text(encoding="utf-8"))["Total parameters"][1]


def test_fewer_experts_than_top_k(write_card: Card) -> None:
    text = write_card(keep_sets=[[0, 5]] * TINY.num_layers)
    assert architecture(text)["Experts per token"] == ["3", "2"]
    assert "Every token uses all 2 experts" in words(text)
    assert "multiple of 4" in words(text)


def test_fewer_experts_a_token_are_not_called_as_many(write_card: Card) -> None:
    assert "each token still uses as many experts" not in words(write_card(keep_sets=[[0, 5]] * TINY.num_layers))


def test_rounded_weights_are_not_called_unchanged(tiny_bf16: Path) -> None:
    """From BF16 to MXFP4 nearly every expert weight changes, and the logits with them."""
    source = Checkpoint(tiny_bf16)
    text = words(card.card(source, KEEP_SETS, "science", "openai/gpt-oss-20b", quantized=True, source="science.json"))
    assert "nothing else changed" not in text
    assert "the logits equal those of the original model" not in text


def test_a_change_of_precision_is_told(write_card: Card) -> None:
    assert architecture(write_card(quantized=False))["Precision"] == ["MXFP4 experts, BF16 rest", "BF16"]


def test_quality_is_said_to_be_unmeasured(write_card: Card) -> None:
    assert "quality has not been measured" in words(write_card())


def test_the_method_names_the_ranking(write_card: Card) -> None:
    assert "`science.json`" in write_card()


@pytest.mark.parametrize(
    ("file", "domain"),
    [
        ("science.json", "science"),
        ("health_or_medicine.json", "health_or_medicine"),
        ("ranking.json", "general"),
        ("ranking_by_layer.json", "general"),
        ("keep.json", "general"),
    ],
)
def test_the_domain_is_told_by_the_rankings_name(tmp_path: Path, file: str, domain: str) -> None:
    assert card.domain_of(tmp_path / file) == domain


def test_a_name_begins_as_the_published_one() -> None:
    assert card.model_name(GPT_OSS_120B, 128, "all").startswith("gpt-oss-116.8b-specialized-all-")


def test_the_name_is_the_seeds(shared: Path) -> None:
    name = card.model_name(GPT_OSS_20B, 12, "science")
    assert name == "gpt-oss-9.0b-specialized-science-pruned-moe-only-12-experts"
    seed = (shared / "seeds/004_84058a761274ceaa.txt").read_text(encoding="utf-8")
    assert f"/{name}" in seed
