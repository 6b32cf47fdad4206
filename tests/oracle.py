"""What transformers computes in float32: the reference of parity tests, run in the test, never stored.

It computes with torch, which the tests need for nothing else. A test that asks for a reference skips where torch is
not installed: it has no CPU build for every Python.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest


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


def load(folder: Path, dtype: str = "float32") -> Any:
    """transformers' own model, with its plain attention and its plain loop over experts."""
    needs_torch()
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    ).eval()


def forward(model: Any, token_ids: Sequence[int]) -> Reference:
    """One row through transformers, each expert's output taken from the inputs that it sees there."""
    torch = needs_torch()
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
        with torch.no_grad():
            result.logits = model(_row(token_ids)).logits[0].float().numpy()
    finally:
        for hook in hooks:
            hook.remove()
    return result


def greedy(model: Any, prompt: Sequence[int], count: int) -> np.ndarray:
    """The `count` likeliest tokens after a prompt, past every stop."""
    torch, ids = needs_torch(), _row(prompt)
    fixed = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        return model.generate(ids, attention_mask=torch.ones_like(ids), **fixed)[0, len(prompt) :].numpy()


def gradients(model: Any, token_ids: Sequence[int]) -> dict[str, np.ndarray]:
    """Of the row's mean loss by every weight, by transformers' names."""
    ids = _row(token_ids)
    model(ids, labels=ids).loss.backward()
    return {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}


def distillation(
    folder: Path,
    kept: Sequence[Sequence[int]],
    rows: Sequence[tuple[np.ndarray, np.ndarray]],
    factors: dict[str, float],
) -> tuple[float, dict[str, np.ndarray]]:
    """Σ w·KL(model ‖ model with the kept experts of each layer alone) over rows of tokens and what each counts, and its
    gradients by every weight, by transformers' names. `factors` multiply the student's parameters of these names'
    ends."""
    torch = needs_torch()
    teacher, student = load(folder), load(folder)
    for name, parameter in student.named_parameters():
        parameter.data *= next((factor for end, factor in factors.items() if name.endswith(end)), 1.0)
    for layer, experts in zip(student.model.layers, kept, strict=True):
        dropped = [expert for expert in range(layer.mlp.router.num_experts) if expert not in experts]
        layer.mlp.router.bias.data[dropped] = -torch.inf
    loss = torch.zeros(())
    for ids, weights in rows:
        with torch.no_grad():
            log_p = teacher(_row(ids)).logits[0, :-1].log_softmax(-1)
        log_q = student(_row(ids)).logits[0, :-1].log_softmax(-1)
        loss = loss + ((log_p.exp() * (log_p - log_q)).sum(-1) * torch.tensor(weights[1:])).sum()
    loss.backward()
    return loss.item(), {name: parameter.grad.numpy() for name, parameter in student.named_parameters()}


def expert_output(module: Any, expert: int, x: Any) -> Any:
    """f_j(x) as section 1 of the published architecture writes it, [T, D]."""
    torch = needs_torch()
    gate_up = x @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert]
    gate = gate_up[:, 0::2].clamp(max=module.limit)
    up = gate_up[:, 1::2].clamp(-module.limit, module.limit)
    return ((up + 1) * gate * torch.sigmoid(module.alpha * gate)) @ module.down_proj[expert] + module.down_proj_bias[
        expert
    ]


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference over the largest magnitude."""
    return float(np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max())


def needs_torch() -> Any:
    """The package; the test skips where it is not installed."""
    return pytest.importorskip("torch", reason="the reference needs torch, which is not installed for this Python")


def _row(token_ids: Sequence[int]) -> Any:
    return needs_torch().tensor(np.asarray(token_ids)[None]).long()
