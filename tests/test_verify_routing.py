"""Recorded choices beside those of a model: what transformers chose is found again, and wrong models are told."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from convert.sources import open_source
from experiments.verify_routing import agreement, forcing, recorded
from experiments.verify_routing.__main__ import main
from experiments.verify_routing.agreement import Agreement
from experiments.verify_routing.forcing import Choices
from gptoss_jax.data.tokens import load_tokenizer
from gptoss_jax.files import atomic
from gptoss_jax.network.source import Source
from gptoss_jax.routing.tables import About, Routed
from gptoss_jax.routing.traces import TRACE, Writer
from gptoss_jax.run.options import Placing
from tests import oracle

LENGTHS = (40, 9, 130)


def chosen(model: Any, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What transformers chooses for a row, [T, L, k] each."""
    reference = oracle.forward(model, ids)
    return np.stack(reference.experts, 1), np.stack(reference.gates, 1)


def write_trace(folder: Path, source: Source, model: Any, lengths: Sequence[int] = LENGTHS) -> Path:
    """A trace of rows of random tokens, the last of which has not passed the model."""
    rng = np.random.default_rng(0)
    with atomic.new_folder(folder, last=TRACE) as partial:
        writer = Writer(partial, About.of(source))
        for number, n in enumerate(lengths):
            ids = rng.integers(0, source.config.vocab_size, n).astype(np.int32)
            experts, gates = (x[:-1] for x in chosen(model, ids))
            nothing = np.zeros(n, np.uint8)
            writer.add(Routed(f"row {number}", ids, np.arange(n, dtype=np.int32), nothing, nothing > 0, experts, gates))
        writer.finish({})
    return folder


@pytest.fixture(scope="module")
def tiny_trace(tiny_bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What transformers chooses in float32."""
    folder = tmp_path_factory.mktemp("recorded") / "trace"
    return write_trace(folder, open_source(str(tiny_bf16)), oracle.load(tiny_bf16))


@pytest.fixture(scope="module")
def nano_trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of a trained model, whose attention matters."""
    source = open_source("nano")
    folder = tmp_path_factory.mktemp("recorded") / "trace"
    return write_trace(folder, source, oracle.load(Path(str(source.folder))), (60, 25))


def compared(source: Source, trace: Path, **placing: Any) -> Agreement:
    """With the model in float32."""
    answers = recorded.read(trace, source).answers
    ours = forcing.forced(source, answers, Placing(dtype="float32", **placing))
    return Agreement.of(forcing.recorded(answers), ours)


@pytest.mark.parametrize("placing", [{"batch_size": 2}, {"engine": "streamed"}], ids=["resident", "streamed"])
def test_what_transformers_chose_is_found_again(placing: dict[str, Any], tiny_bf16: Path, tiny_trace: Path) -> None:
    """By either engine, to the last choice; gates were rounded to float16."""
    found = compared(open_source(str(tiny_bf16)), tiny_trace, **placing)
    assert (found.rank_Lk == 1).all() and (found.set_L == 1).all() and (found.gates_L < 5e-4).all()


def test_the_report_of_nano(nano_trace: Path) -> None:
    """The whole command: it agrees, and says what to expect of bfloat16."""
    result = CliRunner().invoke(main, ["nano", str(nano_trace), "--batch-size", "2"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == "83 tokens of 2 answers are compared." and lines[-1].startswith("AGREES: 100.00% of choices")
    (exact,) = (line for line in lines if line.startswith("| recorded, and the model in float32"))
    assert exact.split(" | ")[1:3] == ["100.00%", "100.00%"]
    shown = [line.split(" | ")[1:3] for line in lines if "bfloat16 |" in line or "in float32 |" in line]
    assert shown[1] == shown[2] and 0.8 < float(shown[1][0].rstrip("%")) / 100 < 1  # float32 is what was recorded


class Wrong:
    """A source of whose arrays one is another."""

    def __init__(self, source: Source, path: str, change: Any):
        self.source, self.path, self.change = source, path, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def load(self, wanted: Any) -> Any:
        found = dict(self.source.load(wanted))
        path = f"layers/{self.path}"
        changed = np.stack([self.change(np.asarray(layer, np.float32)) for layer in found[path]])
        found[path] = np.asarray(changed, found[path].dtype)
        return found


def transposed(kernel_DHh: np.ndarray) -> np.ndarray:
    """The matrix read as if it lay the other way."""
    D, H, h = kernel_DHh.shape
    return kernel_DHh.reshape(H * h, D).T.reshape(D, H, h)


@pytest.mark.parametrize(
    ("path", "change"),
    [("moe/router/kernel", lambda kernel_ED: kernel_ED[::-1]), ("attention/o_kernel", transposed)],
    ids=["experts in another order", "a transposed kernel"],
)
def test_a_wrong_model_falls_far_below(path: str, change: Any, nano_trace: Path) -> None:
    source = open_source("nano")
    answers = recorded.read(nano_trace, source).answers
    right = forcing.in_both(source, answers, Placing(engine="resident", batch_size=2))
    theirs, expected = forcing.recorded(answers), Agreement.of(right["bfloat16"], right["float32"])
    wrong = Wrong(source, path, change)
    found = Agreement.of(theirs, forcing.forced(wrong, answers, Placing(engine="resident", batch_size=2)))  # type: ignore[arg-type]
    assert expected.rank > 0.8 and found.rank < 0.7 * expected.rank
    assert agreement.verdict(found, expected).startswith("DIFFERS")
    assert agreement.verdict(Agreement.of(theirs, right["float32"]), expected).startswith("AGREES")
    assert agreement.verdict(Agreement.of(theirs, right["bfloat16"]), expected).startswith("AGREES")


def test_agreement_by_hand() -> None:
    """Two tokens of one layer and two experts each."""
    one = Choices(np.array([[[3, 1]], [[2, 0]]]), np.array([[[0.75, 0.25]], [[0.5, 0.5]]]))
    other = Choices(np.array([[[3, 2]], [[0, 2]]]), np.array([[[0.5, 0.5]], [[0.75, 0.25]]]))
    found = Agreement.of(one, other)
    assert found.rank_Lk.tolist() == [[0.5, 0]] and found.set_L.tolist() == [0.5] and found.gates_L.tolist() == [0.25]
    assert (found.rank, found.set, found.gates) == (0.25, 0.5, 0.25)


def write_examples(folder: Path, source: Source, model: Any, replies: Sequence[Sequence[str]]) -> Path:
    """Published examples whose choices are those of transformers for the tokenizer's own tokens."""
    tokenizer = load_tokenizer(Path(str(source.folder)))
    for number, reply in enumerate(replies):
        before = ["<|start|>", *texts(tokenizer, "user"), "<|message|>", *texts(tokenizer, "What is it?"), "<|end|>"]
        whole = [*before, *reply]
        ids = [one for text in whole for one in tokenizer(text, add_special_tokens=False)["input_ids"]]
        router_data: list[Any] = []
        experts, gates = chosen(model, np.array(ids))
        for t in range(len(before), len(whole) - 1):
            layers = {
                f"layer_{layer}": {"selected_experts": e, "selected_probs": g}
                for layer, (e, g) in enumerate(zip(experts[t].tolist(), gates[t].tolist(), strict=True))
            }
            router_data.append({f"token_{t}": layers})
        file = folder / "quiz" / f"law {number}" / "True_False_examples.json"
        file.parent.mkdir(parents=True)
        names = ("dataset", "category", "finished_successfully", "has_repetition")
        raw = dict(zip(names, ("quiz", f"law {number}", True, False), strict=True))
        raw |= {"row_index": number, "original_prompt": "What is it?", "full_text": whole, "generated_only": reply}
        file.write_text(json.dumps(raw | {"router_data": router_data}))
    return folder


def texts(tokenizer: Any, text: str) -> list[str]:
    """The text of each token."""
    return [tokenizer.decode([one]) for one in tokenizer(text, add_special_tokens=False)["input_ids"]]


def test_published_examples(tiny_bf16: Path, tmp_path: Path) -> None:
    """Tokens are made of their texts; from the first that is cut otherwise on they are left out, and counted."""
    source, model = open_source(str(tiny_bf16)), oracle.load(tiny_bf16)
    tokenizer = load_tokenizer(tiny_bf16)
    said = texts(tokenizer, "This is the answer.")
    long = max(range(1, len(said)), key=lambda at: len(said[at]))
    assert len(said[long]) > 1, "a token of several characters"
    apart = [*said[:long], said[long][:1], said[long][1:], *said[long + 1 :]]
    head = ["<|channel|>", *texts(tokenizer, "final"), "<|message|>"]
    replies = [[*head, *said, "<|return|>"], [*head, *apart, "<|return|>"]]
    found = recorded.read(write_examples(tmp_path / "examples", source, model, replies), source)
    left_out = len(replies[1]) - 1 - len(head) - long
    assert [len(answer.experts_TLk) for answer in found.answers] == [len(replies[0]) - 1, len(head) + long]
    (remark,) = found.remarks
    assert "recorded tokens of 1 of 2 answers" in remark and f"; {left_out} of {sum(map(len, replies)) - 2} " in remark
    ours = forcing.forced(source, found.answers, Placing(dtype="float32", batch_size=2))
    assert Agreement.of(forcing.recorded(found.answers), ours).rank == 1


def test_records_of_other_models_are_refused(tiny_bf16: Path, tiny_trace: Path, published_files: Path) -> None:
    """In one line that names both sizes."""
    for argv, says in (
        (["nano", tiny_trace], ("4 layers and 3 experts", "6 and 4")),
        ([tiny_bf16, published_files], ("4 layers and 2 experts", "4 and 3")),
        ([tiny_bf16, tiny_trace.parent / "nothing"], ("no such file or folder",)),
    ):
        result = CliRunner().invoke(main, [str(argument) for argument in argv])
        assert result.exit_code == 2 and result.stderr.count("\n") == 1 and not result.stdout
        assert [text for text in says if text not in result.stderr] == [], result.stderr
