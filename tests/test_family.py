"""The family of nano: cut by its own fingerprints, measured, and uploaded to a hub that runs here."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants

import gptoss_jax as gj
from convert import checksums
from experiments.family import hub
from experiments.family.__main__ import main
from tests.bad_input import tree
from tests.hub_server import TOKEN, Hub, running

pytestmark = pytest.mark.slow

FAMILIES = ("arithmetic", "legs")
ASKED = ("--family", "arithmetic", "--family", "legs", "--keep", "12")
NAMES = [f"gpt-oss-4.4m-specialized-{family}-pruned-moe-only-12-experts" for family in FAMILIES]


def call(work: Path, *options: str, questions: int = 4) -> Result:
    """The command; its last lines tell what went wrong."""
    return CliRunner().invoke(main, [str(work), *ASKED, "--questions", str(questions), *options])


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The family, finished. Not to be changed."""
    folder = tmp_path_factory.mktemp("family") / "work"
    result = call(folder)
    assert result.exit_code == 0, result.output
    return folder


class Said(NamedTuple):
    """A reply of the evaluation."""

    text: str
    final: str | None


def replies(work: Path) -> dict[tuple[str | None, str], Said]:
    """By model and question's id."""
    found = {}
    for line in (work / "eval-12" / "replies.jsonl").read_text(encoding="utf-8").splitlines():
        reply = json.loads(line)
        final = re.search(r"<\|channel\|>final<\|message\|>(.*?)<\|", reply["text"], re.DOTALL)
        found[reply["model"], reply["id"]] = Said(reply["text"], final and final[1].strip())
    return found


def rows(work: Path, split: str = "evaluation") -> list[dict[str, str]]:
    """The rows of a split."""
    return [json.loads(line) for line in (work / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_experts_are_those_that_the_answers_use(work: Path) -> None:
    """Each checkpoint keeps what the ranking by its family's answers says."""
    for family, name in zip(FAMILIES, NAMES, strict=True):
        kept = gj.fingerprint.rank(work / "fingerprints", family, by="specificity", segment="think").keep(12)
        mapping = json.loads((work / "models" / name / "expert_mapping.json").read_text(encoding="utf-8"))
        assert [sorted(map(int, mapping[str(layer)])) for layer in range(6)] == [sorted(some) for some in kept.layers]


def test_the_table_has_what_replies_say(work: Path) -> None:
    """Exact match, counted here from the texts of the replies."""
    said, asked = replies(work), rows(work)
    assert {row["id"] for row in asked}.isdisjoint(row["id"] for row in rows(work, "calibration"))
    lines = (work / "README.md").read_text(encoding="utf-8").splitlines()
    for family, name in zip(FAMILIES, NAMES, strict=True):
        (line,) = (line for line in lines if f"[{name}]" in line)
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        shares = []
        for is_own in (True, False):
            some = [row for row in asked if (row["category"] == family) == is_own]
            for models in ([None], [family], [f"random {seed}" for seed in range(3)]):
                right = [said[model, row["id"]].final == row["answer"] for row in some for model in models]
                shares.append(100 * sum(right) / len(right))
        assert [float(cells[at].split()[0]) for at in (2, 3, 4, 7, 8, 9)] == pytest.approx(shares, abs=0.006)
        assert float(cells[5].split()[0]) == pytest.approx(shares[1] - shares[0], abs=0.006)
        assert cells[1] == f"{gj.open(work / 'models' / name).config.num_parameters():,}"
        assert all("(" in cell for cell in cells[2:])


def test_the_card_is_measured_and_shows_answers_by_a_rule(work: Path) -> None:
    """The first three by SHA-256; the cut model says what the soft prune said."""
    said = replies(work)
    for family, name in zip(FAMILIES, NAMES, strict=True):
        folder = work / "models" / name
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert "none is among these rows, by hash" in card and "random 0 (control)" in card
        own = sorted((row for row in rows(work) if row["category"] == family), key=lambda row: row["id"])
        section = card.partition("## 3 answers")[2].partition("\n## ")[0]
        for number, row in enumerate(own[:3], 1):
            answer = section.partition(f"### Answer {number}\n")[2].partition("### Answer")[0]
            asked, _, says = answer.partition("It says:")
            assert " ".join(asked.split()) == " ".join(row["messages"][0]["content"].split())
            assert says.strip().splitlines()[0] == said[family, row["id"]].text.splitlines()[0]
            assert f"The right answer is `{row['answer']}`." in says
        assert checksums.differing(folder) == []


def test_the_usage_of_a_card_runs(work: Path) -> None:
    """Both ways, as they are printed, beside the folder."""
    card = (work / "models" / NAMES[0] / "README.md").read_text(encoding="utf-8")
    codes = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert ["gptoss_jax" in code for code in codes] == [True, False]
    for code in codes:
        path = {"PYTHONPATH": str(Path(gj.__file__).parents[1])}
        ran = subprocess.run(
            [sys.executable, "-c", code], cwd=work / "models", env=os.environ | path, capture_output=True
        )
        assert ran.returncode == 0 and ran.stdout.strip(), ran.stderr.decode()


def test_what_is_finished_is_not_made_again(work: Path, tmp_path: Path) -> None:
    """And what is missing is made as before, whatever a stopped run left."""
    again = Path(shutil.copytree(work, tmp_path / "work"))
    shutil.rmtree(again / "models" / NAMES[1])
    (again / "unfinished").mkdir()
    (again / "README.md").unlink()
    kept = {file: file.stat().st_mtime_ns for file in again.rglob("*") if file.is_file()}
    result = call(again)
    assert result.exit_code == 0, result.output
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert tree(again) == tree(work)


@pytest.mark.parametrize(
    ("options", "questions", "says"),
    [
        ((), 5, "holds other questions than are asked for: take another folder"),
        (("--keep", "3"), 4, "3 is not in the range 4<=x<=16"),
        (("--keep", "17"), 4, "17 is not in the range 4<=x<=16"),
        (("--endpoint", "http://127.0.0.1"), 4, "--endpoint goes with --push-to-hub"),
    ],
)
def test_what_cannot_be_is_refused(
    work: Path, tmp_path: Path, options: tuple[str, ...], questions: int, says: str
) -> None:
    """The last line says why, and nothing changes."""
    other = Path(shutil.copytree(work, tmp_path / "work"))
    result = call(other, *options, questions=questions)
    assert result.exit_code == 2 and says in result.stderr.splitlines()[-1]
    assert tree(other) == tree(work)


# The hub.


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that takes the token of this process."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a store of the hub's own, with another protocol
    with running() as found:
        yield found


def test_models_arrive_as_they_lie_here(work: Path, server: Hub) -> None:
    """By the command; a second time is no error, and sends no weights again."""
    for times in (1, 2):
        result = call(work, "--push-to-hub", "someone", "--endpoint", server.endpoint)
        assert result.exit_code == 0, result.output
        assert len(server.commits) == 2 * times and len(server.objects) == 2
    assert {*server.repositories} == {f"someone/{name}" for name in NAMES}
    for name in NAMES:
        lies = {file.name: file.read_bytes() for file in (work / "models" / name).iterdir()}
        assert server.repositories[f"someone/{name}"] == lies and len(lies) > 8


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        ("/api/repos/create", 400, "refused with 400"),
        ("/preupload/main", 403, "refused with 403 (forbidden): give a token that may write there"),
        ("/objects/batch", 403, "refused with 403"),
        ("/commit/main", 413, "refused with 413"),
    ],
)
def test_a_refusal_is_one_line_and_loses_nothing(work: Path, server: Hub, path: str, status: int, says: str) -> None:
    """Wherever in an upload it comes; afterwards the same command succeeds."""
    before, server.refused = tree(work), (path, status)
    result = call(work, "--push-to-hub", "someone", "--endpoint", server.endpoint)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith(f"family: someone/{NAMES[0]}: ") and says in result.stderr
    assert tree(work) == before
    server.refused = None
    assert call(work, "--push-to-hub", "someone", "--endpoint", server.endpoint).exit_code == 0


def test_no_token_no_network_and_no_name_are_told(
    work: Path, server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in a line that says what to do."""
    folder = work / "models" / NAMES[0]
    with running() as gone:
        closed = gone.endpoint
    for owner, endpoint, says in [
        ("someone", closed, "the connection failed"),
        ("some one", server.endpoint, "not uploaded"),
    ]:
        with pytest.raises(hub.OutputError) as told:
            hub.push([folder], owner, endpoint)
        assert says in str(told.value) and "\n" not in str(told.value)
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    with pytest.raises(hub.OutputError, match="give a token that may write there"):
        hub.push([folder], "someone", server.endpoint)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(hub.OutputError, match="set HF_TOKEN"):
        hub.push([folder], "someone", server.endpoint)
    assert server.repositories == {}
