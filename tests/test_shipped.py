"""nano as it ships: whole, small, read by transformers, and as able as its card says."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from convert import checksums
from convert.hf import Checkpoint
from convert.sources import NANO, open_source
from experiments.nano import QUESTIONS, evaluate, families
from experiments.nano.corpus import prompt_and_reply
from experiments.nano.families import FAMILIES
from gptoss_jax.cli import cli
from gptoss_jax.config import FULL, SLIDING
from gptoss_jax.data.harmony import HarmonyText
from gptoss_jax.data.tokens import load_tokenizer, token_ids
from gptoss_jax.generation import choose
from gptoss_jax.generation.continuous import prompts_of, replies
from gptoss_jax.generation.steps import How
from gptoss_jax.run.options import Placing, Sampling
from tests import oracle

pytestmark = pytest.mark.slow

FOLDER = Path(str(open_source(NANO).folder))
GREEDY = Sampling(temperature=0.0)


def test_it_is_whole_and_small() -> None:
    assert checksums.differing(FOLDER) == []
    assert {f.name for f in FOLDER.iterdir()} >= {"README.md", "chat_template.jinja", "generation_config.json"}
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 16e6


def test_it_has_what_the_large_ones_have() -> None:
    source = Checkpoint(FOLDER)
    config = source.config
    assert source.quantized and set(config.layer_types) == {SLIDING, FULL}
    assert config.rope_scaling and config.rope_scaling.factor > 1
    assert config.num_layers >= 6 and config.num_experts >= 16 and config.top_k == 4
    assert 2048 <= config.vocab_size <= 8192
    sinks = [source.tensors[f"model.layers.{i}.self_attn.sinks"].read() for i in range(config.num_layers)]
    assert all(np.asarray(s, np.float32).any() for s in sinks)


def test_questions_are_of_their_splits() -> None:
    """And the same that their numbers give: none was trained on."""
    for split in ("calibration", "evaluation"):
        examples = families.read(QUESTIONS / f"{split}.jsonl")
        assert {e.split for e in examples} == {split}
        each = len(examples) // len(FAMILIES)
        assert [e.family for e in examples] == [name for name in FAMILIES for _ in range(each)]
        assert examples[:5] == families.pick(split, list(FAMILIES)[:1], 5)


def test_transformers_reads_its_tokenizer_and_template() -> None:
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(FOLDER), load_tokenizer(FOLDER)
    assert len(theirs) == Checkpoint(FOLDER).config.vocab_size
    for example in families.read(QUESTIONS / "evaluation.jsonl")[::40]:
        prompt, reply = prompt_and_reply(example, ours)
        messages = example.messages()
        rendered = theirs.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        assert rendered == prompt
        ids = theirs(prompt + reply, add_special_tokens=False)["input_ids"]
        assert ids == list(token_ids(HarmonyText(prompt + reply), ours, len(ours)))
        assert theirs.decode(ids) == prompt + reply


def test_greedy_tokens_equal_transformers() -> None:
    """128 tokens after the questions of all families at once, past every stop."""
    reference = oracle.load(FOLDER)
    source, tokenizer = open_source(NANO), load_tokenizer(FOLDER)
    examples = families.read(QUESTIONS / "evaluation.jsonl")
    examples = [next(e for e in examples if e.family == name) for name in FAMILIES]
    prompts = [
        token_ids(HarmonyText(prompt_and_reply(e, tokenizer)[0]), tokenizer, source.config.vocab_size) for e in examples
    ]
    asked = prompts_of(prompts, source.config, 128)
    decoder = choose.decoder(source, Placing(dtype="float32"), asked, How(source.config, GREEDY, ()))
    ours = replies(decoder, asked)
    for row, prompt in zip(ours, prompts, strict=True):
        np.testing.assert_array_equal(row, oracle.greedy(reference, prompt, 128))


def test_it_answers_as_its_card_says() -> None:
    """Some questions of each family: within four standard errors of what the card states."""
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    stated = {m[1]: int(m[2]) / int(m[3]) for m in re.finditer(r"\| (\w+) \| .* \d+% \((\d+) of (\d+)\) \|\n", card)}
    assert list(stated) == list(FAMILIES)
    examples = families.read(QUESTIONS / "evaluation.jsonl")
    some = [e for name in FAMILIES for e in [e for e in examples if e.family == name][:10]]
    scores = evaluate.score(FOLDER, some)
    expected = np.mean(list(stated.values()))
    found = evaluate.total(scores.values())
    assert abs(found.accuracy - expected) < 4 * np.sqrt(0.25 / found.asked)
    assert 1 < found.perplexity < 1.5


@pytest.mark.parametrize("seed", [0, 1])
def test_the_command_answers(seed: int) -> None:
    """Under its name, at a temperature, by the seed; effort low leaves the reasoning out."""
    words = ["generate", NANO, "--prompt", "State the final answer to the following arithmetic problem: 28 + 45 ="]
    low = CliRunner().invoke(cli, [*words, "--temperature", "0", "--reasoning-effort", "low"], catch_exceptions=False)
    assert low.exit_code == 0 and "[final]" in low.stdout and "[analysis]" not in low.stdout
    drawn = [
        CliRunner().invoke(cli, [*words, "--temperature", "0.1", "--seed", str(seed)], catch_exceptions=False)
        for _ in range(2)
    ]
    assert drawn[0].stdout == drawn[1].stdout and "[analysis]" in drawn[0].stdout


def test_a_profile_of_it_names_it(tmp_path: Path) -> None:
    """The whole way under the name: profile, rank, prune. The card of the result does not take it for a hub id, and
    says what the ranking was made from, which is this very model."""
    rows = tmp_path / "rows.jsonl"
    text = "<|start|>user<|message|>1 + 1<|end|><|start|>assistant<|channel|>final<|message|>2<|return|>"
    rows.write_text(json.dumps({"text": text, "domain": "sums"}) + "\n", encoding="utf-8")
    for words in (
        ["profile", NANO, "--data", str(rows), "--domain-column", "domain", "--out", str(tmp_path / "profile")],
        ["rank", str(tmp_path / "profile"), "--domain", "sums", "--out", str(tmp_path / "sums.json")],
        ["prune", NANO, "--ranking", str(tmp_path / "sums.json"), "--keep", "8", "--out", str(tmp_path / "cut")],
    ):
        result = CliRunner().invoke(cli, words, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    assert Checkpoint(tmp_path / "cut").config.num_experts == 8
    card = (tmp_path / "cut" / "README.md").read_text(encoding="utf-8")
    assert "base_model" not in card and "another fingerprint" not in card
    assert "by `reap` over the profile's domain `sums` (rule `best 8`, seed `0`)" in card
    assert "-specialized-sums-pruned-moe-only-8-experts`" in card
    said = json.loads((tmp_path / "sums.json").read_text(encoding="utf-8"))
    assert said["model_fingerprint"] == open_source(NANO).fingerprint()
    assert said["profile_hash"] == hashlib.sha256((tmp_path / "profile" / "saliency.parquet").read_bytes()).hexdigest()
