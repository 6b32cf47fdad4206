"""The report: tables, curves, and where it lost."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from gptoss_jax.evaluation.intervals import Estimate, holm
from gptoss_jax.evaluation.markdown import table

from ..families import results
from .candidates import CRITERIA, HEALED, KD_SEEDS, SEEDS

RULES = (*CRITERIA, "greedy", "picked", *(f"{rule}, healed" for rule in HEALED), "random")
REFERENCE, FULL = "reap", "full"


def answers(work: Path, family: str, rule: str, keep: int) -> np.ndarray:
    """[questions, 3] of a rule; of several seeds the mean."""
    folder = work / "results" / family

    def of(name: str) -> np.ndarray:
        found: np.ndarray = np.load(folder / f"{name}.npy")
        return found

    if rule == FULL:
        return of(FULL)
    if rule == "random":
        return results.mean([of(f"random {seed}-{keep}") for seed in SEEDS])
    if rule.endswith(", healed"):
        return results.mean([of(f"{rule.removesuffix(', healed')}-{keep}-healed-{seed}") for seed in KD_SEEDS])
    return of(f"{rule}-{keep}")


def write(work: Path, families: Sequence[str], keeps: Sequence[int], report: Path) -> None:
    """Write the report, and its picture beside it."""
    report.parent.mkdir(parents=True, exist_ok=True)
    picture = report.parent / f"{report.stem}.png"
    keeps = sorted(keeps, reverse=True)
    curves(work, families, keeps, picture)
    sections = [
        "# Choosing together, and healing",
        _head(work, families, keeps),
        f"![exact match and divergence against experts kept]({picture.name})",
        *(_compared(work, families, keep) for keep in keeps),
        *_seeds(work, families, keeps),
        _lost(work, families, keeps),
        *(_by_family(work, families, keep) for keep in keeps),
    ]
    report.write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _head(work: Path, families: Sequence[str], keeps: Sequence[int]) -> str:
    count = len(answers(work, families[0], FULL, 0))
    return (
        f"`python -m experiments.better WORK` makes this page. {len(families)} families of tasks × keep "
        f"{', '.join(map(str, keeps))} of 16 experts a layer. Choices and healings of a family see the same "
        f"calibration questions; measured is on {count} evaluation questions of it that nothing saw, and that no "
        "variant of the method was looked at with. Exact match is of greedy replies; KL is that of the full model from "
        "the pruned one over the contents of the right replies, in nats a token. Intervals hold 95 %, paired and "
        "clustered by question. `random` is a mean of five seeds; what is healed one of three, with what the product "
        "rolled back counted as it was written: as the pruned model."
    )


def _compared(work: Path, families: Sequence[str], keep: int) -> str:
    """Each rule beside REAP and beside the whole model, over all families."""
    of = {rule: [answers(work, family, rule, keep) for family in families] for rule in RULES}
    whole = [answers(work, family, FULL, keep) for family in families]
    ids = [np.array([f"{family}/{n}" for n in range(len(one))]) for family, one in zip(families, whole, strict=True)]
    more = {rule: results.exact_difference(of[rule], of[REFERENCE], ids) for rule in RULES if rule != REFERENCE}
    corrected = dict(zip(more, holm([one.p_value for one in more.values()]), strict=True))
    rows = [["all experts", f"{100 * _mean(whole):.1f}", "", "", "", ""]]
    for rule in RULES:
        lost = results.exact_difference(of[rule], whole, ids)
        kl = sum(a[:, 1].sum() for a in of[rule]) / sum(a[:, 2].sum() for a in of[rule])
        beside = ["", ""] if rule == REFERENCE else [_points(more[rule]), f"{corrected[rule]:.2g}"]
        rows.append([f"`{rule}`", f"{100 * _mean(of[rule]):.1f}", f"{kl:.4f}", *beside, _points(lost)])
    head = ["", "exact match, %", "KL", f"points more than `{REFERENCE}`", "p", "points more than all experts"]
    return "\n".join([f"## Keep {keep}", "", *table(head, rows)])


def _seeds(work: Path, families: Sequence[str], keeps: Sequence[int]) -> Iterator[str]:
    """How much the order of the steps decides."""
    rows = []
    for keep in keeps:
        for rule in HEALED:
            shares = [
                np.mean(
                    [np.load(work / "results" / f / f"{rule}-{keep}-healed-{s}.npy")[:, 0].mean() for f in families]
                )
                for s in KD_SEEDS
            ]
            rows.append([f"keep {keep}, `{rule}, healed`", *(f"{100 * share:.1f}" for share in shares)])
    yield "## Seeds of healing"
    yield "\n".join(table(["mean exact match, %", *(f"seed {seed}" for seed in KD_SEEDS)], rows))


def _lost(work: Path, families: Sequence[str], keeps: Sequence[int]) -> str:
    """Every family in which a rule does worse than REAP, by more than chance explains."""
    lines = []
    for keep in keeps:
        for rule in RULES:
            for family in families:
                ours, theirs = (answers(work, family, name, keep) for name in (rule, REFERENCE))
                of = results.exact_difference([ours], [theirs], [np.arange(len(ours))])
                if rule not in (REFERENCE, "random", "frequency") and of.high < 0:
                    lines.append(f"- keep {keep}, {family}: `{rule}` {_points(of)} points beside `{REFERENCE}`")
    told = lines or ["In no family and at no number of experts is any of these rules significantly worse than `reap`."]
    return "\n".join(["## Where it lost", "", *told])


def _by_family(work: Path, families: Sequence[str], keep: int) -> str:
    rows = []
    for family in families:
        whole = answers(work, family, FULL, keep)
        rows.append([family, _cell(whole), *(_cell(answers(work, family, rule, keep)) for rule in RULES)])
    said = "Exact match in per cent with its interval, and KL."
    head = ["", "all experts", *(f"`{rule}`" for rule in RULES)]
    return "\n".join([f"## By family, keep {keep}", "", said, "", *table(head, rows)])


def _mean(of: Sequence[np.ndarray]) -> float:
    return float(np.mean([one[:, 0].mean() for one in of]))


def _points(of: Estimate) -> str:
    return f"{100 * of.value:+.1f} ({100 * of.low:.1f} to {100 * of.high:.1f})"


def _cell(of: np.ndarray) -> str:
    share = results.exact(of)
    kl = f"; {of[:, 1].sum() / of[:, 2].sum():.3f}" if of[:, 2].any() else ""
    return f"{100 * share.value:.0f} ({100 * max(share.low, 0):.0f} to {100 * min(share.high, 1):.0f}){kl}"


def curves(work: Path, families: Sequence[str], keeps: Sequence[int], file: Path) -> None:
    """Exact match against experts kept: all families together, and each by itself."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 7), layout="constrained")
    panels = figure.subplots(2, 5, sharex=True).flat
    some = {"all families": list(families)} | {name: [name] for name in families}
    for axes, (name, those) in zip(panels, some.items(), strict=False):
        for number, rule in enumerate(RULES):
            shares = [100 * _mean([answers(work, one, rule, keep) for one in those]) for keep in keeps]
            style = {"color": "0.6", "linestyle": "--"} if rule == "random" else {"color": f"C{number}"}
            axes.plot(keeps, shares, label=rule, marker="o", markersize=3, **style)
        axes.axhline(100 * _mean([answers(work, one, FULL, 0) for one in those]), color="0.3", linewidth=0.8)
        axes.set(title=name, ylim=(0, 101), xticks=keeps)
    figure.axes[0].legend(fontsize=7)
    figure.supxlabel("experts kept of 16")
    figure.supylabel("exact match, %")
    figure.savefig(file, dpi=110)
