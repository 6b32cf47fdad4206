"""What a model card says of an evaluation."""

from ..selection.origin import quoted
from .intervals import LEVEL
from .markdown import CALIBRATION, cautions, figures, interval, table, title
from .quality import QUANTITIES
from .replies import COLUMNS
from .summary import Entry, Summary

FIGURES = ("ppl", "ppl_difference", "kl", "agreement", "p_difference", "conflict_difference")


def card_quality(summary: Summary, entry: Entry) -> str:
    """The section "Quality" for an entry's keep-sets: the baseline, the keep-sets, and random ones of their size."""
    setting = summary.setting
    models = [summary.baseline, entry, *(other for other in summary.controls(entry) if other is not entry)]
    lines = [
        f"Measured beside {quoted(setting.baseline)} on {setting.rows:,} rows of {quoted(setting.data)}. "
        f"Calibration rows: {CALIBRATION[setting.calibration]}. In parentheses stand {LEVEL:.0%} intervals, paired and "
        "clustered by document."
    ]
    for seq_len, of in entry.quality.items():
        where = f"Sequence length {seq_len:,}: {of.tokens:,} scored tokens of {of.documents:,} documents."
        rows = [[title(model), *figures(model.quality[seq_len], FIGURES)] for model in models]
        lines += ["", where, "", *table(["", *(QUANTITIES[name].label for name in FIGURES)], rows)]
    if entry.replies:
        lines += ["", f"Replies to {entry.replies.rows:,} rows.", "", *_replies(models, [*entry.replies.estimates])]
    verdict = "passes" if entry.passes else "does not pass"
    lines += ["", f"It {verdict} the near-lossless gate at the sequence lengths measured.", ""]
    return "\n".join(["## Quality", "", *lines, *(f"- {caution}" for caution in cautions(summary))])


def _replies(models: list[Entry], names: list[str]) -> list[str]:
    rows = [
        [title(model), *(interval(model.replies.estimates[name], COLUMNS[name][1]) for name in names)]
        for model in models
        if model.replies
    ]
    return table(["", *(COLUMNS[name][0] for name in names)], rows)
