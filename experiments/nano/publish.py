"""A trained model as a checkpoint in Hugging Face form, BF16 and then MXFP4."""

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
from flax import nnx

from convert.folder import write_config
from convert.mapping import Named, all_tensors
from convert.shards import Planned, write_shards
from gptoss_jax.devices import mesh as sharding
from gptoss_jax.network.model import GptOss

MAX_SHARD = 1 << 30


def write_bf16(folder: Path, model: GptOss, tokenizer: Path) -> None:
    """The weights in BF16, config.json, and the files of the tokenizer's folder."""
    config = model.config
    arrays = {path: np.asarray(x) for path, x in sharding.by_path(nnx.state(model)).items()}

    def values(entry: Named) -> Iterator[np.ndarray]:
        _, tensor, layer = entry
        array = arrays[tensor.path] if layer is None else arrays[f"layers/{tensor.path}"][layer]
        yield np.ascontiguousarray(tensor.to_hf(array, config)).astype(ml_dtypes.bfloat16)

    planned = [[Planned(e.name, "BF16", e.tensor.hf_shape(config), partial(values, e))] for e in all_tensors(config)]
    write_shards(folder, planned, MAX_SHARD)
    write_config(folder, config.to_json())
    for file in tokenizer.iterdir():
        shutil.copy(file, folder / file.name)
