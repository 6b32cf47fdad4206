"""eval.md: an evaluation for people to read."""

import math
from collections.abc import Iterable, Mapping, Sequence

from ..selection.origin import quoted
from .gate import SEQ_LENS
from .intervals import LEVEL, Estimate
from .quality import BINS, CONFLICT_QUANTILE, QUANTITIES, Quality
from .replies import COLUMNS, RepliesCompared
from .summary import Entry, Summary

FEW = 100  # documents or questions: with fewer, intervals are wider than most differences
SHOWN = tuple(name for name in QUANTITIES if name != "ppl_baseline")  # the baseline has a row of its own
CALIBRATION = {
    "disjoint": "none is among these rows, by hash",
    "unknown": "unknown, so that some of them may be among these rows",
}


def eval_report(summary: Summary) -> str:
    """The whole report."""
    replies = summary.baseline.replies
    by_length = [(seq_len, section) for seq_len in summary.setting.blocks for section in (_tokens, _percentiles)]
    sections = [
        _header(summary),
        *(section(summary, seq_len) for seq_len, section in by_length),
        _gate(summary),
        *([_by_domain(summary)] if summary.baseline.by_domain else []),
        *([_replies(summary, replies)] if replies else []),
        _p_values(summary),
        "\n".join(["## What to be careful of", "", *(f"- {caution}" for caution in cautions(summary))]),
    ]
    return "\n\n".join(sections) + "\n"


def _header(summary: Summary) -> str:
    setting = summary.setting
    lines = [
        f"# Quality of {plain(setting.model)} beside {plain(setting.baseline)}",
        "",
        f"- Model: {quoted(setting.model)} | Baseline: {quoted(setting.baseline)}",
        f"- Data: {quoted(setting.data)}, {setting.rows:,} rows, prompts hash {quoted(setting.prompts_hash)}",
        *(
            f"- Sequence length {seq_len:,}: {setting.blocks[seq_len]:,} blocks, {of.tokens:,} scored (kept) tokens of "
            f"{of.documents:,} documents"
            for seq_len, of in summary.baseline.quality.items()
        ),
        f"- Calibration rows: {CALIBRATION[setting.calibration]}",
        f"- In parentheses: {LEVEL:.0%} intervals, by bootstrap over documents ({setting.draws:,} draws, seed "
        f"{setting.seed}), paired",
    ]
    return "\n".join([*lines, *(["", "```bash", setting.command, "```"] if setting.command else [])])


def _tokens(summary: Summary, seq_len: int) -> str:
    head = ["", "experts", *(QUANTITIES[name].label for name in SHOWN), "JS2D"]
    # Beside itself the baseline has a perplexity, a probability and conflicts; the rest is zero.
    rows = []
    for entry in (summary.baseline, *summary.entries):
        quality = entry.quality[seq_len]
        rows.append([title(entry), kept(entry), *figures(quality, SHOWN), number(quality.js2d)])
    said = (
        f"A confident conflict is a token whose entropy is at most the {CONFLICT_QUANTILE:.0%} quantile and whose "
        "probability is below its own: both quantiles are the baseline's, for all models."
    )
    return "\n".join([f"## Against the baseline, sequence length {seq_len:,}", "", *table(head, rows), "", said])


def figures(quality: Quality, names: Iterable[str]) -> list[str]:
    """A cell for each of some QUANTITIES."""
    found = [(quality.estimates[name], QUANTITIES[name]) for name in names]
    return [interval(estimate, what.percent, what.is_difference) for estimate, what in found]


def _percentiles(summary: Summary, seq_len: int) -> str:
    lines = [f"## Percentiles over tokens, sequence length {seq_len:,}", ""]
    for what in ("kl_percentiles", "dp_percentiles"):
        names = [*getattr(summary.baseline.quality[seq_len], what)]
        found: list[tuple[Entry, Mapping[str, float]]] = [
            (entry, getattr(entry.quality[seq_len], what)) for entry in summary.entries
        ]
        rows = [[title(entry), *(number(of[name]) for name in names)] for entry, of in found]
        lines += [*table(["KL (nats)" if what == "kl_percentiles" else "Δp", *names], rows), ""]
    return "\n".join(lines).rstrip()


def _by_domain(summary: Summary) -> str:
    names = ("ppl_difference", "kl", "agreement")
    rows = []
    for entry in summary.entries:
        for domain, quality in entry.by_domain.items():
            rows.append([title(entry), plain(domain), f"{quality.documents:,}", *figures(quality, names)])
    lines = table(["", "domain", "documents", *(QUANTITIES[name].label for name in names)], rows)
    said = f"Sequence length {next(iter(summary.setting.blocks)):,}; domains with two documents or more."
    return "\n".join(["## By domain", "", said, "", *lines])


def _gate(summary: Summary) -> str:
    here = _lengths(summary.setting.blocks)
    said = (
        f"It asks for the sequence lengths {_lengths(SEQ_LENS)}; this evaluation has {here}. Each "
        "cell has the value and its limit: the most that it may be, or for a p-value the least."
    )
    lengths = [f", {check.seq_len:,}" if check.seq_len else "" for check in summary.baseline.gate]
    names = [plain(check.name + length) for check, length in zip(summary.baseline.gate, lengths, strict=True)]
    rows = []
    for entry in summary.entries:
        cells = [f"{number(check.value)} of {number(check.limit)}: {_yes(check.passed)}" for check in entry.gate]
        rows.append([title(entry), *cells, _yes(entry.passes)])
    return "\n".join(["## Near-lossless gate", "", said, "", *table(["", *names, "passes"], rows)])


def _yes(holds: bool) -> str:
    return "yes" if holds else "**no**"


def _lengths(lengths: Iterable[int]) -> str:
    return " and ".join(f"{length:,}" for length in lengths)


def _replies(summary: Summary, first: RepliesCompared) -> str:
    names = [name for name in COLUMNS if name in first.estimates]
    head = ["", *(f"{COLUMNS[name][0]}{more}" for name in names for more in ("", ", difference")), "median length"]
    rows = []
    for entry in (summary.baseline, *summary.entries):
        if entry.replies is not None:
            own, more = entry.replies.estimates, entry.replies.differences
            cells = [title(entry)]
            for name in names:
                difference = "" if entry is summary.baseline else interval(more[name], COLUMNS[name][1], signed=True)
                cells += [interval(own[name], COLUMNS[name][1]), difference]
            rows.append([*cells, f"{entry.replies.median_length:g}"])
    kind = f" Answers are read by the rule {quoted(summary.setting.answers)}." if summary.setting.answers else ""
    asked = f"{first.rows:,} rows were asked of each model.{kind}"
    return "\n".join(["## Replies", "", asked, "", *table(head, rows)])


def _p_values(summary: Summary) -> str:
    labels = {name: what.label for name, what in QUANTITIES.items()}
    labels |= {name: label for name, (label, _) in COLUMNS.items()}
    columns = {(of, name): None for entry in summary.entries for of, found in entry.corrected.items() for name in found}
    head = [labels[name] + ("" if of == "replies" else f", {int(of):,}") for of, name in columns]
    rows = []
    for entry in summary.entries:
        found = [entry.corrected.get(of, {}).get(name) for of, name in columns]
        rows.append([title(entry), *("" if p_value is None else f"{p_value:.2g}" for p_value in found)])
    said = (
        f"Two-sided, of no difference from the baseline, Holm-corrected for {len(summary.entries)} comparisons in each "
        "column. They rest on the standard error that is robust against clusters."
    )
    return "\n".join(["## p-values", "", said, "", *table(["", *head], rows)])


def cautions(summary: Summary) -> list[str]:
    """Sentences about what the numbers do not say."""
    setting, entries, replies = summary.setting, summary.entries, summary.baseline.replies
    found = list(setting.warnings)
    if setting.calibration == "unknown":
        found.append("Where experts were chosen on these rows, the numbers flatter their keep-sets.")
    documents = min(of.documents for of in summary.baseline.quality.values())
    if documents < FEW:
        differences = [of.estimates["ppl_difference"] for entry in entries for of in entry.quality.values()]
        wide = _widest([("ΔPPL", difference, False) for difference in differences])
        found.append(f"Scored tokens come from {documents} documents, fewer than {FEW}{wide}.")
    if replies and replies.rows < FEW:
        shares = [
            (label, entry.replies.differences[name], True)
            for entry in entries
            for name, (label, is_share) in COLUMNS.items()
            if is_share and entry.replies and name in entry.replies.differences
        ]
        found.append(f"Replies are to {replies.rows} questions, fewer than {FEW}{_widest(shares)}.")
    if entries and not any(entry.is_control for entry in entries):
        found.append("No keep-set was drawn at random (criterion `random`): nothing shows what choosing gained.")
    if absent := [length for length in SEQ_LENS if length not in setting.blocks]:
        found.append(f"The near-lossless gate asks for the sequence length {_lengths(absent)} too.")
    found.append("Percentiles and JS2D have no interval.")
    fewest, bins = min(of.tokens for of in summary.baseline.quality.values()), math.prod(BINS)
    if fewest < bins:
        found.append(f"JS2D counts tokens in {bins:,} bins: with {fewest:,} tokens chance alone lifts it far above 0.")
    if replies:
        found.append("A rise of loops that is not significant may still be one: its interval says how large.")
    return found


def _widest(estimates: Sequence[tuple[str, Estimate, bool]]) -> str:
    """The widest interval of some, as the end of a sentence."""
    if not estimates:
        return ""
    label, estimate, percent = max(estimates, key=lambda of: of[1].high - of[1].low)
    return f": the interval of the difference in {label} is up to {number(estimate.high - estimate.low, percent)} wide"


def title(entry: Entry) -> str:
    """An entry's name; the control is marked."""
    return plain(entry.name) + (" (control)" if entry.is_control else "")


def kept(entry: Entry) -> str:
    """How many experts its layers keep."""
    if not entry.experts:
        return ""
    fewest, most = min(entry.experts), max(entry.experts)
    return str(fewest) if fewest == most else f"{fewest} to {most}"


def plain(text: str) -> str:
    """A text in a cell: a line break or bar would end it."""
    return " ".join(text.split()).replace("|", "\\|")


def number(value: float, percent: bool = False, signed: bool = False) -> str:
    """A number with four digits, or as per cent with two decimals; a difference has its sign."""
    shown = round(100 * value, 2) + 0.0 if percent else value  # + 0.0: −0 has a sign
    sign = "+" if signed and shown else ""
    return f"{shown:{sign}.2f} %" if percent else f"{shown:{sign}.4g}"


def interval(estimate: Estimate, percent: bool = False, signed: bool = False) -> str:
    """A number with its interval in parentheses."""
    value, low, high = (number(one, percent, signed) for one in (estimate.value, estimate.low, estimate.high))
    return value if low == high else f"{value} ({low.removesuffix(' %')} to {high})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table: the first column on the left, the others on the right."""
    return [_line(head), "|---|" + "---:|" * (len(head) - 1), *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
