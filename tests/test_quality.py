"""Numbers of a comparison equal what their definitions say of the logits, one token after the other."""

import math
import re

import numpy as np
import pytest

from gptoss_jax.errors import DataError, StatisticsError
from gptoss_jax.evaluation import gate
from gptoss_jax.evaluation.intervals import Estimate
from gptoss_jax.evaluation.llama_lines import llama_lines
from gptoss_jax.evaluation.quality import (
    DP_PERCENTILES,
    KL_PERCENTILES,
    QUANTITIES,
    Means,
    Quality,
    compare,
    conflicts,
    js2d,
)
from gptoss_jax.evaluation.replies import compare_replies
from gptoss_jax.evaluation.scored import Scored
from tests.simulated import Logits, logits, replies, scored_tokens


def by_definition(of: Logits, name: str) -> dict[str, float]:
    """Every number, from probabilities by token."""
    models = []
    for logits_NV in (of.baseline, of.others[name]):
        p_NV = np.exp(logits_NV) / np.exp(logits_NV).sum(1, keepdims=True)
        top = np.sort(p_NV, axis=1)[:, -20:]
        top /= top.sum(1, keepdims=True)
        entropy = -(top * np.log(top)).sum(1) / math.log(20)
        models.append((p_NV, np.array([p[t] for p, t in zip(p_NV, of.true, strict=True)]), entropy))
    (base_NV, base, base_entropy), (other_NV, other, entropy) = models
    least, most = np.quantile(base, 0.15), np.quantile(base_entropy, 0.15)
    wrong = [np.mean([h <= most and p < least for p, h in zip(*of_one[1:], strict=True)]) for of_one in models]
    ppl = [math.exp(-np.mean(np.log(p))) for p in (base, other)]
    return {
        "ppl": ppl[1],
        "ppl_baseline": ppl[0],
        "ppl_difference": ppl[1] - ppl[0],
        "ln_ppl_ratio": math.log(ppl[1] / ppl[0]),
        "kl": np.mean(
            [
                sum(b * math.log(b / o) for b, o in zip(x, y, strict=True))
                for x, y in zip(base_NV, other_NV, strict=True)
            ]
        ),
        "agreement": np.mean([x.argmax() == y.argmax() for x, y in zip(base_NV, other_NV, strict=True)]),
        "p": other.mean(),
        "p_difference": other.mean() - base.mean(),
        "p_difference_rms": math.sqrt(np.mean((other - base) ** 2)),
        "conflicts": wrong[1],
        "conflict_difference": wrong[1] - wrong[0],
    }


@pytest.mark.parametrize("name", ["best", "drawn", "more"])
def test_numbers_are_those_of_their_definitions(name: str) -> None:
    of = logits(3)
    tokens = scored_tokens(of)
    found = compare(tokens.documents, tokens.baseline, tokens.others[name], draws=50)
    expected = by_definition(of, name)
    assert [*found.estimates] == [*expected] == [*QUANTITIES]
    values = [estimate.value for estimate in found.estimates.values()]
    np.testing.assert_allclose(values, [*expected.values()], rtol=1e-6, atol=1e-9)
    assert (found.tokens, found.documents) == (len(of.true), len(set(of.documents)))
    kl = np.sort(tokens.others[name].kl)
    assert found.kl_percentiles["100"] == kl[-1] and found.kl_percentiles["0"] == kl[0]
    middle = (kl[(len(kl) - 1) // 2] + kl[len(kl) // 2]) / 2
    assert found.kl_percentiles["50"] == pytest.approx(middle)
    assert [*map(float, found.kl_percentiles)] == [*KL_PERCENTILES]
    assert [*map(float, found.dp_percentiles)] == [*DP_PERCENTILES]
    assert all(e.low < e.value < e.high if e.error else e.low == e.high for e in found.estimates.values())


def test_js2d_equals_a_loop_over_bins() -> None:
    tokens = scored_tokens(logits(4))
    histograms: list[dict[tuple[int, int], float]] = []
    for of in (tokens.baseline, tokens.others["drawn"]):
        histograms.append({})
        for nats, entropy in zip(of.nats, of.entropy, strict=True):
            place = min(159, int(160 * math.exp(-nats))), min(119, int(120 * float(entropy)))
            histograms[-1][place] = histograms[-1].get(place, 0) + 1 / len(of.nats)
    expected = 0.0
    for place in {**histograms[0], **histograms[1]}:
        first, second = (h.get(place, 0.0) for h in histograms)
        expected += sum(x / 2 * math.log(2 * x / (first + second)) for x in (first, second) if x)
    assert js2d(tokens.baseline, tokens.others["drawn"]) == pytest.approx(expected, rel=1e-9)


def test_models_that_share_no_bin_are_ln_2_apart() -> None:
    low, high = (
        Scored(np.full(9, n), np.full(9, h, np.float32), np.zeros(9, np.int32), np.zeros(9))
        for n, h in ((0.01, 0.1), (5.0, 1.0000001))
    )
    assert js2d(low, high) == pytest.approx(math.log(2))


def test_the_baseline_beside_itself_is_exactly_zero() -> None:
    tokens = scored_tokens(logits(5))
    found = compare(tokens.documents, tokens.baseline, tokens.baseline)
    nothing = Estimate(0.0, 0.0, 0.0, 0.0, 1.0)
    for name, quantity in QUANTITIES.items():
        if quantity.is_difference or name in ("kl", "p_difference_rms"):
            estimate = found.estimates[name]
            assert estimate == nothing, name
    assert found.estimates["agreement"].value == found.estimates["agreement"].low == 1
    assert found.estimates["ppl"] == found.estimates["ppl_baseline"]
    assert {*found.kl_percentiles.values()} == {*found.dp_percentiles.values()} == {0.0} and found.js2d == 0
    assert all(check.passed for check in gate.checks({1024: found}))


@pytest.mark.filterwarnings("error")
def test_models_that_differ_in_one_document_have_finite_intervals() -> None:
    """Draws without it are draws of equal models."""
    tokens = scored_tokens(logits(5))
    same = tokens.documents != tokens.documents[0]
    both = zip(vars(tokens.baseline).values(), vars(tokens.others["drawn"]).values(), strict=True)
    found = compare(tokens.documents, tokens.baseline, Scored(*(np.where(same, a, b) for a, b in both)))
    for name, estimate in found.estimates.items():
        assert np.isfinite([*vars(estimate).values()]).all(), name
        assert estimate.low <= estimate.value <= estimate.high, name
    assert found.estimates["kl"].low == 0 < found.estimates["kl"].high


@pytest.mark.parametrize("name", QUANTITIES)
def test_slopes_of_quantities_are_finite_differences(name: str) -> None:
    """Complex steps need functions that take complex numbers."""
    means = np.linspace(0.11, 0.93, len(Means._fields))
    of = QUANTITIES[name].of
    for at in range(len(means)):
        step = np.zeros(len(means))
        step[at] = 1e-6
        slope = (of(Means(*(means + step))) - of(Means(*(means - step)))) / 2e-6
        assert of(Means(*(means + 1e-30j * (step > 0)))).imag / 1e-30 == pytest.approx(slope, abs=1e-8, rel=1e-6)


def test_cuts_of_conflicts_are_the_baselines() -> None:
    """A model that is wrong and sure everywhere has conflicts everywhere; with its own cuts it would have none."""
    tokens = scored_tokens(logits(6))
    N = len(tokens.documents)
    sure = Scored(np.full(N, 30.0), np.zeros(N, np.float32), tokens.baseline.best, np.zeros(N))
    assert compare(tokens.documents, tokens.baseline, sure, draws=10).estimates["conflicts"].value == 1


def test_tokens_on_the_cuts_of_conflicts() -> None:
    """Of 21 tokens the fourth lies on each cut: it is sure enough, and not improbable enough."""
    p = np.array([0.01, 0.04, 0.02, 0.03, *np.linspace(0.5, 0.9, 17)])
    entropy = (np.arange(21) / 32).astype(np.float32)
    of = Scored(-np.log(p), entropy, np.zeros(21, np.int32), np.zeros(21))
    own, others = conflicts(of, of)
    assert [*np.flatnonzero(own)] == [*np.flatnonzero(others)] == [0, 2, 3]


def test_scores_that_are_not_finite_or_not_of_the_same_tokens_are_refused() -> None:
    tokens = scored_tokens(logits(7))
    other = tokens.others["best"]
    other.nats[3] = np.nan
    with pytest.raises(StatisticsError, match="best: nats of scored token 3 is nan"):
        compare(tokens.documents, tokens.baseline, other, "best")
    short = Scored(*(x[:-1] for x in vars(tokens.others["more"]).values()))
    with pytest.raises(DataError, match="more: has"):
        compare(tokens.documents, tokens.baseline, short, "more")


# The gate


def quality(ppl: float = 10.0, more: float = 0.0, conflict: float = 0.0, p: float = 0.0, js: float = 0.0) -> Quality:
    values = {"ppl_baseline": ppl, "ppl_difference": more, "conflict_difference": conflict, "p_difference": p}
    return Quality(9, 3, {name: Estimate(value, value, value, 0.0, 1.0) for name, value in values.items()}, {}, {}, js)


@pytest.mark.parametrize(
    ("of", "fails"),
    [
        (quality(), []),
        (quality(more=0.25, conflict=0.002, p=-0.02, js=0.02), []),
        (quality(more=-0.2501), ["|ΔPPL|"]),
        (quality(ppl=2.8, more=0.141), ["|ΔPPL|"]),
        (quality(ppl=2.8, more=0.139), []),
        (quality(conflict=-0.0021), ["|Δ conflict rate|"]),
        (quality(p=0.021), ["|Δ mean p|"]),
        (quality(js=0.021), ["JS2D"]),
    ],
)
def test_thresholds_of_the_gate(of: Quality, fails: list[str]) -> None:
    assert [check.name for check in gate.checks({1024: of}) if not check.passed] == fails
    both = [(check.name, check.seq_len) for check in gate.checks({1024: quality(), 2048: of}) if not check.passed]
    assert both == [(name, 2048) for name in fails]


def test_the_gate_stops_loops_that_rise_and_ends_that_fall() -> None:
    sound = replies(1, 200, looping=0.02)
    for worse, fails in (
        (replies(2, 200, looping=0.3), ["p of a rise of loops"]),
        (sound, []),
        (
            [reply.__class__(**vars(reply) | {"ended": n % 2 == 0}) for n, reply in enumerate(sound)],
            ["p of a fall of natural ends"],
        ),
    ):
        found = gate.checks({}, compare_replies(sound, worse, 100))
        assert [check.name for check in found if not check.passed] == fails
    better = compare_replies(replies(2, 200, looping=0.3), sound, 100)
    assert better.differences["loops"].p_value < 1e-6 and all(check.passed for check in gate.checks({}, better))


# llama.cpp's lines


def found_by(pattern: str, text: str) -> tuple[float, ...]:
    """As scripts read the output: the pattern's groups as numbers."""
    match = re.search(pattern, text)
    assert match, pattern
    return tuple(map(float, match.groups()))


def test_scripts_find_llamas_lines() -> None:
    tokens = scored_tokens(logits(8))
    base, other = tokens.baseline, tokens.others["drawn"]
    text = "\n".join(llama_lines(base, other))
    quality = compare(tokens.documents, base, other, draws=10)
    value = {name: estimate.value for name, estimate in quality.estimates.items()}
    number = r"\s*(-?\d+\.\d+)"
    both = rf":{number}\s*±{number}"
    assert found_by(rf"Mean PPL\(Q\)\s*{both}", text)[0] == pytest.approx(value["ppl"], abs=1e-6)
    assert found_by(rf"Mean PPL\(base\)\s*{both}", text)[0] == pytest.approx(value["ppl_baseline"], abs=1e-6)
    assert found_by(rf"Mean ln\(PPL\(Q\)/PPL\(base\)\)\s*{both}", text)[0] == pytest.approx(
        value["ln_ppl_ratio"], abs=1e-6
    )
    assert found_by(rf"Mean PPL\(Q\)/PPL\(base\)\s*{both}", text)[0] == pytest.approx(
        value["ppl"] / value["ppl_baseline"], abs=1e-6
    )
    assert found_by(rf"Mean PPL\(Q\)-PPL\(base\)\s*{both}", text)[0] == pytest.approx(value["ppl_difference"], abs=1e-6)
    assert 0 < found_by(rf"Cor\(ln\(PPL\(Q\)\), ln\(PPL\(base\)\)\):{number}%", text)[0] < 100
    assert found_by(rf"Mean\s+KLD{both}", text)[0] == pytest.approx(value["kl"], abs=1e-6)
    for words, name in (
        ("Maximum", "100"),
        (r"99\.9%", "99.9"),
        (r"99\.0%", "99"),
        ("Median", "50"),
        (r" 5\.0%", "5"),
        ("Minimum", "0"),
    ):
        assert found_by(rf"(?m)^{words}\s+KLD:{number}$", text)[0] == pytest.approx(
            quality.kl_percentiles[name], abs=1e-6
        )
        assert found_by(rf"(?m)^{words}\s+Δp:{number}%$", text)[0] == pytest.approx(
            100 * quality.dp_percentiles[name], abs=1e-3
        )
    assert found_by(rf"Mean\s+Δp{both} %", text)[0] == pytest.approx(100 * value["p_difference"], abs=1e-3)
    assert found_by(rf"RMS Δp\s*{both} %", text)[0] == pytest.approx(100 * value["p_difference_rms"], abs=1e-3)
    assert found_by(rf"Same top p{both} %", text)[0] == pytest.approx(100 * value["agreement"], abs=1e-3)


def test_llamas_errors_are_its_formulas() -> None:
    """Sums over tokens, as its source has them: mean_and_uncertainty and covariance."""
    tokens = scored_tokens(logits(9))
    x, y = tokens.others["best"].nats, tokens.baseline.nats
    n = len(x)

    def uncertainty(total: float, squares: float) -> float:
        return math.sqrt((squares / n - (total / n) ** 2) / (n - 1))

    ux, uy = uncertainty(x.sum(), (x * x).sum()), uncertainty(y.sum(), (y * y).sum())
    covariance = ((x * y).sum() / n - x.sum() / n * y.sum() / n) / (n - 1)
    ppl, base = math.exp(x.mean()), math.exp(y.mean())
    ratio, ratio_error = x.mean() - y.mean(), math.sqrt(ux**2 + uy**2 - 2 * covariance)
    difference = math.sqrt((ppl * ux) ** 2 + (base * uy) ** 2 - 2 * ppl * base * covariance)
    lines = llama_lines(tokens.baseline, tokens.others["best"])
    assert lines[:8] == [
        "====== Perplexity statistics ======",
        f"Mean PPL(Q)                   : {ppl:10.6f} ± {ppl * ux:10.6f}",
        f"Mean PPL(base)                : {base:10.6f} ± {base * uy:10.6f}",
        f"Cor(ln(PPL(Q)), ln(PPL(base))): {100 * covariance / ux / uy:6.2f}%",
        f"Mean ln(PPL(Q)/PPL(base))     : {ratio:10.6f} ± {ratio_error:10.6f}",
        f"Mean PPL(Q)/PPL(base)         : {ppl / base:10.6f} ± {ppl / base * ratio_error:10.6f}",
        f"Mean PPL(Q)-PPL(base)         : {ppl - base:10.6f} ± {difference:10.6f}",
        "",
    ]
    rms = math.sqrt(np.mean((np.exp(-x) - np.exp(-y)) ** 2))
    square = (np.exp(-x) - np.exp(-y)) ** 2
    error = 0.5 / rms * uncertainty(square.sum(), (square**2).sum())
    assert lines[-2] == f"RMS Δp    : {100 * rms:6.3f} ± {100 * error:5.3f} %"


def test_llamas_lines_of_the_baseline_itself_are_numbers() -> None:
    tokens = scored_tokens(logits(9))
    text = "\n".join(llama_lines(tokens.baseline, tokens.baseline))
    assert (
        "nan" not in text and "Same top p: 100.000 ± 0.000 %" in text and "Mean    KLD:   0.000000 ±   0.000000" in text
    )
    assert llama_lines(*(Scored(*(x[:99] for x in vars(tokens.baseline).values())) for _ in range(2))) == []
