"""The architecture of a GPT-OSS model, as its config.json states it.

Glossary, used in shapes, suffixes and einsum strings throughout the project:

    B batch           S sequence          T tokens (B·S)        D hidden size
    H query heads     K key/value heads   h head size           E experts
    k experts per token                   F expert hidden size  L layers
    V vocabulary      G groups of rows    M rows of some tokens at once
    c the pair (gate, up)                 q query heads that share a key head (H / K)
    J groups of co-activations            b bins of gates
    N positions of a row                  v variants of a model
    r k + 1: the chosen experts, and the runner-up
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from . import config_keys as keys
from .config_keys import number
from .errors import ConfigError, shown

# How weights of experts lie: floats, four bits as a device wants all of a layer, four bits as they are stored.
Form = Literal["bf16", "mxfp4", "blocks"]

SLIDING = "sliding_attention"
FULL = "full_attention"

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # owner/name, of a model or of a dataset


@dataclass(frozen=True)
class Yarn:
    """YaRN's stretching of the rotary frequencies (Peng et al. 2023, arXiv:2309.00071)."""

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = False
    attention_factor: float | None = None

    @property
    def amplitude(self) -> float:
        """What cos and sin are multiplied by."""
        return _amplitude(self.factor) if self.attention_factor is None else self.attention_factor


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
    rope_scaling: Yarn | None
    swiglu_limit: float = 7.0
    swiglu_alpha: float = 1.702  # the slope of the sigmoid, which makes x·σ(1.702x) approximate GELU
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
            found = shown(raw.get("model_type") if isinstance(raw, dict) else raw)
            raise ConfigError(
                f"{where}: model_type is {found}, expected 'gpt_oss': only GPT-OSS checkpoints can be read"
            )
        keys.check(raw, where)
        # Absent, some keys have a value that transformers gives them.
        raw = {"head_dim": 64, "swiglu_limit": cls.swiglu_limit, "swiglu_alpha": cls.swiglu_alpha, **raw}
        experts, alias = keys.EXPERTS
        raw = {experts: raw[alias], **raw} if alias in raw else raw
        for names in (keys.EXPERTS, keys.ACTIVE):
            if names[1] in raw:
                keys.agreed({name: number(raw, name, int, where) for name in names}, where)
        sizes = {field: number(raw, key, int, where) for field, key in keys.SIZES.items()}
        rope_theta, rope_scaling = _rope(raw, where)
        config = cls(
            **sizes,
            layer_types=_layer_types(raw, sizes["num_layers"], where),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            swiglu_limit=number(raw, "swiglu_limit", float, where),
            swiglu_alpha=number(raw, "swiglu_alpha", float, where),
            rms_norm_eps=number(raw, "rms_norm_eps", float, where),
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
        if self.num_parameters() > keys.MOST_PARAMETERS:
            raise ConfigError(f"{where}: its sizes come to {self.num_parameters()} parameters: no model has as many")

    def to_json(self) -> dict[str, Any]:
        """The config in the form that Hugging Face publishes."""
        yarn = self.rope_scaling
        rope: dict[str, Any] = {"rope_type": "default"}
        if yarn is not None:
            rope = {
                **({} if yarn.attention_factor is None else {"attention_factor": yarn.attention_factor}),
                "beta_fast": yarn.beta_fast,
                "beta_slow": yarn.beta_slow,
                "factor": yarn.factor,
                "original_max_position_embeddings": yarn.original_context,
                "rope_type": "yarn",
                "truncate": yarn.truncate,
            }
        return {
            "architectures": ["GptOssForCausalLM"],
            "attention_bias": True,
            "attention_dropout": 0.0,
            "experts_per_token": self.top_k,
            "hidden_act": "silu",
            "initial_context_length": self.max_position if yarn is None else yarn.original_context,
            "initializer_range": 0.02,
            "layer_types": list(self.layer_types),
            "model_type": "gpt_oss",
            "output_router_logits": False,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_scaling": rope,
            "rope_theta": self.rope_theta,
            "router_aux_loss_coef": 0.9,
            # Published configs lack the slope, and clients older than the key would not read another.
            **({} if self.swiglu_alpha == Config.swiglu_alpha else {"swiglu_alpha": self.swiglu_alpha}),
            "swiglu_limit": self.swiglu_limit,
            "tie_word_embeddings": False,
            "use_cache": True,
            **{key: getattr(self, field) for field, key in keys.SIZES.items()},
        }


def _layer_types(raw: Mapping[str, Any], num_layers: int, where: str) -> tuple[str, ...]:
    layer_types = raw.get("layer_types")
    if layer_types is None:  # transformers' own, the published models'
        layer_types = [(SLIDING, FULL)[i % 2] for i in range(num_layers)]
    if not isinstance(layer_types, list):
        raise ConfigError(f"{where}: layer_types is {shown(layer_types)}, expected a list")
    if len(layer_types) != num_layers:
        raise ConfigError(f"{where}: layer_types has {len(layer_types)} entries, expected {num_layers}")
    for kind in layer_types:
        if kind not in (SLIDING, FULL):
            raise ConfigError(f"{where}: layer_types names {shown(kind)}, expected {SLIDING!r} or {FULL!r}")
    return tuple(layer_types)


def _rope(raw: Mapping[str, Any], where: str) -> tuple[float, Yarn | None]:
    """rope_theta and its scaling, by either of the names that transformers gave them; by both, if they agree."""
    found = {name: _rotation(name, raw, where) for name in keys.ROPE if raw.get(name) is not None}
    if not found:
        raise ConfigError(f"{where}: rope_scaling is missing: add it as the original model has it")
    return keys.agreed(found, where)


def _rotation(name: str, raw: Mapping[str, Any], where: str) -> tuple[float, Yarn | None]:
    rope, inside = raw[name], f"{where}: {name}"
    if not isinstance(rope, dict) or not rope:
        raise ConfigError(f"{inside} is {shown(rope)}, expected an object as the original model has it")
    kind = keys.agreed({key: rope[key] for key in ("rope_type", "type") if key in rope} or {"": "default"}, inside)
    if kind not in (*keys.ROPE_KEYS,):
        raise ConfigError(f"{inside}: rope_type is {shown(kind)}, expected 'yarn' or 'default'")
    keys.refuse_unknown(rope, keys.ROPE_KEYS[kind], inside)
    keys.check_only(rope, inside)
    holders = {"rope_theta": raw, f"{name}.rope_theta": rope}
    thetas = {
        key: number(holder, "rope_theta", float, where) for key, holder in holders.items() if "rope_theta" in holder
    }
    theta = keys.agreed(thetas or {"": 150000.0}, where)  # transformers' own, the published models'
    return theta, _yarn(name, raw, where) if kind == "yarn" else None


def _yarn(name: str, raw: Mapping[str, Any], where: str) -> Yarn:
    rope, inside = raw[name], f"{where}: {name}"

    def optional(key: str) -> float | None:
        return None if rope.get(key) is None else number(rope, key, float, inside)

    original, initial = keys.ORIGINAL_CONTEXT
    holders = {f"{name}.{original}": rope, original: raw}
    contexts = {key: number(holder, original, int, where) for key, holder in holders.items() if original in holder}
    contexts = contexts or {"max_position_embeddings": number(raw, "max_position_embeddings", int, where)}
    if initial in raw:
        contexts[initial] = number(raw, initial, int, where)
    factor, attention_factor = number(rope, "factor", float, inside), optional("attention_factor")
    mscale, mscale_all_dim = optional("mscale"), optional("mscale_all_dim")
    if attention_factor is None and mscale and mscale_all_dim:
        attention_factor = _amplitude(factor, mscale) / _amplitude(factor, mscale_all_dim)
    truncate = rope.get("truncate", True)
    if not isinstance(truncate, bool):
        raise ConfigError(f"{inside}: truncate is {shown(truncate)}, expected true or false")
    return Yarn(
        factor=factor,
        original_context=keys.agreed(contexts, where),
        beta_fast=optional("beta_fast") or 32.0,
        beta_slow=optional("beta_slow") or 1.0,
        truncate=truncate,
        attention_factor=attention_factor,
    )


def _amplitude(factor: float, mscale: float = 1.0) -> float:
    """What YaRN's paper suggests that cos and sin are multiplied by."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


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

# Every dimension differs, so that no transpose can hide; D and F are multiples of MXFP4's 32. No number is a default,
# of this program or of transformers, so that none can be left out unseen.
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
    rope_theta=5000.0,
    rope_scaling=Yarn(
        factor=20.0, original_context=900, beta_fast=8.0, beta_slow=2.0, truncate=True, attention_factor=1.25
    ),
    swiglu_limit=0.2,
    swiglu_alpha=1.3,
    rms_norm_eps=2e-3,
    max_position=18000,
)
