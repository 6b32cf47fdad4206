"""What transformers computes in float32: the reference of parity tests, run in the test, never stored."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM


@dataclass
class Reference:
    """One row's results; lists are by layer."""

    logits: np.ndarray
    hidden: list[np.ndarray]
    router_logits: list[np.ndarray]
    experts: list[np.ndarray]
    gates: list[np.ndarray]
    norms: list[np.ndarray]
    peaks: list[np.ndarray]


def load(folder: Path, dtype: Any = torch.float32) -> Any:
    """transformers' own model, with its plain attention and its plain loop over experts."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    ).eval()


@torch.no_grad()
def forward(model: Any, token_ids: Sequence[int]) -> Reference:
    """One row through transformers, each expert's output taken from the inputs that it sees there."""
    result = Reference(np.empty(0), [], [], [], [], [], [])

    def after_router(_: Any, __: Any, output: Any) -> None:
        logits, gates, experts = output
        result.router_logits.append(logits.float().numpy())
        result.gates.append(gates.float().numpy())
        result.experts.append(experts.numpy())

    def after_experts(module: Any, args: Any, output: Any) -> None:
        x, chosen = args[0], args[1]
        pairs = torch.stack([expert_output(module, int(e), x) for e in range(module.num_experts)], 1)
        out = torch.take_along_dim(pairs, chosen[:, :, None], 1).float()
        result.norms.append(out.norm(dim=-1).numpy())
        result.peaks.append(out.abs().amax(-1).numpy())

    def after_layer(_: Any, __: Any, output: Any) -> None:
        result.hidden.append((output[0] if isinstance(output, tuple) else output)[0].float().numpy())

    hooks = []
    for layer in model.model.layers:
        hooks.append(layer.mlp.router.register_forward_hook(after_router))
        hooks.append(layer.mlp.experts.register_forward_hook(after_experts))
        hooks.append(layer.register_forward_hook(after_layer))
    try:
        result.logits = model(torch.tensor(np.asarray(token_ids)[None]).long()).logits[0].float().numpy()
    finally:
        for hook in hooks:
            hook.remove()
    return result


def expert_output(module: Any, expert: int, x: torch.Tensor) -> torch.Tensor:
    """f_j(x) as section 1 of the published architecture writes it, [T, D]."""
    gate_up = x @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert]
    gate = gate_up[:, 0::2].clamp(max=module.limit)
    up = gate_up[:, 1::2].clamp(-module.limit, module.limit)
    return ((up + 1) * gate * torch.sigmoid(1.702 * gate)) @ module.down_proj[expert] + module.down_proj_bias[expert]


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference over the largest magnitude."""
    return float(np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max())
