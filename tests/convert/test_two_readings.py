"""What can be read in two ways, and what transformers would leave random: one line that says what is there."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.hf import Checkpoint
from tests.bad_input import INDEX, Refused, case, dump, edit, read_shard, write_shard
from tests.convert.test_forms import EMBEDDING, HEAD, KERNEL, NORM, ROUTER, Change, Tensors, renamed, without, written
from tests.convert.test_prune import raw, raw_file
from tests.oracle import needs_torch


def single_experts(tensors: Tensors) -> Tensors:
    """As tools write that know linear maps alone."""
    made = {name: t for name, t in tensors.items() if not name.endswith(("gate_up_proj", "down_proj"))}
    for name, tensor in tensors.items():
        layer, kernel = name.rpartition(".experts.")[::2]
        if kernel in ("gate_up_proj", "down_proj"):
            made |= {f"{layer}.experts.{j}.{kernel}.weight": one.T for j, one in enumerate(tensor)}
    return made


def both_forms(tensors: Tensors) -> Tensors:
    torch = needs_torch()
    shape = (7, 64, 3, 16)
    return tensors | {
        f"{KERNEL}_blocks": torch.zeros(shape, dtype=torch.uint8),
        f"{KERNEL}_scales": torch.zeros(shape[:-1], dtype=torch.uint8),
    }


def added(name: str, *shape: int, dtype: str = "bfloat16") -> Change:
    return lambda tensors: tensors | {name: needs_torch().zeros(shape, dtype=getattr(needs_torch(), dtype))}


def cast(name: str, dtype: str) -> Change:
    return lambda tensors: tensors | {name: tensors[name].to(getattr(needs_torch(), dtype))}


REFUSED = {
    "single experts": (single_experts, {}, ("gate_up_proj is missing", "experts.0.", "does not read either")),
    "two forms": (both_forms, {}, (KERNEL, f"{KERNEL}_blocks", "transformers takes the first")),
    "two names": (added("layers.1.input_layernorm.weight", 64), {}, (NORM, "names of one tensor")),
    "blocks without scales": (
        lambda tensors: without(KERNEL, f"{KERNEL}_scales")(both_forms(tensors)),
        {},
        (f"{KERNEL}_scales is missing",),
    ),
    "no head, not tied": (without(HEAD), {}, ("lm_head.weight is missing", "tie_word_embeddings")),
    "tied, neither": (without(HEAD, EMBEDDING), {"tie_word_embeddings": True}, (f"{EMBEDDING} is missing",)),
    "tied, and they differ": (dict, {"tie_word_embeddings": True}, ("they differ", "vLLM", "tie_word_embeddings")),
    "one norm missing": (without(NORM), {}, (f"{NORM} is missing", "take all files")),
    "OpenAI's names": (
        renamed(("model.layers.", "block."), ("model.", "")),
        {},
        ("block.0.", "OpenAI's reference program"),
    ),
    "adapter's names": (
        renamed(("model.", "base_model.model.model.lora_")),
        {},
        ("weights of an adapter", "merge it"),
    ),
    "torch.compile's names": (renamed(("model.", "_orig_mod.model.")), {}, ("_orig_mod.", "prefix of a wrapper")),
    "bitsandbytes": (
        lambda t: without(KERNEL)(added(f"{KERNEL}s.0.weight.absmax", 8)(t)),
        {},
        ("quantised by bitsandbytes",),
    ),
    "GPTQ": (lambda t: without(KERNEL)(added("model.layers.1.mlp.experts.0.down_proj.qweight", 8)(t)), {}, ("GPTQ",)),
    "compressed": (
        lambda t: without(KERNEL)(added("model.layers.1.mlp.experts.0.down_proj.weight_packed", 8)(t)),
        {},
        ("another form than the published MXFP4",),
    ),
    "MLX": (
        lambda t: without(KERNEL)(added("model.layers.1.mlp.experts.down_proj.scales", 8)(t)),
        {},
        ("in the form of MLX",),
    ),
    "FP8": (cast(ROUTER, "float8_e4m3fn"), {}, (f"{ROUTER} is F8_E4M3", "BF16, F16, F32", "before it was quantised")),
    "whole numbers": (cast(ROUTER, "int8"), {}, (f"{ROUTER} is I8",)),
    "a further tensor": (added("model.layers.1.mlp.extra", 3), {}, ("mlp.extra is no tensor of this GPT-OSS model",)),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_stands_there_instead_is_named(form: str, tiny_bf16: Path, tmp_path: Path, refused: Refused) -> None:
    change, config, says = REFUSED[form]
    written(tiny_bf16, tmp_path / "model", change, **config)
    error = refused("convert", "model", "--to", "hf", "--out", "out", says=says)
    assert "download" not in error


@pytest.mark.parametrize("form", ["single experts", "two forms", "no head, not tied", "tied, and they differ"])
def test_of_these_messages_transformers_is_the_witness(form: str, tiny_bf16: Path, tmp_path: Path) -> None:
    torch = needs_torch()
    from transformers import GptOssForCausalLM

    change, config, _ = REFUSED[form]
    folder = written(tiny_bf16, tmp_path / "model", change, **config)
    model, info = GptOssForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    stored, loaded = raw(tiny_bf16), model.state_dict()
    if form in ("single experts", "no head, not tied"):
        missing = {HEAD} if form.startswith("no") else {n for n in stored if n.endswith(("gate_up_proj", "down_proj"))}
        assert set(info["missing_keys"]) == missing
    else:
        for name in (KERNEL, EMBEDDING, HEAD):
            assert torch.equal(loaded[name], stored[name].float()), name


def weights_elsewhere(m: Path) -> None:
    edit(m / "config.json", transformers_weights="other.safetensors")


def one_file_beside(m: Path) -> None:
    shutil.copy(m / "model-00001-of-00005.safetensors", m / "model.safetensors")


def no_index(m: Path) -> None:
    (m / INDEX).unlink()


def shard_beside_one_file(m: Path) -> None:
    no_index(m)
    (m / "model-00001-of-00005.safetensors").rename(m / "model.safetensors")


def torch_alone(m: Path) -> None:
    for file in (*m.glob("*.safetensors"), m / INDEX):
        file.unlink()
    (m / "pytorch_model.bin").write_bytes(b"PK")


def adapter_alone(m: Path) -> None:
    torch_alone(m)
    (m / "config.json").unlink()
    dump(m / "adapter_config.json", {"base_model_name_or_path": "openai/gpt-oss-20b"})


FILES = [
    case("one file beside shards", one_file_beside, "model.safetensors", INDEX, "transformers takes this file, vLLM"),
    case("shards beside one file", shard_beside_one_file, "00002-of-00005", "takes model.safetensors alone, vLLM both"),
    case("shards without index", no_index, "model-00001-of-00005", f"no {INDEX}", "copy that too"),
    case(
        "other weights beside shards",
        lambda m: shutil.copy(m / "model-00001-of-00005.safetensors", m / "consolidated.safetensors"),
        "consolidated.safetensors",
        "does not name",
    ),
    case(
        "an adapter beside the model",
        lambda m: dump(m / "adapter_config.json", {}),
        "adapter_config.json",
        "transformers adds it where peft is installed",
        "merge it",
    ),
    case(
        "an adapter's weights beside the model",
        lambda m: (m / "adapter_model.safetensors").write_bytes(b""),
        "adapter_model.safetensors",
        "merge it",
    ),
    case("an adapter alone", adapter_alone, "holds an adapter", "no model", "merge it into its base"),
    case("weights of torch alone", torch_alone, "pytorch_model.bin", "save the model as safetensors"),
    case("an Orbax checkpoint beside shards", lambda m: (m / "orbax").mkdir(), "holds orbax and model-0000", "others"),
    case("weights elsewhere", weights_elsewhere, "transformers_weights", "other.safetensors"),
]


@pytest.mark.parametrize(("damage", "says"), FILES)
def test_a_folder_that_can_be_read_in_two_ways(
    damage: Callable[[Path], Any], says: tuple[str, ...], model: Path, ranking: Path, refused: Refused
) -> None:
    damage(model)
    error = refused("prune", model, "--ranking", ranking, "--keep", 4, "--out", "out", says=says)
    assert "download" not in error


def test_of_two_whole_models_transformers_takes_the_one_file(model: Path) -> None:
    """The witness of the first of these messages."""
    torch = needs_torch()
    from safetensors.torch import save_file
    from transformers import GptOssForCausalLM

    save_file({n: t + (n == "model.norm.weight") for n, t in raw(model).items()}, model / "model.safetensors")
    shards = raw_of_shards(model)
    loaded = GptOssForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()["model.norm.weight"]
    assert torch.equal(loaded, (shards["model.norm.weight"] + 1).float())


def raw_of_shards(folder: Path) -> Tensors:
    return {n: t for file in sorted(folder.glob("model-*.safetensors")) for n, t in raw_file(file).items()}


def test_an_index_of_one_file_names_it_and_no_other(tiny_mxfp4: Path, tmp_path: Path) -> None:
    """Then there is one way to read it."""
    written(tiny_mxfp4, tmp_path / "model", dict)
    names = read_shard(tmp_path / "model" / "model.safetensors")[0].keys() - {"__metadata__"}
    dump(tmp_path / "model" / INDEX, {"weight_map": dict.fromkeys(names, "model.safetensors")})
    assert set(Checkpoint(tmp_path / "model").tensors) == names


def test_bytes_of_bf16_that_are_called_f16_are_other_numbers(model: Path) -> None:
    """What the header says counts: no dtype is guessed."""
    file = next(f for f in model.glob("*.safetensors") if ROUTER in read_shard(f)[0])
    header, data = read_shard(file)
    header[ROUTER]["dtype"] = "F16"
    write_shard(file, header, data)
    assert Checkpoint(model).tensors[ROUTER].read().dtype == np.float16
