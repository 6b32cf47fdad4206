"""Every key of config.json is understood as transformers does, changes no number, or is refused by name."""

import json
import warnings
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig, GptOssConfig

from convert.folder import pruned_config
from gptoss_jax import config_keys
from gptoss_jax.config import FULL, GPT_OSS_20B, GPT_OSS_120B, SLIDING, TINY, Config
from gptoss_jax.errors import ConfigError
from gptoss_jax.files.paths import read_json
from gptoss_jax.network.rope import frequencies

YARN = TINY.to_json()["rope_scaling"]
ROPE_KEYS = set().union(*config_keys.ROPE_KEYS.values())


def read(**changes: Any) -> Config:
    """The config of TINY's JSON with other keys; ... removes one."""
    raw = TINY.to_json() | changes
    return Config.from_json({key: value for key, value in raw.items() if value is not ...})


def test_no_number_of_the_tested_configuration_is_a_default() -> None:
    """Where a value is left out on its way to the network, some test sees it: nothing puts the same in its place."""
    theirs = GptOssConfig()
    for field in fields(Config):
        value = getattr(TINY, field.name)
        assert field.default in (MISSING, None) or value != field.default, field.name
        key = config_keys.SIZES.get(field.name, field.name)
        if key not in ("rope_theta", "rope_scaling"):
            default = getattr(theirs, key, None)
            assert value != (tuple(default[: TINY.num_layers]) if key == "layer_types" else default), key
    assert TINY.rope_scaling
    defaults = theirs.rope_parameters
    assert TINY.rope_theta != defaults["rope_theta"]
    for field in fields(TINY.rope_scaling):
        key = {"original_context": "original_max_position_embeddings"}.get(field.name, field.name)
        value = getattr(TINY.rope_scaling, field.name)
        assert value != defaults.get(key) and (field.default is MISSING or value != field.default), key
    assert TINY.rope_scaling.original_context != TINY.max_position


def test_all_that_transformers_reads_is_known() -> None:
    """A release that reads another key makes this fail."""
    theirs = {field.name for field in fields(GptOssConfig)} | GptOssConfig.attribute_map.keys()
    theirs |= GenerationConfig._get_default_generation_params().keys()
    assert {key for key in theirs if not key.endswith("_token_id")} <= config_keys.KNOWN


@pytest.mark.parametrize("preset", [GPT_OSS_20B, GPT_OSS_120B, TINY], ids=["20b", "120b", "tiny"])
def test_what_transformers_writes_is_read(preset: Config, tmp_path: Path) -> None:
    """Its own release of today keeps keys that it does not know, and writes many more."""
    GptOssConfig(**preset.to_json()).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert "rope_parameters" in raw and "rope_scaling" not in raw
    assert Config.from_json(raw) == preset
    assert Config.from_json(json.loads(GptOssConfig(**preset.to_json()).to_json_string(use_diff=False))) == preset


def test_published_configs_are_read() -> None:
    for preset in (GPT_OSS_20B, GPT_OSS_120B):
        assert Config.from_json(preset.to_json()) == preset
        defaults = {"head_dim", "layer_types", "swiglu_limit", "rope_theta", "experts_per_token"}
        assert Config.from_json({k: v for k, v in preset.to_json().items() if k not in defaults}) == preset


def test_a_config_is_written_as_the_published_one(shared: Path) -> None:
    """No key is new, and the other clients find what they know."""
    published = read_json(shared / "data/gptoss20b" / "config.json")
    written = GPT_OSS_20B.to_json()
    assert {key: published[key] for key in written} == written
    notes = {"eos_token_id", "pad_token_id", "quantization_config", "transformers_version"}
    assert published.keys() - written.keys() == notes


@pytest.mark.parametrize("keys", [(*config_keys.EXPERTS, *config_keys.ACTIVE), ("num_experts", "num_experts_per_tok")])
def test_prune_changes_every_number_of_experts_and_nothing_else(keys: tuple[str, ...]) -> None:
    numbers = {"num_local_experts": 7, "num_experts": 7, "num_experts_per_tok": 3, "experts_per_token": 3}
    rest = {k: v for k, v in TINY.to_json().items() if k not in numbers}
    pruned = pruned_config({k: numbers[k] for k in keys} | rest, 2, quantize=False)
    assert pruned == dict.fromkeys(keys, 2) | rest
    assert list(pruned) == [*keys, *rest]
    assert Config.from_json(pruned) == replace(TINY, num_experts=2, top_k=2)
    assert pruned_config(numbers, 5, quantize=False)["experts_per_token"] == 3


# Numbers that no model has, and values of other types: what stands there, and what the line says.
NUMBERS = [
    ("num_local_experts", 10**18, "65536"),
    ("num_hidden_layers", 10**18, "4096"),
    ("hidden_size", 10**400, "16777216"),
    ("vocab_size", 1 << 25, "16777216"),
    ("intermediate_size", 96.0, "whole"),
    ("num_attention_heads", True, "whole"),
    ("num_key_value_heads", None, "whole"),
    ("head_dim", None, "whole"),
    ("sliding_window", None, "whole"),
    ("sliding_window", "9", "whole"),
    ("rope_theta", 1, "above 1"),
    ("rope_theta", 0.5, "above 1"),
    ("rope_theta", -5000.0, "above 1"),
    ("rope_theta", 10**400, "above 1"),
    ("rope_theta", 1e13, "above 1"),
    ("rms_norm_eps", 1e-300, "1e-12"),
    ("rms_norm_eps", float("nan"), "NaN"),
    ("swiglu_limit", float("inf"), "infinity"),
    ("swiglu_limit", {"__float__": "Infinity"}, "1e+12"),
    ("swiglu_alpha", -1.702, "1e-12"),
    ("attention_dropout", float("nan"), "NaN"),
    ("id2label", {"0": [float("-inf")]}, "infinity"),
]


@pytest.mark.parametrize(("key", "value", "says"), NUMBERS)
def test_numbers_that_no_model_has(key: str, value: Any, says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read(**{key: value})
    assert key in str(raised.value) and says in str(raised.value)
    assert len(str(raised.value)) < 200


def test_sizes_that_together_no_model_has() -> None:
    with pytest.raises(ConfigError, match="422215448265992 parameters: no model has as many"):
        read(hidden_size=1 << 20, intermediate_size=1 << 20, num_local_experts=1 << 5, num_hidden_layers=4)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 40) | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted(ROPE_KEYS)), inner, max_size=4),
    max_leaves=6,
) | st.sampled_from([10**400, 1 << 63, 1.0, 1 + 1e-15, 1e-12, 1e12, 1e308, 5e-324, SLIDING, FULL, "yarn", "default"])
ANY_KEY = st.sampled_from(
    sorted({*config_keys.KNOWN, *ROPE_KEYS, "eos_token_id", "_name_or_path", "unknown", "\x1b[2J"})
)


@given(
    st.dictionaries(ANY_KEY, VALUES, max_size=3),
    st.dictionaries(st.sampled_from(sorted(ROPE_KEYS)), VALUES, max_size=3),
)
def test_any_json_value_at_any_key(changes: dict[str, Any], rope: dict[str, Any]) -> None:
    raw = TINY.to_json() | {"rope_scaling": YARN | rope} | changes
    try:
        config = Config.from_json(json.loads(json.dumps(raw)))
    except ConfigError as error:
        assert str(error).isprintable() and len(str(error)) < 500
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isfinite(frequencies(config)).all()
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config
