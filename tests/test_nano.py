"""nano's data and training: nothing is in two splits, and a stopped training ends as an unbroken one."""

import json
import random
import re
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from flax import nnx

from convert.hf import Checkpoint
from experiments import tokenizers
from experiments.nano import evaluate, families, network, publish, specialise, train
from experiments.nano.__main__ import main as make_nano
from experiments.nano.card import card
from experiments.nano.corpus import Corpus, prompt_and_reply
from experiments.nano.evaluate import Score
from experiments.nano.families import ENGLISH, FAMILIES, SPLITS, draw
from experiments.nano.network import Recipe
from gptoss_jax.config import TINY
from gptoss_jax.data import batching
from gptoss_jax.data.batching import Document
from gptoss_jax.data.harmony import MARKS, START, HarmonyText, messages_of, pieces
from gptoss_jax.data.template import FIXED_DATE
from gptoss_jax.data.tokens import load_tokenizer
from gptoss_jax.devices import mesh as sharding
from gptoss_jax.devices.placement import here
from gptoss_jax.errors import ResumeError
from gptoss_jax.network import model, rope
from gptoss_jax.network.source import load
from gptoss_jax.run.forward import forward

pytestmark = pytest.mark.slow

ALL = [*FAMILIES, ENGLISH]
# TINY's tokenizer has 320 tokens, so that conversations are long.
RECIPE = Recipe(steps=6, rows=2, length=256, warmup=2, decay=0.5)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizers.write_small(folder, TINY.vocab_size)
    return folder


@pytest.mark.parametrize("family", ALL)
def test_no_instance_is_in_two_splits(family: str) -> None:
    questions = [{e.question for e in islice(draw(random.Random(1), s, [family]), 200)} for s in SPLITS]
    assert all(len(some) > 15 for some in questions)
    assert not (questions[0] & questions[1] or questions[0] & questions[2] or questions[1] & questions[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_scorer_takes_the_answer_and_no_other(family: str) -> None:
    scorer = families.generator(family)
    for number in range(100):
        example, entry = families.instance(family, number), scorer[number]
        assert example.thinking and scorer.score_answer(example.answer, entry) == 1
        assert scorer.score_answer(f"not {example.answer}", entry) < 1


@pytest.mark.parametrize(
    ("family", "thinking"),
    [
        ("arithmetic", r"-?\d+ [+-] \d+ = {answer}$"),
        ("algebra", r"= {answer}$"),
        ("logic", "It (does not )?follows?[.]$"),
        ("lists", r"^\d [^,]+(, \d [^,]+)+, 1 \w+$"),
        ("times", r"\d+ h, (\d+ - \d+ = )?\d+ min$"),
        ("legs", r" = {answer}$"),
        ("divisors", r"(\* {answer} = (\d+) - \2|- {answer}) = 0$"),
        (
            "kinship",
            r"^(\w+ \d, \w+ \d(: \w+ \d(, \w+ \d)*)?\. )+\w+ \d, \w+ \d: "
            r"\w+ (child of|parent of|married to) \w+(; \w+ (child of|parent of|married to) \w+)*$",
        ),
    ],
)
def test_the_reasoning_ends_with_what_the_answer_says(family: str, thinking: str) -> None:
    for example in islice(draw(random.Random(3), "train", [family]), 200):
        answer = re.escape(example.answer)
        assert re.search(thinking.format(answer=answer), example.thinking), example


def test_every_step_of_a_sum_holds() -> None:
    """All sides of every equation that reasoning states are equal."""
    seen = 0
    for example in islice(draw(random.Random(4), "train", ["arithmetic", "legs", "times", "divisors"]), 400):
        for step in re.split(r"; | h, ", example.thinking.replace(" min", "")):
            sides = step.removesuffix(" h").split(" = ")
            assert len({eval(side) for side in sides}) == 1, example.thinking
            seen += len(sides) - 1
    assert seen > 600


def test_generations_of_a_family_agree_with_the_way_through_it() -> None:
    """A child's is one behind its parent's, a couple's is one."""
    steps = {"child of": 1, "parent of": -1, "married to": 0}
    for example in islice(draw(random.Random(6), "train", ["kinship"]), 200):
        told = re.findall(r"(\w+) (\d)", example.thinking)
        generation = dict(told)
        assert all(generation[name] == number for name, number in told), example
        for one, relation, other in re.findall(r"(\w+) (child of|parent of|married to) (\w+)", example.thinking):
            assert int(generation[one]) == int(generation[other]) + steps[relation], example


def channels(reply: str) -> list[tuple[str, str]]:
    parts, stray = messages_of(list(pieces(HarmonyText(f"{START}assistant{reply}"), MARKS)))
    assert not stray
    return [(part.channel, part.content) for part in parts]


def test_the_template_renders_what_training_reads(tokenizer: Path) -> None:
    """Both ways: the prompt of generation is the head of the training text, and its reply is read back in channels."""
    loaded = load_tokenizer(tokenizer)
    for example in islice(draw(random.Random(5), "train", ALL), 40):
        prompt, reply = prompt_and_reply(example, loaded)
        template = FIXED_DATE + loaded.get_chat_template()
        assert prompt + reply == loaded.apply_chat_template(example.messages(), chat_template=template, tokenize=False)
        assert prompt.endswith("<|start|>assistant") and "Reasoning: medium" in prompt
        expected = [("analysis", example.thinking)] * bool(example.thinking) + [("final", example.answer)]
        assert channels(reply) == expected
        assert evaluate.final(reply) == example.answer
        low, short = prompt_and_reply(example, loaded, "low")
        assert "Reasoning: low" in low and channels(short) == expected[-1:]


def test_a_step_has_the_same_batch_again_and_whole_conversations(tokenizer: Path) -> None:
    corpus = Corpus(tokenizer, rows=3, length=400)
    first, again, other = corpus.batch(7), corpus.batch(7), corpus.batch(8)
    for one, two in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, two)
    assert (first.tokens.ids != other.tokens.ids).any()
    texts = [
        corpus.tokenizer.decode(first.tokens.ids[b][first.tokens.segments[b] == n])
        for b in range(3)
        for n in range(1, first.tokens.segments[b].max() + 1)
    ]
    assert len(texts) > 2
    assert all(t.startswith("<|start|>system") and t.endswith("<|return|>") for t in texts)
    learnt = corpus.tokenizer.decode(first.tokens.ids[0][(first.weights[0] > 0) & (first.tokens.segments[0] == 1)])
    assert learnt == texts[0].partition("<|start|>assistant")[2]


def trained(folder: Path, tokenizer: Path, recipe: Recipe = RECIPE) -> model.GptOss:
    return train.train(folder, Corpus(tokenizer, recipe.rows, recipe.length), TINY, recipe, seed=0)


def test_first_weights_look_up_where_the_current_token_stood_before() -> None:
    """A query of layer 1's first head is closest to the key behind the token's earlier place, however far that is."""
    config, rng = network.CONFIG, np.random.default_rng(0)
    network_0 = network.first_weights(config, 0)
    found = []
    for distance in (20, 33, 60):
        tokens = rng.permutation(config.vocab_size)[:distance].astype(np.int32)
        ids = np.concatenate([tokens, tokens[:15]])
        (batch,) = batching.padded([Document(ids, np.ones(len(ids), np.float32))], 1, 64 if len(ids) <= 64 else 128)
        hidden_SD = forward(network_0, batch.tokens, here()).hidden[0, 0]
        norm, attention = network_0.layers.attention_norm, network_0.layers.attention
        scaled_SD = hidden_SD / jnp.sqrt((hidden_SD**2).mean(-1, keepdims=True)) * norm.scale[...][1][None]
        cos, sin = rope.tables(config, jnp.asarray(batch.tokens.positions))
        q_Sh, k_Sh = (
            rope.rotate((scaled_SD @ kernel[...][1, 0].T)[None, :, None], cos, sin)[0, :, 0]
            for kernel in (attention.q_kernel, attention.k_kernel)
        )
        scores_SS = np.asarray(q_Sh @ k_Sh.T)
        found += [scores_SS[i, : i + 1].argmax() == i - distance + 1 for i in range(distance, len(ids))]
    assert np.mean(found) > 0.5  # by chance 0.02


def test_a_stopped_training_ends_as_an_unbroken_one(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, log included; it stops between two states, so that steps run again."""
    monkeypatch.setattr(train, "SAVED_EVERY", 2)
    monkeypatch.setattr(train, "LOGGED_EVERY", 1)
    unbroken = sharding.by_path(nnx.state(trained(tmp_path / "a", tokenizer)))
    add = train.Log.add

    def stops(log: train.Log, step: int, *rest: object) -> None:
        if step == 4:
            raise KeyboardInterrupt
        add(log, step, *rest)

    monkeypatch.setattr(train.Log, "add", stops)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "b", tokenizer)
    assert [p.name for p in (tmp_path / "b" / "states").iterdir()] == ["2"]
    monkeypatch.setattr(train.Log, "add", add)
    resumed = sharding.by_path(nnx.state(trained(tmp_path / "b", tokenizer)))
    for path, array in unbroken.items():
        np.testing.assert_array_equal(array, resumed[path], err_msg=path)
    logs = [[json.loads(line) for line in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in "ab"]
    timed = ("seconds", "tokens")
    a, b = ([{k: v for k, v in line.items() if k not in timed} for line in log] for log in logs)
    assert a == b and [line["step"] for line in a] == [1, 2, 3, 4, 5, 6]
    assert a[-1]["loss"] < a[0]["loss"]


def test_a_training_of_another_configuration_is_not_gone_on_with(tokenizer: Path, tmp_path: Path) -> None:
    trained(tmp_path, tokenizer, RECIPE._replace(steps=3))
    with pytest.raises(ResumeError, match="recipe rate"):
        trained(tmp_path, tokenizer, RECIPE._replace(steps=3, rate=1e-4))
    with pytest.raises(ResumeError, match="config num_local_experts"):
        train.train(tmp_path, Corpus(tokenizer, 2, 512), replace(TINY, num_experts=8), RECIPE._replace(steps=3), seed=0)


def test_the_command_says_so_in_one_line(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    shutil.copytree(tokenizer, tmp_path / "tokenizer")
    settings = {"config": network.CONFIG.to_json(), "recipe": Recipe()._asdict(), "seed": 1}
    (tmp_path / "training" / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    result = CliRunner().invoke(make_nano, [str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert "of a training with another seed: train in another folder" in result.stderr


def test_what_is_published_is_what_was_trained(tokenizer: Path, tmp_path: Path) -> None:
    """The BF16 checkpoint read back has the weights, rounded to bfloat16."""
    trained_model = network.first_weights(TINY, 3)
    publish.write_bf16(tmp_path, trained_model, tokenizer)
    read = sharding.by_path(load(Checkpoint(tmp_path), "bfloat16"))
    for path, array in sharding.by_path(trained_model).items():
        np.testing.assert_array_equal(array.astype("bfloat16"), read[path], err_msg=path)


def test_families_are_instances_of_their_generators() -> None:
    assert len(FAMILIES) >= 6
    assert families.instance("arithmetic", 12345) == families.instance("arithmetic", 12345)


def test_distance_is_the_root_of_the_divergence() -> None:
    """Against entropies: JS(p, q) = H((p + q) / 2) − (H(p) + H(q)) / 2; 0 of equals, √ln 2 of strangers."""
    rng = np.random.default_rng(0)
    p, q = (specialise.shares_of(rng.integers(0, 9, (3, 16))) for _ in range(2))

    def entropy(x: np.ndarray) -> np.ndarray:
        return np.array([-sum(v * np.log(v) for v in row if v > 0) for row in x])

    expected = np.sqrt(entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2).mean()
    np.testing.assert_allclose(specialise.distance(p, q), expected, rtol=1e-9)
    assert specialise.distance(p, p) == 0
    np.testing.assert_allclose(specialise.distance(np.eye(2)[:1], np.eye(2)[1:]), np.sqrt(np.log(2)))


def test_specialisation_of_families_that_share_nothing(tmp_path: Path, tiny_mxfp4: Path) -> None:
    """Halves are taken in turns, and rows name both."""
    examples = families.pick("calibration", ["arithmetic", "legs"], 3)
    assert [e.family for e in examples] == ["arithmetic"] * 3 + ["legs"] * 3
    assert {e.split for e in examples} == {"calibration"}
    families.write(tmp_path / "examples.jsonl", examples)
    assert families.read(tmp_path / "examples.jsonl") == examples
    specialise.write_rows(tmp_path / "rows.jsonl", tiny_mxfp4, examples)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [r["half"] for r in rows[:3]] == [
        "arithmetic, first half",
        "arithmetic, second half",
        "arithmetic, first half",
    ]
    between = np.array([[0, 0.6], [0.6, 0]])
    found = specialise.Specialisation(["a", "b"], np.zeros((2, 1, 4)), between, np.array([0.1, 0.2]))
    np.testing.assert_allclose(found.ratio, 4)


def test_the_card_says_what_was_measured() -> None:
    scores = {
        "BF16": dict.fromkeys(FAMILIES, Score(9, 10, 50 * np.log(1.25), 50)),
        "MXFP4": dict.fromkeys(FAMILIES, Score(8, 10, 50 * np.log(1.5), 50)),
    }
    count = len(FAMILIES)
    found = specialise.Specialisation(
        list(FAMILIES), np.zeros((count, 6, 16)), 0.3 - 0.3 * np.eye(count), np.full(count, 0.02)
    )
    losses = dict.fromkeys(FAMILIES, 0.5)
    log = [
        {"step": 25 * n, "loss": n / 10, "families": losses, "tokens": 500_000, "seconds": 1800} for n in range(1, 7)
    ]
    text = card(network.CONFIG, Recipe(), log, scores, found)
    assert "| logic | 90% (9 of 10) | 80% (8 of 10) |" in text and "| mean | 90.0% | 80.0% |" in text
    assert "| perplexity of the right replies | 1.2500 | 1.5000 |" in text
    assert [line.split()[1] for line in text.splitlines() if line.endswith(" 0.500 |")] == ["25", "50", "100", "150"]
    assert "3.0 million tokens" in text and "3.0 hours" in text and "15.0 times" in text
    assert all(f"`{family.dataset}`" in text for family in FAMILIES.values())
