"""`generate --trace`: what tokens of prompts and replies chose, against transformers in float32; and runs that stop."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import gptoss_jax as gj
from convert.sources import open_source
from experiments.nano import QUESTIONS
from experiments.nano.families import read
from gptoss_jax.cli import cli
from gptoss_jax.config import TINY
from gptoss_jax.data.harmony import HarmonyText
from gptoss_jax.errors import OutputError
from gptoss_jax.generation import recording
from gptoss_jax.generation.answer import Answer
from gptoss_jax.generation.traced import traced
from gptoss_jax.routing.segments import ANSWER, OTHER, PROMPT, THINK
from gptoss_jax.run.options import Answering, Placing, Sampling
from gptoss_jax.run.progress import Progress
from tests import oracle

from .bad_input import Program, Refused, case, dump, edit
from .test_interrupted import PROGRAM, words

pytestmark = pytest.mark.slow

TOKENS = 12  # of each reply, at most
# Harmony text may be as short as it likes: two prompts lie within the window of 9 tokens and three reach beyond it.
TEXTS = ("<|start|>a", "<|start|>user<|message|>" + "1 + 1 " * 9, "b", "c" * 40, "d" * 20)
PROMPTS = [HarmonyText(text) for text in TEXTS]
WAYS: dict[str, dict[str, Any]] = {
    "resident": {},
    "resident, two rows": {"batch_size": 2},
    "streamed, two rows": {"engine": "streamed", "batch_size": 2},
}
SUMS = ["What is 12 + 7?", "Hello"]  # which nano answers in both channels
ASKED = ["Hi", "What is 2?", "Who?", "So long, " * 5]


def answered(model: Path, prompts: list[HarmonyText], folder: Path, **placing: Any) -> Answer:
    """The replies to harmony text, whose trace stands in the folder."""
    sampling, placing = Sampling(temperature=0.0), {"engine": "resident"} | placing
    source, options = open_source(str(model)), Placing(dtype="float32", **placing)
    answer = Answer(source, prompts, Answering(max_new_tokens=TOKENS), sampling, options, {})
    with traced(answer, folder, overwrite=False, resume=False):
        for _ in answer.grow():
            pass
    return answer


@pytest.fixture(scope="module")
def ending(tiny_mxfp4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose second reply ends by itself, before the others do."""
    place = tmp_path_factory.mktemp("ending")
    said = answered(tiny_mxfp4, PROMPTS[1:2], place / "trace").token_ids[0]
    folder = Path(shutil.copytree(tiny_mxfp4, place / "model"))
    edit(folder / "generation_config.json", eos_token_id=[said[4]])
    return folder


@pytest.fixture(scope="module")
def made(ending: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Answer, gj.Trace]]:
    """Replies with their trace; each way runs once."""
    done: dict[str, Any] = {}

    def run(way: str) -> tuple[Answer, gj.Trace]:
        if way not in done:
            folder = tmp_path_factory.mktemp("made") / "trace"
            done[way] = answered(ending, PROMPTS, folder, **WAYS[way]), gj.Trace.open(folder)
        return done[way]

    return run


@pytest.mark.parametrize("way", WAYS)
def test_routing_equals_transformers(way: str, made: Callable[..., Any], ending: Path) -> None:
    """Of every token but each reply's last, which has not passed the network."""
    answer, trace = made(way)
    reference = oracle.load(ending)
    for prompt in trace:
        theirs = oracle.forward(reference, prompt.token_ids[:-1])
        np.testing.assert_array_equal(prompt.experts, np.stack(theirs.experts, 1))
        np.testing.assert_allclose(prompt.gates, np.stack(theirs.gates, 1), rtol=2**-10, atol=2**-20)
    shortest, longest = (choose(len(ids) for ids in answer.prompts) for choose in (min, max))
    assert shortest + 2 < TINY.sliding_window and longest > 4 * TINY.sliding_window


def test_fifty_prompts_of_nano_are_routed_as_transformers_routes_them(tmp_path: Path) -> None:
    """Side by side, as rows come and go, and three of them alone; nearly all reach beyond nano's window of 32."""
    every = read(QUESTIONS / "evaluation.jsonl")
    asked = [example.messages()[:-1] for example in every[:: len(every) // 50][:50]]
    options = {"dtype": "float32", "temperature": 0, "max_new_tokens": 64}
    gj.generate("nano", asked, trace=tmp_path / "beside", batch_size=16, **options)
    beside, reference = gj.Trace.open(tmp_path / "beside"), oracle.load(Path(str(open_source("nano").folder)))
    assert len(beside) == 50 and sum(len(prompt) > 2 * 32 for prompt in beside) > 40
    for prompt in beside:
        theirs = oracle.forward(reference, prompt.token_ids[:-1])
        np.testing.assert_array_equal(prompt.experts, np.stack(theirs.experts, 1))
    for number in (0, 20, 40):
        folder = tmp_path / f"alone-{number}"
        gj.generate("nano", [asked[number]], trace=folder, **options)
        (alone,) = gj.Trace.open(folder)
        np.testing.assert_array_equal(alone.token_ids, beside[str(number + 1)].token_ids)
        np.testing.assert_array_equal(alone.experts, beside[str(number + 1)].experts)


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_prompts_and_replies(way: str, made: Callable[..., Any]) -> None:
    answer, trace = made(way)
    assert trace.prompts == [str(number) for number in range(1, len(PROMPTS) + 1)]
    lengths = [len(ids) for ids in answer.token_ids]
    assert lengths[1] < TOKENS == lengths[0]  # rows that end make room for those that wait
    for prompt, asked, said in zip(trace, answer.prompts, answer.token_ids, strict=True):
        assert prompt.token_ids.tolist() == [*asked.tolist(), *said]
        assert prompt.positions.tolist() == [*range(len(prompt))]
        assert prompt.generated.tolist() == [False] * len(asked) + [True] * len(said)
        assert prompt.experts.shape == prompt.gates.shape == (len(prompt) - 1, TINY.num_layers, TINY.top_k)
        assert (prompt.segments[: len(asked)] == PROMPT).all() and (prompt.segments[len(asked) :] != PROMPT).all()
    assert trace.info["options"]["--temperature"] == 0.0 and trace.info["tokens"] == sum(map(len, trace))
    trace.check(TINY, answer.source.fingerprint())


def test_one_prompt_is_traced_as_it_is_beside_others(made: Callable[..., Any], ending: Path, tmp_path: Path) -> None:
    _, beside = made("resident, two rows")
    answered(ending, PROMPTS[3:4], tmp_path / "trace")
    (alone,) = gj.Trace.open(tmp_path / "trace")
    np.testing.assert_array_equal(alone.token_ids, beside["4"].token_ids)
    np.testing.assert_array_equal(alone.experts, beside["4"].experts)
    np.testing.assert_allclose(alone.gates, beside["4"].gates, rtol=2**-10, atol=2**-20)


def test_segments_are_those_of_a_model_that_speaks_harmony(tmp_path: Path) -> None:
    """The text of each segment is what the reply says in that channel; Python's `trace` is the command's."""
    options = {"temperature": 0.0, "dtype": "float32", "max_new_tokens": 40}
    replies = gj.generate("nano", SUMS, trace=tmp_path / "trace", **options)
    trace, tokenizer = gj.Trace.open(tmp_path / "trace"), gj.open("nano").tokenizer
    for prompt, reply in zip(trace, replies, strict=True):
        assert reply.ended and prompt.token_ids[prompt.generated].tolist() == reply.token_ids
        for code, channel in ((THINK, "analysis"), (ANSWER, "final")):
            text = tokenizer.decode(prompt.token_ids[prompt.segments == code].tolist())
            assert text == "".join(said for name, said in reply.parts if name == channel) != ""
        marks = prompt.token_ids[prompt.generated & (prompt.segments == OTHER)].tolist()
        assert tokenizer.decode(marks[:3]) == "<|channel|>analysis<|message|>" and marks[-1] == reply.token_ids[-1]
    argv = ["generate", "nano", "--prompt", SUMS[0], "--prompt", SUMS[1], "--temperature", 0, "--dtype", "float32"]
    argv = [*argv, "--max-new-tokens", 40, "--trace", tmp_path / "command"]
    assert CliRunner().invoke(cli, words(argv), catch_exceptions=False).exit_code == 0
    assert of_folder(tmp_path / "command") == of_folder(tmp_path / "trace")


def of_folder(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def line(model: Path, *more: Any, asked: list[str] = ASKED) -> list[Any]:
    """Prompts of which the half waits for the others."""
    argv = ["generate", model, *(word for text in asked for word in ("--prompt", text))]
    return [*argv, "--max-new-tokens", TOKENS, "--temperature", 0, "--dtype", "float32", "--batch-size", 2, *more]


@pytest.mark.parametrize("count", [1, 4])
def test_what_is_printed_is_the_same_with_a_trace(
    count: int, tiny_mxfp4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one prompt while it grows, and of several at the end."""
    argv = words(line(tiny_mxfp4, asked=ASKED[:count]))
    with_, without = (
        CliRunner().invoke(cli, [*argv, *more], catch_exceptions=False)
        for more in (["--trace", str(tmp_path / "trace")], [])
    )
    assert with_.exit_code == without.exit_code == 0 and with_.stdout == without.stdout != ""
    assert with_.stderr == without.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["trace"]


# Waits once behind the first replies that are kept.
STOPPING = """
import sys, time
from gptoss_jax.generation import recording

recording.SECONDS, save, waited = 0.0, recording.Recording.save, []

def stopping(self):
    save(self)
    if self.files and not waited:
        waited.append(1)
        print("now", flush=True)
        time.sleep(60)

recording.Recording.save = stopping
from gptoss_jax.cli import main
main()
"""


def stopped(argv: list[Any], folder: Path, stop: signal.Signals) -> tuple[int, str]:
    """Exit status and standard error of a process that is stopped when it has kept the first replies."""
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", STOPPING, *words(argv)], cwd=folder, **pipes) as process:
        assert process.stdout is not None and process.stdout.readline() == "now\n"
        process.send_signal(stop)
        _, error = process.communicate()
    return process.returncode, error


def test_a_killed_run_goes_on(tiny_mxfp4: Path, tmp_path: Path, program: Program, refused: Refused) -> None:
    """To the bytes of one that was not killed; other runs keep off what it has kept."""
    argv = line(tiny_mxfp4)
    whole, more = ([*PROGRAM, *words([*argv, "--trace", *some])] for some in (["whole"], ["trace", "--resume"]))
    expected = subprocess.run(whole, cwd=tmp_path, capture_output=True, check=True)
    assert stopped([*argv, "--trace", "trace"], tmp_path, signal.SIGKILL)[0] == -signal.SIGKILL
    assert (tmp_path / "trace.progress" / "replies-0").exists() and not (tmp_path / "trace").exists()
    refused(*argv, "--trace", "trace", says=("trace.progress: holds an unfinished run: --resume goes on with it",))
    others = line(tiny_mxfp4, "--trace", "trace", "--resume", asked=[*ASKED[:3], "Another"])
    refused(*others, says=("trace.progress: the unfinished run has the prompts' hash",))
    others = [*argv, "--trace", "trace", "--resume", "--seed", 3]
    refused(*others, says=("the unfinished run has --seed 0, this one 3",))
    done = subprocess.run(more, cwd=tmp_path, capture_output=True, check=True)
    assert done.stdout == expected.stdout
    assert of_folder(tmp_path / "trace") == of_folder(tmp_path / "whole")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["trace", "whole"]


def test_a_stopped_run_says_that_it_can_go_on(tiny_mxfp4: Path, tmp_path: Path) -> None:
    status, error = stopped(line(tiny_mxfp4, "--trace", "trace"), tmp_path, signal.SIGTERM)
    assert status == 128 + signal.SIGTERM and error.count("\n") == 1
    assert "what is finished is kept: the same command with --resume goes on" in error
    assert [file.name for file in tmp_path.iterdir()] == ["trace.progress"]


def test_what_has_ended_is_asked_no_more(tiny_mxfp4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's `resume`: the decoder gets the other prompts alone, and all replies come back."""
    options = {"temperature": 0, "dtype": "float32", "max_new_tokens": TOKENS, "batch_size": 2}
    expected = gj.generate(str(tiny_mxfp4), ASKED, **options)
    monkeypatch.setattr(recording, "SECONDS", 0.0)
    take, asked = recording.Recording.take, []

    def killing(self: recording.Recording, grown: Any) -> None:
        take(self, grown)
        if self.files:
            raise KeyboardInterrupt

    missing = recording.Recording.missing
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(recording.Recording, "take", killing)
        gj.generate(str(tiny_mxfp4), ASKED, trace=tmp_path / "trace", **options)
    monkeypatch.setattr(recording.Recording, "missing", lambda self: asked.append(missing(self)) or asked[-1])
    ours = gj.generate(str(tiny_mxfp4), ASKED, trace=tmp_path / "trace", resume=True, **options)
    assert ours == expected and [prompt.number for prompt in asked[0]] == [2, 3]
    assert gj.Trace.open(tmp_path / "trace").prompts == ["1", "2", "3", "4"]


def test_a_run_that_was_killed_when_all_was_written_ends(
    tiny_mxfp4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its progress still lies beside its trace, which nothing else may replace."""
    options = {"temperature": 0, "dtype": "float32", "max_new_tokens": 3, "trace": tmp_path / "trace"}
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "remove", lambda self: None)
        said = gj.generate(str(tiny_mxfp4), ASKED[:1], **options)
    before = of_folder(tmp_path / "trace")
    with pytest.raises(OutputError, match="trace: exists already"):
        gj.generate(str(tiny_mxfp4), ASKED[:1], **options | {"seed": 5}, resume=True)
    assert gj.generate(str(tiny_mxfp4), ASKED[:1], **options, resume=True) == said
    assert of_folder(tmp_path / "trace") == before and not (tmp_path / "trace.progress").exists()


def test_a_trace_replaces_no_input(model: Path, refused: Refused, tmp_path: Path) -> None:
    messages = dump(tmp_path / "m.json", [{"role": "user", "content": "Hi"}])
    refused("generate", model, "--messages", messages, "--trace", messages, "--overwrite", says=("is where the input",))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        case("a folder that stands", ["--trace", "there"], "there: exists already: give another --trace"),
        case("a file", ["--trace", "file"], "file: exists already: give another --trace"),
        case("inside the model", ["--trace", "model/trace"], "model/trace: is where the input", "another --trace"),
        case("over the model", ["--trace", "model", "--overwrite"], "is where the input", "another --trace"),
        case("resumes nothing", ["--resume"], "--overwrite and --resume go with --trace"),
        case("overwrites nothing", ["--overwrite"], "--overwrite and --resume go with --trace"),
        case("an empty name", ["--trace", ""], "--trace an empty text is no path"),
        case("no progress", ["--trace", "t"], "t.progress: is no unfinished run", "another --trace"),
    ],
)
def test_what_cannot_be_is_one_line(
    more: list[Any], says: tuple[str, ...], model: Path, refused: Refused, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    dump(tmp_path / "file", {})
    (tmp_path / "t.progress").mkdir()
    dump(tmp_path / "t.progress" / "file", {})
    refused("generate", model, "--prompt", "Hi", *more, says=says)


def test_a_prompt_beyond_the_context_writes_nothing(model: Path, refused: Refused) -> None:
    edit(model / "config.json", max_position_embeddings=24)
    refused("generate", model, "--prompt", "long " * 30, "--trace", "t", says=("the model's context is 24",))


def test_a_trace_is_replaced_when_asked(tiny_mxfp4: Path, tmp_path: Path, program: Program) -> None:
    (tmp_path / "trace").mkdir()
    dump(tmp_path / "trace" / "file", {})
    argv = ["generate", tiny_mxfp4, "--prompt", "Hi", "--max-new-tokens", 2, "--trace", "trace", "--overwrite"]
    assert program(*argv)[0] == 0
    assert sorted(file.name for file in (tmp_path / "trace").iterdir()) == ["part-00000.parquet", "trace.json"]
    assert json.loads((tmp_path / "trace" / "trace.json").read_text())["prompts"] == 1
