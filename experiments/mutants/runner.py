"""Runs the tests of a module on a copy of the tree, in processes forked from one that has imported much."""

import contextlib
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import click

from experiments.mutants.faults import ROOT, Mutant, code
from experiments.mutants.known import HOLDS

# What tests import before the project's own code.
LARGE = (
    "pytest _pytest.assertion hypothesis jaxtyping beartype numpy jax flax.nnx optax orbax.checkpoint safetensors.numpy"
)
LARGE += " ml_dtypes pyarrow.parquet datasets tokenizers transformers upath tqdm jinja2 torch openai_harmony"
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    # Programs that a mutant leaves as they were need no second compilation.
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
PASSED, NONE_CHOSEN = 0, 5  # exit statuses of pytest


def _test_file(name: str) -> str:
    """`convert/mxfp4` of the table is tests/convert/test_mxfp4.py."""
    folder, _, last = name.rpartition("/")
    return str(Path("tests", folder, f"test_{last}.py"))


class Runner:
    """A copy of the tree in `work`, and processes that run its tests."""

    def __init__(self, work: Path) -> None:
        self.work, self.tree = work.resolve(), work.resolve() / "tree"
        for room in ("gptoss_jax", "convert", "experiments", "tests", "docs", ".ci"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / room, self.tree / room, ignore=ignored, dirs_exist_ok=True)
        for file in ("pyproject.toml", "README.md", "LICENSE", "CONTRIBUTING.md", "Makefile"):
            shutil.copy2(ROOT / file, self.tree / file)
        # A test may pass with yesterday's code and fail with today's: it would kill every mutant.
        digest = hashlib.sha256()
        for file in sorted(self.tree.rglob("*.py")):
            digest.update(file.read_bytes())
        self.code = digest.hexdigest()[:16]
        if (ROOT.parent / "shared").exists() and not (self.work / "shared").exists():
            (self.work / "shared").symlink_to(ROOT.parent / "shared")
        others = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and Path(p).resolve() != ROOT]
        os.environ.update(ENVIRONMENT, JAX_COMPILATION_CACHE_DIR=str(self.work / "compiled"))
        os.environ["PYTHONPATH"] = os.pathsep.join([str(self.tree), *others])
        sys.path[:] = [str(self.tree), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
        for name in LARGE.split():
            importlib.import_module(name)

    def tests(self, limit: float, *arguments: str) -> tuple[int | None, str]:
        """Exit status of pytest in a forked process, None past the limit of seconds, and what it printed."""
        log = self.work / "log.txt"
        sys.stdout.flush()
        if not (child := os.fork()):
            os.setsid()
            target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(target, stream)
            os.chdir(self.tree)
            for name in [name for name in sys.modules if name.partition(".")[0] == "experiments"]:
                del sys.modules[name]
            options = ["-x", "-p", "no:cacheprovider", "--tb=line", f"--basetemp={self.work / 'tmp'}"]
            status = importlib.import_module("pytest").main([*options, *arguments])
            sys.stdout.flush()
            os._exit(int(status))
        end = time.monotonic() + limit
        while not (done := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < end:
            time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # also what a test has left running
        if not done[0]:
            os.waitpid(child, 0)
        text = log.read_text(encoding="utf-8", errors="replace")
        return (os.waitstatus_to_exitcode(done[1]) if done[0] else None), text

    def seconds(self, file: str) -> float:
        """How long the tests of a file take that are not slow; they must pass without a mutant."""
        kept = self.work / "seconds.json"
        known = json.loads(kept.read_text()) if kept.exists() else {}
        key = f"{file} {self.code}"
        if key not in known:
            start = time.monotonic()
            status, text = self.tests(900, "-m", "not slow", file)
            if status not in (PASSED, NONE_CHOSEN):
                raise click.ClickException(f"{file} fails without a mutant:\n{text[-3000:]}")
            known[key] = round(time.monotonic() - start, 1)
            status, text = self.tests(900, "-m", "slow", file)
            if status not in (PASSED, NONE_CHOSEN):
                raise click.ClickException(f"{file} fails without a mutant:\n{text[-3000:]}")
            kept.write_text(json.dumps(known, indent=1))
            click.echo(f"{file}: {known[key]} s")
        return float(known[key])

    def judge(self, mutant: Mutant) -> tuple[str, str]:
        """What becomes of a mutant, and the test that noticed it."""
        files = sorted(map(_test_file, HOLDS[mutant.file].split()), key=self.seconds)
        limit = 60 + 4 * sum(map(self.seconds, files))
        place = self.tree / mutant.file
        source, status = place.read_text(encoding="utf-8"), place.stat()
        place.write_text(code(source, mutant.operator, mutant.occurrence), encoding="utf-8")
        # Compiled code is found by time and size; that of a mutant is never written.
        os.utime(place, ns=(status.st_atime_ns, time.time_ns() + 10**10))
        sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = True, "1"
        try:
            for mark, allowed in (("not slow", limit), ("slow", 900.0)):
                end, text = self.tests(allowed, "-m", mark, *files)
                if end is None:
                    return "timed out", mark
                if end not in (PASSED, NONE_CHOSEN):
                    found = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)
                    return "killed", found[0] if found else text[-300:]
        finally:
            place.write_text(source, encoding="utf-8")
            os.utime(place, ns=(status.st_atime_ns, status.st_mtime_ns))
            sys.dont_write_bytecode = False
            del os.environ["PYTHONDONTWRITEBYTECODE"]
        return "survived", ""
