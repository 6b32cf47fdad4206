"""What is published of gpt-oss-20b: eight rankings by domain, summaries, and the routing of fourteen answers."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np
import pytest

import gptoss_jax as gj
from gptoss_jax.config import GPT_OSS_20B
from gptoss_jax.fingerprints.importing import of_examples
from gptoss_jax.fingerprints.published import Published, read_published
from gptoss_jax.fingerprints.ranking import NEVER
from gptoss_jax.fingerprints.summaries import Group
from tests.conftest import SHARED

pytestmark = pytest.mark.slow

FOLDER = SHARED / "data" / "fingerprint"
RANKINGS = ("all", "health_or_medicine", "instruction_following", "law", "math", "safety", "science", "unsafety")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> gj.fingerprint.Activations:
    """All that is published, written and read again."""
    if not FOLDER.is_dir():
        pytest.skip("the folder of shared data is not here")
    out = tmp_path_factory.mktemp("fingerprint") / "activations"
    sources = [FOLDER / "summaries.tar.xz", FOLDER / "examples.tar.xz"]
    gj.fingerprint.import_published(sources, FOLDER / "domains.json", out=out)
    return gj.fingerprint.Activations.open(out)


@pytest.fixture(scope="module")
def published() -> Published:
    """The examples alone."""
    if not FOLDER.is_dir():
        pytest.skip("the folder of shared data is not here")
    found = Published()
    read_published(FOLDER / "examples.tar.xz", found)
    return found


@pytest.mark.parametrize("name", RANKINGS)
def test_a_published_ranking_comes_out_exactly(name: str, dataset: gj.fingerprint.Activations) -> None:
    assert {*RANKINGS} == {file.stem for file in (FOLDER / "topical_analytics").glob("*.json")}
    domain = {"all": None, "unsafety": "safety"}.get(name, name)
    ranking = gj.fingerprint.rank(dataset, domain, mode="interleaved", reverse=name == "unsafety")
    theirs = json.loads((FOLDER / "topical_analytics" / f"{name}.json").read_text(encoding="utf-8"))
    assert ranking.reasons is not None and len(theirs) == GPT_OSS_20B.num_layers
    for layer, (experts, reasons) in enumerate(zip(ranking.layers, ranking.reasons, strict=True)):
        seen = [expert for expert, reason in zip(experts, reasons, strict=True) if reason != NEVER]
        assert theirs[f"layer_{layer}"] == seen
    ranking.check(GPT_OSS_20B)


def test_sizes(dataset: gj.fingerprint.Activations) -> None:
    names = ("num_layers", "num_experts", "top_k", "groups", "samples", "answers")
    assert [dataset.info[name] for name in names] == [24, 32, 4, 703, 36_000, 14]


def test_groups_of_one_answer_come_out_of_its_routing_to_the_bit(
    dataset: gj.fingerprint.Activations, published: Published
) -> None:
    assert dataset.info["whole_groups"] == dataset.info["reproduced_groups"] == 7
    counted = {one.group for one in dataset.summaries if one.count_LE is not None}
    assert len(counted) == 7 and counted <= {*published.examples}
    said = Published()
    read_published(FOLDER / "summaries.tar.xz", said)
    for group in counted:
        seen = of_examples(group, published.examples[group], GPT_OSS_20B.num_experts)
        assert {*seen} == {*said.summaries[group]}
        for segment, means in said.summaries[group].items():
            assert (means.sample_count, means.tokens) == (1, seen[segment].tokens)
            for layer, expert, frequency, density in means.cells:
                assert seen[segment].count_frequency_LE[layer, expert] == frequency
                assert seen[segment].prob_density_LE[layer, expert] == density
            assert (seen[segment].count_frequency_LE > 0).sum() == len(means.cells)


def test_sample_count_counts_the_answers_that_have_the_segment(dataset: gj.fingerprint.Activations) -> None:
    """All of a group: means over so many are fractions of that, finished groups have both segments, others thoughts."""
    segments: dict[Group, set[str]] = defaultdict(set)
    cut = 0
    for one in dataset.summaries:
        segments[one.group].add(one.segment)
        assert abs(one.tokens * one.sample_count - round(one.tokens * one.sample_count)) < 1e-6 * one.sample_count
        # Tokens without routing: the last of an answer; of thoughts the two in the prompt. Were answers without the
        # segment counted, as zeros, more would be missing; a mean of 1/n is at least one over the mean of n.
        of_layers = one.count_frequency_LE.sum(1) / GPT_OSS_20B.top_k
        if one.group.finished:
            missing = {"answer": 1, "think": 2}[one.segment]
            assert (of_layers <= 1 - missing / one.tokens + 1e-9).all()
            assert (of_layers > 1 - 5 * missing / one.tokens).all()
        elif one.tokens == 514:  # of the 512 tokens of a cut answer all are thought, whatever they say
            np.testing.assert_allclose(of_layers, 511 / 514, rtol=1e-12)
            cut += 1
    assert cut == 268
    assert all(names == ({"think", "answer"} if group.finished else {"think"}) for group, names in segments.items())


def agreement(published: Published, offset: int, layer: int) -> float:
    """How often two places with the same token choose the same experts, where entry i belongs to token i + offset."""
    sets: dict[str, Counter[tuple[int, ...]]] = defaultdict(Counter)
    for token, experts in entries(published, offset, layer):
        sets[token][experts] += 1
    same = sum(n * (n - 1) for some in sets.values() for n in some.values())
    return same / sum(n * (n - 1) for n in (sum(some.values()) for some in sets.values()))


def entries(published: Published, offset: int, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for examples in published.examples.values():
        for example in examples:
            for t, chosen in enumerate(example.experts_TLk[:, layer]):
                if 0 <= t + offset < len(example.reply):
                    yield example.reply[t + offset], tuple(np.sort(chosen).tolist())


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_an_entry_belongs_to_the_token_of_its_place(layer: int, published: Published) -> None:
    """In early layers a token's experts follow from the token: only in its own place do equal tokens agree."""
    found = {offset: agreement(published, offset, layer) for offset in range(-4, 5)}
    assert max(found, key=lambda offset: found[offset]) == 0
    assert found[0] > 1.6 * max(share for offset, share in found.items() if offset), found


def test_all_channel_marks_choose_the_same_experts_in_their_place_alone(published: Published) -> None:
    """In layer 0: two marks of each of 13 finished answers, one of the other."""
    for offset in range(-4, 5):
        sets = Counter(experts for token, experts in entries(published, offset, 0) if token == "<|channel|>")
        assert (len(sets) == 1) == (offset == 0), (offset, sets)
        assert offset or [*sets.values()] == [27]
