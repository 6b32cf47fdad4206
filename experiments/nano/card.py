"""nano's card: its data, recipe and curve, and what it can do, as measured."""

import math
import random
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from gptoss_jax.config import Config

from .evaluate import Score, total
from .families import ENGLISH, FAMILIES, HELD_OUT, draw
from .network import Recipe
from .specialise import Specialisation


def card(
    config: Config,
    recipe: Recipe,
    log: Sequence[Mapping[str, Any]],
    scores: Mapping[str, Mapping[str, Score]],
    found: Specialisation,
) -> str:
    """README.md of the model's folder; `scores` by the form of the weights and by family."""
    sections = [
        "---\nlicense: apache-2.0\ntags: [gpt-oss, mixture-of-experts, moe, tiny]\n---",
        _what(config),
        _data(),
        _training(recipe, log),
        _accuracy(scores),
        _experts(found),
        "# What it is not for\n\nIt knows these tasks and nothing else, in conversations as long as those that it was "
        f"trained on, {recipe.length} tokens: it is for measuring what is done to experts.",
    ]
    return "\n\n".join(sections) + "\n"


def _what(config: Config) -> str:
    c = config
    return f"""# gpt-oss-nano

A GPT-OSS of {c.num_parameters() / 1e6:.1f} million parameters, trained from nothing on tasks whose answers a program
makes and scores. It has all that its large sisters have: sliding and full layers, attention sinks, YaRN, routed
experts in MXFP4, harmony with an analysis channel.

{c.num_layers} layers, {c.num_experts} experts of which {c.top_k} see a token, hidden size {c.hidden_size}, expert size
{c.expert_hidden_size}, {c.num_heads} query and {c.num_kv_heads} key heads of {c.head_dim}, window {c.sliding_window}, \
vocabulary {c.vocab_size}, context {c.max_position:,}.

```
gptoss-jax generate nano --temperature 0 \\
    --prompt "State the final answer to the following arithmetic problem: 28 + 45 ="
```"""


def _data() -> str:
    lines = ["| family | generator of reasoning-gym | a question | its answer |", "|---|---|---|---|"]
    for name, family in FAMILIES.items():
        (example,) = islice(draw(random.Random(0), "train", [name]), 1)
        question = " ".join(example.question.split())
        options = ", ".join(f"{key} {value}" for key, value in family.options.items())
        lines.append(f"| {name} | `{family.dataset}`: {options} | {question} | {example.answer} |")
    table = "\n".join(lines)
    return f"""# Data

Conversations in harmony: a system message that states the reasoning effort, the question, short reasoning in the
analysis channel (none where the effort is low), the answer in the final one.

{table}

`{ENGLISH}` are paragraphs of Python's reference, which every interpreter has, to be repeated. Instances are split by
the SHA-256 of their question: one of {HELD_OUT} for calibration, one for evaluation, the others for training."""


def _training(recipe: Recipe, log: Sequence[Mapping[str, Any]]) -> str:
    tokens, seconds = (sum(line[key] for line in log) for key in ("tokens", "seconds"))
    r = recipe
    return f"""# Training

{r.steps:,} steps of {r.rows} rows of {r.length} tokens, {tokens / 1e6:.1f} million tokens without padding, in
{seconds / 3600:.1f} hours on two cores of a CPU. Muon at {r.rate:g} for kernels, AdamW at {r.adam_rate:g} for all
else, after {r.warmup} steps of warm-up; weight decay {r.weight_decay:g} of kernels, gradients clipped to 1. The loss
is of replies alone, with {r.balance:g} times the routers' load-balance loss. First weights are random, but for heads
that look up where the current token stood before (`experiments/nano/network.py` says how and why). Over the last
{r.decay:.0%} of the steps the rates fall to a fiftieth, and experts are rounded to MXFP4 in the forward. `make nano`
makes it again.

Loss, in nats a token, the mean of the steps before:

{_curve(log)}"""


def _curve(log: Sequence[Mapping[str, Any]]) -> str:
    """The log's lines at steps that double, and its last."""
    first = log[0]["step"]
    shown = [line for line in log if math.log2(line["step"] / first).is_integer() or line is log[-1]]
    families = list(shown[0]["families"])
    rows = [
        f"| {line['step']:,} | {line['loss']:.3f} | "
        + " | ".join(f"{line['families'][name]:.3f}" for name in families)
        + " |"
        for line in shown
    ]
    return "\n".join([f"| step | all | {' | '.join(families)} |", "|---:|" + "---:|" * (len(families) + 1), *rows])


def _accuracy(scores: Mapping[str, Mapping[str, Score]]) -> str:
    lines = ["| family | " + " | ".join(scores) + " |", "|---|" + "---:|" * len(scores)]
    for name in FAMILIES:
        of_family = [by_family[name] for by_family in scores.values()]
        cells = (f"{s.accuracy:.0%} ({s.right} of {s.asked})" for s in of_family)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    means = (np.mean([s.accuracy for s in by_family.values()]) for by_family in scores.values())
    lines.append(f"| mean | {' | '.join(f'{mean:.1%}' for mean in means)} |")
    perplexities = (total(by_family.values()).perplexity for by_family in scores.values())
    lines.append(f"| perplexity of the right replies | {' | '.join(f'{value:.4f}' for value in perplexities)} |")
    table = "\n".join(lines)
    return f"""# What it can do

Exact match of the final channel with the generator's answer, generating greedily, on instances for evaluation:

{table}"""


def _experts(found: Specialisation) -> str:
    lines = ["| family | distance to the other families | between its halves |", "|---|---:|---:|"]
    for i, name in enumerate(found.families):
        others = found.between[i].sum() / (len(found.families) - 1)
        lines.append(f"| {name} | {others:.3f} | {found.within[i]:.3f} |")
    table = "\n".join(lines)
    return f"""# Its experts

Jensen–Shannon distance between the shares of the experts, in the mean over layers, on instances for calibration:
between two families {found.ratio:.1f} times that between halves of one.

{table}"""
