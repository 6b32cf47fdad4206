"""The table of tensors: both directions, names and shapes as published, numbers of parameters."""

import json
from pathlib import Path

import numpy as np
import pytest

from convert import card
from convert.mapping import LAYER, OUTER, Tensor, all_tensors
from convert.shards import find_tensors
from gptoss_jax.config import GPT_OSS_20B, GPT_OSS_120B, TINY, Config
from gptoss_jax.files.paths import read_json

ROWS = [pytest.param(t, id=t.path) for t in (*LAYER, *OUTER)]
MXFP4_ROWS = [pytest.param(t, id=t.path) for t in LAYER if t.mxfp4]

# Section by section what gpt-oss-20b has published: one layer, then what lies outside layers.
SHAPES_20B = {
    "input_layernorm.weight": (2880,),
    "post_attention_layernorm.weight": (2880,),
    "self_attn.q_proj.weight": (4096, 2880),
    "self_attn.q_proj.bias": (4096,),
    "self_attn.k_proj.weight": (512, 2880),
    "self_attn.k_proj.bias": (512,),
    "self_attn.v_proj.weight": (512, 2880),
    "self_attn.v_proj.bias": (512,),
    "self_attn.o_proj.weight": (2880, 4096),
    "self_attn.o_proj.bias": (2880,),
    "self_attn.sinks": (64,),
    "mlp.router.weight": (32, 2880),
    "mlp.router.bias": (32,),
    "mlp.experts.gate_up_proj": (32, 2880, 5760),
    "mlp.experts.gate_up_proj_bias": (32, 5760),
    "mlp.experts.down_proj": (32, 2880, 2880),
    "mlp.experts.down_proj_bias": (32, 2880),
    "model.embed_tokens.weight": (201088, 2880),
    "model.norm.weight": (2880,),
    "lm_head.weight": (201088, 2880),
}
BLOCKS_20B = {"mlp.experts.gate_up_proj": (32, 5760, 90, 16), "mlp.experts.down_proj": (32, 2880, 90, 16)}


def numbered(shape: tuple[int, ...]) -> np.ndarray:
    """An array in which every value differs, so that no wrong order can hide."""
    return np.arange(np.prod(shape)).reshape(shape)


def mxfp4_shape(tensor: Tensor, config: Config) -> tuple[int, ...]:
    """Shape of the values that blocks hold."""
    *rest, blocks, nbytes = tensor.blocks_shape(config)
    return (*rest, blocks * nbytes * 2)


def mxfp4_names(config: Config) -> list[str]:
    return [
        f"{entry.name}{part}"
        for entry in all_tensors(config)
        for part in (("_blocks", "_scales") if entry.tensor.mxfp4 else ("",))
    ]


@pytest.mark.parametrize("tensor", ROWS)
def test_to_model_and_back_is_the_identity(tensor: Tensor) -> None:
    published = numbered(tensor.hf_shape(TINY))
    assert np.array_equal(tensor.to_hf(tensor.to_model(published, TINY), TINY), published)


@pytest.mark.parametrize("tensor", MXFP4_ROWS)
def test_the_mxfp4_form_and_back_is_the_identity(tensor: Tensor) -> None:
    values = numbered(mxfp4_shape(tensor, TINY))
    assert np.array_equal(tensor.hf_to_mxfp4(tensor.mxfp4_to_hf(values, TINY), TINY), values)
    assert tensor.mxfp4_to_hf(values, TINY).shape == tensor.hf_shape(TINY)


@pytest.mark.parametrize("tensor", MXFP4_ROWS)
def test_some_of_the_experts_are_enough(tensor: Tensor) -> None:
    values = numbered(mxfp4_shape(tensor, TINY))
    some = tensor.mxfp4_to_hf(values[2:4], TINY)
    assert np.array_equal(some, tensor.mxfp4_to_hf(values, TINY)[2:4])
    assert np.array_equal(tensor.hf_to_mxfp4(some, TINY), values[2:4])


@pytest.mark.parametrize("tensor", MXFP4_ROWS)
def test_both_forms_give_the_model_the_same(tensor: Tensor) -> None:
    values = numbered(mxfp4_shape(tensor, TINY))
    direct = tensor.mxfp4_to_model(values, TINY)
    assert np.array_equal(direct, tensor.to_model(tensor.mxfp4_to_hf(values, TINY), TINY))


def test_gate_is_the_even_and_up_the_odd_columns() -> None:
    by_name = {t.hf_name: t for t in LAYER}
    kernel, bias = by_name["mlp.experts.gate_up_proj"], by_name["mlp.experts.gate_up_proj_bias"]
    published = numbered(kernel.hf_shape(TINY))
    gate, up = np.moveaxis(kernel.to_model(published, TINY), 1, 0)
    assert np.array_equal(gate, published[:, :, 0::2].transpose(0, 2, 1))
    assert np.array_equal(up, published[:, :, 1::2].transpose(0, 2, 1))
    published = numbered(bias.hf_shape(TINY))
    assert np.array_equal(bias.to_model(published, TINY), np.stack([published[:, 0::2], published[:, 1::2]], 1))


def test_the_bf16_form_is_the_transpose_of_the_mxfp4_form() -> None:
    for tensor in (t for t in LAYER if t.mxfp4):
        values = numbered(mxfp4_shape(tensor, TINY))
        assert np.array_equal(tensor.mxfp4_to_hf(values, TINY), values.transpose(0, 2, 1))


def test_heads_are_the_outer_axis_of_projections() -> None:
    by_name = {t.hf_name: t for t in LAYER}
    h = TINY.head_dim
    for letter, heads in (("q", TINY.num_heads), ("k", TINY.num_kv_heads), ("v", TINY.num_kv_heads)):
        tensor = by_name[f"self_attn.{letter}_proj.weight"]
        published = numbered(tensor.hf_shape(TINY))
        kernel = tensor.to_model(published, TINY)
        assert all(np.array_equal(kernel[i], published[i * h : (i + 1) * h]) for i in range(heads))
    tensor = by_name["self_attn.o_proj.weight"]
    published = numbered(tensor.hf_shape(TINY))
    kernel = tensor.to_model(published, TINY)
    assert all(np.array_equal(kernel[:, i], published[:, i * h : (i + 1) * h]) for i in range(TINY.num_heads))


def test_the_table_has_every_parameter_of_the_model() -> None:
    from flax import nnx
    from flax.traverse_util import flatten_dict

    from gptoss_jax.network.model import GptOss

    model = nnx.eval_shape(lambda: GptOss(TINY, rngs=nnx.Rngs(0)))
    state = flatten_dict(nnx.to_pure_dict(nnx.state(model, nnx.Param)), sep="/")
    shapes = {path: leaf.shape for path, leaf in state.items()}
    table = {t.path: t.to_model(numbered(t.hf_shape(TINY)), TINY).shape for t in OUTER}
    for t in LAYER:
        table[f"layers/{t.path}"] = (TINY.num_layers, *t.to_model(numbered(t.hf_shape(TINY)), TINY).shape)
    assert table == shapes


def test_names_of_20b_are_the_published_ones(shared: Path) -> None:
    index = json.loads((shared / "data/gptoss20b/model.safetensors.index.json").read_text())
    names = mxfp4_names(GPT_OSS_20B)
    assert len(names) == 459
    assert set(names) == set(index["weight_map"])


def test_bytes_of_20b_are_the_published_total(shared: Path) -> None:
    index = json.loads((shared / "data/gptoss20b/model.safetensors.index.json").read_text())
    total = 0
    for _, tensor, _ in all_tensors(GPT_OSS_20B):
        if tensor.mxfp4:
            blocks = tensor.blocks_shape(GPT_OSS_20B)
            total += np.prod(blocks) + np.prod(blocks[:-1])
        else:
            total += 2 * np.prod(tensor.hf_shape(GPT_OSS_20B))
    assert total == index["metadata"]["total_size"]


def test_shapes_of_20b() -> None:
    assert {t.hf_name: t.hf_shape(GPT_OSS_20B) for t in (*LAYER, *OUTER)} == SHAPES_20B
    assert {t.hf_name: t.blocks_shape(GPT_OSS_20B) for t in LAYER if t.mxfp4} == BLOCKS_20B


def test_pruning_slices_what_the_published_shapes_count_experts_in() -> None:
    by_experts = {name for name, shape in SHAPES_20B.items() if shape[0] == GPT_OSS_20B.num_experts}
    assert {t.hf_name for t in (*LAYER, *OUTER) if t.per_expert} == by_experts


def test_the_published_config_is_the_preset(shared: Path) -> None:
    assert Config.from_json(read_json(shared / "data/gptoss20b" / "config.json")) == GPT_OSS_20B


@pytest.mark.parametrize("config", [TINY, GPT_OSS_20B, GPT_OSS_120B], ids=["tiny", "20b", "120b"])
def test_a_config_survives_its_json(config: Config) -> None:
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize("n", range(4, 33, 4))
def test_parameters_of_cuts_of_20b(n: int) -> None:
    an_expert = 2880 * 5760 + 5760 + 2880**2 + 2880 + 2880 + 1
    assert GPT_OSS_20B.num_parameters(n) == 1_795_611_456 + 24 * n * an_expert


def test_names_of_cuts_of_20b() -> None:
    billions = ["4.2", "6.6", "9.0", "11.4", "13.7", "16.1", "18.5", "20.9"]
    assert [card.model_name(GPT_OSS_20B, n, "math") for n in range(4, 33, 4)] == [
        f"gpt-oss-{b}b-specialized-math-pruned-moe-only-{n}-experts"
        for b, n in zip(billions, range(4, 33, 4), strict=True)
    ]


def test_bytes_of_an_expert_of_20b() -> None:
    """In MXFP4, with its biases and its row of the router."""
    total = 0
    for tensor in (t for t in LAYER if t.per_expert):
        if tensor.mxfp4:
            _, *blocks = tensor.blocks_shape(GPT_OSS_20B)
            total += np.prod(blocks) + np.prod(blocks[:-1])
        else:
            total += 2 * np.prod(tensor.hf_shape(GPT_OSS_20B)[1:])
    assert total == 13_242_242


def test_a_checkpoint_holds_as_many_values_as_its_config_says(tiny_mxfp4: Path, tiny_bf16: Path) -> None:
    for folder in (tiny_mxfp4, tiny_bf16):
        stored = [t for name, t in find_tensors(folder).items() if not name.endswith("_scales")]
        values = sum(np.prod(t.shape) * (2 if t.name.endswith("_blocks") else 1) for t in stored)
        assert values == TINY.num_parameters()
