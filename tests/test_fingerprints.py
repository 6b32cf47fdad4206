"""Activation datasets: what is published becomes one, and experts are ranked by it; beside plain loops."""

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import gptoss_jax as gj
from gptoss_jax.cli import cli
from gptoss_jax.config import TINY
from gptoss_jax.fingerprints.ranking import NEVER, interleaved
from gptoss_jax.fingerprints.summaries import Group, Summary, sample_count
from gptoss_jax.fingerprints.traces import Segment, contents, messages, published_segments
from gptoss_jax.selection.intervals import student

from . import published
from .published import DOMAINS, FINAL, HEADER, E, L

Activations = gj.fingerprint.Activations


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Summaries of all groups, and an example of each."""
    return published.write(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def dataset(files: Path) -> Activations:
    return gj.fingerprint.import_published(files, DOMAINS)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Activations:
    """Of examples alone, so that all is counted: the first answer of each group."""
    return gj.fingerprint.import_published(published.write(tmp_path_factory.mktemp("traced"), summaries=False), DOMAINS)


def run(*argv: object) -> str:
    """What a command that succeeds prints."""
    result = CliRunner().invoke(cli, ["fingerprint", *map(str, argv)], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return result.stdout


# What is published becomes a dataset.


def test_summaries_are_those_of_the_files(dataset: Activations) -> None:
    known = published.answers()
    assert len(dataset.summaries) == sum(2 if group[2] else 1 for group in known)
    for one in dataset.summaries:
        some = known[tuple(one.group)]
        assert one.sample_count == len(some)
        assert one.tokens == sum(answer.parts()[one.segment][1] for answer in some) / len(some)
        cells = published.means(some, one.segment)
        for layer, expert in np.ndindex(L, E):
            often, dense = cells.get((layer, expert), (0.0, 0.0))
            assert one.count_frequency_LE[layer, expert] == often and one.prob_density_LE[layer, expert] == dense


def test_a_group_whose_answers_are_all_examples_has_counts(dataset: Activations) -> None:
    known, whole = published.answers(), [group for group, size in published.GROUPS.items() if size == 1]
    assert dataset.info["whole_groups"] == dataset.info["reproduced_groups"] == len(whole) == 3
    for one in dataset.summaries:
        if tuple(one.group) not in whole:
            assert one.count_LE is None and one.gate_sum_LE is None
            continue
        (answer,) = known[tuple(one.group)]
        counts, gates = np.zeros((L, E), int), np.zeros((L, E))
        for t in answer.parts()[one.segment][0]:
            for layer, experts in enumerate(answer.experts[t]):
                counts[layer, experts] += 1
                gates[layer, experts] += answer.gates[t, layer]
        np.testing.assert_array_equal(one.count_LE, counts)
        np.testing.assert_array_equal(one.gate_sum_LE, gates)


def test_examples_that_disagree_are_told_of_and_the_summary_stands(tmp_path: Path) -> None:
    folder, group = published.write(tmp_path / "a"), ("exam", "law", True, True)
    file = published.file_of(folder, group)
    raw = json.loads(file.read_text())
    raw["num_think_tokens"] += 1
    file.write_text(json.dumps(raw))
    made = CliRunner().invoke(cli, ["fingerprint", "import", str(folder), "--out", str(tmp_path / "out")])
    assert "1 of 3 groups whose answers are all examples have other figures" in made.stderr
    assert "examples these give 2 summaries to the bit" in made.stdout
    (one,) = (
        s for s in Activations.open(tmp_path / "out").summaries if tuple(s.group) == group and s.segment == "think"
    )
    assert one.tokens == raw["num_think_tokens"] and one.count_LE is None


def test_an_answer_without_thoughts_is_one_too() -> None:
    """Ten answers that thought and seven of them that answered are ten, whichever segment stands last."""
    zeros, groups = np.zeros((L, E)), (Group("quiz", "sums", True, False), Group("quiz", "lists", True, False))
    segments = (("think", 10), ("answer", 7))
    found = [Summary(group, name, n, 5.0, zeros, zeros) for group in groups for name, n in segments]
    assert sample_count(found) == sample_count(found[::-1]) == 20


def test_examples_alone_give_the_summaries_of_their_answers(traced: Activations) -> None:
    known = published.answers()
    for one in traced.summaries:
        cells = published.means(known[tuple(one.group)][:1], one.segment)
        assert one.sample_count == 1 and {c: one.count_frequency_LE[c] for c in cells} == {
            place: often for place, (often, _) in cells.items()
        }
        assert (one.count_frequency_LE > 0).sum() == len(cells) and one.count_LE is not None
        np.testing.assert_allclose(one.count_LE, one.count_frequency_LE * one.tokens, rtol=1e-12)
    assert traced.info["top_k"] == published.K


def test_answers_have_their_texts(dataset: Activations) -> None:
    known = published.answers()
    assert len(dataset.answers) == len(known) == dataset.info["answers"]
    for row in dataset.answers:
        answer = known[row["benchmark"], row["category"], row["finished"], row["repetition"]][0]
        thought = "".join(answer.reply[len(HEADER) : len(HEADER) + answer.thoughts])
        assert row["think"] == thought and row["reply"] == "".join(answer.reply) and row["prompt"] == "What is it?"
        assert row["think_tokens"] == answer.parts()["think"][1]
        assert row["answer_tokens"] == (answer.parts()["answer"][1] if answer.finished else 0)
        assert row["answer"].startswith(" say0 say1") == answer.finished


def test_a_folder_an_archive_and_several_sources_are_one(files: Path, dataset: Activations, tmp_path: Path) -> None:
    parts = [tmp_path / "one.tar.xz", tmp_path / "two.tar"]
    for part, mode, is_example in zip(parts, ("w:xz", "w"), (False, True), strict=True):
        with tarfile.open(part, mode) as archive:
            for file in files.rglob("*.json"):
                if ("examples" in file.name) == is_example:
                    archive.add(file, file.relative_to(files))
    made = gj.fingerprint.import_published(parts, DOMAINS, out=tmp_path / "made")
    dataset.save(tmp_path / "saved")
    for name in ("summaries.parquet", "answers.parquet", "README.md"):
        assert (tmp_path / "made" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()
    assert made.info == {**dataset.info, "source": f"{parts[0]}, {parts[1]}"}


# The segments of a reply.

CALL = ["<|channel|>", "commentary", " to", "=x", "<|message|>", "{}", "<|call|>"]
REPLIES: dict[str, tuple[list[str], bool, dict[str, Segment], tuple[str, str]]] = {
    "both": (
        [*HEADER, "a", "b", "<|end|>", *FINAL, "c", "<|return|>"],
        True,
        {"think": Segment(-2, 5), "answer": Segment(6, 13)},
        ("ab", "c"),
    ),
    "without thoughts": (
        [*FINAL[2:], "c", "d", "<|return|>"],
        True,
        {"answer": Segment(-2, 6)},
        ("", "cd"),
    ),
    "with a call between": (
        [*HEADER, "a", "<|end|>", "<|start|>", "assistant", *CALL, *FINAL, "c", "<|return|>"],
        True,
        {"think": Segment(-2, 4), "answer": Segment(14, 21)},
        ("a", "c"),
    ),
    "cut in its thoughts": ([*HEADER, "a", "b"], False, {"think": Segment(-2, 5)}, ("ab", "")),
    "cut in its answer": (
        [*HEADER, "a", "<|end|>", *FINAL, "c", "d"],
        False,
        {"think": Segment(-2, 12)},
        ("a", "cd"),
    ),
    "cut in a header": ([*HEADER, "a", "<|end|>", *FINAL[:3]], False, {"think": Segment(-2, 8)}, ("a", "")),
}


@pytest.mark.parametrize("name", REPLIES)
def test_segments_of_a_reply(name: str) -> None:
    reply, finished, segments, texts = REPLIES[name]
    assert published_segments(reply, finished) == segments
    assert tuple(contents(reply).values()) == texts


def test_messages_of_a_reply() -> None:
    reply = REPLIES["with a call between"][0]
    assert [(one.channel, one.first, one.content, one.end) for one in messages(reply)] == [
        ("analysis", -2, 3, 4),
        ("commentary to=x", 5, 12, 13),
        ("final", 14, 19, 20),
    ]


# The folder.


def test_a_dataset_is_read_as_it_was_written(dataset: Activations, tmp_path: Path) -> None:
    dataset.save(tmp_path / "out")
    read = Activations.open(tmp_path / "out")
    assert read.info == dataset.info and read.domains == DOMAINS and [*read.answers] == [*dataset.answers]
    for one, other in zip(read.summaries, dataset.summaries, strict=True):
        assert (one.group, one.segment, one.sample_count, one.tokens) == (
            other.group,
            other.segment,
            other.sample_count,
            other.tokens,
        )
        for name in ("count_frequency_LE", "prob_density_LE", "count_LE", "gate_sum_LE"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_the_tables_are_in_long_form(dataset: Activations, tmp_path: Path) -> None:
    dataset.save(tmp_path / "out")
    schema = pq.read_schema(tmp_path / "out" / "summaries.parquet")
    of_text, of_number = ["benchmark", "category"], ["count_frequency", "prob_density"]
    assert {field.name: str(field.type) for field in schema} == {
        **dict.fromkeys(of_text, "string"),
        **dict.fromkeys(["finished", "repetition"], "bool"),
        "segment": "string",
        "sample_count": "int64",
        "tokens": "double",
        **dict.fromkeys(["layer", "expert"], "int32"),
        **dict.fromkeys(of_number, "double"),
        "count": "int64",
        "gate_sum": "double",
    }
    rows = pq.read_table(tmp_path / "out" / "summaries.parquet").to_pylist()
    assert len(rows) == len(dataset.summaries) * L * E
    for row, (number, layer, expert) in zip(rows, np.ndindex(len(dataset.summaries), L, E), strict=True):
        one = dataset.summaries[number]
        assert [row[name] for name in Group._fields] == [*one.group] and row["segment"] == one.segment
        assert (row["layer"], row["expert"]) == (layer, expert)
        assert row["count_frequency"] == one.count_frequency_LE[layer, expert]
        assert row["count"] == (None if one.count_LE is None else one.count_LE[layer, expert])


@pytest.mark.slow
@pytest.mark.parametrize("examples", [True, False])
def test_datasets_loads_it(examples: bool, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    folder = published.write(tmp_path / "files", examples=examples)
    made = gj.fingerprint.import_published(folder, out=tmp_path / "out")
    names = datasets.get_dataset_config_names(str(tmp_path / "out"))
    loaded = {
        name: datasets.load_dataset(str(tmp_path / "out"), name, split="train", cache_dir=str(tmp_path / "cache"))
        for name in names
    }
    assert {*names} == {"summaries", *(["answers"] if examples else [])}  # datasets loads no table without rows
    assert len(loaded["summaries"]) == len(made.summaries) * L * E
    assert [*loaded.get("answers", [])] == [*made.answers]
    assert loaded["summaries"][5]["category"] == made.summaries[0].group.category


# Rankings, beside loops over what each answer chose.


def score(groups: list[Any], weight: str, segments: tuple[str, ...]) -> list[list[float]]:
    """What each expert scores, from the files' answers."""
    total = [[0.0] * E for _ in range(L)]
    for some in groups:
        for segment in segments:
            if segment not in some[0].parts():
                continue
            for (layer, expert), (often, _) in published.means(some, segment).items():
                tokens = some[0].parts()[segment][1]
                total[layer][expert] += round(often * tokens) if weight == "token" else len(some) * often / 2
    return total


def listed(scores: list[float]) -> list[int]:
    return sorted((e for e in range(E) if scores[e] > 0), key=lambda e: (-scores[e], e))


def turns(own: list[int], every: list[int]) -> list[int]:
    """One of the domain, one of all, and so on; who has no more leaves the turn to the other."""
    found: list[int] = []
    for turn in range(max(len(own), len(every))):
        for some in (own, every):
            if turn < len(some) and some[turn] not in found:
                found.append(some[turn])
    return found


WAYS = [
    (domain, segment, mode, weight, reverse)
    for domain in (None, "law", "art")
    for segment in ("both", "think", "answer")
    for mode in ("pure", "interleaved")
    for weight in ("sample", "token")
    for reverse in (False, True)
]


@pytest.mark.parametrize(("domain", "segment", "mode", "weight", "reverse"), WAYS)
def test_a_ranking_is_that_of_the_loop(
    domain: str | None,
    segment: str,
    mode: str,
    weight: str,
    reverse: bool,
    dataset: Activations,
    traced: Activations,
) -> None:
    of_tokens = weight == "token"
    known = {group: some[:1] if of_tokens else some for group, some in published.answers().items()}
    inside = [some for group, some in known.items() if domain is None or f"{group[0]}/{group[1]}" in DOMAINS[domain]]
    segments = ("think", "answer") if segment == "both" else (segment,)
    scores = [score(some, weight, segments) for some in (inside, [*known.values()])]
    own, every = ([listed(layer) for layer in layers] for layers in scores)
    expected = [turns(*pair) for pair in zip(own, every, strict=True)] if mode == "interleaved" else own
    expected = [layer[::-1] if reverse else layer for layer in expected]
    ranking = gj.fingerprint.rank(
        traced if of_tokens else dataset, domain, segment=segment, mode=mode, weight=weight, reverse=reverse
    )
    assert ranking.reasons is not None
    for layer, (found, why) in enumerate(zip(ranking.layers, ranking.reasons, strict=True)):
        assert found[: len(expected[layer])] == expected[layer]
        never = [e for e in range(E) if e not in expected[layer]]
        assert found[len(expected[layer]) :] == never
        assert [e for e, reason in zip(found, why, strict=True) if reason == NEVER] == never
        if of_tokens:
            assert ranking.counts is not None
            assert ranking.counts[layer] == [round(scores[0][layer][e]) for e in found]
    assert 6 in ranking.layers[1][-1:] and (of_tokens or ranking.counts is None)


@pytest.mark.parametrize(
    ("own", "every", "both"),
    [
        ([1, 2, 3], [3, 2, 1], [1, 3, 2]),
        ([4], [0, 1, 2, 4], [4, 0, 1, 2]),
        ([0, 1, 2], [2], [0, 2, 1]),
        ([], [3, 1], [3, 1]),
    ],
)
def test_interleaving(own: list[int], every: list[int], both: list[int]) -> None:
    assert interleaved([own], [every]) == [both] == [turns(own, every)]


def test_categories_stand_in_the_place_of_a_domain(dataset: Activations) -> None:
    by_name = gj.fingerprint.rank(dataset, category=["exam/law", "quiz/*law"])
    assert by_name.layers == gj.fingerprint.rank(dataset, "law").layers
    assert by_name.origin.domains == {"exam/law, quiz/*law": 1.0}
    other = gj.fingerprint.rank(dataset, "law", domains={"law": ["quiz/maths"]})
    assert other.layers == gj.fingerprint.rank(dataset, category=["quiz/maths"]).layers != by_name.layers


def test_the_origin_says_what_was_ranked(dataset: Activations, tmp_path: Path) -> None:
    dataset.save(tmp_path / "out")
    ranking = gj.fingerprint.rank(tmp_path / "out", "law", mode="interleaved", segment="think", reverse=True)
    assert vars(ranking.origin) == {
        "criterion": "frequency",
        "domains": {"law": 1.0},
        "rule": "falling score, interleaved with all, reversed, segment think, each sample the same",
        "seed": None,
        "profile_hash": None,
        "model_fingerprint": None,
        "calibration_rows": None,
        "answers_hash": hashlib.sha256((tmp_path / "out" / "summaries.parquet").read_bytes()).hexdigest(),
    }
    assert ranking.origin.answers_hash == dataset.hash  # before it is written
    assert str(ranking.origin) == "by `frequency` over the activation dataset's domain `law`"
    assert str(gj.fingerprint.rank(dataset).origin) == "by `frequency` over all answers of the activation dataset"


# Specificity, beside loops.


def log_ratio(own: list[Any], every: list[Any], weight: str) -> np.ndarray:
    used = [np.array(score(some, weight, ("think", "answer"))) for some in (own, every)]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.subtract(*(np.log(layers / layers.sum(1, keepdims=True)) for layers in used))


@pytest.mark.parametrize("weight", ["sample", "token"])
def test_specificity_is_that_of_the_loop(weight: str, dataset: Activations, traced: Activations) -> None:
    of_tokens = weight == "token"
    known = {group: some[:1] if of_tokens else some for group, some in published.answers().items()}
    inside = {group for group in known if f"{group[0]}/{group[1]}" in DOMAINS["law"]}

    def without(category: str | None) -> np.ndarray:
        left = {group: some for group, some in known.items() if group[1] != category}
        return log_ratio([some for group, some in left.items() if group in inside], [*left.values()], weight)

    whole, variance = without(None), np.zeros((L, E))
    for names in (["law", "tax law"], ["art", "maths"]):  # law is one category of two benchmarks
        replicates = np.array([without(name) for name in names])
        with np.errstate(invalid="ignore"):
            variance += (len(names) - 1) / len(names) * ((replicates - replicates.mean(0)) ** 2).sum(0)
    found = gj.fingerprint.specificity(traced if of_tokens else dataset, "law", weight=weight)
    half = student(0.95, 1) * np.sqrt(variance)
    known_LE = np.isfinite(half)
    assert known_LE.sum() > 5 and not known_LE.all()
    for layer, expert in np.ndindex(L, E):
        place = layer, expert
        np.testing.assert_allclose(found.ratio[place], np.nan_to_num(np.exp(whole[place])), rtol=1e-9)
        ends = (0, np.inf)
        if known_LE[place]:
            ends = (np.exp(whole[place] - half[place]), np.exp(whole[place] + half[place]))
        np.testing.assert_allclose((found.low[place], found.high[place]), ends, rtol=1e-6)
    np.testing.assert_allclose(found.share.sum(1), 1)
    np.testing.assert_allclose(found.share_of_all.sum(1), 1)
    ranked = gj.fingerprint.rank(traced if of_tokens else dataset, "law", by="specificity", weight=weight)
    for layer, experts in enumerate(ranked.layers):
        seen = [e for e in range(E) if found.share[layer, e] > 0]
        assert experts[: len(seen)] == sorted(seen, key=lambda e, row=found.ratio[layer]: (-row[e], e))


def test_a_domain_of_one_category_has_no_interval(dataset: Activations) -> None:
    found = gj.fingerprint.specificity(dataset, "art")
    assert not found.low.any() and np.isinf(found.high).all() and found.ratio.any()
    assert " to " not in found.words(0, 0) and found.share[0, 2] == found.ratio[0, 2] == 0
    assert found.ratio[found.best(1)[0]] == found.ratio.max()


def simulated(rng: np.random.Generator, categories: int) -> Activations:
    """Categories of a domain, and as many others, whose use of four experts scatters about what their kind likes."""
    likes = {"in": np.array([4.0, 3.0, 2.0, 1.0]), "out": np.array([1.0, 2.0, 3.0, 4.0])}
    summaries = []
    for kind, alpha in likes.items():
        for number in range(categories):
            frequency = rng.dirichlet(5 * alpha)[None]
            group = Group("quiz", f"{kind}{number}", True, False)
            summaries.append(Summary(group, "think", 10, 50.0, frequency, frequency / 2))
    return Activations(summaries, [], {}, "")


@pytest.mark.slow
def test_intervals_hold_the_truth() -> None:
    """95 of 100 are to do so: of 400 domains of eight categories."""
    rng, truth = np.random.default_rng(0), np.array([4, 3, 2, 1]) / np.array([2.5] * 4)
    held = []
    for _ in range(400):
        found = gj.fingerprint.specificity(simulated(rng, 8), category=["quiz/in*"])
        held.append((found.low[0] <= truth) & (truth <= found.high[0]))
    assert (np.mean(held, 0) > 0.92).all() and (np.mean(held, 0) < 0.99).all(), np.mean(held, 0)


# The commands.


def test_the_commands_do_what_python_does(files: Path, tmp_path: Path) -> None:
    domains = tmp_path / "domains.json"
    domains.write_text(json.dumps(DOMAINS), encoding="utf-8")
    out = tmp_path / "dataset"
    made = gj.fingerprint.import_published(files, DOMAINS, out=tmp_path / "python")
    said = run("import", files, "--domains", domains, "--out", out)
    assert said.startswith("7 groups of 14 answers, 7 of them with their text, over 4 layers of 7 experts; of 3 groups")
    for file in out.iterdir():
        assert file.read_bytes() == (tmp_path / "python" / file.name).read_bytes()
    options = {"segment": "answer", "by": "specificity", "mode": "interleaved"}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    printed = run("rank", out, "--domain", "law", *words, "--keep", "50%", "--out", tmp_path / "ranking.json")
    expected = gj.fingerprint.rank(tmp_path / "python", "law", **options)
    assert (tmp_path / "ranking.json").read_text() == expected.to_json()
    assert (tmp_path / "keep.json").read_text() == expected.keep(3).to_json()
    special = gj.fingerprint.specificity(made, "law", segment="answer")
    lines = [f"layer {layer}, expert {expert}: {special.words(layer, expert)}" for layer, expert in special.best(10)]
    assert printed.splitlines()[2:] == lines and printed.splitlines()[1].startswith("3 experts a layer")
    for number, (words, python) in enumerate(
        [
            (["--domain", "law", "--domains", domains, "--reverse"], {"domain": "law", "reverse": True}),
            (["--category", "quiz/law", "--category", "*/art"], {"category": ("quiz/law", "*/art")}),
            (["--category", "exam/law", "--weight", "token"], {"category": ("exam/law",), "weight": "token"}),
        ]
    ):
        run("rank", out, *words, "--out", tmp_path / f"{number}.json")
        layers = json.loads((tmp_path / f"{number}.json").read_text())["layers"]
        assert layers == gj.fingerprint.rank(made, **python).layers != gj.fingerprint.rank(made, "law").layers


def test_a_ranking_is_one_that_prune_takes(dataset: Activations, tiny_mxfp4: Path, tmp_path: Path) -> None:
    ranking = gj.fingerprint.rank(dataset, "law", keep=4, out=tmp_path / "ranking.json")
    assert gj.Ranking.read(tmp_path / "ranking.json", TINY) == ranking
    assert gj.KeepSets.read(tmp_path / "keep.json", TINY) == ranking.keep(4)
    gj.prune(str(tiny_mxfp4), gj.KeepSets.read(tmp_path / "keep.json", TINY), out=tmp_path / "cut")
    card = " ".join((tmp_path / "cut" / "README.md").read_text(encoding="utf-8").split())
    assert "The choice of experts is by `frequency` over the activation dataset's domain `law`" in card
    assert f"The SHA-256 of the dataset's summaries is `{dataset.hash}`." in card


def test_a_domain_that_is_there_in_part_is_told_of(dataset: Activations, tmp_path: Path) -> None:
    dataset.save(tmp_path / "out")
    domains = tmp_path / "domains.json"
    domains.write_text(json.dumps({"law": ["quiz/law", "exam/chess"]}))
    words = ["rank", tmp_path / "out", "--domains", domains, "--domain", "law", "--out", tmp_path / "r.json"]
    told = CliRunner().invoke(cli, ["fingerprint", *map(str, words)], catch_exceptions=False)
    assert "of the 2 categories of domain 'law' the dataset has 1" in told.stderr and told.exit_code == 0
