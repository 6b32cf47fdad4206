"""What the tests of bad input share: the program called as its entry point is, and broken checkpoints.

Its fixtures are imported by name where they are used.
"""

import json
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxtyping
import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptoss_jax.cli import main

INDEX = "model.safetensors.index.json"
RANKING = [[6, 5, 4, 3, 2, 1, 0]] * 4
SHORT = ("--max-seq-length", "64", "--num-rows", "4")  # one shape to compile, and a small one

Program = Callable[..., tuple[int, str]]
Refused = Callable[..., str]


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: the bytes of files and links' targets, None for folders."""
    return {
        str(p.relative_to(folder)): str(p.readlink()).encode()
        if p.is_symlink()
        else p.read_bytes()
        if p.is_file()
        else None
        for p in folder.rglob("*")
    }


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Program:
    """Calls the entry point in `tmp_path`; gives exit status and standard error."""

    def call(*argv: object) -> tuple[int, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["gptoss-jax", *map(str, argv)])
        # Users have no checked annotations: what they get must not rest on those of the tests.
        monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        capfd.readouterr()
        status = 0
        # pytest collects warnings; outside of it they would be further lines on standard error.
        with warnings.catch_warnings(record=True) as caught:
            try:
                main()
            except SystemExit as stop:
                status = stop.code if isinstance(stop.code, int) else 1
        shown = [f"{w.message}\n" for w in caught if not issubclass(w.category, DeprecationWarning)]
        return status, capfd.readouterr().err + "".join(shown)

    return call


@pytest.fixture
def refused(program: Program, tmp_path: Path) -> Refused:
    """Calls the program, which must give status 2 and one line with `says`, and leave `tmp_path` as it was."""

    def call(*argv: object, says: tuple[str, ...] = ()) -> str:
        before = tree(tmp_path)
        status, error = program(*argv)
        changed = {name for name, _ in tree(tmp_path).items() ^ before.items()}
        assert (status, error.count("\n"), changed) == (2, 1, set()), error
        assert error.startswith("gptoss-jax: ")
        assert [text for text in says if text not in error] == [], error
        return error

    return call


@pytest.fixture
def model(tiny_mxfp4: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may break."""
    return Path(shutil.copytree(tiny_mxfp4, tmp_path / "model"))


@pytest.fixture
def ranking(tmp_path: Path) -> Path:
    """A sound ranking for it."""
    return dump(tmp_path / "ranking.json", RANKING)


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """A profile's folder, without domains and EAFT."""
    folder = tmp_path / "profile"
    folder.mkdir()
    pq.write_table(pa.table(table()), folder / "saliency.parquet")
    return folder


@pytest.fixture
def argv(command: str, model: Path, rows_jsonl: Path, ranking: Path, profile: Path) -> list[Any]:
    """A command line that would succeed; the test gives `command`, and adds --out."""
    return {
        "profile": ["profile", model, "--data", rows_jsonl, *SHORT],
        "prune": ["prune", model, "--ranking", ranking, "--keep", 4],
        "rank": ["rank", profile],
    }[command]


def table(layers: int = 4, experts: int = 7) -> dict[str, Any]:
    """A saliency table's columns."""
    layer, expert = np.divmod(np.arange(layers * experts), experts)
    numbers = np.linspace(1, 2, layers * experts)
    sums = dict.fromkeys(("gate_sum", "norm_sum", "gate_norm_sum", "gate_norm_sq_sum"), numbers)
    return {"layer": layer, "expert": expert, "count": expert + 1} | sums


def case(name: str, what: Any, *says: str) -> Any:
    """A row of a table: bad input, and what the message about it says."""
    return pytest.param(what, says, id=name)


def dump(file: Path, value: Any) -> Path:
    """Write JSON."""
    file.write_text(json.dumps(value), encoding="utf-8")
    return file


def edit(file: Path, **changes: Any) -> None:
    """Set keys of a JSON object; ... removes one."""
    raw = json.loads(file.read_text(encoding="utf-8")) | changes
    dump(file, {key: value for key, value in raw.items() if value is not ...})


def shard_of(model: Path, name: str) -> Path:
    """The shard that holds a tensor."""
    return model / json.loads((model / INDEX).read_text(encoding="utf-8"))["weight_map"][name]


def read_shard(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and tensors of a shard."""
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_shard(file: Path, header: Any, tensors: bytes) -> None:
    """A shard with any header at all."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + tensors)


def edit_entry(model: Path, name: str, **changes: Any) -> None:
    """Set fields of a tensor's entry in the header of its shard."""
    file = shard_of(model, name)
    header, tensors = read_shard(file)
    header[name] |= changes
    write_shard(file, header, tensors)


def poke(model: Path, name: str, index: tuple[int, ...], value: float) -> None:
    """Set one value (or row of values) of a BF16 tensor in place."""
    file = shard_of(model, name)
    header, tensors = read_shard(file)
    entry = header[name]
    begin, end = entry["data_offsets"]
    array = np.frombuffer(tensors[begin:end], ml_dtypes.bfloat16).reshape(entry["shape"]).copy()
    array[index] = value
    write_shard(file, header, tensors[:begin] + array.tobytes() + tensors[end:])
