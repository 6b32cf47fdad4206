"""The forms in which tools write GPT-OSS, and the tensors of the published form that they hold.

Read is what transformers reads, each tensor by its published name: floats of other sizes, names with one `model.`
more or less, experts in MXFP4 here and as floats there, one tensor for both embeddings. What stands there in
another form is named: transformers would leave random weights in its place.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gptoss_jax.config import Config
from gptoss_jax.errors import CheckpointError
from gptoss_jax.files.paths import AnyPath

from .mapping import Named, all_tensors
from .shards import Stored

FLOATS = ("BF16", "F16", "F32")
PARTS = ("blocks", "scales")
PREFIX = "model."
EMBEDDING, UNEMBEDDING = "model.embed_tokens.weight", "lm_head.weight"
COMPARED_ROWS = 4096
OTHER_MODEL = "config.json and weights are of different models"
UNQUANTISED = "take the model from before it was quantised"

# What stands in the place of published tensors, by what only this form's names have, and what to do about it.
FOREIGN = {
    r"lora_|modules_to_save": ("weights of an adapter", "merge it into its base model first"),
    r"\.(absmax|quant_map|quant_state|SCB)\b": ("weights quantised by bitsandbytes", UNQUANTISED),
    r"\.(qweight|qzeros|g_idx)$": ("weights quantised by GPTQ or AWQ", UNQUANTISED),
    r"(weight|proj)_(packed|shape|scale|scale_2|zero_point)$|\.(input|output)_scale$": (
        "weights quantised in another form than the published MXFP4",
        UNQUANTISED,
    ),
    r"experts\.(gate|up|down)_proj\.(weight|scales|biases)$": (
        "weights in the form of MLX",
        "take the model that they were converted from",
    ),
    r"experts\.\d+\.|_projs\.\d+|experts\.w\d+": (
        "experts under names of their own, which transformers does not read either",
        "stack them as gate_up_proj and down_proj, as transformers' save_pretrained does",
    ),
    r"^block\.\d+\.": (
        "weights of OpenAI's reference program, as in a hub repository's folder original",
        "take the files beside that folder",
    ),
    r"^blk\.\d+\.": ("tensors named as in GGUF", "take the model that they were converted from"),
    r"^(_orig_mod|module|base_model|_fsdp_wrapped_module)\.": (
        "names with the prefix of a wrapper",
        "save the model that is wrapped",
    ),
}


def as_published(
    found: Mapping[str, Stored], config: Config, config_json: Mapping[str, Any], folder: AnyPath
) -> dict[str, Stored]:
    """The tensors by their published names; CheckpointError where one is missing, is there twice, or is none of this
    model."""
    named = all_tensors(config)
    tensors = _renamed(found, named)
    _tie(tensors, config_json.get("tie_word_embeddings") is True, folder)
    known: set[str] = set()
    for entry in named:
        known.update(_checked(entry, tensors, config, folder))
    if unknown := sorted(tensors.keys() - known):
        what = _foreign(unknown[0]) or OTHER_MODEL
        raise CheckpointError(f"{tensors[unknown[0]].file}: {unknown[0]} is no tensor of this GPT-OSS model: {what}")
    return tensors


def _renamed(found: Mapping[str, Stored], named: Sequence[Named]) -> dict[str, Stored]:
    """The same under published names, where these differ by one `model.` before them; unknown names stay."""
    published = {entry.name for entry in named}
    published |= {f"{entry.name}_{part}" for entry in named if entry.tensor.mxfp4 for part in PARTS}
    stored_as: dict[str, str] = {}
    for name, stored in found.items():
        # In the order in which transformers tries them.
        tried = (name.removeprefix(PREFIX), name, PREFIX + name)
        known = next((other for other in tried if other in published), name)
        if known in stored_as:
            both = f"{name} and {stored_as[known]}"
            raise CheckpointError(f"{stored.file.parent}: holds {both}, which are names of one tensor: remove one")
        stored_as[known] = name
    return {known: replace(found[name], name=known) for known, name in stored_as.items()}


def _tie(tensors: dict[str, Stored], tied: bool, folder: AnyPath) -> None:
    """Where config.json ties the embeddings, the one that is there stands for both."""
    embedding, unembedding = tensors.get(EMBEDDING), tensors.get(UNEMBEDDING)
    if not tied:
        return
    if embedding is None and unembedding is not None:
        tensors[EMBEDDING] = replace(unembedding, name=EMBEDDING)
    elif unembedding is None and embedding is not None:
        tensors[UNEMBEDDING] = replace(embedding, name=UNEMBEDDING)
    elif embedding and unembedding and not _same(embedding, unembedding):
        raise CheckpointError(
            f"{folder}: config.json ties {UNEMBEDDING} to {EMBEDDING}, and they differ: transformers takes both as "
            f"they are, vLLM {EMBEDDING} for both: set tie_word_embeddings to false, or remove {UNEMBEDDING}"
        )


def _same(one: Stored, other: Stored) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    pieces = ((at, min(COMPARED_ROWS, one.shape[0] - at)) for at in range(0, one.shape[0], COMPARED_ROWS))
    return all(np.array_equal(one.read(*piece), other.read(*piece)) for piece in pieces)


def _checked(entry: Named, tensors: Mapping[str, Stored], config: Config, folder: AnyPath) -> list[str]:
    """The names under which a tensor is there: its own, or those of its blocks and scales; CheckpointError."""
    name, tensor, _ = entry
    parts = [f"{name}_{part}" for part in PARTS] if tensor.mxfp4 else []
    as_parts = [part for part in parts if part in tensors]
    if as_parts and name in tensors:
        raise CheckpointError(
            f"{folder}: holds {name} and {as_parts[0]}: transformers takes the first, servers that go by "
            "quantization_config the second: remove the one that is not meant"
        )
    if not as_parts:
        _check(name, tensors, FLOATS, tensor.hf_shape(config), folder)
        return [name]
    blocks = tensor.blocks_shape(config)
    for part, shape in zip(parts, (blocks, blocks[:-1]), strict=True):
        _check(part, tensors, ("U8",), shape, folder)
    return parts


def _check(
    name: str, tensors: Mapping[str, Stored], dtypes: Sequence[str], shape: tuple[int, ...], folder: AnyPath
) -> None:
    found = tensors.get(name)
    if found is None:
        raise _missing(name, tensors, folder)
    if found.dtype in dtypes and found.shape == shape:
        return
    what = OTHER_MODEL
    if found.shape == shape:
        what = f"only {', '.join(FLOATS)} and the published MXFP4 are read: {UNQUANTISED}"
    raise CheckpointError(
        f"{found.file}: {name} is {found.dtype} {list(found.shape)}, expected {dtypes[0]} {list(shape)}: {what}"
    )


def _missing(name: str, tensors: Mapping[str, Stored], folder: AnyPath) -> CheckpointError:
    """The error for a tensor that is not there: it says what is, in its place."""
    foreign = ((other, _foreign(other)) for other in sorted(tensors))
    if stands := next((f"{other} is there: {what}" for other, what in foreign if what), None):
        return CheckpointError(f"{folder}: {name} is missing, and {stands}")
    if name == UNEMBEDDING:
        mend = "set tie_word_embeddings to true in config.json if the model uses its embedding for both"
    else:
        mend = f"take all files of the checkpoint; if these are all, {OTHER_MODEL}"
    return CheckpointError(f"{folder}: {name} is missing: {mend}")


def _foreign(name: str) -> str | None:
    """What the name of a tensor that is none of the published ones says of its form, and what to do about it."""
    return next((f"{what}: {mend}" for pattern, (what, mend) in FOREIGN.items() if re.search(pattern, name)), None)
