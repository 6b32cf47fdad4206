"""The report of a profile, in Markdown: sections of the published REAP profile of gpt-oss-20b, then more."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..selection.intervals import LEVEL, unsettled
from ..selection.ranking import RANKING, rank
from ..statistics.counted import STORE
from ..statistics.sums import Statistics
from ..statistics.tables import SALIENCY, SALIENCY_BY_DOMAIN, USAGE, USAGE_BY_DOMAIN, Columns
from .pictures import PICTURES
from .rates import rate

TOP = 10
CONCENTRATION = (4, 8, 16)
QUARTERS = (1, 2, 3)  # of the experts, which stay where the report says what is not settled
THIN = 10  # pairs; a mean over fewer says little about an expert


def top_experts(columns: Columns) -> list[str]:
    """One line a layer: the ten experts with the highest saliency_mean."""
    return _by_layer([experts[:TOP] for experts in rank(columns).layers])


def _by_layer(experts: Sequence[Sequence[int]]) -> list[str]:
    return [f"- layer_{layer}: {some}" for layer, some in enumerate(experts)]


def concentration(columns: Columns) -> list[str]:
    """One table row a layer: the share of Σg·n that the 4, 8 and 16 experts with the most of it hold."""
    lines = ["| layer | " + " | ".join(f"top_{n}" for n in CONCENTRATION) + " |", "|---:" * 4 + "|"]
    for layer, mass in enumerate(np.sort(columns["gate_norm_sum"], axis=1)[:, ::-1]):
        shares = [mass[:n].sum() / max(mass.sum(), np.finfo(float).tiny) for n in CONCENTRATION]
        lines.append(f"| {layer} | " + " | ".join(f"{share:.3f}" for share in shares) + " |")
    return lines


def thin_evidence(columns: Columns) -> list[str]:
    """Experts among the ten best of a layer whose mean rests on fewer than THIN pairs."""
    return [
        f"layer {layer}: expert {expert} is in the top {TOP} on {columns['count'][layer, expert]} tokens"
        for layer, experts in enumerate(rank(columns).layers)
        for expert in experts[:TOP]
        if 0 < columns["count"][layer, expert] < THIN
    ]


def not_settled(by_fold: Mapping[str, np.ndarray]) -> list[str]:
    """How many experts of each layer are on a side of the cut that may be chance, for some cuts; and which, for half.

    `by_fold` are the columns that add, [L, folds, E]."""
    _, folds, E = by_fold["count"].shape
    kept, half = sorted({max(1, E * quarter // 4) for quarter in QUARTERS}), max(1, E // 2)
    open_by_cut = {n: unsettled(by_fold, n) for n in kept}
    lines = [
        "Experts that other rows might put on the other side of the cut, where so many of the best by saliency_mean "
        f"stay: the {LEVEL:.0%} interval of their distance from the cut holds 0 (jackknife, {folds} folds of rows).",
        "",
        "| layer | " + " | ".join(f"keep {n}" for n in kept) + " |",
        "|---:" * (len(kept) + 1) + "|",
    ]
    counts = zip(*open_by_cut.values(), strict=True)
    lines += [f"| {layer} | {' | '.join(str(len(experts)) for experts in each)} |" for layer, each in enumerate(counts)]
    return [*lines, "", f"Where {half} stay:", "", *_by_layer(open_by_cut[half])]


def profile_report(
    info: Mapping[str, Any],
    columns: Columns,
    total: Statistics,
    by_domain: Mapping[str, Statistics],
    by_fold: Mapping[str, np.ndarray],
) -> str:
    """The whole report. `info` is the content of profile.json; statistics are [L, …], columns by fold [L, folds, E]."""
    lines = [*_header(info), "", f"## Top experts by layer (top {TOP}, ranked by saliency_mean)", ""]
    lines += [*top_experts(columns), "", "## Saliency concentration (by gate_norm_sum mass)", ""]
    lines += [*concentration(columns), "", "## Artifacts", ""]
    lines += [
        f"- `{SALIENCY}` (per-layer, per-expert count + gate/norm/saliency stats)",
        f"- `{RANKING}` (sorted experts per layer)",
        f"- `{USAGE}` (usage, co-activation, gate means and histogram)",
        *([f"- `{SALIENCY_BY_DOMAIN}`, `{USAGE_BY_DOMAIN}` (both by domain)"] if by_domain else []),
        f"- `{STORE}` (all sums by domain and fold, and which rows they are of: for merging)",
        *(f"- `{name}` ({title})" for name, title in PICTURES.items()),
        "- `profile.json` (every option, versions, model fingerprint, warnings)",
    ]
    lines += ["", "## Reproduce", "", "```bash", *_commands(info), "```", ""]
    lines += ["## Pictures", "", *(f"![{title}]({name})" for name, title in PICTURES.items()), "", "## Router", ""]
    lines += _router(total)
    if "until_stable" in info:
        lines += ["", "## Rows until the experts to keep stay the same", "", *_until_stable(info["until_stable"])]
    if by_fold["count"].shape[1] > 1:
        lines += ["", "## Experts that are not settled", "", *not_settled(by_fold)]
    if len(by_domain) > 1:
        lines += ["", "## Domains", "", *_domains(by_domain)]
    if info["warnings"]:
        lines += ["", "## Warnings", "", *(f"- {warning}" for warning in info["warnings"])]
    return "\n".join(lines) + "\n"


def _commands(info: Mapping[str, Any]) -> list[str]:
    """What gives this profile again: of merged ones first what made each."""
    return [*(part["command"] for part in info.get("merged", [])), info["command"]]


def _header(info: Mapping[str, Any]) -> list[str]:
    return [
        f"# {info['model']} saliency profile (GPT-OSS MoE)",
        "",
        f"- Model: `{info['model']}`",
        *(_merged_rows(info) if "merged" in info else _rows(info)),
        f"- Max seq length: {info['options']['max_seq_length']}",
        f"- Layers: {info['num_layers']} | Experts: {info['num_experts']} | Top-k: {info['top_k']}",
        f"- Total tokens processed: {info['total_tokens']:,} | "
        f"Kept ({'all' if info['options']['keep'] == 'all' else 'assistant-span'}) tokens: {info['kept_tokens']:,}",
        f"- Forward throughput: {rate(info['tokens_per_s'])} tokens/s",
        f"- Prompts hash: `{info['prompts_hash']}`",
    ]


def _rows(info: Mapping[str, Any]) -> list[str]:
    o = info["options"]
    domains = ", ".join(o["domain"])
    subset = f" subset `{o['subset']}`" if o.get("subset") else ""
    # Where none is named each row has its own, and the warnings say which.
    column = f"col `{o['text_column']}`" if o["text_column"] is not None else "col found in each row"
    return [
        f"- Dataset: `{o['data']}`{subset} split `{o['split']}` {column}",
        f"- Domain filter: `{domains}`" + ("" if domains else " (empty = no filter)"),
        f"- Rows: {info['rows']:,} | Batch size: {o['batch_size']}",
    ]


def _merged_rows(info: Mapping[str, Any]) -> list[str]:
    parts = [f"  - `{part['folder']}`: {part['rows']:,} rows" for part in info["merged"]]
    return [f"- Dataset: {len(parts)} profiles merged", *parts, f"- Rows: {info['rows']:,}"]


def _router(total: Statistics) -> list[str]:
    tokens = np.maximum(1, total.tokens)[:, None]
    entropy, gates = total.router_entropy_sum[:, None] / tokens, total.gate_rank_sum / tokens
    ranks = range(1, gates.shape[1] + 1)
    lines = ["Mean entropy of the router over all experts (nats), and mean gate by rank.", ""]
    lines += ["| layer | entropy | " + " | ".join(f"gate_{r}" for r in ranks) + " | never chosen |"]
    lines += ["|---:" * (gates.shape[1] + 3) + "|"]
    for layer in range(len(gates)):
        cells = " | ".join(f"{x:.3f}" for x in (entropy[layer, 0], *gates[layer]))
        lines.append(f"| {layer} | {cells} | {int((total.count[layer] == 0).sum())} |")
    return lines


def _until_stable(found: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{found['said'][0].upper()}{found['said'][1:]}.",
        "",
        "| rows | tokens | kept tokens | new in the keep-sets |",
        "|---:" * 4 + "|",
    ]
    for point in found["curve"]:
        changed = "" if point["changed"] is None else f"{point['changed']:.1%}"
        lines.append(f"| {point['rows']:,} | {point['tokens']:,} | {point['kept_tokens']:,} | {changed} |")
    return lines


def _domains(by_domain: Mapping[str, Statistics]) -> list[str]:
    lines = ["| domain | kept tokens | top 4 of the first layer | top 4 of the last layer |", "|---|---:|---|---|"]
    for name, statistics in by_domain.items():
        ranking = rank({"count": statistics.count, "gate_norm_sum": statistics.gate_norm_sum}).layers
        name = " ".join(name.split()).replace("|", "\\|")  # a line break or bar would end the cell
        lines.append(f"| {name} | {statistics.tokens[0]:,} | {ranking[0][:4]} | {ranking[-1][:4]} |")
    return lines
