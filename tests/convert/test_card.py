"""The model card of a pruned checkpoint: what it states is true, and its code runs as printed."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import gptoss_jax as gj
from convert import card
from convert.hf import Checkpoint
from gptoss_jax.cli import cli
from gptoss_jax.config import GPT_OSS_20B, GPT_OSS_120B, TINY
from gptoss_jax.errors import UserError
from gptoss_jax.evaluation import stored
from gptoss_jax.evaluation.summary import Summary
from gptoss_jax.selection.keep_sets import KeepSets
from gptoss_jax.selection.origin import UNKNOWN, Origin
from gptoss_jax.selection.ranking import Ranking
from tests.bad_input import Refused
from tests.oracle import needs_torch
from tests.simulated import KEPT, summary

KEEP = 4
KEEP_SETS = KeepSets([list(range(KEEP))] * TINY.num_layers)
FEW = KeepSets([[0, 5]] * TINY.num_layers)
RANKING = Ranking(
    [list(range(TINY.num_experts))] * TINY.num_layers,
    Origin("reap", {"science": 1.0}, "falling score", 0, profile_hash="5ca1ab1e"),
)
TINY_NAME = f"gpt-oss-{TINY.num_parameters(KEEP) / 1e6:.1f}m-specialized-science-pruned-moe-only-{KEEP}-experts"

Card = Callable[..., str]


def prune(model: Path, ranking: Path, *options: str, content: str = RANKING.to_json()) -> str:
    """Run the command with a ranking of that name, into the folder that it chooses; what it says on both streams."""
    ranking.write_text(content)
    arguments = ["prune", str(model), "--ranking", str(ranking), "--keep", str(KEEP), *options]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def write_card(tiny_mxfp4: Path) -> Card:
    def write(**changes: Any) -> str:
        arguments = {
            "checkpoint": Checkpoint(tiny_mxfp4),
            "keep_sets": KEEP_SETS,
            "domain": "science",
            "model": "openai/gpt-oss-20b",
            "quantized": True,
            "warnings": (),
            "pruned_before": False,
            "quality": None,
        }
        return card.card(**(arguments | changes))

    return write


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory, tiny_mxfp4: Path) -> Path:
    """A checkpoint that the command wrote into the working folder, under the name that it gives by itself."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        prune(tiny_mxfp4, home / "law.json")  # a name that must say nothing
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


@pytest.mark.slow
def test_the_usage_code_runs_as_printed(pruned: Path) -> None:
    needs_torch()
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


def test_a_folder_is_called_by_its_own_name_from_wherever_it_is_given(
    write_card: Card, monkeypatch: pytest.MonkeyPatch, tiny_mxfp4: Path
) -> None:
    monkeypatch.chdir(tiny_mxfp4)
    for model in (str(tiny_mxfp4), ".", f"../{tiny_mxfp4.name}"):
        assert f"is `{tiny_mxfp4.name}` reduced from" in write_card(model=model)


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
    text = write_card(keep_sets=FEW)
    assert architecture(text)["Experts per token"] == ["3", "2"]
    assert "Every token uses all 2 experts" in words(text)
    assert "multiple of 4" in words(text)


def test_fewer_experts_a_token_are_not_called_as_many(write_card: Card) -> None:
    assert "each token still uses as many experts" not in words(write_card(keep_sets=FEW))


def test_rounded_weights_are_not_called_unchanged(write_card: Card, tiny_bf16: Path) -> None:
    """From BF16 to MXFP4 nearly every expert weight changes, and the logits with them."""
    text = words(write_card(checkpoint=Checkpoint(tiny_bf16)))
    assert "rounded from BF16 to MXFP4" in text and "Nothing else changed" not in text
    assert "the logits equal those of the original model" not in text


def test_weights_that_keep_their_values_are_not_called_rounded(write_card: Card, tiny_bf16: Path) -> None:
    bf16 = Checkpoint(tiny_bf16)
    for text in (write_card(), write_card(quantized=False), write_card(checkpoint=bf16, quantized=False)):
        assert "rounded from" not in text and "Nothing else changed" in words(text)


def test_a_change_of_precision_is_told(write_card: Card) -> None:
    assert architecture(write_card(quantized=False))["Precision"] == ["MXFP4 experts, BF16 rest", "BF16"]


def test_quality_is_said_to_be_unmeasured(write_card: Card) -> None:
    assert "quality has not been measured" in words(write_card())


@pytest.fixture(scope="module")
def evaluated(tiny_mxfp4: Path) -> Summary:
    return summary(rows=30, model_fingerprint=Checkpoint(tiny_mxfp4).fingerprint())


def test_the_command_puts_what_was_measured_into_the_card(evaluated: Summary, tiny_mxfp4: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "eval.json", tmp_path / "out"
    file.write_text(stored.to_json(evaluated), encoding="utf-8")
    best = replace(KEPT["best"], origin=Origin("reap", {"science": 1.0}, profile_hash="5ca1ab1e"))
    keep_sets = tmp_path / "keep.json"
    keep_sets.write_text(best.to_json())
    argv = ["prune", str(tiny_mxfp4), "--keep-sets", str(keep_sets), "--eval", str(file), "--out", str(out)]
    assert CliRunner().invoke(cli, argv, catch_exceptions=False).exit_code == 0
    text = (out / "README.md").read_text(encoding="utf-8")
    quality = text.split("## Quality")[1].split("\n## ")[0]
    (entry,) = (one for one in evaluated.entries if one.name == "best")
    measured, base = entry.quality[1024].estimates, evaluated.baseline.quality[1024].estimates
    for of in (measured["ppl"], measured["ppl_difference"], measured["kl"], base["ppl"]):
        assert f"{of.value:.4g}" in quality and f"{of.low:.4g}" in quality and f"{of.high:.4g}" in quality
    assert "drawn (control)" in quality and "`rows.jsonl`" in quality and "by hash" in quality
    assert "Replies to 30 rows" in quality and "fewer than 100" in quality and "fingerprint" not in quality
    assert "by `reap` over the profile's domain `science`" in text and "5ca1ab1e" in text
    assert "unmeasured" not in text and "has not been measured" not in text


def test_python_takes_an_evaluation_too(evaluated: Summary, tiny_mxfp4: Path, tmp_path: Path) -> None:
    out = gj.prune(str(tiny_mxfp4), KEPT["more"], eval=evaluated, out=tmp_path / "out").folder
    assert "## Quality" in (out / "README.md").read_text(encoding="utf-8")


def test_an_evaluation_of_another_checkpoint_is_told(evaluated: Summary, tiny_mxfp4: Path, tmp_path: Path) -> None:
    other = replace(evaluated, setting=replace(evaluated.setting, model_fingerprint="another"))
    out = gj.prune(str(tiny_mxfp4), KEPT["more"], eval=other, out=tmp_path / "out").folder
    assert "Measured with a checkpoint of another fingerprint" in (out / "README.md").read_text(encoding="utf-8")


def test_an_evaluation_of_other_keep_sets_is_refused(
    evaluated: Summary, refused: Refused, tiny_mxfp4: Path, ranking: Path, tmp_path: Path
) -> None:
    others = replace(evaluated, entries=tuple(one for one in evaluated.entries if one.name != "best"))
    file = tmp_path / "eval.json"
    file.write_text(stored.to_json(others), encoding="utf-8")
    argv = ["prune", tiny_mxfp4, "--ranking", ranking, "--keep", 4, "--eval", file, "--out", tmp_path / "out"]
    refused(*argv, says=("eval.json", "drawn (4 experts by `random`", "more (5 experts by `reap`", "evaluate these"))
    file.write_text("{}")
    refused(*argv, says=("eval.json: is no evaluation",))
    file.unlink()
    refused(*argv, says=("eval.json: cannot be read",))


def test_a_folder_is_not_written_over_the_evaluation(
    evaluated: Summary, refused: Refused, tiny_mxfp4: Path, ranking: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    file = tmp_path / "out" / "eval.json"
    file.write_text(stored.to_json(evaluated), encoding="utf-8")
    argv = ["prune", tiny_mxfp4, "--ranking", ranking, "--keep", 4, "--eval", file, "--out", tmp_path / "out"]
    refused(*argv, "--overwrite", says=("is where the input",))


def test_the_method_names_criterion_data_rule_and_seed(pruned: Path, write_card: Card) -> None:
    expected = (
        "The choice of experts is by `reap` over the profile's domain `science` (rule `best 4`, seed `0`). "
        "The SHA-256 of the profile's saliency table is `5ca1ab1e`."
    )
    assert expected in words((pruned / "README.md").read_text(encoding="utf-8"))
    assert expected in words(write_card(keep_sets=RANKING.keep(KEEP)))


def test_lists_without_origin_are_told_as_such(write_card: Card, tiny_mxfp4: Path, tmp_path: Path) -> None:
    assert "The choice of experts is of unknown origin." in words(write_card())
    out = tmp_path / "out"
    prune(tiny_mxfp4, tmp_path / "science.json", "--out", str(out), content=json.dumps(RANKING.layers))
    text = (out / "README.md").read_text(encoding="utf-8")
    assert "The choice of experts is of unknown origin (rule `best 4`)." in words(text)
    assert "science" not in text.lower() and "rank" not in text


def test_the_command_names_criterion_and_data(tiny_mxfp4: Path, tmp_path: Path) -> None:
    lists = json.dumps(RANKING.layers)
    file, out = tmp_path / "science.json", tmp_path / "out"
    said = prune(tiny_mxfp4, file, "--out", str(out))
    choice = "4 of 7 experts a layer by `reap` over the profile's domain `science`"
    before, now = (
        json.loads((folder / "model.safetensors.index.json").read_text())["metadata"]["total_size"] / 1e6
        for folder in (tiny_mxfp4, out)
    )
    weights = f"weights {before:.1f} MB before, {now:.1f} MB now"
    assert said == f"{TINY_NAME}: {choice}; {weights}: {out}\n"
    said = prune(tiny_mxfp4, file, "--out", str(out), "--overwrite", content=lists)
    general = TINY_NAME.replace("science", "general")
    assert said == f"{general}: 4 of 7 experts a layer of unknown origin; {weights}: {out}\n"


def test_a_profile_of_another_checkpoint_is_told_and_no_error(tiny_mxfp4: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for fingerprint, told in ((Checkpoint(tiny_mxfp4).fingerprint(), False), ("another", True)):
        ranking = replace(RANKING, origin=replace(RANKING.origin, model_fingerprint=fingerprint))
        arguments = ["--out", str(out), "--overwrite"]
        said = prune(tiny_mxfp4, tmp_path / "ranking.json", *arguments, content=ranking.to_json())
        text = words((out / "README.md").read_text(encoding="utf-8"))
        doubt = "rests on a profile of a checkpoint with another fingerprint"
        assert (doubt in text, doubt in said) == (told, told)
        assert [line for line in said.splitlines() if line.startswith("gptoss-jax: warning: ")] == (
            said.splitlines()[:1] if told else []
        )


@pytest.mark.parametrize(
    ("origin", "given", "domain"),
    [
        (UNKNOWN, None, "general"),
        (UNKNOWN, "law", "law"),
        (Origin("reap", {}), None, "general"),
        (Origin("reap", {"science": 1.0}), None, "science"),
        (Origin("reap", {"science": 1.0}), "law", "law"),
        (Origin("reap", {"law": 0.5, "science": 0.5}), None, "general"),
        (Origin("reap", {"law: tax": 1.0}), None, "law_tax"),
    ],
)
def test_the_domain_is_the_given_or_the_origins_only_one(origin: Origin, given: str | None, domain: str) -> None:
    assert card.domain_for(origin, given) == domain


def test_a_ranked_domain_too_long_for_a_name_is_refused() -> None:
    with pytest.raises(UserError, match="--domain"):
        card.domain_for(Origin("reap", {"a" * 300: 1.0}), None)


def test_a_name_begins_as_the_published_one() -> None:
    assert card.model_name(GPT_OSS_120B, 128, "all").startswith("gpt-oss-116.8b-specialized-all-")


def test_the_name_is_the_seeds(shared: Path) -> None:
    name = card.model_name(GPT_OSS_20B, 12, "science")
    assert name == "gpt-oss-9.0b-specialized-science-pruned-moe-only-12-experts"
    seed = (shared / "seeds/004_84058a761274ceaa.txt").read_text(encoding="utf-8")
    assert f"/{name}" in seed
