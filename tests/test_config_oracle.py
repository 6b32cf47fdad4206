"""Configs that differ from the tested one: our logits are transformers', or the key is named and the exit is 2."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jaxtyping
import numpy as np
import pytest

from convert.hf import Checkpoint
from experiments import checkpoints
from gptoss_jax.config import FULL, SLIDING, TINY, Config
from gptoss_jax.data import batching
from gptoss_jax.data.batching import Document
from gptoss_jax.devices.placement import Placement
from gptoss_jax.network.source import load
from gptoss_jax.run.forward import forward
from tests import oracle
from tests.bad_input import Refused, dump, poke

pytestmark = pytest.mark.slow

CONFIG = replace(TINY, num_layers=2, layer_types=(FULL, SLIDING))
IDS = np.random.default_rng(4).integers(0, CONFIG.vocab_size, 60).astype(np.int32)
BASE = CONFIG.to_json()
YARN = BASE["rope_scaling"]


class Case(NamedTuple):
    """Keys of config.json in the place of the tested one's; ... removes one."""

    changes: dict[str, Any]
    says: tuple[str, ...] | None = None
    """What the refusal names; None where the model is read."""
    differs: bool = True
    """Whether transformers' logits are others than before."""


def rope(name: str = "rope_scaling", **changes: Any) -> dict[str, Any]:
    return {name: {key: value for key, value in (YARN | changes).items() if value is not ...}}


def followed(**changes: Any) -> Case:
    """Other logits, and those of transformers."""
    return Case(changes)


def same(**changes: Any) -> Case:
    """The logits of before, of transformers too."""
    return Case(changes, differs=False)


def refused(*says: str, **changes: Any) -> Case:
    return Case(changes, says)


ALONE = {"rope_scaling": ..., "rope_theta": ...}
PLAIN = {"rope_type": "default", "rope_theta": 5000.0}
MSCALE = {"attention_factor": ..., "mscale": 2.0, "mscale_all_dim": 0.5}
BOTH_ORIGINAL = {"original_max_position_embeddings": 450, "initial_context_length": 450}
CASES = {
    # Rotation.
    "another theta": followed(rope_theta=20000.0),
    "theta as a whole number": same(rope_theta=5000),
    "no theta": followed(rope_theta=...),
    "theta in the object": same(rope_theta=..., **rope(rope_theta=5000.0)),
    "two thetas that agree": same(**rope(rope_theta=5000)),
    "two thetas": refused("rope_theta", "rope_scaling.rope_theta", **rope(rope_theta=7000.0)),
    "factor": followed(**rope(factor=4.0)),
    "factor 1": followed(**rope(factor=1)),
    "factor below 1": followed(**rope(factor=0.25, attention_factor=...)),
    "factor null": refused("factor", **rope(factor=None)),
    "no factor": refused("factor", **rope(factor=...)),
    "beta_fast": followed(**rope(beta_fast=30.0)),
    "no beta_fast": followed(**rope(beta_fast=...)),
    "beta_fast null": followed(**rope(beta_fast=None)),
    "beta_slow": followed(**rope(beta_slow=0.5)),
    "no beta_slow": followed(**rope(beta_slow=...)),
    "beta_slow above beta_fast": followed(**rope(beta_fast=1.0, beta_slow=9.0)),
    "beta_slow as beta_fast": followed(**rope(beta_fast=1.0, beta_slow=1.0, truncate=False)),
    "truncate false": followed(**rope(truncate=False)),
    "no truncate": same(**rope(truncate=...)),
    "truncate null": refused("truncate", **rope(truncate=None)),
    "attention_factor": followed(**rope(attention_factor=2.0)),
    "no attention_factor": followed(**rope(attention_factor=...)),
    "attention_factor null": followed(**rope(attention_factor=None)),
    "attention_factor 0": refused("attention_factor", **rope(attention_factor=0.0)),
    "mscale and mscale_all_dim": followed(**rope(**MSCALE)),
    "mscale with a factor below 1": followed(**rope(**MSCALE, factor=0.5)),
    "mscale alone": followed(**rope(**MSCALE | {"mscale_all_dim": ...})),
    "mscale beside attention_factor": same(**rope(mscale=2.0, mscale_all_dim=0.5)),
    "original context": followed(initial_context_length=90, **rope(original_max_position_embeddings=90)),
    "original context before all pairs": followed(initial_context_length=6, **rope(original_max_position_embeddings=6)),
    "original context of nowhere": followed(initial_context_length=..., **rope(original_max_position_embeddings=...)),
    "original context outside": followed(**BOTH_ORIGINAL, **rope(original_max_position_embeddings=...)),
    "original context twice": refused("original_max_position_embeddings", original_max_position_embeddings=450),
    "initial context of another length": refused("initial_context_length", initial_context_length=4096),
    "initial context alone": refused("initial_context_length", **rope(original_max_position_embeddings=...)),
    "no scaling": followed(rope_scaling={"rope_type": "default"}),
    "no scaling, new name": followed(**ALONE, rope_parameters=PLAIN),
    "theta alone": followed(**ALONE, rope_parameters={"rope_theta": 20000.0}),
    "rope_parameters": same(**ALONE | rope("rope_parameters", rope_theta=5000.0)),
    "rope_parameters beside null": same(**ALONE | {"rope_scaling": None} | rope("rope_parameters", rope_theta=5000.0)),
    "rope_scaling and rope_parameters": same(**rope("rope_parameters")),
    "rope_scaling and rope_parameters that differ": refused(
        "rope_scaling", "rope_parameters", **rope("rope_parameters", factor=4.0)
    ),
    "rope_parameters without scaling beside it": refused("rope_scaling", "rope_parameters", rope_parameters=PLAIN),
    "neither": refused("rope_scaling", rope_scaling=...),
    "rope_scaling null": refused("rope_scaling", rope_scaling=None),
    "rope_scaling empty": refused("rope_scaling", rope_scaling={}),
    "type of old": same(**rope(rope_type=..., type="yarn")),
    "no type": refused("beta_fast", **rope(rope_type=...)),
    "two types": refused("rope_type", "type", **rope(type="linear")),
    "linear": refused("'linear'", rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "dynamic": refused("'dynamic'", rope_scaling={"rope_type": "dynamic", "factor": 4.0}),
    "proportional": refused("'proportional'", rope_scaling={"rope_type": "proportional"}),
    "llama3": refused(
        "'llama3'", **rope(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=5000.0)
    ),
    "longrope": refused("'longrope'", **rope(rope_type="longrope", short_factor=[2.0] * 7, long_factor=[1.0] * 7)),
    "rope type of nobody": refused("'xpos'", **rope(rope_type="xpos")),
    "rope by kind of layer": refused("sliding_attention", rope_scaling={SLIDING: YARN, FULL: YARN}),
    "unknown key of rope": refused("mrope_section", **rope(mrope_section=[2, 5])),
    "whole heads": same(partial_rotary_factor=1.0),
    "half heads": refused("partial_rotary_factor", partial_rotary_factor=0.5),
    "half heads, inside": refused("partial_rotary_factor", **rope(partial_rotary_factor=0.5)),
    # Layers and experts.
    "eps": followed(rms_norm_eps=0.05),
    "limit": followed(swiglu_limit=0.25),
    "no limit": followed(swiglu_limit=...),
    "slope": followed(swiglu_alpha=3.0),
    "no slope": followed(swiglu_alpha=...),
    "window": followed(sliding_window=4),
    "window 1": followed(sliding_window=1),
    "window null": refused("sliding_window", sliding_window=None),
    "layer types": followed(layer_types=[SLIDING, SLIDING]),
    "no layer types": followed(layer_types=...),
    "layer types null": followed(layer_types=None),
    "other layer types": refused("'chunked_attention'", layer_types=[FULL, "chunked_attention"]),
    "fewer experts per token": followed(num_experts_per_tok=2, experts_per_token=2),
    "two numbers of experts per token": refused("experts_per_token", experts_per_token=2),
    "experts_per_token alone": refused("num_experts_per_tok", num_experts_per_tok=...),
    "num_experts_per_tok alone": same(experts_per_token=...),
    "num_experts beside": same(num_experts=7),
    "num_experts alone": same(num_experts=7, num_local_experts=...),
    "num_experts that differs": refused("num_experts", "num_local_experts", num_experts=5),
    "longer context": same(max_position_embeddings=36000),
    # One value alone is this network's.
    "no biases": refused("attention_bias", attention_bias=False),
    "other activation": refused("hidden_act", hidden_act="gelu"),
    "tied to a name": refused("tie_word_embeddings", tie_word_embeddings="embed_tokens"),
    "sizes by layer": refused("per_layer_config", per_layer_config={"0": {"sliding_window": 4}}),
    "classifier": refused("architectures", architectures=["GptOssForSequenceClassification"]),
    "no architectures": same(architectures=...),
    "code of its own": refused("auto_map", auto_map={"AutoModelForCausalLM": "evil.Evil"}),
    "encoder": refused("is_encoder_decoder", is_encoder_decoder=True),
    "other quantisation": refused("'bitsandbytes'", quantization_config={"quant_method": "bitsandbytes"}),
    "quantisation without method": refused("quant_method", quantization_config={"group_size": 32, "bits": 4}),
    "quantisation null": same(quantization_config=None),
    # Keys of other programs, some of which transformers obeys.
    "another config inside": refused("text_config", text_config=BASE),
    "another config beside": refused("configuration_files", configuration_files=["config.4.0.0.json"]),
    "another file of weights": refused("transformers_weights", transformers_weights="other.safetensors"),
    "NTK's names": refused("rope_ntk_alpha", "rope_ntk_beta", rope_ntk_alpha=1.0, rope_ntk_beta=32.0),
    "unknown key": refused("unknown_key", unknown_key=[1]),
    # What is read over.
    "dropout": same(attention_dropout=0.5),
    "training": same(initializer_range=0.5, router_aux_loss_coef=0.001),
    "router logits": same(output_router_logits=True),
    "hidden states": same(output_hidden_states=True, output_attentions=True),
    "without a cache": same(use_cache=False),
    "dtype": same(torch_dtype="float16"),
    "dtype of today": same(dtype="bfloat16"),
    "labels": same(id2label={"0": "yes", "1": "no", "2": "?"}, label2id={"yes": 0}, problem_type="regression"),
    "token ids": same(pad_token_id=5, bos_token_id=1, eos_token_id=[2, 7]),
    "generation": same(temperature=0.1, top_k=2, max_length=3, do_sample=True, repetition_penalty=2.0),
    "implementation": same(attn_implementation="eager", experts_implementation="eager", chunk_size_feed_forward=1),
    "notes": same(_name_or_path="x", transformers_version="4.55.0", unsloth_version="2025.8", unsloth_fixed=True),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose queries and keys are large enough for attention to depend on rotation."""
    folder = tmp_path_factory.mktemp("oracle")
    checkpoints.write_random(folder, CONFIG, mxfp4=False, seed=1)
    rng = np.random.default_rng(2)
    heads = {"q": CONFIG.num_heads, "k": CONFIG.num_kv_heads}
    for layer in range(CONFIG.num_layers):
        for name, count in heads.items():
            kernel = rng.normal(0, 0.2, (count * CONFIG.head_dim, CONFIG.hidden_size))
            poke(folder, f"model.layers.{layer}.self_attn.{name}_proj.weight", (...,), kernel)
    return folder


def write(folder: Path, changes: dict[str, Any]) -> None:
    dump(folder / "config.json", {key: value for key, value in (BASE | changes).items() if value is not ...})


def theirs(folder: Path) -> np.ndarray:
    return oracle.forward(oracle.load(folder), IDS).logits


@pytest.fixture(scope="module")
def before(folder: Path) -> np.ndarray:
    """transformers' logits with the tested config."""
    write(folder, {})
    return theirs(folder)


@cache
def ours(folder: Path, config: Config) -> np.ndarray:
    (batch,) = batching.padded([Document(IDS, np.ones(len(IDS), np.float32))], 1, len(IDS))
    network = load(Checkpoint(folder), "float32")
    # Each operation is compiled once for all configs; the network as a whole would be compiled for each.
    with jax.disable_jit():
        return np.asarray(forward(network, batch.tokens, Placement("cpu")).logits[0])


@pytest.mark.parametrize("name", CASES)
def test_case(
    name: str, folder: Path, before: np.ndarray, refused: Refused, ranking: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    write(folder, case.changes)
    if case.says is not None:
        refused("prune", folder, "--ranking", ranking, "--keep", 4, "--out", "out", says=("config.json", *case.says))
        return
    expected = theirs(folder)
    assert (oracle.relative(expected, before) > 1e-3) == case.differs
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # without jit, numbers stand where arrays do
    assert oracle.relative(ours(folder, Checkpoint(folder).config), expected) < 1e-5


def test_there_are_enough() -> None:
    assert sum(case.says is None for case in CASES.values()) >= 40
    assert sum(case.says is not None for case in CASES.values()) >= 40
