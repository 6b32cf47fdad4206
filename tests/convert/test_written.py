"""What a written checkpoint promises to whoever reads it, from the raw bytes of its files, without readers of ours."""

import json
import os
import re
import stat
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from convert.folder import QUANTIZATION, pruned_config
from tests.bad_input import dump

KEEP_SETS = [[0, 2, 3, 6], [1, 2, 4, 5], [0, 1, 2, 3], [3, 4, 5, 6]]
BYTES = {"BF16": 2, "U8": 1}


def header(file: Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Metadata, tensors in the order of their bytes, and how many bytes these are."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    metadata = entries.pop("__metadata__")
    tensors = dict(sorted(entries.items(), key=lambda item: item[1]["data_offsets"]))
    return metadata, tensors, len(data) - 8 - length


def expected(form: str, experts: int) -> dict[str, tuple[str, list[int]]]:
    """Names, dtypes and shapes as section 2 of the specification lists them, in numbers of the tiny model."""
    attention = {"q": 140, "k": 70, "v": 70}
    layer: dict[str, tuple[str, list[int]]] = {
        "input_layernorm.weight": ("BF16", [64]),
        "post_attention_layernorm.weight": ("BF16", [64]),
        **{f"self_attn.{name}_proj.weight": ("BF16", [rows, 64]) for name, rows in attention.items()},
        **{f"self_attn.{name}_proj.bias": ("BF16", [rows]) for name, rows in attention.items()},
        "self_attn.o_proj.weight": ("BF16", [64, 140]),
        "self_attn.o_proj.bias": ("BF16", [64]),
        "self_attn.sinks": ("BF16", [10]),
        "mlp.router.weight": ("BF16", [experts, 64]),
        "mlp.router.bias": ("BF16", [experts]),
        "mlp.experts.gate_up_proj_bias": ("BF16", [experts, 192]),
        "mlp.experts.down_proj_bias": ("BF16", [experts, 64]),
    }
    if form == "bf16":
        layer |= {
            "mlp.experts.gate_up_proj": ("BF16", [experts, 64, 192]),
            "mlp.experts.down_proj": ("BF16", [experts, 96, 64]),
        }
    else:
        layer |= {
            "mlp.experts.gate_up_proj_blocks": ("U8", [experts, 192, 2, 16]),
            "mlp.experts.gate_up_proj_scales": ("U8", [experts, 192, 2]),
            "mlp.experts.down_proj_blocks": ("U8", [experts, 64, 3, 16]),
            "mlp.experts.down_proj_scales": ("U8", [experts, 64, 3]),
        }
    outer = {
        "model.embed_tokens.weight": ("BF16", [320, 64]),
        "lm_head.weight": ("BF16", [320, 64]),
        "model.norm.weight": ("BF16", [64]),
    }
    return outer | {f"model.layers.{i}.{name}": entry for i in range(4) for name, entry in layer.items()}


@pytest.fixture(scope="module")
def sources(tiny_mxfp4: Path, tiny_bf16: Path) -> dict[str, Path]:
    return {"mxfp4": tiny_mxfp4, "bf16": tiny_bf16}


WRITTEN = [
    (command, source, form, size)
    for command in ("prune", "convert", "from-orbax")
    for source in ("mxfp4", "bf16")
    for form in ("mxfp4", "bf16")
    for size in ("5GB", "60KB")
]


@pytest.fixture(scope="module", params=WRITTEN, ids="-".join)
def made(
    request: pytest.FixtureRequest, sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, str, bool]:
    """A checkpoint, its source, the form of its experts and whether it was pruned."""
    from click.testing import CliRunner

    from gptoss_jax.cli import cli

    def run(*arguments: object) -> None:
        result = CliRunner().invoke(cli, [*map(str, arguments)], catch_exceptions=False)
        assert result.exit_code == 0, result.output

    command, source, form, size = request.param
    folder = tmp_path_factory.mktemp("written")
    options = ["--format", form, "--max-shard-size", size, "--out", folder / "out"]
    if command == "from-orbax":
        run("convert", sources[source], "--to", "orbax", "--out", folder / "orbax")
    if command == "prune":
        run("prune", sources[source], "--keep-sets", dump(folder / "keep.json", KEEP_SETS), *options)
    else:
        run("convert", folder / "orbax" if command == "from-orbax" else sources[source], "--to", "hf", *options)
    return folder / "out", sources[source], form, command == "prune"


Made = tuple[Path, Path, str, bool]


def test_every_tensor_is_there_once_in_its_published_shape(made: Made) -> None:
    folder, _, form, pruned = made
    found = [
        (name, (entry["dtype"], entry["shape"]))
        for file in folder.glob("*.safetensors")
        for name, entry in header(file)[1].items()
    ]
    assert len(found) == len(dict(found))
    assert dict(found) == expected(form, 4 if pruned else 7)


def test_bytes_lie_in_a_row_and_fit_their_shapes(made: Made) -> None:
    for file in made[0].glob("*.safetensors"):
        metadata, tensors, nbytes = header(file)
        assert metadata == {"format": "pt"}
        ends = [0, *(entry["data_offsets"][1] for entry in tensors.values())]
        assert [entry["data_offsets"][0] for entry in tensors.values()] == ends[:-1] and ends[-1] == nbytes
        for entry in tensors.values():
            begin, end = entry["data_offsets"]
            size = BYTES[entry["dtype"]]
            for length in entry["shape"]:
                size *= length
            assert end - begin == size


def test_blocks_stand_directly_before_their_scales(made: Made) -> None:
    folder, _, form, _ = made
    pairs = 0
    for file in folder.glob("*.safetensors"):
        names = [*header(file)[1]]
        for before, name in pairwise(["", *names]):
            assert name.endswith("_scales") == before.endswith("_blocks"), (file.name, before, name)
            if name.endswith("_scales"):
                assert before.removesuffix("_blocks") == name.removesuffix("_scales")
                pairs += 1
        assert not names[-1].endswith("_blocks")
    assert pairs == (8 if form == "mxfp4" else 0)


def test_the_index_names_each_tensor_in_its_shard_and_no_more(made: Made) -> None:
    folder = made[0]
    index = json.loads((folder / "model.safetensors.index.json").read_bytes())
    shards = {file.name: header(file) for file in folder.glob("*.safetensors")}
    assert index["weight_map"] == {name: shard for shard, (_, tensors, _) in shards.items() for name in tensors}
    assert index["metadata"] == {"total_size": sum(nbytes for _, _, nbytes in shards.values())}
    numbers = [re.fullmatch(r"model-(\d{5})-of-(\d{5})\.safetensors", name) for name in sorted(shards)]
    assert [(int(n[1]), int(n[2])) for n in numbers if n] == [(i, len(shards)) for i in range(1, len(shards) + 1)]


def test_config_has_the_sources_keys_and_values(made: Made) -> None:
    """Only how many experts there are, and how they are stored, may differ."""
    folder, source, form, pruned = made
    before, after = (json.loads((f / "config.json").read_bytes()) for f in (source, folder))
    assert after["num_local_experts"] == (4 if pruned else 7)
    assert (after["num_experts_per_tok"], after["experts_per_token"]) == (3, 3)
    assert ("quantization_config" in after) == (form == "mxfp4")
    for config in (before, after):
        config.pop("num_local_experts")
        config.pop("quantization_config", None)
    assert after == before and [*after] == [*before]


def test_no_key_of_config_changes_its_place(made: Made) -> None:
    folder, source, *_ = made
    before, after = (json.loads((f / "config.json").read_bytes()) for f in (source, folder))
    assert [key for key in after if key in before] == [key for key in before if key in after]


def test_other_files_are_the_sources(made: Made) -> None:
    folder, source, _, pruned = made
    own = {"config.json", "SHA256SUMS", "model.safetensors.index.json"} | (
        {"README.md", "expert_mapping.json"} if pruned else set()
    )
    others, theirs = (
        {p.name: p.read_bytes() for p in f.iterdir() if p.suffix != ".safetensors" and p.name not in own}
        for f in (folder, source)
    )
    assert others == theirs and {"tokenizer.json", "generation_config.json", "chat_template.jinja"} <= set(others)


def test_files_are_files_that_others_may_read(made: Made) -> None:
    """Modes as any program's new files have them, whatever those of the source are."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (made[0], *made[0].iterdir()):
        assert not path.is_symlink()
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~mask, path.name


def test_files_of_a_private_source_are_ordinary(model: Path, ranking: Path, tmp_path: Path, program: Any) -> None:
    for file in model.iterdir():
        file.chmod(0o600)
    code = "import os, sys; os.umask(0o022); from gptoss_jax.cli import main; main()"
    arguments = ["prune", model, "--ranking", ranking, "--keep", "4", "--out", tmp_path / "out"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").iterdir()} == {0o644}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755


def test_the_mapping_has_the_kept_experts_in_order(made: Made) -> None:
    folder, _, _, pruned = made
    file = folder / "expert_mapping.json"
    assert file.exists() == pruned
    if pruned:
        pairs = json.loads(file.read_bytes(), object_pairs_hook=list)
        assert pairs == [
            (str(layer), [(str(old), new) for new, old in enumerate(kept)]) for layer, kept in enumerate(KEEP_SETS)
        ]


EXEMPT = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.1.mlp.experts"]}
FP8 = {"quant_method": "fp8"}
OURS = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"], "further": 1}
# Keys of the source, whether experts are written in MXFP4, and which keys differ afterwards.
CONFIGS: dict[str, tuple[dict[str, Any], bool, dict[str, Any]]] = {
    "published": ({"quantization_config": OURS}, True, {}),
    "another dtype": ({"dtype": "float32"}, False, {"dtype": "bfloat16"}),
    "the dtype's old name": ({"torch_dtype": "float16"}, False, {"torch_dtype": "bfloat16"}),
    "its own dtype": ({"dtype": "bfloat16"}, True, {"quantization_config": QUANTIZATION}),
    "tied": ({"tie_word_embeddings": True}, False, {"tie_word_embeddings": False}),
    "no quantisation yet": ({"quantization_config": None}, True, {"quantization_config": QUANTIZATION}),
    "another quantisation": ({"quantization_config": FP8}, True, {"quantization_config": QUANTIZATION}),
    "experts exempted": ({"quantization_config": EXEMPT}, True, {"quantization_config": QUANTIZATION}),
    "no quantisation any more": ({"quantization_config": OURS}, False, {"quantization_config": ...}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_says_what_is_written(name: str) -> None:
    keys, quantize, changes = CONFIGS[name]
    before = {"num_local_experts": 7, "num_experts_per_tok": 3, "rope_theta": 150000, **keys}
    expected = {k: v for k, v in (before | changes | {"num_local_experts": 4}).items() if v is not ...}
    after = pruned_config(before, 4, quantize)
    assert json.dumps(after) == json.dumps(expected)
