"""Parts of parameters: what is read of a checkpoint for one, and what comes of it."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert.hf import Checkpoint
from convert.shards import Stored
from gptoss_jax.devices import mesh
from gptoss_jax.devices.mesh import EXPERT
from gptoss_jax.network.source import abstract
from tests.on_eight_devices import EIGHT, named

Ranges = tuple[tuple[int, int], ...]
BF16 = np.dtype(ml_dtypes.bfloat16)


def parameters(weights: str) -> dict[str, Any]:
    """Shape and dtype of each, by path."""
    return dict(named(abstract(EIGHT, mesh.make(EIGHT, 1, 1), form=weights)))


FLOATS, FOUR_BITS = parameters("bf16"), parameters("mxfp4")
BOTH = FLOATS | FOUR_BITS
CASES = [("mxfp4", path) for path in BOTH] + [("bf16", path) for path in FLOATS]


@pytest.fixture(scope="module")
def checkpoints(eight_mxfp4: Path, eight_bf16: Path) -> dict[str, Checkpoint]:
    return {"mxfp4": Checkpoint(eight_mxfp4), "bf16": Checkpoint(eight_bf16)}


@pytest.fixture(scope="module")
def wholes(checkpoints: dict[str, Checkpoint]) -> dict[tuple[str, str], np.ndarray]:
    """Every parameter by form of the checkpoint and path."""
    return {(form, path): read(checkpoints[form], path, whole(path)) for form, path in CASES}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[int, int]]]:
    """The ranges of bytes read of each tensor."""
    ranges = defaultdict(list)
    fill = Stored._fill

    def recording(stored: Stored, array: np.ndarray, starts: Sequence[int]) -> None:
        size = array.nbytes // len(starts)
        ranges[stored.name] += [(start - stored.offset, start - stored.offset + size) for start in starts]
        fill(stored, array, starts)

    monkeypatch.setattr(Stored, "_fill", recording)
    return ranges


def whole(path: str) -> Ranges:
    return tuple((0, size) for size in BOTH[path].shape)


def share(path: str, device: int) -> Ranges:
    """What one device of expert=8 holds."""
    shape = BOTH[path].shape
    eighths = [(device * size // 8, (device + 1) * size // 8) for size in shape]
    split = mesh.spec(path, len(shape))
    return tuple(
        eighth if axis == EXPERT else (0, size) for size, eighth, axis in zip(shape, eighths, split, strict=True)
    )


def read(checkpoint: Checkpoint, path: str, ranges: Ranges) -> np.ndarray:
    return checkpoint.part(path, ranges, BOTH[path].dtype)


def cut(array: np.ndarray, ranges: Ranges) -> np.ndarray:
    return array[tuple(slice(*r) for r in ranges)]


@pytest.mark.parametrize(("form", "path"), CASES)
def test_a_device_gets_its_slice(
    form: str, path: str, checkpoints: dict[str, Checkpoint], wholes: dict[tuple[str, str], np.ndarray]
) -> None:
    for device in range(8):
        ranges = share(path, device)
        assert read(checkpoints[form], path, ranges).tobytes() == cut(wholes[form, path], ranges).tobytes()


@pytest.mark.parametrize(("form", "path"), CASES)
def test_a_device_reads_its_share_and_no_more(
    form: str, path: str, checkpoints: dict[str, Checkpoint], reads: dict[str, list[tuple[int, int]]]
) -> None:
    """An eighth of each tensor, and eight devices together all of it; of what is not split, all at once."""
    checkpoint, split = checkpoints[form], EXPERT in mesh.spec(path, BOTH[path].ndim)
    together = defaultdict(list)
    for device in range(8 if split else 1):
        reads.clear()
        read(checkpoint, path, share(path, device))
        for name, ranges in reads.items():
            nbytes = checkpoint.tensors[name].nbytes
            assert sum(stop - start for start, stop in ranges) == (nbytes // 8 if split else nbytes), name
            together[name] += ranges
    assert len(together) == tensors_of(form, path)
    for name, ranges in together.items():
        starts, stops = zip(*sorted(ranges), strict=True)
        assert (starts[0], *stops) == (*starts, checkpoint.tensors[name].nbytes), name


def tensors_of(form: str, path: str) -> int:
    """How many a parameter comes from: one a layer, and two where floats come from blocks and scales."""
    decoded = form == "mxfp4" and path.endswith(("gate_up_kernel", "down_kernel"))
    return (EIGHT.num_layers if path.startswith("layers/") else 1) * (2 if decoded else 1)


def test_o_proj_is_read_by_columns(checkpoints: dict[str, Checkpoint], reads: dict[str, list[tuple[int, int]]]) -> None:
    """Each row of D holds all heads, of which the third device's are 12 to 18."""
    path = "layers/attention/o_kernel"
    read(checkpoints["bf16"], path, share(path, 2))
    row, first, last = (2 * EIGHT.head_dim * heads for heads in (EIGHT.num_heads, 12, 18))
    expected = [(start + first, start + last) for start in range(0, EIGHT.hidden_size * row, row)]
    assert dict(reads) == {f"model.layers.{i}.self_attn.o_proj.weight": expected for i in range(EIGHT.num_layers)}


def part_of(size: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(0, size - 1), st.integers(1, size)).filter(lambda r: r[0] < r[1])


@given(data=st.data())
def test_any_layers_rows_and_heads_are_slices(
    data: st.DataObject, checkpoints: dict[str, Checkpoint], wholes: dict[tuple[str, str], np.ndarray]
) -> None:
    """Rows are the first axis behind that of layers; o_kernel has its heads on the next."""
    form, path = data.draw(st.sampled_from(CASES))
    shape = BOTH[path].shape
    free = path.startswith("layers/") + 1 + path.endswith("o_kernel")
    ranges = tuple(data.draw(part_of(size)) for size in shape[:free]) + tuple((0, size) for size in shape[free:])
    assert read(checkpoints[form], path, ranges).tobytes() == cut(wholes[form, path], ranges).tobytes()


@pytest.mark.parametrize("path", FLOATS)
def test_float32_holds_the_values_of_bfloat16(
    path: str, checkpoints: dict[str, Checkpoint], wholes: dict[tuple[str, str], np.ndarray]
) -> None:
    values = checkpoints["mxfp4"].part(path, whole(path), np.dtype(np.float32))
    assert wholes["mxfp4", path].dtype == BF16 and values.dtype == np.float32
    assert np.array_equal(values, wholes["mxfp4", path].astype(np.float32))


def test_four_bits_are_the_bytes_of_the_checkpoint(
    checkpoints: dict[str, Checkpoint], wholes: dict[tuple[str, str], np.ndarray]
) -> None:
    """No more and no less memory than in the file."""
    stored = [t.nbytes for name, t in checkpoints["mxfp4"].tensors.items() if name.endswith(("_blocks", "_scales"))]
    packed = [x.nbytes for (_, path), x in wholes.items() if path.endswith(("_packed", "_scales"))]
    assert sum(packed) == sum(stored)
