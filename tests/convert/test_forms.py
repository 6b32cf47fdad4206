"""Forms that other tools write: read as transformers reads them, from the same folder, and written as published."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert import forms
from convert.hf import Checkpoint
from convert.mapping import all_tensors
from gptoss_jax.config import TINY
from gptoss_jax.devices.mesh import by_path
from gptoss_jax.errors import CheckpointError
from gptoss_jax.network.source import load
from tests.bad_input import INDEX, Program, Refused, dump, edit
from tests.convert.test_prune import assert_same_bytes, raw
from tests.oracle import needs_torch

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROUTER, NORM = "model.layers.2.mlp.router.weight", "model.layers.1.input_layernorm.weight"
KERNEL = "model.layers.1.mlp.experts.down_proj"

Tensors = dict[str, Any]
Change = Callable[[Tensors], Tensors]


def written(source: Path, target: Path, change: Change, **config: Any) -> Path:
    """The checkpoint with other tensors, in one file as the safetensors library writes it."""
    needs_torch()
    from safetensors.torch import save_file

    target.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors" and file.name != INDEX:
            shutil.copy(file, target)
    tensors = {name: tensor.clone().contiguous() for name, tensor in change(raw(source)).items()}
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    edit(target / "config.json", **config)
    return target


def wider(dtype: str, *names: str) -> Change:
    """Tensors in another dtype, with values that BF16 has not: all floats, or those whose names hold one of `names`."""

    def change(tensors: Tensors) -> Tensors:
        torch = needs_torch()
        generator = torch.Generator().manual_seed(5)

        def widened(tensor: Any) -> Any:
            noise = torch.rand(tensor.shape, generator=generator) * 2**-9
            return (tensor.float() * (1 + noise)).to(getattr(torch, dtype))

        chosen = {n for n, t in tensors.items() if t.is_floating_point() and any(name in n for name in names or ("",))}
        return {name: widened(t) if name in chosen else t for name, t in tensors.items()}

    return change


def renamed(*pairs: tuple[str, str]) -> Change:
    """The first of each pair that begins a name is replaced by the second."""

    def new(name: str) -> str:
        before, after = next((pair for pair in pairs if name.startswith(pair[0])), ("", ""))
        return after + name.removeprefix(before)

    return lambda tensors: {new(name): tensor for name, tensor in tensors.items()}


def without(*names: str) -> Change:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def head_as_embedding(tensors: Tensors) -> Tensors:
    return tensors | {HEAD: tensors[EMBEDDING]}


# What transformers reads: the source, the change, keys of config.json.
READ: dict[str, tuple[str, Change, dict[str, Any]]] = {
    "all F32": ("bf16", wider("float32"), {}),
    "all F16": ("bf16", wider("float16"), {}),
    "norms in F32": ("mxfp4", wider("float32", "norm"), {}),
    "router in F32": ("mxfp4", wider("float32", ".router."), {}),
    "MXFP4, the rest in F16": ("mxfp4", wider("float16"), {}),
    "one kernel in F32": ("bf16", wider("float32", KERNEL), {}),
    "without prefix": ("mxfp4", renamed(("model.", "")), {}),
    "one layer without prefix": ("mxfp4", renamed(("model.layers.2.", "layers.2.")), {}),
    "with the prefix twice": ("mxfp4", renamed(("model.", "model.model."), ("lm_head", "model.lm_head")), {}),
    "tied, no head": ("mxfp4", without(HEAD), {"tie_word_embeddings": True}),
    "tied, no embedding": ("mxfp4", without(EMBEDDING), {"tie_word_embeddings": True}),
    "tied, both the same": ("mxfp4", head_as_embedding, {"tie_word_embeddings": True}),
}
MIXED = {"layer 1": "layers.1.mlp", "down_proj of all layers": "down_proj"}


@pytest.fixture(scope="module")
def folders(tiny_mxfp4: Path, tiny_bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder of each form, made once."""
    sources, made = {"mxfp4": tiny_mxfp4, "bf16": tiny_bf16}, tmp_path_factory.mktemp("forms")

    def folder(form: str) -> Path:
        target = made / form.replace(" ", "-")
        if not target.exists():
            if form in MIXED:
                written(tiny_mxfp4, target, lambda tensors: mixed(tensors, raw(tiny_bf16), MIXED[form]))
            else:
                source, change, config = READ[form]
                written(sources[source], target, change, **config)
        return target

    return folder


def mixed(mxfp4: Tensors, bf16: Tensors, where: str) -> Tensors:
    """Kernels whose names hold `where` in BF16, the others in MXFP4."""
    kernels = [n for n in bf16 if n.endswith(("gate_up_proj", "down_proj")) and where in n]
    assert kernels
    dropped = {f"{name}_{part}" for name in kernels for part in ("blocks", "scales")}
    return {n: t for n, t in mxfp4.items() if n not in dropped} | {name: bf16[name] for name in kernels}


def transformers_weights(folder: Path, dtype: str) -> dict[str, np.ndarray]:
    """The state dict of transformers as float32; it must have found every tensor, and no other."""
    torch = needs_torch()
    from transformers import GptOssForCausalLM

    model, info = GptOssForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), output_loading_info=True)
    assert not any(info.values()), info
    return {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}


def our_weights(folder: Path, dtype: str) -> dict[str, np.ndarray]:
    """The same of ours, by the names of the published form."""
    ours = by_path(load(Checkpoint(folder), dtype))
    arrays = {
        name: ours[tensor.path] if layer is None else ours[f"layers/{tensor.path}"][layer]
        for name, tensor, layer in all_tensors(TINY)
    }
    return {
        name: tensor.to_hf(np.asarray(arrays[name]), TINY).astype(np.float32) for name, tensor, _ in all_tensors(TINY)
    }


def assert_same_bits(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].tobytes() == expected.tobytes(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", [*READ, *MIXED])
def test_weights_are_what_transformers_loads(folders: Callable[[str], Path], form: str, dtype: str) -> None:
    """In float32 F32 keeps all its digits; in bfloat16 it is rounded as torch rounds."""
    assert_same_bits(our_weights(folders(form), dtype), transformers_weights(folders(form), dtype))


def test_these_forms_hold_what_bf16_does_not(folders: Callable[[str], Path]) -> None:
    """Else the tests above would show nothing of digits."""
    import ml_dtypes

    weights = our_weights(folders("norms in F32"), "float32")
    assert not np.array_equal(weights[NORM], weights[NORM].astype(ml_dtypes.bfloat16).astype(np.float32))


def test_rows_of_the_embedding_have_all_their_digits(folders: Callable[[str], Path]) -> None:
    ids = np.array([5, 0, 5, 319])
    checkpoint = Checkpoint(folders("all F32"))
    assert (
        checkpoint.rows("embedding", ids).tobytes()
        == our_weights(checkpoint.folder, "float32")[EMBEDDING][ids].tobytes()
    )


# What becomes of them.


@pytest.mark.parametrize("form", [*READ, *MIXED])
def test_convert_writes_the_published_form(
    folders: Callable[[str], Path], form: str, tmp_path: Path, program: Program
) -> None:
    """As the model in bfloat16, which is how transformers would save it; what is MXFP4 keeps its bytes."""
    source = folders(form)
    status, error = program("convert", source, "--to", "hf", "--out", "out")
    assert status == 0, error
    before, after = raw(source), raw(tmp_path / "out")
    is_mxfp4 = form not in MIXED and any(name.endswith("_blocks") for name in before)
    names = {name for name, tensor, _ in all_tensors(TINY) if not (is_mxfp4 and tensor.mxfp4)}
    parts = {f"{n}_{part}" for n, t, _ in all_tensors(TINY) if is_mxfp4 and t.mxfp4 for part in ("blocks", "scales")}
    assert set(after) == names | parts
    expected = transformers_weights(source, "bfloat16")
    assert {n: t.float().numpy().tobytes() for n, t in after.items() if n in names} == {
        n: expected[n].tobytes() for n in names
    }
    assert_same_bytes({n: after[n] for n in parts}, {n: t for n, t in published(before).items() if n in parts})
    assert_same_bits(transformers_weights(tmp_path / "out", "float32"), transformers_weights(source, "bfloat16"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def published(tensors: Tensors) -> Tensors:
    """Blocks and scales by their published names."""
    return {f"model.{n[n.index('layers.') :]}": t for n, t in tensors.items() if n.endswith(("_blocks", "_scales"))}


@pytest.mark.parametrize("form", ["all F32", "all F16"])
def test_what_was_rounded_is_counted(folders: Callable[[str], Path], form: str, program: Program) -> None:
    torch = needs_torch()
    before = raw(folders(form))
    changed = sum(int((t.bfloat16().to(t.dtype) != t).sum()) for t in before.values())
    total = sum(t.numel() for t in before.values())
    assert 0 < changed < total and all(t.dtype != torch.bfloat16 for t in before.values())
    status, error = program("convert", folders(form), "--to", "hf", "--out", "out")
    assert status == 0 and f"of {total:,} values in F16 or F32, {changed:,} were rounded to BF16" in error


def test_prune_counts_what_it_rounds_and_says_so_in_the_card(
    folders: Callable[[str], Path], tmp_path: Path, program: Program
) -> None:
    dump(tmp_path / "keep.json", [[0, 2, 3, 6]] * TINY.num_layers)
    status, error = program("prune", folders("norms in F32"), "--keep-sets", "keep.json", "--out", "out")
    norms = (2 * TINY.num_layers + 1) * TINY.hidden_size
    assert status == 0 and f"of {norms} values in F16 or F32, " in error
    card = " ".join((tmp_path / "out" / "README.md").read_text(encoding="utf-8").split())
    assert "Weights in F32 were written in BF16, each as the nearest value." in card
    assert "MXFP4 experts, BF16 and F32 rest" in card and "the logits equal" not in card


def test_f32_becomes_mxfp4_from_all_its_digits(
    folders: Callable[[str], Path], tmp_path: Path, program: Program
) -> None:
    """Not through BF16, which would round twice."""
    from convert import mxfp4

    source = folders("one kernel in F32")
    assert program("convert", source, "--to", "hf", "--format", "mxfp4", "--out", "out")[0] == 0
    blocks, scales = mxfp4.encode(raw(source)[KERNEL].transpose(1, 2).numpy())
    after = raw(tmp_path / "out")
    assert after[f"{KERNEL}_blocks"].numpy().tobytes() == blocks.tobytes()
    assert after[f"{KERNEL}_scales"].numpy().tobytes() == scales.tobytes()


def test_mixed_experts_can_become_mxfp4(folders: Callable[[str], Path], tmp_path: Path, program: Program) -> None:
    """Those that were so keep their bytes, and what happens is told."""
    source = folders("layer 1")
    status, error = program("convert", source, "--to", "hf", "--format", "mxfp4", "--out", "out")
    assert status == 0 and "experts are BF16 and MXFP4 in the source, and now all MXFP4, rounded where" in error
    before, after = raw(source), raw(tmp_path / "out")
    parts = {name: tensor for name, tensor in before.items() if name.endswith(("_blocks", "_scales"))}
    assert parts and f"{KERNEL}_blocks" not in parts and f"{KERNEL}_blocks" in after
    assert_same_bytes({name: after[name] for name in parts}, parts)


@pytest.mark.parametrize("form", READ)
def test_the_tie_of_embeddings_is_told_where_there_is_one(
    folders: Callable[[str], Path], form: str, tmp_path: Path, program: Program
) -> None:
    dump(tmp_path / "keep.json", [[0, 2, 3, 6]] * TINY.num_layers)
    status, error = program("prune", folders(form), "--keep-sets", "keep.json", "--out", "out")
    assert status == 0 and ("embeddings of the source are tied" in error) == form.startswith("tied")
    assert "MXFP4 in the source" not in error
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_tied_embeddings_that_differ_in_their_last_row_are_refused(
    tiny_bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(tensors: Tensors) -> Tensors:
        head = tensors[EMBEDDING].clone()
        head[-1] += 1
        return tensors | {HEAD: head}

    monkeypatch.setattr(forms, "COMPARED_ROWS", 8)
    folder = written(tiny_bf16, tmp_path / "model", changed, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match="they differ"):
        Checkpoint(folder)


def test_mixed_experts_become_bf16_unless_asked(folders: Callable[[str], Path], program: Program) -> None:
    status, error = program("convert", folders("layer 1"), "--to", "hf", "--out", "out")
    assert status == 0 and "experts are BF16 and MXFP4 in the source, and now all BF16, which holds" in error


def test_four_bits_of_mixed_experts_are_refused(folders: Callable[[str], Path]) -> None:
    with pytest.raises(CheckpointError, match="experts are BF16 and MXFP4: --weights mxfp4 needs MXFP4 in all layers"):
        load(Checkpoint(folders("layer 1")), "bfloat16", form="mxfp4")


def test_orbax_takes_no_more_digits_than_it_has(folders: Callable[[str], Path], refused: Refused) -> None:
    refused("convert", folders("all F32"), "--to", "orbax", "--out", "out", says=("in F32", "--to hf"))


def test_a_value_that_bf16_cannot_hold_is_refused(tiny_bf16: Path, tmp_path: Path, refused: Refused) -> None:
    def large(tensors: Tensors) -> Tensors:
        tensors[ROUTER] = tensors[ROUTER].float()
        tensors[ROUTER][3, 5] = 3.4e38
        return tensors

    written(tiny_bf16, tmp_path / "model", large)
    says = (f"{ROUTER}, expert 3: holds NaN, infinity or a value that is too large for BF16",)
    refused("convert", "model", "--to", "hf", "--out", "out", says=says)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_found_in_any_float(tiny_bf16: Path, tmp_path: Path, dtype: str, value: float) -> None:
    def damaged(tensors: Tensors) -> Tensors:
        tensors[KERNEL] = tensors[KERNEL].to(getattr(needs_torch(), dtype))
        tensors[KERNEL][4, 1, 2] = value
        return tensors

    with pytest.raises(CheckpointError, match=f"{KERNEL}, expert 4: holds NaN or infinity"):
        our_weights(written(tiny_bf16, tmp_path / "model", damaged), "float32")
