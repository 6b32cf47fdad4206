"""The report: tables, curves, and what they say."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

import gptoss_jax as gj
from gptoss_jax.evaluation.intervals import Estimate, holm
from gptoss_jax.evaluation.markdown import table

from ..nano.families import FAMILIES
from . import choices, results
from .results import Results

COMMAND = "python -m experiments.families WORK --report docs/families.md"
RANDOM = "random"
CRITERIA = (*choices.CRITERIA, choices.FROM_WEIGHTS, RANDOM)


def answers(found: Results, kind: str, rule: str, keep: int) -> np.ndarray:
    """[questions, 3] of a choice; of the seeds of `random` the mean."""
    if rule == RANDOM:
        return results.mean([found.answers[f"{kind}: {RANDOM} {seed}: {keep}"] for seed in choices.SEEDS])
    return found.answers[f"{kind}: {rule}: {keep}"]


def write(work: Path, profile: gj.Profile, keeps: Sequence[int], report: Path) -> None:
    """Write the report, and its pictures beside it."""
    families = {family: Results.read(work / "eval" / family) for family in FAMILIES}
    together = Results.read(work / "eval" / "all")
    questions = len(next(iter(families.values())).ids)
    report.parent.mkdir(parents=True, exist_ok=True)
    pictures = report.parent / f"{report.stem}.png"
    curves(families, keeps, pictures)
    sections = [
        _head(questions, keeps),
        f"![exact match and divergence against experts kept]({pictures.name})",
        *_compared(families, keeps, "criterion", "reap", CRITERIA, "Criteria"),
        *_compared(families, keeps, "counted", "all", choices.COUNTED, "What counts in the profile, by `reap`"),
        *_afresh(work, keeps),
        *_blends(together, profile, keeps),
        *(_by_family(families, keeps, kind, rules) for kind, rules in TABLES.items()),
    ]
    report.write_text("\n\n".join(sections) + "\n", encoding="utf-8")


TABLES = {"criterion": CRITERIA, "counted": choices.COUNTED}


def _head(questions: int, keeps: Sequence[int]) -> str:
    return "\n".join(
        [
            "# Which experts of nano to keep, by family",
            "",
            f"`{COMMAND}` makes this page. {len(FAMILIES)} families of tasks × keep "
            f"{', '.join(map(str, keeps))} of 16 experts a layer. Experts are chosen by one family's calibration "
            f"questions, and measured on {questions} evaluation questions of that family, which neither the training "
            "nor any choice saw; all choices of a family pass the model together as soft prunes. Exact match is of "
            "greedy replies; KL is that of the full model from the pruned one over the contents of the right replies, "
            "in nats a token. Intervals hold 95 %, paired and clustered by question. `random` is a mean of five seeds.",
        ]
    )


def _compared(
    families: dict[str, Results], keeps: Sequence[int], kind: str, reference: str, rules: Sequence[str], title: str
) -> Iterator[str]:
    """Each rule beside a reference over all settings."""
    settings = [(found, keep) for found in families.values() for keep in keeps]
    ids = [np.array([f"{family}/{name}" for name in found.ids]) for family, found in families.items() for _ in keeps]
    of = {rule: [answers(found, kind, rule, keep) for found, keep in settings] for rule in rules}
    others = [rule for rule in rules if rule != reference]
    more = {rule: results.exact_difference(of[rule], of[reference], ids) for rule in others}
    further = {rule: results.divergence_difference(of[rule], of[reference], ids) for rule in others}
    corrected = [dict(zip(others, holm([e[r].p_value for r in others]), strict=True)) for e in (more, further)]
    rows = []
    for rule in rules:
        share = np.mean([a[:, 0].mean() for a in of[rule]])
        kl = np.sum([a[:, 1].sum() for a in of[rule]]) / np.sum([a[:, 2].sum() for a in of[rule]])
        best = sum(_is_best(of, rule, n) for n in range(len(settings)))
        cells = [f"{100 * share:.1f}", f"{kl:.4f}", str(best)]
        if rule == reference:
            rows.append([f"`{rule}`", *cells, "", "", "", ""])
            continue
        shown = [
            results.points(more[rule]),
            results.p_value(corrected[0][rule]),
            _nats(further[rule]),
            results.p_value(corrected[1][rule]),
        ]
        rows.append([f"`{rule}`", *cells, *shown])
    head = [
        "",
        "exact match, %",
        "KL",
        f"best of {len(settings)}",
        f"points more than `{reference}`",
        "p",
        "KL more",
        "p",
    ]
    yield f"## {title}"
    yield f"All {len(settings)} settings together; p-values are corrected by Holm."
    yield "\n".join(table(head, rows))


def _afresh(work: Path, keeps: Sequence[int]) -> Iterator[str]:
    """The two findings on questions that had no part in finding them."""
    families = {family: Results.read(work / "afresh" / family) for family in FAMILIES}
    sections = [
        *_compared(families, keeps, "criterion", "reap", ("reap", "swap", "random 0"), ""),
        *_compared(families, keeps, "counted", "all", choices.KEEPS, ""),
    ]
    yield "## Measured afresh"
    yield "`swap` and `all` were found to be good on the questions above. On as many others:"
    yield from sections[2::3]


def _is_best(of: dict[str, list[np.ndarray]], rule: str, setting: int) -> bool:
    """Whether no other rule has more right answers, nor as many with less divergence."""
    scores = {name: (each[setting][:, 0].mean(), -each[setting][:, 1].sum()) for name, each in of.items()}
    return max(scores, key=scores.__getitem__) == rule


def _nats(estimate: Estimate) -> str:
    return f"{estimate.value:+.4f} ({estimate.low:.4f} to {estimate.high:.4f})"


def _blends(found: Results, profile: gj.Profile, keeps: Sequence[int]) -> Iterator[str]:
    """One model for all families: the worst of them, and the mean."""
    rows = []
    for keep in keeps:
        kept = choices.union(profile, keep)
        for rule in (*choices.BLENDS, RANDOM):
            of = answers(found, "blend", rule, keep)
            shares = {name: of[found.domains == name, 0].mean() for name in FAMILIES}
            worst = min(shares, key=shares.__getitem__)
            kl = of[:, 1].sum() / of[:, 2].sum()
            cells = [f"{100 * shares[worst]:.0f} ({worst})", f"{100 * np.mean([*shares.values()]):.1f}", f"{kl:.4f}"]
            rows.append([f"keep {keep}, {rule}", *cells, f"{kept.mean():.1f}" if rule == choices.BLENDS[0] else ""])
    head = ["", "worst family, %", "mean, %", "KL", "experts of the union, of 16"]
    yield "## One model for all families"
    yield (
        "By `reap_sum` over the calibration questions of all families: pooled, each family with the same weight, and "
        "`--blend maxmin`, which keeps most of the worst family's Σ g·n. Together the families' own best experts, as "
        "many each, are nearly all."
    )
    yield "\n".join(table(head, rows))


def _by_family(families: dict[str, Results], keeps: Sequence[int], kind: str, rules: Sequence[str]) -> str:
    rows = []
    for family, found in families.items():
        rows.append([family, "16", f"{_cell(found.baseline)}", *([""] * (len(rules) - 1))])
        rows += [["", str(keep), *(_cell(answers(found, kind, rule, keep)) for rule in rules)] for keep in keeps]
    said = "Exact match in per cent with its interval, and KL; in the first row of a family that of all experts."
    title = "criterion" if kind == "criterion" else "what counts"
    return "\n".join(
        [f"## By family and {title}", "", said, "", *table(["", "keep", *(f"`{r}`" for r in rules)], rows)]
    )


def _cell(of: np.ndarray) -> str:
    share = results.exact(of)
    kl = of[:, 1].sum() / of[:, 2].sum()
    return f"{100 * share.value:.0f} ({100 * max(share.low, 0):.0f} to {100 * min(share.high, 1):.0f}); {kl:.3f}"


def curves(families: dict[str, Results], keeps: Sequence[int], file: Path) -> None:
    """Exact match and divergence against experts kept: all families together, and each by itself."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 7), layout="constrained")
    panels = figure.subplots(2, 5, sharex=True)
    some = {"all families": list(families.values())} | {name: [found] for name, found in families.items()}
    for axes, (name, those) in zip([panels[0, 0], *panels[:, 1:].flat], some.items(), strict=True):
        for number, rule in enumerate(CRITERIA):
            shares = [
                np.mean([answers(found, "criterion", rule, keep)[:, 0].mean() for found in those]) for keep in keeps
            ]
            style = {"color": "0.6", "linestyle": "--"} if rule == RANDOM else {"color": f"C{number}"}
            axes.plot(keeps, [100 * share for share in shares], label=rule, marker="o", markersize=3, **style)
        full = 100 * np.mean([found.baseline[:, 0].mean() for found in those])
        axes.axhline(full, color="0.3", linewidth=0.8)
        axes.set(title=name, ylim=(0, 101), xticks=keeps)
    for number, rule in enumerate(CRITERIA):
        of = [[answers(found, "criterion", rule, keep) for found in families.values()] for keep in keeps]
        nats = [sum(a[:, 1].sum() for a in each) / sum(a[:, 2].sum() for a in each) for each in of]
        style = {"color": "0.6", "linestyle": "--"} if rule == RANDOM else {"color": f"C{number}"}
        panels[1, 0].plot(keeps, nats, marker="o", markersize=3, **style)
    panels[1, 0].set(title="KL, all families", yscale="log")
    panels[0, 0].legend(fontsize=8)
    figure.supxlabel("experts kept of 16")
    figure.supylabel("exact match, %")
    figure.savefig(file, dpi=110)
