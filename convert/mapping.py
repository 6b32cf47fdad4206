"""The one table of names: tensors of a Hugging Face checkpoint ↔ parameters of `gptoss_jax.network.model`.

Each row gives both names and one pattern of axes per side (letters: see `gptoss_jax.config`;
`c` is the pair gate, up, whose rows alternate in checkpoints). Reading rearranges `hf` into
`model`, writing does the reverse, and both expected shapes follow from the patterns.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from einops import rearrange

from gptoss_jax.config import Config
from gptoss_jax.kernels.mxfp4 import BLOCK as MXFP4_BLOCK


@dataclass(frozen=True)
class Tensor:
    """One row of the table."""

    hf_name: str
    path: str
    """Attributes of the module, joined by '/'."""
    hf: str
    model: str
    mxfp4: str | None = None
    """Axes of the MXFP4 form, whose last is cut into blocks; None for what is never quantised."""
    per_expert: bool = False
    """Whether the first axis counts experts: what pruning slices."""

    def hf_shape(self, config: Config) -> tuple[int, ...]:
        """Shape of the BF16 form in a checkpoint."""
        return _shape(self.hf, config)

    def blocks_shape(self, config: Config) -> tuple[int, ...]:
        """Shape of `_blocks` in a checkpoint; `_scales` has it without the last axis."""
        assert self.mxfp4 is not None
        *rest, inner = _shape(self.mxfp4, config)
        return (*rest, inner // MXFP4_BLOCK, MXFP4_BLOCK // 2)

    def model_shape(self, config: Config) -> tuple[int, ...]:
        """Shape of the parameter."""
        return _shape(self.model, config)

    def to_model(self, array: np.ndarray, config: Config) -> np.ndarray:
        """Rearrange the BF16 form into the parameter; a run of rows or columns is enough, here and below."""
        return _rearranged(array, self.hf, self.model, config)

    def to_hf(self, array: np.ndarray, config: Config) -> np.ndarray:
        """Rearrange the parameter into the BF16 form."""
        return _rearranged(array, self.model, self.hf, config)

    def mxfp4_to_model(self, array: np.ndarray, config: Config) -> np.ndarray:
        """Rearrange values, codes or scales of the MXFP4 form into the parameter."""
        assert self.mxfp4 is not None
        return _rearranged(array, self.mxfp4, self.model, config)

    def model_to_mxfp4(self, array: np.ndarray, config: Config) -> np.ndarray:
        """Do the reverse of `mxfp4_to_model`."""
        assert self.mxfp4 is not None
        return _rearranged(array, self.model, self.mxfp4, config)

    def mxfp4_to_hf(self, array: np.ndarray, config: Config) -> np.ndarray:
        """Rearrange values of the MXFP4 form into the BF16 form."""
        assert self.mxfp4 is not None
        return _rearranged(array, self.mxfp4, self.hf, config)

    def hf_to_mxfp4(self, array: np.ndarray, config: Config) -> np.ndarray:
        """Do the reverse of `mxfp4_to_hf`."""
        assert self.mxfp4 is not None
        return _rearranged(array, self.hf, self.mxfp4, config)


LAYER = (
    Tensor("input_layernorm.weight", "attention_norm/scale", "D", "D"),
    Tensor("self_attn.q_proj.weight", "attention/q_kernel", "(H h) D", "H h D"),
    Tensor("self_attn.q_proj.bias", "attention/q_bias", "(H h)", "H h"),
    Tensor("self_attn.k_proj.weight", "attention/k_kernel", "(K h) D", "K h D"),
    Tensor("self_attn.k_proj.bias", "attention/k_bias", "(K h)", "K h"),
    Tensor("self_attn.v_proj.weight", "attention/v_kernel", "(K h) D", "K h D"),
    Tensor("self_attn.v_proj.bias", "attention/v_bias", "(K h)", "K h"),
    Tensor("self_attn.o_proj.weight", "attention/o_kernel", "D (H h)", "D H h"),
    Tensor("self_attn.o_proj.bias", "attention/o_bias", "D", "D"),
    Tensor("self_attn.sinks", "attention/sinks", "H", "H"),
    Tensor("post_attention_layernorm.weight", "moe_norm/scale", "D", "D"),
    Tensor("mlp.router.weight", "moe/router/kernel", "E D", "E D", per_expert=True),
    Tensor("mlp.router.bias", "moe/router/bias", "E", "E", per_expert=True),
    Tensor(
        "mlp.experts.gate_up_proj",
        "moe/experts/gate_up_kernel",
        "E D (F c)",
        "E c F D",
        mxfp4="E (F c) D",
        per_expert=True,
    ),
    Tensor("mlp.experts.gate_up_proj_bias", "moe/experts/gate_up_bias", "E (F c)", "E c F", per_expert=True),
    Tensor(
        "mlp.experts.down_proj",
        "moe/experts/down_kernel",
        "E F D",
        "E D F",
        mxfp4="E D F",
        per_expert=True,
    ),
    Tensor("mlp.experts.down_proj_bias", "moe/experts/down_bias", "E D", "E D", per_expert=True),
)

OUTER = (
    Tensor("model.embed_tokens.weight", "embedding", "V D", "V D"),
    Tensor("model.norm.weight", "final_norm/scale", "D", "D"),
    Tensor("lm_head.weight", "unembedding", "V D", "V D"),
)


def layer_name(index: int, tensor: Tensor) -> str:
    """Full name of a layer's tensor in a checkpoint."""
    return f"model.layers.{index}.{tensor.hf_name}"


class Named(NamedTuple):
    """A tensor of a checkpoint: its full name, its row of the table, its layer (None outside layers)."""

    name: str
    tensor: Tensor
    layer: int | None


def all_tensors(config: Config) -> list[Named]:
    """Every tensor of a checkpoint, in the order in which we write them."""
    embedding, *head = (Named(t.hf_name, t, None) for t in OUTER)
    layers = [Named(layer_name(i, t), t, i) for i in range(config.num_layers) for t in LAYER]
    return [embedding, *layers, *head]


def _axes(pattern: str) -> list[list[str]]:
    return [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\S+", pattern)]


def _shape(pattern: str, config: Config) -> tuple[int, ...]:
    dims = config.dims()
    return tuple(int(np.prod([dims[axis] for axis in group])) for group in _axes(pattern))


def _rearranged(array: np.ndarray, before: str, after: str, config: Config) -> np.ndarray:
    # Of axes that are joined, all sizes but the first are told; the first may be that of a part.
    dims = config.dims()
    return rearrange(array, f"{before} -> {after}", **{a: dims[a] for group in _axes(before) for a in group[1:]})
