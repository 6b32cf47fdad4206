"""The architecture of a GPT-OSS model, as its config.json states it.

Glossary, used in shapes, suffixes and einsum strings throughout the project:

    B batch           S sequence          T tokens (B·S)        D hidden size
    H query heads     K key/value heads   h head size           E experts
    k experts per token                   F expert hidden size  L layers
    V vocabulary      G groups of rows    M rows of some tokens at once
    c the pair (gate, up)                 q query heads that share a key head (H / K)
    J groups of co-activations            b bins of gates
"""

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .errors import ConfigError

# How weights of experts lie: floats, four bits as a device wants all of a layer, four bits as they are stored.
Form = Literal["bf16", "mxfp4", "blocks"]

SLIDING = "sliding_attention"
FULL = "full_attention"

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # owner/name, of a model or of a dataset

# Sizes by their names here and in config.json.
SIZE_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "num_experts": "num_local_experts",
    "top_k": "num_experts_per_tok",
    "expert_hidden_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "sliding_window": "sliding_window",
    "max_position": "max_position_embeddings",
}


@dataclass(frozen=True)
class Yarn:
    """YaRN's stretching of the rotary frequencies (Peng et al. 2023, arXiv:2309.00071)."""

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = False

    @property
    def attention_factor(self) -> float:
        """What cos and sin are multiplied by."""
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclass(frozen=True)
class Config:
    """Sizes and constants of the network; no dtype, mesh or run option is among them."""

    num_layers: int  # L
    hidden_size: int  # D
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # h
    num_experts: int  # E
    top_k: int  # k
    expert_hidden_size: int  # F
    vocab_size: int  # V
    layer_types: tuple[str, ...]
    sliding_window: int
    rope_theta: float
    rope_scaling: Yarn
    swiglu_limit: float = 7.0
    rms_norm_eps: float = 1e-5
    max_position: int = 131072

    def dims(self) -> dict[str, int]:
        """The sizes by their letters, as the tensor patterns of `convert.mapping` name them."""
        return {
            "D": self.hidden_size,
            "H": self.num_heads,
            "K": self.num_kv_heads,
            "h": self.head_dim,
            "E": self.num_experts,
            "F": self.expert_hidden_size,
            "V": self.vocab_size,
            "c": 2,
        }

    def num_parameters(self, num_experts: int | None = None) -> int:
        """Parameters of the model, or of its cut to `num_experts` experts a layer."""
        n = self.num_experts if num_experts is None else num_experts
        d, f, kv = self.hidden_size, self.expert_hidden_size, self.num_kv_heads * self.head_dim
        heads = self.num_heads * self.head_dim
        attention = (d + 1) * (heads + 2 * kv) + (heads + 1) * d + self.num_heads
        expert = (d + 1) * 2 * f + (f + 1) * d + (d + 1)  # the last is its row of the router
        return self.num_layers * (attention + 2 * d + n * expert) + 2 * self.vocab_size * d + d

    @classmethod
    def from_json(cls, raw: Any, where: str = "config.json") -> "Config":
        """Read a Hugging Face config; ConfigError names the key that is missing or wrong."""
        if not isinstance(raw, dict) or raw.get("model_type") != "gpt_oss":
            found = raw.get("model_type") if isinstance(raw, dict) else raw
            raise ConfigError(
                f"{where}: model_type is {found!r}, expected 'gpt_oss': only GPT-OSS checkpoints can be read"
            )
        raw = {"swiglu_limit": 7.0, **raw}
        # Published configs name the number twice; others have only one of the two.
        raw["num_experts_per_tok"] = raw.get("num_experts_per_tok", raw.get("experts_per_token"))
        if raw.get("experts_per_token", raw["num_experts_per_tok"]) != raw["num_experts_per_tok"]:
            raise ConfigError(f"{where}: num_experts_per_tok and experts_per_token differ: make them equal")
        if raw.get("hidden_act", "silu") != "silu":
            raise ConfigError(f"{where}: hidden_act is {raw['hidden_act']!r}, expected 'silu'")
        sizes = {field: _number(raw, key, int, where) for field, key in SIZE_KEYS.items()}
        layer_types = raw.get("layer_types")
        if not isinstance(layer_types, list):
            raise ConfigError(f"{where}: layer_types is {layer_types!r}, expected a list")
        if len(layer_types) != sizes["num_layers"]:
            raise ConfigError(f"{where}: layer_types has {len(layer_types)} entries, expected {sizes['num_layers']}")
        for kind in layer_types:
            if kind not in (SLIDING, FULL):
                raise ConfigError(f"{where}: layer_types names {kind!r}, expected {SLIDING!r} or {FULL!r}")
        # transformers 5 writes rope_theta and rope_scaling as one object, rope_parameters.
        rope = raw.get("rope_parameters") or raw.get("rope_scaling")
        if not isinstance(rope, dict):
            raise ConfigError(f"{where}: rope_scaling is {rope!r}, expected an object as the original model has it")
        config = cls(
            **sizes,
            layer_types=tuple(layer_types),
            rope_theta=_number({**raw, **rope}, "rope_theta", float, where),
            rope_scaling=_yarn(rope, raw, where),
            swiglu_limit=_number(raw, "swiglu_limit", float, where),
            rms_norm_eps=_number(raw, "rms_norm_eps", float, where),
        )
        config._check(where)
        return config

    def _check(self, where: str) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"{where}: num_attention_heads must be a multiple of num_key_value_heads")
        if self.head_dim % 2:
            raise ConfigError(f"{where}: head_dim is {self.head_dim}, rotary embeddings need an even one")
        if self.top_k > self.num_experts:
            raise ConfigError(
                f"{where}: num_experts_per_tok {self.top_k} is above num_local_experts {self.num_experts}"
            )

    def to_json(self) -> dict[str, Any]:
        """The config in the form that Hugging Face publishes."""
        yarn = self.rope_scaling
        return {
            "architectures": ["GptOssForCausalLM"],
            "attention_bias": True,
            "attention_dropout": 0.0,
            "experts_per_token": self.top_k,
            "hidden_act": "silu",
            "initial_context_length": yarn.original_context,
            "initializer_range": 0.02,
            "layer_types": list(self.layer_types),
            "model_type": "gpt_oss",
            "output_router_logits": False,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_scaling": {
                "beta_fast": yarn.beta_fast,
                "beta_slow": yarn.beta_slow,
                "factor": yarn.factor,
                "original_max_position_embeddings": yarn.original_context,
                "rope_type": "yarn",
                "truncate": yarn.truncate,
            },
            "rope_theta": self.rope_theta,
            "router_aux_loss_coef": 0.9,
            "swiglu_limit": self.swiglu_limit,
            "tie_word_embeddings": False,
            "use_cache": True,
            **{key: getattr(self, field) for field, key in SIZE_KEYS.items()},
        }


def _number(raw: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    """A number above 0; whole where `kind` is int."""
    value = raw.get(key)
    if value is None:
        raise ConfigError(f"{where}: key {key!r} is missing: add it as the original model has it")
    is_number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value <= sys.float_info.max:
        what = "a whole number of at least 1" if kind is int else "a number above 0"
        raise ConfigError(f"{where}: {key} is {value!r}, expected {what}")
    return kind(value)


def _yarn(rope: Mapping[str, Any], raw: Mapping[str, Any], where: str) -> Yarn:
    kind = rope.get("rope_type", rope.get("type"))
    if kind != "yarn":
        raise ConfigError(f"{where}: rope_type is {kind!r}, expected 'yarn'")
    original = "original_max_position_embeddings"
    rope = {original: raw.get("initial_context_length"), "beta_fast": 32.0, "beta_slow": 1.0, **rope}
    return Yarn(
        factor=_number(rope, "factor", float, where),
        original_context=_number(rope, original, int, where),
        beta_fast=_number(rope, "beta_fast", float, where),
        beta_slow=_number(rope, "beta_slow", float, where),
        truncate=bool(rope.get("truncate", True)),
    )


def _published(num_layers: int, num_experts: int) -> Config:
    return Config(
        num_layers=num_layers,
        hidden_size=2880,
        num_heads=64,
        num_kv_heads=8,
        head_dim=64,
        num_experts=num_experts,
        top_k=4,
        expert_hidden_size=2880,
        vocab_size=201088,
        layer_types=(SLIDING, FULL) * (num_layers // 2),
        sliding_window=128,
        rope_theta=150000.0,
        rope_scaling=Yarn(factor=32.0, original_context=4096),
    )


GPT_OSS_20B = _published(num_layers=24, num_experts=32)
GPT_OSS_120B = _published(num_layers=36, num_experts=128)
PRESETS = {"gpt-oss-20b": GPT_OSS_20B, "gpt-oss-120b": GPT_OSS_120B}  # by the names that users know

# Every dimension differs, so that no transpose can hide; D and F are multiples of MXFP4's 32.
TINY = Config(
    num_layers=4,
    hidden_size=64,
    num_heads=10,
    num_kv_heads=5,
    head_dim=14,
    num_experts=7,
    top_k=3,
    expert_hidden_size=96,
    vocab_size=320,
    layer_types=(SLIDING, FULL, FULL, SLIDING),  # not alternating: nobody may guess it from i % 2
    sliding_window=9,
    rope_theta=150000.0,
    rope_scaling=Yarn(factor=32.0, original_context=4096),
)
