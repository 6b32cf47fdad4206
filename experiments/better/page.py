"""The report: tables, curves, and where it lost."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptoss_jax.evaluation.intervals import holm
from gptoss_jax.evaluation.markdown import table
from gptoss_jax.selection.criteria import ELIMINATIONS

from ..families import results
from .candidates import CRITERIA, HEALED, PICKED_OF, SEEDS, seeds_of

# The rules of what is healed, each with the name that its files have.
HEALINGS = {f"{rule}, {way}": (rule, way) for rule, way in HEALED}
RULES = (*CRITERIA, *ELIMINATIONS, "picked", *HEALINGS, "random")
REFERENCE, FULL = "reap", "full"


@dataclass(frozen=True)
class Found:
    """What was measured, in the folder of the work."""

    work: Path
    families: Sequence[str]
    seeds: int
    command: str
    """That makes the page."""

    def of(self, family: str, rule: str, keep: int = 0) -> np.ndarray:
        """[questions, 3] of a rule; of several seeds the mean."""
        if rule == FULL:
            return self._read(family, FULL)
        if rule == "random":
            return results.mean([self._read(family, f"random {seed}-{keep}") for seed in SEEDS])
        if rule in HEALINGS:
            return results.mean([self.healed(family, rule, keep, seed) for seed in self.seeds_of(rule)])
        return self._read(family, f"{rule}-{keep}")

    def seeds_of(self, rule: str) -> range:
        """Of what is healed."""
        return seeds_of(HEALINGS[rule][1], self.seeds)

    def healed(self, family: str, rule: str, keep: int, seed: int) -> np.ndarray:
        """With one seed."""
        base, way = HEALINGS[rule]
        return self._read(family, f"{base}-{keep}-{way}-{seed}")

    def every(self, rule: str, keep: int) -> list[np.ndarray]:
        """Of all families."""
        return [self.of(family, rule, keep) for family in self.families]

    def ids(self) -> list[np.ndarray]:
        """A name for each question of each family."""
        counts = [len(one) for one in self.every(FULL, 0)]
        return [np.array([f"{f}/{n}" for n in range(c)]) for f, c in zip(self.families, counts, strict=True)]

    def _read(self, family: str, name: str) -> np.ndarray:
        found: np.ndarray = np.load(self.work / "results" / family / f"{name}.npy")
        return found


def write(found: Found, keeps: Sequence[int], report: Path) -> None:
    """Write the report, and its picture beside it."""
    report.parent.mkdir(parents=True, exist_ok=True)
    picture = report.parent / f"{report.stem}.png"
    keeps = sorted(keeps, reverse=True)
    curves(found, keeps, picture)
    sections = [
        "# Choosing together, and healing",
        _head(found, keeps),
        f"![exact match against experts kept]({picture.name})",
        *(_compared(found, keep) for keep in keeps),
        *_seeds(found, keeps),
        _lost(found, keeps),
        *(_by_family(found, keep) for keep in keeps),
    ]
    report.write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _head(found: Found, keeps: Sequence[int]) -> str:
    count = len(found.of(found.families[0], FULL))
    return (
        f"`{found.command}` makes this page. {len(found.families)} families of tasks × keep "
        f"{', '.join(map(str, keeps))} of 16 experts a layer. Choices and healings of a family see the same "
        f"calibration questions; measured is on {count} evaluation questions of it that nothing saw: variants of the "
        "method were told apart on questions before these. Exact match is of greedy replies; KL is that of the full "
        "model from the pruned one over the contents of the right replies, in nats a token. Intervals hold 95 %, "
        f"paired and clustered by question. `random` is a mean of five seeds; what is `healed` one of {found.seeds}, "
        "with what was rolled back counted as it was written: as the pruned model. `healed` is 60 steps of router "
        "distillation, `rebuilt` the same behind `--reconstruct routers --reconstruct biases`, `small` with `--train "
        "small`. `picked` is that of "
        f"{', '.join(f'`{rule}`' for rule in PICKED_OF)} with the least KL on calibration questions that were held out."
    )


def _compared(found: Found, keep: int) -> str:
    """Each rule beside REAP and beside the whole model, over all families."""
    of, whole, ids = {rule: found.every(rule, keep) for rule in RULES}, found.every(FULL, keep), found.ids()
    more = {rule: results.exact_difference(of[rule], of[REFERENCE], ids) for rule in RULES if rule != REFERENCE}
    corrected = dict(zip(more, holm([one.p_value for one in more.values()]), strict=True))
    rows = [["all experts", f"{100 * _mean(whole):.1f}", "", "", "", ""]]
    for rule in RULES:
        lost = results.exact_difference(of[rule], whole, ids)
        kl = sum(a[:, 1].sum() for a in of[rule]) / sum(a[:, 2].sum() for a in of[rule])
        beside = ["", ""] if rule == REFERENCE else [results.points(more[rule]), results.p_value(corrected[rule])]
        rows.append([f"`{rule}`", f"{100 * _mean(of[rule]):.1f}", f"{kl:.4f}", *beside, results.points(lost)])
    head = ["", "exact match, %", "KL", f"points more than `{REFERENCE}`", "p", "points more than all experts"]
    return "\n".join([f"## Keep {keep}", "", *table(head, rows)])


def _seeds(found: Found, keeps: Sequence[int]) -> Iterator[str]:
    """How much the order of the steps decides."""
    rows = []
    for keep in keeps:
        for rule in HEALINGS:
            every = [[found.healed(f, rule, keep, seed) for f in found.families] for seed in found.seeds_of(rule)]
            means = [f"{100 * _mean(of_seed):.1f}" for of_seed in every]
            rows.append([f"keep {keep}, `{rule}`", *means, *[""] * (found.seeds - len(means))])
    yield "## Seeds of healing"
    yield "\n".join(table(["mean exact match, %", *(f"seed {seed}" for seed in range(found.seeds))], rows))


def _lost(found: Found, keeps: Sequence[int]) -> str:
    """Every family in which a rule does worse than REAP, by more than chance explains."""
    lines = []
    for keep in keeps:
        for rule in (rule for rule in RULES if rule not in (REFERENCE, "random", "frequency")):
            for family in found.families:
                ours, theirs = (found.of(family, name, keep) for name in (rule, REFERENCE))
                of = results.exact_difference([ours], [theirs], [np.arange(len(ours))])
                if of.high < 0:
                    lines.append(f"- keep {keep}, {family}: `{rule}` {results.points(of)} points beside `{REFERENCE}`")
    told = lines or ["In no family and at no number of experts is any of these rules significantly worse than `reap`."]
    return "\n".join(["## Where it lost", "", *told])


def _by_family(found: Found, keep: int) -> str:
    rows = [
        [family, _cell(found.of(family, FULL)), *(_cell(found.of(family, rule, keep)) for rule in RULES)]
        for family in found.families
    ]
    said = "Exact match in per cent with its interval, and KL."
    head = ["", "all experts", *(f"`{rule}`" for rule in RULES)]
    return "\n".join([f"## By family, keep {keep}", "", said, "", *table(head, rows)])


def _mean(of: Sequence[np.ndarray]) -> float:
    return float(np.mean([one[:, 0].mean() for one in of]))


def _cell(of: np.ndarray) -> str:
    share = results.exact(of)
    kl = f"; {of[:, 1].sum() / of[:, 2].sum():.3f}" if of[:, 2].any() else ""
    return f"{100 * share.value:.0f} ({100 * max(share.low, 0):.0f} to {100 * min(share.high, 1):.0f}){kl}"


def curves(found: Found, keeps: Sequence[int], file: Path) -> None:
    """Exact match against experts kept: all families together, and each by itself."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 7), layout="constrained")
    panels = figure.subplots(2, 5, sharex=True).flatten()
    some = {"all families": list(found.families)} | {name: [name] for name in found.families}
    for axes, (title, those) in zip(panels, some.items(), strict=False):
        for number, rule in enumerate(RULES):
            shares = [100 * _mean([found.of(name, rule, keep) for name in those]) for keep in keeps]
            style = {"color": "0.6", "linestyle": "--"} if rule == "random" else {"color": f"C{number}"}
            axes.plot(keeps, shares, label=rule, marker="o", markersize=3, **style)
        axes.axhline(100 * _mean([found.of(name, FULL) for name in those]), color="0.3", linewidth=0.8)
        axes.set(title=title, ylim=(0, 101), xticks=keeps)
    for axes in panels[len(some) :]:
        axes.axis("off")
    panels[-1].legend(*panels[0].get_legend_handles_labels(), loc="center")
    figure.supxlabel("experts kept of 16")
    figure.supylabel("exact match, %")
    figure.savefig(file, dpi=110)
