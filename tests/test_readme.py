"""What README shows of Python is what runs."""

import doctest
import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_example_from_python_runs_as_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder of its own, to the letter."""
    monkeypatch.chdir(tmp_path)
    text = README.read_text(encoding="utf-8")
    section = re.search(r"^## From Python\n(.*?)^## ", text, re.DOTALL | re.MULTILINE)
    assert section is not None
    (block,) = re.findall(r"^```python\n(.*?)^```$", section[1], re.DOTALL | re.MULTILINE)
    example = doctest.DocTestParser().get_doctest(block, {}, "README.md, From Python", str(README), 0)
    said: list[str] = []
    result = doctest.DocTestRunner().run(example, out=said.append)
    assert result.attempted > 10 and result.failed == 0, "".join(said)
    assert (tmp_path / "sum" / "config.json").exists()


def test_what_forward_returns_is_in_the_table() -> None:
    from gptoss_jax.run.forward import Forward

    arrays = re.findall(r"^\| `(\w+)` \| \[", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert {*arrays} == {*Forward.__dataclass_fields__, "saliency"}
