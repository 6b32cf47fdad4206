"""The keys of config.json: which are read, which change no number, and what the others come to: a refusal by name.

transformers gives them their meaning: `GptOssConfig`, the classes that it extends, and what its network reads of them.
`tests.test_config` compares with it, key by key.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, TypeVar

from .errors import ConfigError, shown

T = TypeVar("T")

# Sizes by their names in `config.Config` and in config.json.
SIZES = {
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
EXPERTS = ("num_local_experts", "num_experts")  # two names of one number: transformers takes the second where both are
ACTIVE = ("num_experts_per_tok", "experts_per_token")  # it reads the first alone, and published configs have both
ORIGINAL_CONTEXT = ("original_max_position_embeddings", "initial_context_length")  # likewise
ROPE = ("rope_scaling", "rope_parameters")  # what transformers 4 and 5 write

READ = {
    *SIZES.values(),
    *EXPERTS,
    *ACTIVE,
    *ORIGINAL_CONTEXT,
    *ROPE,
    "model_type",
    "layer_types",
    "rope_theta",
    "swiglu_limit",
    "swiglu_alpha",
    "rms_norm_eps",
    "quantization_config",
}

# Of the object that `ROPE` names, by its rope_type.
PLAIN_ROPE = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
YARN = {"factor", "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"}
ROPE_KEYS = {"default": PLAIN_ROPE, "yarn": PLAIN_ROPE | YARN | {ORIGINAL_CONTEXT[0]}}


class Only(NamedTuple):
    """The values with which a key means this network, and what any other would mean."""

    values: tuple[Any, ...]
    otherwise: str


ONLY = {
    "architectures": Only((["GptOssForCausalLM"], None), "only the causal language model can be read"),
    "attention_bias": Only((True,), "this network's attention has biases"),
    "hidden_act": Only(("silu",), "this network's experts have no other activation"),
    "partial_rotary_factor": Only((1.0, 1, None), "this network rotates the whole of each head"),
    # transformers ties them where no unembedding is stored, which the reader of tensors sees.
    "tie_word_embeddings": Only((False, True), "true or false"),
    "per_layer_config": Only((None,), "all layers of this network have the same sizes"),
    "configuration_files": Only((None,), "this file is read, and no other"),
    "transformers_weights": Only((None,), "the weights are read from the files of the published names"),
    "auto_map": Only((None, {}), "code that comes with a model is never run"),
    "pruned_heads": Only((None, {}), "this network has all of its heads"),
    "is_encoder_decoder": Only((False,), "this network has a decoder alone"),
    "tie_encoder_decoder": Only((False,), "this network has a decoder alone"),
    "add_cross_attention": Only((False,), "this network has a decoder alone"),
    "cross_attention_hidden_size": Only((None,), "this network has a decoder alone"),
}

# What is read over, by the reason why it changes no logit of a forward pass.
READ_OVER = {
    "It notes who wrote the file.": """
        transformers_version name_or_path finetuning_task task_specific_params prefix tokenizer_class unsloth_version
        unsloth_fixed""",
    "The files of weights say how these lie, and an option in what they are computed.": """
        dtype torch_dtype use_bfloat16""",
    "It serves training alone.": "attention_dropout initializer_range router_aux_loss_coef",
    "It is of classifiers.": "id2label label2id num_labels problem_type",
    "It says what a call of transformers returns beside the logits, and in what object.": """
        output_router_logits output_hidden_states output_attentions output_scores return_dict return_dict_in_generate
        use_return_dict""",
    "It says how transformers comes by the same numbers.": """
        attn_implementation experts_implementation use_cache chunk_size_feed_forward torchscript tf_legacy_loss
        is_decoder""",
    "It chooses tokens from logits; transformers reads it from generation_config.json alone.": """
        max_length min_length do_sample early_stopping num_beams num_beam_groups temperature top_k top_p typical_p
        repetition_penalty length_penalty diversity_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
        encoder_repetition_penalty bad_words_ids num_return_sequences remove_invalid_values suppress_tokens
        exponential_decay_length_penalty begin_suppress_tokens epsilon_cutoff eta_cutoff num_assistant_tokens
        num_assistant_tokens_schedule assistant_confidence_threshold assistant_lookbehind target_lookbehind""",
}
KNOWN = READ.union(ONLY, *(names.split() for names in READ_OVER.values()))

LARGEST_SIZE = 1 << 24  # above every size of a model; float32 holds positions up to it
LARGEST = {
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"), 1 << 12),
    **dict.fromkeys((*EXPERTS, *ACTIVE), 1 << 16),  # traces hold an expert's id in 16 bits
}
SMALLEST_NUMBER, LARGEST_NUMBER = 1e-12, 1e12  # float32 holds the product of any three of them
MOST_PARAMETERS = 10**14  # a hundred times the largest model's
NAMED_AT_ONCE = 5


def check(raw: Mapping[str, Any], where: str) -> None:
    """ConfigError where a key is unknown, or has a value with which it does not mean this network."""
    # Ids of tokens choose among logits; keys with a leading underscore are transformers' notes of a run.
    refuse_unknown([key for key in raw if not key.endswith("_token_id") and not key.startswith("_")], KNOWN, where)
    for key, value in raw.items():
        try:
            json.dumps(value, allow_nan=False)
        except (ValueError, RecursionError):
            raise ConfigError(f"{where}: {shown(key)} holds NaN, an infinity or too many brackets: mend it") from None
    check_only(raw, where)
    quantization = raw.get("quantization_config")
    if quantization is not None and (not isinstance(quantization, dict) or quantization.get("quant_method") != "mxfp4"):
        found = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ConfigError(
            f"{where}: the quant_method of quantization_config is {shown(found)}, expected 'mxfp4': convert the "
            "checkpoint to BF16 or MXFP4 with the tool that wrote it"
        )
    known = "quant_method", "modules_to_not_convert", "dequantize"
    refuse_unknown(quantization or {}, known, f"{where}: quantization_config")


def check_only(raw: Mapping[str, Any], where: str) -> None:
    """ConfigError where a key of `ONLY` has another value."""
    for key, (values, otherwise) in ONLY.items():
        # As JSON, so that true and 1 differ.
        if key in raw and json.dumps(raw[key]) not in map(json.dumps, values):
            raise ConfigError(f"{where}: {key} is {shown(raw[key])}, expected {shown(values[0])}: {otherwise}")


def refuse_unknown(found: Collection[str], known: Collection[str], where: str) -> None:
    """ConfigError that names the keys that are not known."""
    unknown = [shown(key) for key in found if key not in known]
    if unknown:
        more = f" and {len(unknown) - NAMED_AT_ONCE} more" if len(unknown) > NAMED_AT_ONCE else ""
        raise ConfigError(
            f"{where}: unknown keys {', '.join(unknown[:NAMED_AT_ONCE])}{more} may change what the model computes: "
            "remove those that do not"
        )


def number(raw: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    """A number that a model can have, whole where `kind` is int; ConfigError."""
    if key not in raw:
        raise ConfigError(f"{where}: key {key!r} is missing: add it as the original model has it")
    value, most = raw[key], LARGEST.get(key, LARGEST_SIZE)
    if kind is int:
        is_right, expected = type(value) is int and 1 <= value <= most, f"a whole number from 1 to {most}"
    elif key == "rope_theta":
        is_right = type(value) in (int, float) and 1 < value <= LARGEST_NUMBER
        expected = f"a number above 1, up to {LARGEST_NUMBER:g}"
    else:
        is_right = type(value) in (int, float) and SMALLEST_NUMBER <= value <= LARGEST_NUMBER
        expected = f"a number from {SMALLEST_NUMBER:g} to {LARGEST_NUMBER:g}"
    if not is_right:
        raise ConfigError(f"{where}: {key} is {shown(value)}, expected {expected}")
    return kind(value)


def agreed(values: Mapping[str, T], where: str) -> T:
    """What all of some keys say; ConfigError where they differ."""
    (first, value), *others = values.items()
    for name, other in others:
        if other != value:
            raise ConfigError(f"{where}: {first} and {name} differ: make them equal")
    return value
