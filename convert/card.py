"""The model card of a pruned checkpoint, and its name."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gptoss_jax.config import FULL, HUB_ID, Config
from gptoss_jax.errors import UserError
from gptoss_jax.files.paths import is_local, place
from gptoss_jax.selection.keep_sets import KeepSets
from gptoss_jax.selection.origin import Origin, quoted
from gptoss_jax.selection.serving import serving_limits

from .tensors import AnyCheckpoint, stored_forms

NAME = re.compile(r"[\w.-]{1,80}")


def domain_for(origin: Origin, given: str | None) -> str:
    """What a model is specialised in, as its name has it: what is given, else its only domain, else general.

    UserError where that cannot be part of a folder's name.
    """
    domain = given or re.sub(r"[^\w.-]+", "_", origin.domain or "general")
    if not NAME.fullmatch(domain):
        raise UserError(f"--domain {domain!r} becomes part of a folder's name: use letters, digits, '_', '-' and '.'")
    return domain


def model_name(config: Config, num_kept: int, domain: str) -> str:
    """The published form: parameters in billions, domain, experts a layer; in millions where they are few."""
    parameters = config.num_parameters(num_kept)
    size = f"{parameters / 1e9:.1f}b" if parameters >= 5e7 else f"{parameters / 1e6:.1f}m"
    return f"gpt-oss-{size}-specialized-{domain}-pruned-moe-only-{num_kept}-experts"


def card(
    checkpoint: AnyCheckpoint,
    keep_sets: KeepSets,
    domain: str,
    model: str,
    quantized: bool,
    warnings: Sequence[str],
    pruned_before: bool,
    quality: str | None,
    healed: str | None = None,
) -> str:
    """README.md: front matter, architecture before and after, method, quality, usage, limitations, citation.

    Args:
        checkpoint: The model before it was pruned.
        keep_sets: The experts that stay, of every layer as many.
        domain: What the model is specialised in, as its name has it.
        model: What the user calls the model: a folder or a hub id.
        quantized: Whether the experts were written in MXFP4.
        warnings: What a reader should know of how the experts were chosen.
        pruned_before: Whether experts had been removed from that model already.
        quality: The section about what was measured of these keep-sets, in Markdown; None where nothing was.
        healed: The section about what was trained afterwards, in Markdown; None where nothing was.
    """
    config, n = checkpoint.config, len(keep_sets.layers[0])
    kernels, others = stored_forms(checkpoint)
    name = model_name(config, n, domain)
    title = domain.replace("_", " ").title()
    # A path says nothing to whoever reads the card, nor does a name of this project; a hub id does.
    where = place(model)
    is_on_hub = bool(HUB_ID.fullmatch(model)) and not where.exists()
    base = model if is_on_hub else (where.resolve() if is_local(where) else where).name
    sections = [
        _front_matter(domain, base if is_on_hub else None),
        f"# {title} GPT-OSS Model ({n} Experts)\n\n"
        f"`{name}` is `{base}` reduced from {config.num_experts} to {n} experts per layer, "
        f"{'without retraining' if healed is None else 'and healed as told below'}. {_measured(quality)}: try it on "
        "your task before you rely on it.",
        _architecture(config, n, title, _precision(kernels, others), _precision(["MXFP4" if quantized else "BF16"])),
        _method(config, n, keep_sets.origin, warnings, _rounded(kernels, others, quantized), healed),
        *([_tried(keep_sets.tried)] if keep_sets.tried else []),
        *([_elsewhere(keep_sets.elsewhere)] if keep_sets.elsewhere else []),
        *([healed] if healed else []),
        _numbers(pruned_before),
        *([quality] if quality else []),
        _usage(name),
        _limitations(config, n, quality is not None),
        _citation(name, domain, base),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(domain: str, hub_id: str | None) -> str:
    base = [f"base_model: {hub_id}"] if hub_id else []
    tags = ["mixture-of-experts", "moe", "expert-pruning", "gpt-oss", "pruned-model", "domain-specific", domain]
    return "\n".join(
        [
            "---",
            "license: apache-2.0",
            *base,
            "language:",
            "- en",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags:",
            *(f"- {json.dumps(tag)}" for tag in tags),  # quoted: a domain may read as a number
            "---",
        ]
    )


def _measured(quality: str | None) -> str:
    if quality is None:
        return "Its quality has not been measured"
    return "What was measured of its quality stands below, and is of one set of rows"


def _precision(kernels: Sequence[str], others: Sequence[str] = ("BF16",)) -> str:
    if list(kernels) == list(others):
        return " and ".join(kernels)
    return f"{' and '.join(kernels)} experts, {' and '.join(others)} rest"


def _rounded(kernels: Sequence[str], others: Sequence[str], quantized: bool) -> list[str]:
    """A sentence for each way in which weights changed."""
    to_mxfp4 = [form for form in kernels if quantized and form != "MXFP4"]
    to_bf16 = sorted({*others, *([] if quantized else kernels)} - {"BF16", "MXFP4"})
    return [
        *(
            f"The weights of the kept experts were rounded from {form} to MXFP4, to the nearest value."
            for form in to_mxfp4
        ),
        *(f"Weights in {form} were written in BF16, each as the nearest value." for form in to_bf16),
    ]


def _architecture(config: Config, n: int, title: str, before: str, after: str) -> str:
    def size(parameters: int) -> str:
        return f"{parameters / 1e9:.1f}B ({parameters:,})"

    full = sum(kind == FULL for kind in config.layer_types)
    rows = [
        ("Total parameters", size(config.num_parameters()), size(config.num_parameters(n))),
        ("Experts per layer", config.num_experts, n),
        ("Experts per token", config.top_k, min(config.top_k, n)),
        ("Precision", before, after),
        ("Layers", config.num_layers, config.num_layers),
        ("Context length", f"{config.max_position:,}", f"{config.max_position:,}"),
        ("Attention heads", *[f"{config.num_heads} (query), {config.num_kv_heads} (key-value)"] * 2),
        ("Residual dimension", config.hidden_size, config.hidden_size),
        (
            "Attention pattern",
            *[f"{full} full, {config.num_layers - full} sliding ({config.sliding_window} tokens)"] * 2,
        ),
        ("Specialisation", "none", title),
    ]
    table = [f"| **{what}** | {was} | {now} |" for what, was, now in rows]
    return "\n".join(["## Architecture", "", "| | before | after |", "|---|---|---|", *table])


def _method(
    config: Config, n: int, origin: Origin, warnings: Sequence[str], rounded: Sequence[str], healed: str | None
) -> str:
    if rounded or healed:
        effect = " ".join([*rounded, "Nothing was trained." if healed is None else "What was trained is told below."])
    else:
        effect = (
            "Nothing else changed, and nothing was trained: in float32, the logits equal those of the original model "
            "with the router logits of the removed experts at −∞ before top-k."
        )
    return f"""## Method

Of the {config.num_experts} experts of each layer {n} were kept, and the rest removed together with their rows of the
router, which now chooses among the kept experts. {effect}

{_choice(origin)}{"".join(f" {warning}." for warning in warnings)}"""


def _nats(of: Sequence[float]) -> str:
    return f"{of[0]:.4g} ({of[1]:.4g} to {of[2]:.4g})"


def _elsewhere(lost: Mapping[str, Sequence[float]]) -> str:
    """What the keep-sets lose where they were not chosen for."""
    told = (
        "**What other domains lose by these keep-sets**: the KL of the whole model from the pruned one, in nats a "
        "token, with 95 % intervals, on a fifth of their rows."
    )
    rows = [f"| {quoted(domain)} | {_nats(of)} |" for domain, of in lost.items()]
    return "\n".join([told, "", "| domain | KL |", "|---|---|", *rows])


def _tried(tried: Sequence[Mapping[str, Any]]) -> str:
    """What the keep-sets were picked of."""

    def share(of: Sequence[float]) -> str:
        return f"{100 * of[0]:.1f} % ({100 * of[1]:.1f} to {100 * of[2]:.1f})"

    rows = []
    for one in tried:
        match = share(one["match"]) if "match" in one else ""
        rows.append(f"| {quoted(one['name'])} | {one['keep']} | {_nats(one['kl'])} | {match} |")
    head = ["| candidate | experts | KL | right answers |", "|---|---:|---|---|"]
    told = (
        "What was tried, on rows by which no candidate was made: the KL of the whole model from it, in nats a token, "
        "with 95 % intervals."
    )
    return "\n".join([told, "", *head, *rows])


def _numbers(pruned_before: bool) -> str:
    """What numbers expert_mapping.json is about."""
    which = (
        "the model\nfrom which the first experts were removed: the model that was pruned here had been pruned before."
        if pruned_before
        else "the model that\nwas pruned."
    )
    return f"`expert_mapping.json` gives the new number of each kept expert, by layer and by its number in {which}"


def _choice(origin: Origin) -> str:
    """How the kept experts were chosen, as far as it is known."""
    known = {"rule": origin.rule, "seed": origin.seed}
    details = ", ".join(f"{name} {quoted(str(value))}" for name, value in known.items() if value is not None)
    choice = f"The choice of experts is {origin}" + (f" ({details})." if details else ".")
    if origin.answers_hash is not None:
        return f"{choice} The SHA-256 of the dataset's summaries is {quoted(origin.answers_hash)}."
    if origin.profile_hash is None:
        return choice
    return f"{choice} The SHA-256 of the profile's saliency table is {quoted(origin.profile_hash)}."


def _usage(name: str) -> str:
    return f"""## Usage

With `transformers`, `torch` and `accelerate`, which transformers needs for MXFP4:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "{name}"  # the folder of this model
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")

messages = [{{"role": "user", "content": "Explain the process of photosynthesis in plants."}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
outputs = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(tokenizer.decode(outputs[0][inputs["input_ids"].shape[1]:]))
```"""


def _limitations(config: Config, n: int, is_measured: bool) -> str:
    unmeasured = (
        "- Quality was measured on the rows named above alone, and with the router choosing among the kept experts in "
        "the original model."
        if is_measured
        else "- Quality is unmeasured: no perplexity, benchmark or generation of this checkpoint was scored."
    )
    lines = [
        f"{unmeasured} Expect losses on every{' other' if is_measured else ''} task, larger ones outside the domain.",
        "- Safety behaviour may have changed with the removed experts, and was not tested.",
    ]
    if n >= config.top_k:
        lines.append("- Pruning saves memory; each token still uses as many experts, so decoding is hardly faster.")
    else:
        lines.append(f"- Each token uses {n} experts, the original {config.top_k}: a larger change than pruning alone.")
    lines += [f"- {limit}" for limit in serving_limits(n, config.top_k)]
    return "\n".join(["## Limitations", "", *lines])


def _citation(name: str, domain: str, model: str) -> str:
    return f"""## Citation

```bibtex
@misc{{{name.replace(".", "_")},
  title = {{{name}: {model} pruned to its {domain.replace("_", " ")} experts}},
  note  = {{Made with gptoss-jax}}
}}

@misc{{openai2025gptoss,
  title  = {{gpt-oss-120b and gpt-oss-20b Model Card}},
  author = {{OpenAI}},
  year   = {{2025}},
  eprint = {{2508.10925}},
  archivePrefix = {{arXiv}}
}}
```"""
