"""What a terminal shows: one line, clean and short; bars that count; signals; outputs that are closed or full."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.bench.terminal import drawn
from gptoss_jax.cli import terminal
from gptoss_jax.run.bar import Pace, bar

from .bad_input import INDEX, RANKING, SHORT, Program, dump, without_told

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = [sys.executable, "-m", "gptoss_jax"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202eab\r"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("plain – ünïcode 日本 👩‍👧", "plain – ünïcode 日本 👩‍👧"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("bell\x07 back\x08 return\r delete\x7f", "bell\\x07 back\\x08 return\\r delete\\x7f"),
        ("\x9b31m", "\\x9b31m"),
        ("\u202etxt.exe\u2066", "\\u202etxt.exe\\u2066"),
        ("bytes \udcff", "bytes \\udcff"),
        ("two\nlines\tand\u2028more", "two\nlines\tand\\u2028more"),
    ],
)
def test_what_moves_a_cursor_is_escaped(text: str, clean: str) -> None:
    assert terminal.cleaned(text) == clean
    assert terminal.line(text) == " ".join(clean.split())


def test_a_long_text_keeps_its_beginning_and_its_end() -> None:
    """What is wrong stands at the beginning of a message, and what to do at its end."""
    text = terminal.line("rows.jsonl: line 1 is " + "x" * 30_000_000 + ": give another file")
    assert len(text) < 2100 and text.startswith("rows.jsonl: line 1 is xx") and text.endswith("xx: give another file")
    assert " … " in text
    assert len(terminal.cleaned("\x1b" * 10**6)) <= 4 * terminal.MOST + 3


def test_names_of_files_reach_no_terminal_raw(program: Program, tmp_path: Path) -> None:
    """Through errors: of the program itself, of click, and of values that files hold."""
    dump(tmp_path / "ranking.json", {EVIL: [0]})
    for words in (
        ["profile", f"gone{EVIL}", "--data", "rows.jsonl"],
        ["prune", "nano", "--ranking", "ranking.json", "--keep", 4],
        ["rank", f"gone{EVIL}"],
        [f"fly{EVIL}"],
        ["plan", "nano", "--topology", f"v5e:{EVIL}"],
    ):
        status, error = program(*words)
        assert (status, error.count("\n")) == (2, 1) and len(error) < 2500, error
        assert error.isprintable() or error[:-1].isprintable(), error


def test_a_name_without_end_is_cut(program: Program, tmp_path: Path) -> None:
    dump(tmp_path / "ranking.json", {"x" * 30_000_000: [0]})
    status, error = program("prune", "nano", "--ranking", "ranking.json", "--keep", 4)
    assert status == 2 and error.count("\n") == 1 and len(error) < 2500


def test_what_is_reported_is_clean_too(program: Program, finished: Any, tmp_path: Path, capfd: Any) -> None:
    """A profile's domains come from its rows."""
    folder = finished("one", 1, domains=["a", f"b{EVIL}"])
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(terminal.click, "echo", lambda text, **_: said.append(text))
        assert program("rank", folder, "--domain", f"b{EVIL}")[0] == 0
    assert len(said) == 1 and "by `reap`" in said[0] and said[0].isprintable()


# Real processes from here on.


def run(*words: Any, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [*PROGRAM, *map(str, words)]
    return subprocess.run(
        command, **{"cwd": cwd, "env": ENVIRONMENT, "text": True, "stderr": subprocess.PIPE} | options
    )


def test_python_m_is_the_program(tmp_path: Path) -> None:
    done = run("--version", cwd=tmp_path, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout[:11], done.stderr) == (0, "gptoss-jax,", "")


def test_completion_is_switched_on_as_readme_says(tmp_path: Path) -> None:
    (line,) = re.findall(r'eval "\$\((\S+=bash_source) gptoss-jax\)"', (ROOT / "README.md").read_text())
    name, value = line.split("=")
    done = run(cwd=tmp_path, stdout=subprocess.PIPE, env=ENVIRONMENT | {name: value})
    assert done.returncode == 0 and "complete -o nosort" in done.stdout and "gptoss-jax" in done.stdout
    words = {name: "bash_complete", "COMP_WORDS": "gptoss-jax pr", "COMP_CWORD": "1"}
    done = run(cwd=tmp_path, stdout=subprocess.PIPE, env=ENVIRONMENT | words)
    assert done.stdout.split() == ["plain,profile", "plain,prune"]


@pytest.mark.parametrize("made", ["convert.py", "convert/__init__.py"])
def test_a_strangers_convert_is_named(made: str, tmp_path: Path) -> None:
    """`python -m` looks for modules in the current folder first."""
    file = tmp_path / made
    file.parent.mkdir(exist_ok=True)
    file.write_text("raise RuntimeError('a stranger runs')")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = run("prune", "nano", "--keep-sets", "k.json", cwd=tmp_path, stdout=subprocess.PIPE, env=environment)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert str(file) in done.stderr and "rename it" in done.stderr
    code = "import gptoss_jax as gj; gj.open('nano')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert f"ImportError: gptoss-jax: {file} hides" in done.stderr and "a stranger runs" not in done.stderr


def test_windows_is_told_in_one_line(tmp_path: Path) -> None:
    """There fcntl, resource and SIGHUP are missing."""
    code = """
import sys
sys.modules.update(fcntl=None, resource=None)
import signal
del signal.SIGHUP
from gptoss_jax.cli import main
sys.platform = "win32"
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "rank"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert "Linux and macOS" in done.stderr and "WSL" in done.stderr


def test_a_complete_output_is_no_failure_where_standard_output_is_closed_or_full(finished: Any, tmp_path: Path) -> None:
    folder = finished("one", 1)
    reading, writing = os.pipe()
    os.close(reading)
    with open("/dev/full", "w") as full, os.fdopen(writing, "w") as broken:
        for number, out in enumerate((full, broken)):
            done = run("rank", folder, "--out", f"{number}.json", cwd=tmp_path, stdout=out)
            assert (done.returncode, done.stderr) == (0, ""), done.stderr
            assert json.loads((tmp_path / f"{number}.json").read_text())["layers"]
    done = run("rank", folder, "--out", "2.json", cwd=tmp_path, preexec_fn=lambda: os.close(1))
    assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "2.json").exists()


SAYING = "import sys; from gptoss_jax.cli import terminal; terminal.begin(); terminal.show(sys.argv[1])"


def test_what_is_asked_for_is_an_error_where_it_cannot_be_had(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", SAYING, "x"], stdout=full, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
    assert (
        done.returncode == 1
        and "OutputError: standard output cannot be written: no space left on device" in done.stderr
    )
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", SAYING, "x"], stdout=writing, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_an_encoding_that_lacks_characters_gets_escapes(tmp_path: Path) -> None:
    environment = ENVIRONMENT | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([sys.executable, "-c", SAYING, "7 × 9 🙂"], capture_output=True, env=environment)
    assert (done.returncode, done.stdout) == (0, b"7 \xd7 9 \\U0001f642\n")


# What is seen on a terminal.


def on_terminal(*words: Any, cwd: Path) -> tuple[int, str]:
    """The program with standard error on a terminal: status, and all that was drawn there."""
    status, frames = drawn(words, 120, cwd)
    return status, "\n".join(frame.text for frame in frames)


def test_time_left_is_a_mean_in_which_a_pause_counts_little() -> None:
    """What is compiled for the first parts, or for a later one of another shape, does not come again."""
    now = 0
    pace = Pace(lambda: now)
    assert pace() is None
    said = []
    for took, done in ((100, 4), (50, 5), (1, 6), (1, 7), (1, 8), (1, 9)):
        now += took
        pace.advanced(done)
        said.append(pace())
    assert said == [None, *map(pytest.approx, (1 / 50, 2 / 51, 3 / 4, 4 / 5, 5 / 6))]
    now += 2  # nothing more is finished, and it is known that this takes longer
    assert pace() == pytest.approx(5 / 7)


def test_looks_every_few_steps_count_in_full() -> None:
    """Of ten steps of a second each a look takes three: 65 steps take 83 seconds."""
    now = 0
    pace = Pace(lambda: now)
    for step in range(66):
        now += 1 + 3 * (step % 10 == 0 and step > 0)
        pace.advanced(step)
    assert pace() == pytest.approx(65 / 83)


def test_nothing_is_drawn_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    with bar(10, "rows") as advance:
        advance(10)
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_replies_are_counted_as_they_grow(tmp_path: Path) -> None:
    prompts = [word for n in range(70) for word in ("--prompt", f"What is {n} + 2?")]
    status, drawn = on_terminal("generate", "nano", *prompts, "--max-new-tokens", 40, cwd=tmp_path)
    counted = [int(n) for n in re.findall(r"\| (\d+) of 70 replies \[", drawn)]
    assert status == 0 and counted == sorted(counted) and counted[-1] == 70, drawn
    assert any(0 < n < 70 for n in counted), drawn  # they end beside one another, and none waits for all
    assert on_terminal("generate", "nano", "--prompt", "2 + 2?", "--max-new-tokens", 4, cwd=tmp_path)[1].count("%") == 0


PROFILE = ("--dtype", "float32", "--max-seq-length", 64, "--batch-size", 4)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["streamed", "resident"])
def test_what_a_run_says_and_draws(engine: str, tiny_mxfp4: Path, rows_jsonl: Path, tmp_path: Path) -> None:
    line = ["profile", tiny_mxfp4, "--data", rows_jsonl, "--engine", engine, *PROFILE]
    status, drawn = on_terminal(*line, cwd=tmp_path)
    assert status == 0, drawn
    info = json.loads((tmp_path / "profile" / "profile.json").read_text())
    told, *bars = [text.strip() for text in drawn.splitlines() if text.strip()]
    assert told.startswith(
        f"gptoss-jax: 12 rows: {info['total_tokens']:,} tokens, of which {info['kept_tokens']:,} count; "
        f"{info['truncated_rows']} rows truncated, 0 without a kept token; engine {engine}: asked for; "
    )
    assert re.search(r"GiB of \d+\.\d free$", told)
    whole = f"{info['total_tokens']:,}"
    assert all(re.search(rf"\| [\d,]+ of {whole} tokens \[", text) for text in bars), bars
    assert f"| {whole} of {whole} tokens [" in bars[-1] and "100%" in bars[-1]
    layers = [int(n) for n in re.findall(r"^layer (\d) of 4: ", "\n".join(bars), re.MULTILINE)]
    assert layers == sorted(layers) and (not layers if engine == "resident" else layers[-1] == 4)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["streamed", "resident"])
def test_control_c_says_how_to_go_on_and_what_goes_on_ends_in_silence(
    engine: str, tiny_mxfp4: Path, rows_jsonl: Path, tmp_path: Path
) -> None:
    """The interrupt comes when two units are finished and kept."""
    code = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
import gptoss_jax.run.progress as progress
real = progress.Progress.save
def save(self, state, always):
    real(self, state, True)
    if state.units == 2:
        os.kill(os.getpid(), signal.SIGINT)
progress.Progress.save = save
from gptoss_jax.cli import main
main()
"""
    line = [*map(str, ["profile", tiny_mxfp4, "--data", rows_jsonl, "--engine", engine, *PROFILE])]
    done = subprocess.run(
        [sys.executable, "-c", code, *line], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 128 + signal.SIGINT and "Traceback" not in done.stderr
    assert without_told(done.stderr).strip() == (
        "gptoss-jax: stopped; what is finished is kept: the same command with --resume goes on"
    )
    status, drawn = on_terminal(*line, "--resume", cwd=tmp_path)
    assert status == 0 and "Warning" not in drawn and "warn" not in drawn, drawn
    last = [text for text in drawn.splitlines() if text.strip()][-1]
    assert re.search(r"100%.*\| ([\d,]+) of \1 tokens \[", last), last


@pytest.mark.slow
def test_a_hangup_that_is_ignored_stays_so(tiny_mxfp4: Path, rows_jsonl: Path, tmp_path: Path) -> None:
    """As nohup has it, with which runs outlive a connection."""
    code = """
import os, signal
import gptoss_jax.run.job as job
real = job.measure
def measure(*given):
    os.kill(os.getpid(), signal.SIGHUP)
    return real(*given)
job.measure = measure
from gptoss_jax.cli import main
main()
"""
    line = [*map(str, ["profile", tiny_mxfp4, "--data", rows_jsonl, *SHORT])]
    for prefix, status in ([], 128 + signal.SIGHUP), (["nohup"], 0):
        done = subprocess.run(
            [*prefix, sys.executable, "-c", code, *line], cwd=tmp_path, env=ENVIRONMENT, capture_output=True
        )
        assert done.returncode == status, done.stderr
        assert (tmp_path / "profile").exists() == (not status)


@pytest.mark.slow
def test_bars_of_bytes_have_one_unit(model: Path, tmp_path: Path) -> None:
    dump(tmp_path / "ranking.json", RANKING)
    status, drawn = on_terminal(
        "prune", model, "--ranking", "ranking.json", "--keep", "75%", "--out", "cut", cwd=tmp_path
    )
    assert status == 0 and re.search(r"100%.*\| (\d+) of \1 MB \[.* MB/s\]", drawn), drawn


@pytest.mark.slow
def test_prune_says_what_a_per_cent_is_and_what_it_saves(model: Path, tmp_path: Path) -> None:
    dump(tmp_path / "ranking.json", RANKING)
    line = ["prune", model, "--ranking", "ranking.json", "--keep", "75%", "--out", "cut"]
    done = run(*line, cwd=tmp_path, stdout=subprocess.PIPE)
    sizes = [json.loads((folder / INDEX).read_text())["metadata"]["total_size"] for folder in (model, tmp_path / "cut")]
    before, now = (f"{size / 1e6:,.1f} MB" for size in sizes)
    assert (
        f": 5 of 7 experts a layer (75% of 7: 5) of unknown origin; weights {before} before, {now} now: cut"
        in done.stdout
    )
    assert (done.returncode, done.stderr, before == now) == (0, "", False)


# What needs no device asks for none.


@pytest.mark.slow
@pytest.mark.parametrize("command", ["prune", "rank", "merge", "convert", "fingerprint rank"])
def test_what_needs_no_device_does_not_wait_for_other_hosts(command: str, argv: list[Any], tmp_path: Path) -> None:
    """On one host of many JAX waits for the others when it is asked which devices there are, unless it keeps to the
    CPU."""
    code = """
import os, sys
os.environ.pop("JAX_PLATFORMS", None)
from gptoss_jax.cli import main
try:
    main()
except SystemExit as stop:
    bridge = sys.modules.get("jax._src.xla_bridge")
    if bridge and bridge.backends_are_initialized() and sys.modules["jax"].config.jax_platforms != "cpu":
        sys.exit(f"all devices were asked for, and {command} ended with {stop}")
    raise
"""
    line = [*map(str, argv), "--out", "out"]
    done = subprocess.run(
        [sys.executable, "-c", code, *line], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
