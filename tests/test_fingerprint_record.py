"""`fingerprint record`: beside loops over the trace of its replies, and beside a profile of the very texts."""

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import gptoss_jax as gj
from gptoss_jax.cli import cli
from gptoss_jax.data import tokens
from gptoss_jax.data.harmony import HarmonyText
from gptoss_jax.evaluation.replies import loops
from gptoss_jax.routing.segments import ANSWER, THINK

from .bad_input import Program, Refused, case, dump, edit
from .test_generate_trace import of_folder, stopped
from .test_interrupted import PROGRAM, words

pytestmark = pytest.mark.slow

Activations = gj.fingerprint.Activations


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def row(text: str, benchmark: str, category: str, **more: Any) -> dict[str, Any]:
    return {"text": text, "benchmark": benchmark, "category": category} | more


# What nano answers, without end, and in circles: two of these replies do not end.
HARMONY = "<|start|>system<|message|>Be brief.<|end|><|start|>user<|message|>What is 9 - 4?<|end|><|start|>assistant"
CONVERSATION = [
    user("Hello"),
    {"role": "assistant", "content": "Hi"},
    user("Count to ten"),
    {"role": "assistant", "content": "1"},
]
ROWS = [
    row("What is 12 + 7?", "quiz", "sums", id="a"),
    row("Sort: 3, 1, 2", "quiz", "sums", id="a"),
    row("Is 7 prime?", "quiz", "talk"),
    row("Ann is Tom's mother. Tom is Bob's father. Who is Ann to Bob?", "quiz", "kin", id="kin"),
    row("a a a a a a a a a a a a", "quiz", "kin", id="a#2"),
    row(HARMONY, "exam", "sums", id="harmony"),
    row("zzzzzz qqq qqq", "exam", "sums", id="z"),
    {"messages": CONVERSATION, "benchmark": "exam", "category": "talk", "id": "talk"},
]
DOMAINS = {"sums": ["quiz/sums", "exam/sums"], "talk": ["quiz/talk", "exam/talk"]}
MOST = 110  # tokens of a reply
GREEDY = {"temperature": 0.0, "dtype": "float32", "max_new_tokens": MOST}
FLAGS = ("--temperature", 0, "--dtype", "float32", "--max-new-tokens", MOST)


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of the command, more questions than run side by side."""
    place = tmp_path_factory.mktemp("recorded")
    rows, domains = write(place / "rows.jsonl", ROWS), dump(place / "domains.json", DOMAINS)
    argv = ["fingerprint", "record", "nano", "--data", rows, "--domains", domains, "--out", place / "out", *FLAGS]
    done = CliRunner().invoke(cli, words([*argv, "--batch-size", 3]), catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    assert "8 questions, of which 8 are asked" in done.stderr
    assert done.stdout.startswith("8 answers in ") and "over 6 layers of 16 experts" in done.stdout
    return place / "out"


@pytest.fixture(scope="module")
def dataset(folder: Path) -> Activations:
    return Activations.open(folder)


@pytest.fixture(scope="module")
def trace(folder: Path) -> gj.Trace:
    return gj.Trace.open(folder / "traces")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return gj.open("nano").tokenizer


ASKED = [str(row["text"]) for row in ROWS[:5]] + ["What is 9 - 4?", "zzzzzz qqq qqq", "Count to ten"]


# What is written.


def test_answers_are_what_the_model_says(dataset: Activations, trace: gj.Trace, tokenizer: Any) -> None:
    assert trace.prompts == [answer["prompt_id"] for answer in dataset.answers]
    for answer in dataset.answers:
        prompt = trace[answer["prompt_id"]]
        said = prompt.token_ids[prompt.generated].tolist()
        assert answer["reply"] == tokenizer.decode(said)
        assert answer["finished"] == (tokenizer.decode(said[-1:]) == "<|return|>") == (len(said) < MOST)
        assert answer["repetition"] == loops(said)
        for name, code in (("think", THINK), ("answer", ANSWER)):
            content = prompt.token_ids[prompt.segments == code].tolist()
            assert answer[name].replace("\n\n", "") == tokenizer.decode(content).replace("\n\n", "")
            assert answer[f"{name}_tokens"] == ((prompt.segments[:-1] == code) & prompt.generated[:-1]).sum()
    flags = {(answer["finished"], answer["repetition"]) for answer in dataset.answers}
    assert flags == {(True, False), (False, False), (False, True)}
    (whole,) = gj.generate("nano", ["What is 12 + 7?"], **GREEDY)
    assert whole.text in [answer["reply"] for answer in dataset.answers if answer["prompt"] == "What is 12 + 7?"]


def test_answers_stand_beside_their_questions(dataset: Activations, trace: gj.Trace, tokenizer: Any) -> None:
    """By benchmark and category; ids that are there twice get a number, and rows without one their hash."""
    for answer in dataset.answers:
        of = ROWS[ASKED.index(answer["prompt"])]
        assert (answer["benchmark"], answer["category"]) == (of["benchmark"], of["category"])
        prompt = trace[answer["prompt_id"]]
        said = tokenizer.decode(prompt.token_ids[~prompt.generated].tolist())
        assert said.endswith(f"{answer['prompt']}<|end|><|start|>assistant")
        if "id" in of and of["id"] != "a":
            assert answer["prompt_id"].startswith(of["id"])
    ids = {answer["prompt_id"] for answer in dataset.answers}
    assert {"a", "kin", "harmony", "z", "talk"} < ids and len(ids) == len(ROWS)
    (talked,) = (trace[answer["prompt_id"]] for answer in dataset.answers if answer["prompt_id"] == "talk")
    whole = tokenizer.decode(talked.token_ids.tolist())
    assert "Hi<|end|>" in whole and "<|message|>1<|end|>" not in whole  # the last reply is the model's own
    (harmony,) = (trace[answer["prompt_id"]] for answer in dataset.answers if answer["prompt_id"] == "harmony")
    assert tokenizer.decode(harmony.token_ids[~harmony.generated].tolist()) == HARMONY


def test_summaries_are_those_of_a_loop_over_the_trace(dataset: Activations, trace: gj.Trace) -> None:
    L, E = trace.about.num_layers, trace.about.num_experts
    groups: dict[Any, list[gj.routing.tables.Routed]] = {}
    for answer in dataset.answers:
        key = tuple(answer[name] for name in ("benchmark", "category", "finished", "repetition"))
        groups.setdefault(key, []).append(trace[answer["prompt_id"]])
    expected = {}
    for key, prompts in groups.items():
        for segment, code in (("think", THINK), ("answer", ANSWER)):
            shares, lengths = [], []
            count, gates = np.zeros((L, E), int), np.zeros((L, E))
            for prompt in prompts:
                own, weight, length = np.zeros((L, E), int), np.zeros((L, E)), 0
                for t in range(len(prompt) - 1):  # the last token has no routing
                    if prompt.generated[t] and prompt.segments[t] == code:
                        length += 1
                        for layer in range(L):
                            for expert, gate in zip(prompt.experts[t, layer], prompt.gates[t, layer], strict=True):
                                own[layer, expert] += 1
                                weight[layer, expert] += float(gate)
                if length:
                    lengths.append(length)
                    shares.append((own / length, weight / length))
                count, gates = count + own, gates + weight
            if lengths:
                means = [np.mean(x, 0) for x in zip(*shares, strict=True)]
                expected[key, segment] = len(lengths), np.mean(lengths), *means, count, gates
    assert [(tuple(one.group), one.segment) for one in dataset.summaries] == sorted(
        expected, key=lambda key: (key[0], key[1] == "answer")
    )
    for one in dataset.summaries:
        samples, length, frequency, density, count, gates = expected[tuple(one.group), one.segment]
        assert (one.sample_count, one.tokens) == (samples, length)
        np.testing.assert_array_equal(one.count_LE, count)
        for ours, theirs in (
            (one.gate_sum_LE, gates),
            (one.count_frequency_LE, frequency),
            (one.prob_density_LE, density),
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    info = dataset.info
    assert (info["answers"], info["groups"], info["counted"]) == (len(ROWS), len(groups), "contents")
    assert dataset.domains == DOMAINS and info["model"] == "nano" and info["options"]["--max-new-tokens"] == MOST


def test_datasets_loads_it(folder: Path, dataset: Activations, trace: gj.Trace, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    loaded = {
        name: datasets.load_dataset(str(folder), name, split="train", cache_dir=str(tmp_path))
        for name in datasets.get_dataset_config_names(str(folder))
    }
    assert {*loaded} == {"summaries", "answers", "traces"}
    assert len(loaded["summaries"]) == len(dataset.summaries) * trace.about.num_layers * trace.about.num_experts
    assert [*loaded["answers"]] == [*dataset.answers]
    assert len(loaded["traces"]) == trace.info["tokens"]
    first = next(iter(trace))
    assert loaded["traces"][0]["experts"] == first.experts[0].reshape(-1).tolist()


# What comes of it.


@pytest.mark.parametrize("weight", ["sample", "token"])
def test_experts_are_ranked_by_it(weight: str, folder: Path, dataset: Activations, tmp_path: Path) -> None:
    argv = ["fingerprint", "rank", folder, "--domain", "sums", "--weight", weight, "--out", tmp_path / "ranking.json"]
    assert CliRunner().invoke(cli, words(argv), catch_exceptions=False).exit_code == 0
    used = np.zeros(dataset.summaries[0].count_frequency_LE.shape)
    for one in dataset.summaries:
        if one.group.category == "sums":
            used += one.count_LE if weight == "token" else one.sample_count * one.count_frequency_LE / 2
    expected = [sorted(range(len(scores)), key=lambda e, scores=scores: (-scores[e], e)) for scores in used]
    assert json.loads((tmp_path / "ranking.json").read_text())["layers"] == expected


def test_the_ranking_is_that_of_a_profile_of_the_very_texts(
    dataset: Activations, trace: gj.Trace, folder: Path, tokenizer: Any
) -> None:
    """Of answers that end: their last token is a mark, which no profile counts. Where a reply is cut within a content,
    its last token has no routing here, and a profile of the text counts it.

    Their texts give the tokens that the model wrote, which is not so of any text; nano writes no other channels, and
    the questions hold no words of the assistant's, which a profile counts too."""
    names = ["quiz/sums", "quiz/talk", "exam/sums"]
    of_names = [answer for answer in dataset.answers if f"{answer['benchmark']}/{answer['category']}" in names]
    assert len(of_names) == 5 and all(answer["finished"] for answer in of_names)
    rows = []
    for answer in of_names:
        ids = trace[answer["prompt_id"]].token_ids
        rows.append({"text": tokenizer.decode(ids.tolist())})
        np.testing.assert_array_equal(tokens.token_ids(HarmonyText(rows[-1]["text"]), tokenizer, 2048), ids)
    profile = gj.profile("nano", rows, keep="assistant", dtype="float32", engine="resident")
    ranking = gj.fingerprint.rank(folder, category=names, weight="token", segment="both")
    expected = gj.rank(profile, criterion="frequency")
    assert ranking.layers == expected.layers and ranking.counts == expected.counts


def test_python_does_what_the_command_does(folder: Path, dataset: Activations, tmp_path: Path) -> None:
    """With a model that is open."""
    model = gj.open("nano", dtype="float32")
    options = {name: value for name, value in GREEDY.items() if name != "dtype"}
    made = gj.fingerprint.record(model, ROWS, DOMAINS, out=tmp_path / "out", batch_size=3, **options)
    for name in ("summaries.parquet", "answers.parquet", "README.md"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert of_folder(tmp_path / "out" / "traces") == of_folder(folder / "traces")
    where = dict.fromkeys(["source", "command", "remarks"])  # which name the rows otherwise
    assert made.hash == dataset.hash and made.info | where == {**dataset.info} | where


SAYING: dict[str, dict[str, Any]] = {
    "drawn": {
        "reasoning_effort": "high",
        "temperature": 1.5,
        "top_k": 20,
        "top_p": 0.9,
        "seed": 7,
        "dtype": "float32",
    },
    "streamed": {"engine": "streamed", "temperature": 0.0, "dtype": "float32"},
}


@pytest.mark.parametrize("way", SAYING)
def test_options_of_record_are_those_of_generate(way: str, tmp_path: Path) -> None:
    options = {"max_new_tokens": 8} | SAYING[way]
    rows = write(tmp_path / "rows.jsonl", [row("What is 12 + 7?", "quiz", "sums")])
    argv = ["fingerprint", "record", "nano", "--data", rows, "--out", tmp_path / "out"]
    argv += [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    done = CliRunner().invoke(cli, words(argv), catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    (answer,), (reply,) = (
        Activations.open(tmp_path / "out").answers,
        gj.generate("nano", ["What is 12 + 7?"], **options),
    )
    assert answer["reply"] == reply.text
    noted = json.loads((tmp_path / "out" / "traces" / "trace.json").read_text())["options"]
    assert {name: noted[f"--{name.replace('_', '-')}"] for name in options if name != "engine"} == {
        name: value for name, value in options.items() if name != "engine"
    }


def test_experts_that_are_masked_are_never_chosen(tmp_path: Path) -> None:
    rows, kept = write(tmp_path / "rows.jsonl", ROWS[:1]), dump(tmp_path / "keep.json", [[*range(14)]] * 6)
    argv = ["fingerprint", "record", "nano", "--data", rows, "--keep-sets", kept, "--out", tmp_path / "out"]
    argv = [*argv, "--max-new-tokens", 24, "--temperature", 0]
    done = CliRunner().invoke(cli, words(argv), catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    made = Activations.open(tmp_path / "out")
    assert {*np.nonzero(made.summaries[0].count_LE)[1].tolist()} <= {*range(14)}
    assert made.info["model"] == f"nano, masked by {kept}"


# Rows, by what they hold: on the small model, with few tokens.

FEW = ("--max-new-tokens", 3, "--temperature", 0, "--dtype", "float32")


def test_columns_and_benchmarks_are_those_that_are_named(tmp_path: Path, program: Program) -> None:
    rows = [{"q": f"What is {n}?", "set": "s/x", "kind": "ab"[n % 2], "key": f"k{n}"} for n in range(4)]
    data = write(tmp_path / "rows.jsonl", rows)
    argv = ["fingerprint", "record", "nano", "--data", data, "--text-column", "q", "--category-column", "kind"]
    argv = [*argv, "--id-column", "key", "--max-new-tokens", 8]
    assert program(*argv, "--benchmark", "quiz", "--out", "one")[0] == 0
    assert program(*argv, "--benchmark-column", "kind", "--out", "two", "--num-rows", 3)[0] == 0
    one, two = (Activations.open(tmp_path / name) for name in ("one", "two"))
    assert {answer["prompt_id"]: (answer["benchmark"], answer["category"]) for answer in one.answers} == {
        f"k{n}": ("quiz", "ab"[n % 2]) for n in range(4)
    }
    assert {(answer["benchmark"], answer["category"]) for answer in two.answers} == {("a", "a"), ("b", "b")}
    assert len(two.answers) == 3


def test_rows_that_ask_nothing_are_left_out_when_asked(tmp_path: Path, program: Program, refused: Refused) -> None:
    silent = {
        "messages": [{"role": "assistant", "content": "I speak"}],
        "benchmark": "b",
        "category": "c",
        "id": "mute",
    }
    asking = {"messages": [user("What is 12 + 7?")], "benchmark": "b", "category": "c", "id": "asks"}
    data = write(tmp_path / "rows.jsonl", [silent, asking])
    argv = ["fingerprint", "record", "nano", "--data", data, "--max-new-tokens", 24, "--out", "out"]
    refused(*argv, says=("row mute asks nothing", "--skip-bad-rows leaves such rows out"))
    status, error = program(*argv, "--skip-bad-rows")
    assert status == 0 and "left out, as they ask nothing: 1 row" in error
    assert [answer["prompt_id"] for answer in Activations.open(tmp_path / "out").answers] == ["asks"]
    write(data, [silent])
    refused(*argv, "--skip-bad-rows", "--overwrite", says=("no row asks anything",))


def test_a_killed_run_goes_on(tmp_path: Path, refused: Refused) -> None:
    data = write(tmp_path / "rows.jsonl", ROWS[:4])
    argv = ["fingerprint", "record", "nano", "--data", data, *FLAGS, "--batch-size", 2, "--out"]
    subprocess.run([*PROGRAM, *words([*argv, "whole"])], cwd=tmp_path, capture_output=True, check=True)
    assert stopped([*argv, "out"], tmp_path, signal.SIGKILL)[0] == -signal.SIGKILL
    refused(*argv, "out", says=("out.progress: holds an unfinished run",))
    write(data, ROWS[1:4])
    refused(*argv, "out", "--resume", says=("the unfinished run has the prompts' hash",))
    write(data, ROWS[:4])
    done = subprocess.run(
        [*PROGRAM, *words([*argv, "out", "--resume"])], cwd=tmp_path, capture_output=True, check=True, text=True
    )
    assert "4 questions, of which" in done.stderr and "4 questions, of which 4" not in done.stderr
    whole, ours = tmp_path / "whole", tmp_path / "out"
    for name in ("summaries.parquet", "answers.parquet", "README.md"):
        assert (ours / name).read_bytes() == (whole / name).read_bytes()
    assert of_folder(ours / "traces") == of_folder(whole / "traces")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "rows.jsonl", "whole"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        case("no category", ["--category-column", "kind"], "kind"),
        case("no benchmark", ["--benchmark-column", "set"], "set"),
        case("no text", ["--text-column", "words"], "words"),
        case("a slash", ["--benchmark", "a/b"], "--benchmark is 'a/b': give a name without a slash"),
        case("a folder that stands", ["--out", "there"], "there: exists already: give another --out"),
        case("inside the model", ["--out", "model/out"], "model/out: is where the input", "another --out"),
        case("over the data", ["--out", "rows.jsonl", "--overwrite"], "rows.jsonl: is where the input"),
        case("progress of another", ["--out", "t"], "t.progress: is no unfinished run"),
        case("no domains", ["--domains", "gone.json"], "gone.json"),
        case("too few tokens", ["--max-new-tokens", 0], "--max-new-tokens"),
        case("no data", ["--data", "gone.jsonl"], "gone.jsonl"),
    ],
)
def test_what_cannot_be_is_one_line(
    more: list[Any], says: tuple[str, ...], model: Path, refused: Refused, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "t.progress").mkdir()
    dump(tmp_path / "t.progress" / "file", {})
    write(tmp_path / "rows.jsonl", [row("Hi", "b", "c")])
    refused("fingerprint", "record", model, "--data", "rows.jsonl", *FEW, *more, says=says)


def test_a_prompt_beyond_the_context_is_refused(model: Path, tmp_path: Path, refused: Refused) -> None:
    edit(model / "config.json", max_position_embeddings=24)
    data = write(tmp_path / "rows.jsonl", [row("long " * 30, "b", "c")])
    refused("fingerprint", "record", model, "--data", data, *FEW, says=("the model's context is",))


def test_replies_without_harmony_are_refused(tiny_mxfp4: Path, tmp_path: Path, program: Program) -> None:
    data = write(tmp_path / "rows.jsonl", [row("Hi", "b", "c")])
    status, error = program("fingerprint", "record", tiny_mxfp4, "--data", data, *FEW, "--out", "out")
    assert status == 2 and "no reply has thoughts or an answer" in error and not (tmp_path / "out").exists()
