"""Intervals: the vectorised bootstrap equals a loop over draws, and intervals hold the truth as often as they say."""

from collections.abc import Callable

import numpy as np
import pytest

from gptoss_jax.errors import DataError
from gptoss_jax.evaluation import intervals
from gptoss_jax.evaluation.intervals import Clusters, Estimate, clusters, estimates, holm
from gptoss_jax.evaluation.replies import Judged, compare_replies

LENGTHS = np.array([3, 1, 7, 2, 2, 9, 4, 1, 5, 6, 3, 8])
DOCUMENTS = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
Quantities = list[Callable[[np.ndarray], np.ndarray]]


def mean(column: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    return lambda means: means[..., column]


def grown(means: np.ndarray) -> np.ndarray:
    """As a difference of perplexities is made."""
    return np.exp(means[..., 0]) * np.expm1(means[..., 1])


def columns(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=len(LENGTHS))[DOCUMENTS]
    return [1 + shared + rng.normal(size=len(DOCUMENTS)), 0.1 + 0.2 * rng.normal(size=len(DOCUMENTS))]


def by_loop(documents: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """`grown` of some tokens and its standard error, documents one after the other and slopes by hand."""
    a, b = x.mean(), y.mean()
    moved = np.exp(a) * np.expm1(b) * (x - a) + np.exp(a + b) * (y - b)
    every = [*dict.fromkeys(documents)]
    squares = sum(moved[documents == document].sum() ** 2 for document in every)
    return np.exp(a) * np.expm1(b), np.sqrt(len(every) / (len(every) - 1) * squares) / len(x)


def test_the_bootstrap_equals_a_loop_over_draws() -> None:
    x, y = columns(1)
    draws, D = 60, len(LENGTHS)
    value, error = by_loop(DOCUMENTS, x, y)
    times_CD = np.random.default_rng(7).multinomial(D, np.full(D, 1 / D), size=draws)
    ratios = []
    for times_D in times_CD:
        tokens, copies = [], []
        for number, times in enumerate(times_D):
            for copy in range(times):
                tokens.append(np.flatnonzero(np.equal(DOCUMENTS, number)))
                copies.append(np.full(len(tokens[-1]), D * number + copy))
        at = np.concatenate(tokens)
        drawn, its_error = by_loop(np.concatenate(copies), x[at], y[at])
        ratios.append((drawn - value) / its_error)
    ratios.sort()
    (found,) = estimates(clusters(DOCUMENTS, [x, y]), [grown], draws, seed=7)
    # Of 60 draws the quantiles 0.025 and 0.975 lie between the second and third from each end: the outer one is taken.
    expected = [value, value - ratios[-2] * error, value - ratios[1] * error, error]
    np.testing.assert_allclose([found.value, found.low, found.high, found.error], expected, rtol=1e-9)


def test_the_standard_error_is_millers() -> None:
    """That of arXiv:2411.00640: products of all pairs within a cluster."""
    x, _ = columns(2)
    square = 0.0
    for number in range(len(LENGTHS)):
        own = np.flatnonzero(np.equal(DOCUMENTS, number))
        for i in own:
            for j in own:
                square += (x[i] - x.mean()) * (x[j] - x.mean())
    (found,) = estimates(clusters(DOCUMENTS, [x]), [mean()], 10)
    few = len(LENGTHS) / (len(LENGTHS) - 1)
    assert found.error == pytest.approx(np.sqrt(few * square) / len(x), rel=1e-12)


def test_the_order_of_tokens_and_the_chunk_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    order = np.random.default_rng(3).permutation(len(DOCUMENTS))
    x, y = columns(3)
    (one,) = estimates(clusters(DOCUMENTS, [x, y]), [grown], 200)
    monkeypatch.setattr(intervals, "CHUNK", 5 * len(LENGTHS))
    (other,) = estimates(clusters(DOCUMENTS[order], [x[order], y[order]]), [grown], 200)
    np.testing.assert_allclose([*vars(one).values()], [*vars(other).values()], rtol=1e-9)
    (third,) = estimates(clusters(DOCUMENTS, [x, y]), [grown], 200, seed=1)
    assert (third.value, third.error) == (one.value, one.error) and third.low != one.low


def test_what_never_varies_has_no_width() -> None:
    ones, zeros = np.ones(len(DOCUMENTS)), np.zeros(len(DOCUMENTS))
    found = estimates(clusters(DOCUMENTS, [ones, zeros]), [mean(0), mean(1)], 100)
    assert found == [Estimate(1.0, 1.0, 1.0, 0.0, 0.0), Estimate(0.0, 0.0, 0.0, 0.0, 1.0)]


def test_one_document_that_differs_has_a_finite_interval() -> None:
    """A third of the draws miss it, and say that nothing varies."""
    x = np.equal(DOCUMENTS, 4).astype(float)
    (found,) = estimates(clusters(DOCUMENTS, [x]), [mean()], 300)
    assert found.low < 0 < found.value < found.high < 1
    assert found.high - found.value == pytest.approx(found.value - found.low) and found.p_value > 0.05


def test_one_document_is_refused() -> None:
    with pytest.raises(DataError, match="1 rows have scored tokens"):
        clusters(np.zeros(5, np.int32), [np.ones(5)])


# Coverage. The truth is the mean of very many documents.

CASES, SOME = 500, 200


def document_sums(kind: str, D: int, rng: np.random.Generator) -> Clusters:
    """Sums of documents whose lengths are skewed, and whose tokens resemble one another."""
    counts_D = np.maximum(1, rng.lognormal(3, 0.8, D)).astype(int)
    of_D = rng.normal(size=D)
    if kind == "difference":  # as of nats of two models, normal
        sums_D = counts_D * (0.02 + 0.05 * of_D) + rng.normal(size=D) * np.sqrt(counts_D) * 0.3
    elif kind == "agreement":  # between 0.6 and 0.98 for most
        sums_D = rng.binomial(counts_D, 1 / (1 + np.exp(-2 - of_D))).astype(float)
    else:  # as of KL: above zero and skewed, between documents and within
        spread = 1.0 if kind == "skewed" else 0.5
        sums_D = rng.gamma(0.5 * counts_D) * 0.1 * np.exp(spread * of_D)
    return Clusters(sums_D[:, None], counts_D.astype(float))


def covered(kind: str, D: int = SOME) -> tuple[float, float]:
    """How often the bootstrap's interval holds the truth, and how often the p-value does not reject it at 0.05."""
    rng = np.random.default_rng(15)
    everyone = document_sums(kind, 1_000_000, rng)
    truth = everyone.sums_DM.sum() / everyone.counts_D.sum()
    held = np.zeros(2)
    for case in range(CASES):
        of = document_sums(kind, D, rng)
        # The truth is moved to zero, which is what the p-value is of.
        moved = Clusters(of.sums_DM - truth * of.counts_D[:, None], of.counts_D)
        (found,) = estimates(moved, [mean()], 400, seed=case)
        held += [found.low <= 0 <= found.high, found.p_value > 0.05]
    return tuple(held / CASES)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["difference", "agreement", "kl"])
def test_intervals_hold_the_truth_as_often_as_they_say(kind: str) -> None:
    bootstrap, robust = covered(kind)
    assert 0.92 <= bootstrap <= 0.98
    assert 0.92 <= robust <= 0.98


def test_the_bootstrap_holds_where_symmetric_intervals_do_not() -> None:
    """Means of documents that spread over two orders of magnitude."""
    bootstrap, robust = covered("skewed")
    assert 0.92 <= bootstrap <= 0.98 and robust < bootstrap


def test_percentiles_of_draws_are_those_of_a_loop() -> None:
    x, _ = columns(5)
    D = len(LENGTHS)
    times_CD = np.random.default_rng(3).multinomial(D, np.full(D, 1 / D), size=80)
    drawn = [np.average(x, weights=np.repeat(times_D, LENGTHS)) for times_D in times_CD]
    (found,) = estimates(clusters(DOCUMENTS, [x]), [mean()], 80, seed=3, studentised=False)
    np.testing.assert_allclose([found.low, found.high], np.quantile(drawn, [0.025, 0.975]), rtol=1e-9)


@pytest.mark.parametrize(("rise", "fall"), [(0.05, 0.1), (0.02, 0.2)])
def test_intervals_of_replies_hold_the_truth(rise: float, fall: float) -> None:
    """Of 100 rows some are answered rightly by one model alone."""
    rng, held, rows = np.random.default_rng(16), np.zeros(2), 100
    for case in range(CASES):
        kind = rng.choice(3, rows, p=[rise, fall, 1 - rise - fall])
        both = rng.random(rows) < 0.7
        base, other = (np.where(kind == 2, both, kind == alone) for alone in (1, 0))
        replies = [[Judged(False, 1.0, True, True, 9, bool(right)) for right in of] for of in (base, other)]
        found = compare_replies(*replies, draws=400, seed=case)
        truths = (rise - fall, 0.7 * (1 - rise - fall) + rise)
        for at, (of, truth) in enumerate(zip((found.differences, found.estimates), truths, strict=True)):
            held[at] += of["correct"].low <= truth <= of["correct"].high
    assert (held >= 0.92 * CASES).all() and (held <= 0.98 * CASES).all()


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == [] and holm([0.5]) == [0.5] and holm([0.9, 0.8]) == [1.0, 1.0]


@pytest.mark.parametrize("seed", range(5))
def test_holm_rejects_what_the_step_down_rejects(seed: int) -> None:
    p_values = np.random.default_rng(seed).beta(0.3, 2, 8)
    corrected = holm([*p_values])
    for level in np.linspace(0.001, 0.999, 97):
        rejected = set()
        for rank, at in enumerate(np.argsort(p_values)):
            if p_values[at] * (len(p_values) - rank) > level:
                break
            rejected.add(int(at))
        assert {at for at, p_value in enumerate(corrected) if p_value <= level} == rejected
