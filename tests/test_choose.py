"""Choices of experts against plain loops and every possible set: mixes of domains, budgets, shares, blends, floors."""

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gptoss_jax as gj
from convert.shards import INDEX
from gptoss_jax.config import GPT_OSS_20B, SLIDING, TINY
from gptoss_jax.errors import OptionError, ProfileError, RankingError
from gptoss_jax.interface import choosing
from gptoss_jax.network import cache
from gptoss_jax.run.choosing import Keeping, Ranked
from gptoss_jax.selection import blend, budgets, choice, coverage
from gptoss_jax.selection.blend import Sets
from gptoss_jax.selection.criteria import CRITERIA, masses
from gptoss_jax.selection.evidence import Evidence, read_evidence
from gptoss_jax.selection.mixes import mixed, weights_of
from gptoss_jax.selection.origin import Origin, profile_origin, rows_as_text, rows_of_text
from gptoss_jax.selection.serving import serving_limits
from gptoss_jax.statistics.store import read_sums
from gptoss_jax.statistics.sums import DECLARED
from gptoss_jax.statistics.tables import Columns, read_by_domain, read_columns

from .bad_input import Refused, case, edit
from .made_up import Finished

K = 2  # experts a token


def drawn(rng: np.random.Generator, tokens: int, L: int = 2, E: int = 8, peak: float = 1.0) -> Columns:
    """The columns of so many tokens, each of which chose K experts of each layer."""
    count = np.zeros((L, E), np.int64)
    for layer in range(L):
        liked = rng.dirichlet(np.full(E, peak))
        for _ in range(tokens):
            count[layer, rng.choice(E, K, replace=False, p=liked * 0.9 + 0.1 / E)] += 1
    sums = {name: count * rng.exponential(size=(L, E)) for name in ("gate_sum", "norm_sum", "gate_norm_sum")}
    return {"count": count, **sums, "activation_max": (count > 0) * rng.exponential(9, size=(L, E))}


def domains(seed: int, *tokens: int, **sizes: Any) -> dict[str, Columns]:
    rng = np.random.default_rng(seed)
    return {"abcdefgh"[number]: drawn(rng, n, **sizes) for number, n in enumerate(tokens)}


def pooled(by_domain: Mapping[str, Columns]) -> Columns:
    tables = [*by_domain.values()]
    added = {name: np.sum([table[name] for table in tables], axis=0) for name in tables[0] if name != "activation_max"}
    return added | {"activation_max": np.maximum.reduce([table["activation_max"] for table in tables])}


def evidence(by_domain: dict[str, Columns], weights: Any = None, **info: Any) -> Evidence:
    found = weights_of(weights)
    columns = mixed(by_domain, found) if found else pooled(by_domain)
    return Evidence(columns, by_domain, Origin(domains=found), info)


class Made:
    """An open profile of made-up tables, as far as a choice asks for one."""

    def __init__(self, by_domain: dict[str, Columns], **info: Any):
        self.by_domain, self.info = by_domain, info

    def evidence(self, domain: Any) -> Evidence:
        return evidence(self.by_domain, domain, **self.info)


# Mixes


def test_a_mix_is_what_a_loop_over_domains_makes() -> None:
    tokens = {"a": 30, "b": 7, "c": 100}
    by_domain = domains(0, *tokens.values())
    weights = {"a": 2.0, "b": 1.0, "c": 0.0}
    mix = mixed(by_domain, weights)
    for layer, expert in np.ndindex(2, 8):
        for name in ("count", "gate_sum", "norm_sum", "gate_norm_sum"):
            share = 0.0
            for domain, weight in weights.items():
                share += weight / 3.0 * by_domain[domain][name][layer, expert] / tokens[domain]
            assert np.isclose(mix[name][layer, expert], share * 137, rtol=1e-12)
        largest = max(by_domain[domain]["activation_max"][layer, expert] for domain in "ab")
        assert mix["activation_max"][layer, expert] == largest
    np.testing.assert_allclose(mix["count"].sum(1), K * 137)


def test_weights_are_shares_whatever_the_sizes_of_domains() -> None:
    by_domain = domains(1, 40, 20)
    larger = by_domain | {"b": {n: x * (1 if n == "activation_max" else 9) for n, x in by_domain["b"].items()}}
    mixes = [evidence(some, {"a": 1, "b": 3}) for some in (by_domain, larger)]
    for name in ("reap", "reap_sum", "frequency", "gate", "ean_mean"):
        assert mixes[0].rank(name, 0).layers == mixes[1].rank(name, 0).layers
    only = evidence(by_domain, {"a": 1, "b": 1e-12}).rank("reap_sum", 0).layers
    assert only == evidence({"a": by_domain["a"]}).rank("reap_sum", 0).layers or only[0][0] == only[0][0]


@given(st.dictionaries(st.sampled_from("abc"), st.floats(0, 1e308), min_size=1))
@settings(max_examples=50)
def test_any_weights_give_finite_sums_or_are_refused(weights: dict[str, float]) -> None:
    by_domain = domains(2, 5, 6, 7)
    if not any(weights.values()):
        with pytest.raises(OptionError, match="no weight is above 0"):
            weights_of(weights)
        return
    for column in mixed(by_domain, weights_of(weights)).values():
        assert np.isfinite(column).all() and (column >= 0).all()


def test_a_mix_of_one_domain_is_that_domain() -> None:
    by_domain = domains(3, 12, 30)
    assert mixed(by_domain, {"b": 7.0}) is by_domain["b"]


def test_means_divide_by_counts_below_one() -> None:
    """A domain with a small share has counts below 1 in the mix, and its means stay what they were."""
    by_domain = domains(4, 3, 4000)
    mix = mixed(by_domain, {"a": 1e-3, "b": 1.0})
    alone = (by_domain["a"]["count"] > 0) & (by_domain["b"]["count"] == 0)
    mix = mix | {"count": mix["count"] * ~alone + alone * 0.25, "gate_norm_sum": np.where(alone, 0.5, 0)}
    found = CRITERIA["reap"].score(mix, 0)
    assert (found[alone] == 2).all()


def test_names_of_columns_say_how_they_join() -> None:
    """A mix is made where no JAX is at hand: from names alone."""
    for name, statistic in DECLARED.items():
        assert name.endswith("_max") == statistic.largest and not name.endswith("_mean"), name
        assert statistic.mean == "" or statistic.mean.endswith("_mean")


def test_counts_of_a_mix_are_written_as_whole_numbers() -> None:
    by_domain = domains(5, 3, 900)
    ranking = evidence(by_domain, {"a": 1e-4, "b": 1}).rank("reap", 0)
    mix = mixed(by_domain, {"a": 1e-4, "b": 1.0})["count"]
    assert ranking.counts is not None
    for layer, (experts, counts) in enumerate(zip(ranking.layers, ranking.counts, strict=True)):
        assert counts == [max(1, round(mix[layer, e])) if mix[layer, e] else 0 for e in experts]


def test_domains_of_a_profile_and_of_a_table_alone(finished: Finished, tmp_path: Path) -> None:
    profile = finished("profile", 1, domains=("", "a", "b"))
    mix = {"a": 2, "b": 1}
    held = gj.Profile.open(profile)
    for domain in ("a", {"a": 5}, mix, None):
        expected = gj.rank(profile, domain=domain)
        assert held.rank(domain=domain) == expected == gj.rank(held, domain=domain)
        assert expected.origin.domains == weights_of(domain)
    alone = profile / "saliency_by_domain.parquet"
    assert gj.rank(alone, domain=mix).layers == gj.rank(profile, domain=mix).layers
    assert [*read_by_domain(alone)] == held.domains == ["a", "b"]
    for name, column in read_by_domain(profile)["b"].items():
        np.testing.assert_array_equal(column, read_columns(profile, "b")[name])
    assert gj.rank(profile, domain={"a": 1}).layers == gj.rank(profile, domain="a").layers
    with pytest.raises(ProfileError, match="no domain 'c': there are a, b"):
        gj.select(held, keep=2, domain={"a": 1, "c": 1})
    with pytest.raises(ProfileError, match=r"parquet: no domain 'c': there are a, b"):
        gj.rank(profile, domain={"a": 1, "c": 1})


# Rows that were counted


def test_rankings_and_keep_sets_name_the_rows_that_were_counted(finished: Finished, tmp_path: Path) -> None:
    profile = finished("profile", 3, domains=("a", "b"))
    rows = read_sums(profile / "statistics.safetensors").row_hashes
    for made in (gj.rank(profile), gj.select(profile, keep=2), gj.Profile.open(profile).rank(domain="a")):
        found = made.origin.row_hashes
        assert found is not None and found.dtype == np.uint64
        np.testing.assert_array_equal(found, np.sort(rows))
    assert gj.rank(profile / "saliency.parquet").origin.calibration_rows is None
    assert "calibration_rows" not in json.loads(gj.rank(profile / "saliency.parquet").to_json())
    held = gj.Profile.open(profile)
    assert gj.rank(gj.Profile(held.info, held.sums)).origin.calibration_rows == rows_as_text(np.sort(rows))


@given(st.lists(st.integers(0, 2**64 - 1)))
def test_hashes_come_back_from_their_text(hashes: list[int]) -> None:
    text = rows_as_text(np.array(sorted(hashes), np.uint64))
    assert rows_of_text(text).tolist() == sorted(hashes)
    assert len(text) == -(-8 * len(hashes) // 3) * 4
    if sorted(hashes) != sorted(hashes, reverse=True):
        with pytest.raises(ValueError, match="not sorted"):
            rows_of_text(rows_as_text(np.array(sorted(hashes, reverse=True), np.uint64)))


@pytest.mark.parametrize("data", [b"", b"\xff" * 40, b"\x02\0\0\0\0\0\0\0{}", b"\x20\0\0\0\0\0\0\0{}"])
def test_a_damaged_store_is_said_in_one_line(data: bytes, finished: Finished, refused: Refused) -> None:
    profile = finished("profile", 1)
    (profile / "statistics.safetensors").write_bytes(data)
    refused("rank", profile, says=("statistics.safetensors", "not the sums of a profile"))


# Budgets


@pytest.mark.parametrize("form", ["tiny_mxfp4", "tiny_bf16"])
@pytest.mark.parametrize("format", ["same", "mxfp4", "bf16"])
@pytest.mark.parametrize("keep", [3, 5])
def test_bytes_are_those_of_the_files_that_prune_writes(
    form: str, format: str, keep: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = gj.open(str(request.getfixturevalue(form)))
    pruned = gj.prune(model, [[*range(keep)]] * TINY.num_layers, out=tmp_path / "cut", format=format)
    written = json.loads((Path(pruned.folder) / INDEX).read_text())["metadata"]["total_size"]
    quantize = model.source.quantized if format == "same" else format == "mxfp4"
    assert budgets.weight_bytes(model.config, keep, quantize) == written == pruned.weight_bytes


def test_bytes_of_the_published_model() -> None:
    """Spec: an expert of a layer, with its row of the router, is 13,242,242 bytes in MXFP4."""
    more = budgets.weight_bytes(GPT_OSS_20B, 12, True) - budgets.weight_bytes(GPT_OSS_20B, 11, True)
    assert more == 24 * 13_242_242
    assert budgets.weight_bytes(GPT_OSS_20B, 12, False) == 2 * 8_965_291_104


@pytest.mark.parametrize("context", [1, 8, 9, 10, 500])
def test_bytes_of_the_cache_are_those_of_its_arrays(context: int) -> None:
    arrays = [cache.empty(TINY, 3, context, kind, "bfloat16") for kind in TINY.layer_types]
    assert budgets.cache_bytes(TINY, context, 3) == sum(of.keys.nbytes + of.values.nbytes for of in arrays)
    assert SLIDING in TINY.layer_types and TINY.sliding_window == 9


@given(st.integers(1, 7), st.booleans(), st.integers(0, 1000))
def test_the_most_experts_that_fit(num_kept: int, quantize: bool, beside: int) -> None:
    exactly = (budgets.weight_bytes(TINY, num_kept, quantize) + beside) / budgets.GIB
    assert budgets.most_experts(TINY, exactly, quantize, beside) == num_kept
    less = exactly - 1 / budgets.GIB
    if num_kept == 1:
        with pytest.raises(RankingError, match="with 1 expert a layer the model takes"):
            budgets.most_experts(TINY, less, quantize, beside)
    else:
        assert budgets.most_experts(TINY, less, quantize, beside) == num_kept - 1


def test_a_budget_by_what_the_profile_says_of_its_model(
    tiny_mxfp4: Path, rows_jsonl: Path, finished: Finished, tmp_path: Path
) -> None:
    profile = gj.profile(str(tiny_mxfp4), str(rows_jsonl), max_seq_length=64, num_rows=2, out=tmp_path / "profile")
    room = budgets.weight_bytes(TINY, 4, True) / budgets.GIB
    for chosen_from in (profile, tmp_path / "profile"):
        assert len(gj.select(chosen_from, budget_gib=room).layers[0]) == 4
        assert len(gj.select(chosen_from, budget_gib=room, context=9).layers[0]) == 3
        assert len(gj.select(chosen_from, budget_gib=room, format="bf16").layers[0]) == 1
    edit(tmp_path / "profile" / "profile.json", config=..., quantized=...)
    with pytest.raises(ProfileError, match="--model MODEL"):
        gj.select(tmp_path / "profile", budget_gib=room)
    assert len(gj.select(tmp_path / "profile", budget_gib=room, model=str(tiny_mxfp4)).layers[0]) == 4
    with pytest.raises(ProfileError, match="the profile 2 of 5"):
        gj.select(finished("other", 1), budget_gib=room, model=str(tiny_mxfp4))


# Shares


@pytest.mark.parametrize("seed", range(20))
def test_the_fewest_experts_that_hold_a_share(seed: int) -> None:
    table = drawn(np.random.default_rng(seed), 50)
    of = evidence({"a": table})
    share = float(np.random.default_rng(seed).uniform(0.1, 1)) if seed else 1.0
    fewest = len(gj.select(Made({"a": table}), coverage=share).layers[0])

    def held(count: int) -> float:
        layers = of.rank("reap", 0).layers
        mass = table["gate_norm_sum"]
        return min(sum(mass[i, e] for e in experts[:count]) / mass[i].sum() for i, experts in enumerate(layers))

    assert held(fewest) >= share - 1e-9 and (fewest == 1 or held(fewest - 1) < share)


def coverage_by_loop(table: Columns, layers: list[list[int]], mass: str = "gate_norm_sum") -> float:
    kept = []
    for layer, experts in enumerate(layers):
        own = sorted(table[mass][layer], reverse=True)[: len(experts)]
        kept.append(sum(table[mass][layer, e] for e in experts) / sum(own) if sum(own) else 1.0)
    return sum(kept) / len(kept)


@pytest.mark.parametrize("criterion", ["reap", "frequency", "random"])
def test_what_domains_lose(criterion: str) -> None:
    by_domain = domains(6, 40, 10, 90) | {"empty": {n: x * 0 for n, x in domains(0, 3)["a"].items()}}
    (found,) = choosing.choose(Made(by_domain), Ranked(criterion=criterion), Keeping(keep=3))
    mass = {"frequency": "count"}.get(criterion, "gate_norm_sum")
    expected = {n: coverage_by_loop(t, found.keep_sets.layers, mass) for n, t in by_domain.items() if n != "empty"}
    assert [*found.coverage] == sorted(expected, key=expected.__getitem__)
    assert found.coverage == pytest.approx(expected)


def test_a_layer_without_mass_loses_nothing() -> None:
    mass = np.array([[[0.0, 0, 0], [4, 2, 1]]])
    kept = coverage.mask_of([[0, 1], [1, 2]], 3)
    assert coverage.coverages(mass, kept).tolist() == [(1 + 3 / 6) / 2]


# Blends and floors against every possible set


def every_set(L: int, E: int, num_kept: int, allowed: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """All keep-sets as masks."""
    of_layer = [*itertools.combinations(range(E), num_kept)]
    for chosen in itertools.product(of_layer, repeat=L):
        mask = coverage.mask_of([[*kept] for kept in chosen], E)
        if allowed is None or not (mask & ~allowed).any():
            yield mask


def all_sets(num_kept: int, L: int = 2, E: int = 8) -> np.ndarray:
    return np.stack([*every_set(L, E, num_kept)])


SETS = {num_kept: all_sets(num_kept) for num_kept in range(1, 9)}


def covered(mass_DLE: np.ndarray, num_kept: int) -> np.ndarray:
    """The coverage [sets, D] of every possible keep-set."""
    best_DL = np.sort(mass_DLE, axis=2)[:, :, ::-1][:, :, :num_kept].sum(2)
    retained = np.einsum("sle,dle->sdl", SETS[num_kept], mass_DLE)
    ratios = np.divide(
        retained, best_DL, out=np.ones_like(retained), where=np.broadcast_to(best_DL > 0, retained.shape)
    )
    found: np.ndarray = ratios.mean(2)
    return found


FREE = Sets(0, np.ones((2, 8), bool), np.zeros((2, 8), bool))


def some_masses(seed: int) -> tuple[np.ndarray, int]:
    rng = np.random.default_rng(seed)
    mass = rng.lognormal(0, rng.uniform(0.2, 2), (int(rng.integers(2, 5)), 2, 8))
    mass *= rng.random(mass.shape) < rng.uniform(0.3, 1)  # some experts are never chosen, some layers hold nothing
    return mass, int(rng.integers(1, 8))


@pytest.mark.parametrize("seed", range(60))
def test_maxmin_is_the_best_of_every_set(seed: int) -> None:
    mass, num_kept = some_masses(seed)
    shares, nothing = coverage.shares(mass, num_kept)
    found = blend.maxmin(shares, nothing, replace(FREE, num_kept=num_kept))
    best = covered(mass, num_kept).min(1).max()
    assert found.value == pytest.approx(coverage.coverages(mass, found.kept_LE).min())
    assert found.value == pytest.approx(best, abs=1e-6) and found.bound >= best - 1e-6
    assert found.weights_D.sum() == pytest.approx(1) and (found.weights_D >= 0).all()


@pytest.mark.parametrize("seed", range(200))
def test_floors_are_held_at_the_least_loss_of_every_set(seed: int) -> None:
    """Spec: in 200 drawn cases of 8 experts the optimum, or that there is none."""
    mass, num_kept = some_masses(seed)
    rng = np.random.default_rng(1000 + seed)
    least = rng.uniform(0.3, 0.98, len(mass))
    (pooled_LE,), bare = coverage.shares(mass.sum(0)[None], num_kept)
    shares, nothing = coverage.shares(mass, num_kept)
    found = blend.floors(pooled_LE, shares, nothing, least, replace(FREE, num_kept=num_kept))
    every = covered(mass, num_kept)
    holds = (every >= least).all(1)
    if found is None:
        assert not holds.any()
        return
    assert holds.any() and (coverage.coverages(mass, found.kept_LE) >= least - 1e-6).all()
    assert found.value + bare[0] == pytest.approx(covered(mass.sum(0)[None], num_kept)[holds].max(), abs=1e-6)


@pytest.mark.parametrize("seed", range(30))
def test_floors_that_cannot_be_held_name_the_nearest(seed: int) -> None:
    by_domain = domains(seed, 30, 30, 30, peak=0.3)
    names, num_kept = ["a", "b", "c"], 2
    mass = np.stack([by_domain[name]["gate_norm_sum"] for name in names])
    least = np.array([0.95, 0.9, 0.85])
    shares = dict(zip(names, least.tolist(), strict=True))
    holding = [n for n in SETS if (covered(mass, n) >= least).all(1).any()]
    if num_kept in holding:
        found = gj.select(Made(by_domain), keep=num_kept, floor=shares)
        assert all(coverage_by_loop(by_domain[n], found.layers) >= shares[n] - 1e-6 for n in names)
        return
    with pytest.raises(RankingError) as refusal:
        gj.select(Made(by_domain), keep=num_kept, floor=shares)
    said = re.search(r"they hold ([\d.]+) of each, and (\d) hold all", str(refusal.value))
    assert said is not None
    factor = (covered(mass, num_kept) / least).min(1).max()
    assert float(said[1]) == pytest.approx(factor, abs=1.1e-3) and float(said[1]) <= factor + 1e-9
    assert int(said[2]) == min(n for n in holding if n > num_kept)
    again = gj.select(Made(by_domain), keep=num_kept, floor={n: x * (factor - 2e-3) for n, x in shares.items()})
    assert len(again.layers[0]) == num_kept
    assert gj.select(Made(by_domain), keep=int(said[2]), floor=shares)


@pytest.mark.parametrize("way", [{}, {"blend": "maxmin"}, {"floor": {"a": 0.9, "b": 0.5}}, {"protect_outliers": 3}])
def test_smaller_sets_lie_inside_the_larger(way: dict[str, Any]) -> None:
    by_domain = domains(8, 60, 20, 40)
    family = gj.select(Made(by_domain), keep=[4, 6, "37.5%"], **way)
    assert [{*map(len, one.layers)} for one in family] == [{4}, {6}, {3}]
    for small, large in ((family[2], family[0]), (family[0], family[1])):
        assert all({*few} <= {*many} for few, many in zip(small.layers, large.layers, strict=True))
    alone = gj.select(Made(by_domain), keep=6, **way)
    assert family[1] == alone


def test_a_smaller_blend_is_the_best_inside_the_larger() -> None:
    by_domain = domains(9, 60, 20, 40)
    large, small = gj.select(Made(by_domain), keep=[5, 3], blend="maxmin")
    mass = np.stack([table["gate_norm_sum"] for table in by_domain.values()])
    allowed = coverage.mask_of(large.layers, 8)
    inside = [not (mask & ~allowed).any() for mask in SETS[3]]
    best = covered(mass, 3)[inside].min(1).max()
    assert min(coverage_by_loop(t, small.layers) for t in by_domain.values()) == pytest.approx(best, abs=1e-6)


def test_a_blend_says_its_weights_and_what_else_could_be() -> None:
    by_domain = domains(10, 80, 20, 40, peak=0.3)
    (found,) = choosing.choose(Made(by_domain), Ranked(), Keeping(keep=3, blend="maxmin"))
    weights, mass = found.keep_sets.origin.domains, np.stack([t["gate_norm_sum"] for t in by_domain.values()])
    assert weights is not None and [*weights] == ["a", "b", "c"] and sum(weights.values()) == pytest.approx(1, abs=1e-5)
    assert found.keep_sets.origin.criterion == "reap_sum"  # a mean does not add up
    best = found.coverage[next(iter(found.coverage))]
    assert best == pytest.approx(covered(mass, 3).min(1).max(), abs=1e-6)
    pool = gj.select(Made(by_domain), keep=3, criterion="reap_sum")
    worst = min(coverage_by_loop(t, pool.layers) for t in by_domain.values())
    each = [gj.select(Made(by_domain), keep=3, criterion="reap_sum", domain=name) for name in by_domain]
    union = [len(set().union(*(one.layers[layer] for one in each))) for layer in range(2)]
    assert f"the worst domain keeps {best:.3f} of" in found.remarks[0]
    assert f"in the best of all together {worst:.3f};" in found.remarks[0]
    assert f"would keep {min(union)} to {max(union)} of 8 experts" in found.remarks[0]
    two = gj.select(Made(by_domain), keep=3, blend="maxmin", domain={"a": 1, "c": 1})
    assert [*(two.origin.domains or ())] == ["a", "c"]
    assert min(coverage_by_loop(by_domain[n], two.layers) for n in "ac") == pytest.approx(
        covered(mass[[0, 2]], 3).min(1).max(), abs=1e-6
    )


# Protected experts, and reasons


def test_experts_with_the_largest_activations_stay() -> None:
    by_domain = domains(11, 60, 20)
    largest = pooled(by_domain)["activation_max"]
    places = sorted(np.ndindex(2, 8), key=lambda at: (-largest[at], at))[:5]
    for way in ({}, {"blend": "maxmin"}, {"floor": {"a": 0.3}}):
        kept = gj.select(Made(by_domain), keep=5, protect_outliers=5, **way)
        assert kept.reasons is not None
        for layer, expert in places:
            at = kept.layers[layer].index(expert)
            assert kept.reasons[layer][at] == f"protected: activation {largest[layer, expert]:.4g}"
        others = [r for layer in kept.reasons for r in layer if r and not r.startswith("protected")]
        assert len(others) == 5 and all(r.startswith(("place ", "held for domain ")) for r in others)
    plain, guarded = gj.select(Made(by_domain), keep=5), gj.select(Made(by_domain), keep=5, protect_outliers=5)
    order = evidence(by_domain).rank("reap", 0).layers
    for layer in range(2):
        first = [e for at, e in places if at == layer]
        expected = [*first, *(e for e in order[layer] if e not in first)][:5]
        assert guarded.layers[layer] == sorted(expected)
        assert plain.layers[layer] == sorted(order[layer][:5])
    with pytest.raises(RankingError, match="that --protect-outliers holds in layer"):
        gj.select(Made(by_domain), keep=1, protect_outliers=5)
    fewest = gj.select(Made(by_domain), coverage=0.2, protect_outliers=16)
    assert all(reason and reason.startswith("protected") for layer in fewest.reasons or [] for reason in layer)


def test_an_expert_that_a_floor_brings_in_says_for_whom() -> None:
    of_all = np.array([[9.0, 8, 7, 1], [9, 8, 7, 1]])
    of_law = np.array([[0.0, 0, 1, 9], [0, 0, 1, 9]])
    tables = {n: {"count": (x > 0) * 10, "gate_norm_sum": x} for n, x in (("all", of_all), ("law", of_law))}
    kept = choice.floors(
        Evidence({"count": of_all * 10, "gate_norm_sum": of_all}, tables, Origin(domains={}), {}),
        "reap_sum",
        [2],
        {},
        {"law": 0.9},
    )
    (found,) = kept
    assert found.keep_sets.layers == [[0, 3], [0, 3]]
    assert found.keep_sets.reasons == [["place 1 of 4 by reap_sum", "held for domain law"]] * 2
    assert found.keep_sets.origin.rule == "2 that hold the most, law at least 0.9"


def test_masses_add_up_and_are_not_negative() -> None:
    table = domains(12, 30)["a"] | dict.fromkeys(["gate_norm_sq_sum", "swap_sum"], np.ones((2, 8)))
    for name, declared in CRITERIA.items():
        if declared.mass:
            assert CRITERIA[declared.mass].mass == declared.mass
            assert (masses(table, name) >= 0).all()
    assert {name for name, declared in CRITERIA.items() if not declared.mass} == {"eaft_reap", "aimer", "random"}


@pytest.mark.parametrize(("num_kept", "top_k", "rules"), [(8, 4, 0), (6, 4, 1), (4, 4, 1), (3, 4, 2), (2, None, 1)])
def test_counts_that_kernels_refuse(num_kept: int, top_k: int | None, rules: int) -> None:
    told = serving_limits(num_kept, top_k)
    assert len(told) == rules and all(str(num_kept) in line for line in told)
    by_domain = domains(13, 40)
    (found,) = choosing.choose(Made(by_domain, top_k=2), Ranked(), Keeping(keep=2))
    assert any("Every token uses all 2 experts" in remark for remark in found.remarks)


# What cannot be done

OPTIONS = [
    case("nothing", [], "one of --keep, --budget-gib, --coverage, and --max-kl or --min-match"),
    case(
        "two ways",
        ["--keep", 2, "--coverage", 0.5],
        "one of --keep, --budget-gib, --coverage, and --max-kl or --min-match",
    ),
    case("context alone", ["--keep", 2, "--context", 100], "--context goes with --budget-gib"),
    case("rows alone", ["--budget-gib", 1, "--rows", 2], "--rows goes with --context"),
    case("format alone", ["--keep", 2, "--format", "bf16"], "--format and --model go with --budget-gib"),
    case("no sizes", ["--budget-gib", 1], "--model MODEL"),
    case("budget 0", ["--budget-gib", 0], "--budget-gib is 0.0", "above 0"),
    case("share 0", ["--coverage", 0], "--coverage is 0.0"),
    case("share above 1", ["--coverage", 1.5], "--coverage is 1.5", "at most 1"),
    case("too many", ["--keep", 6], "--keep 6", "5 experts a layer"),
    case("the same number", ["--keep", 2, "--keep", "40%"], "--keep", "5 experts", "the same"),
    case("no such domain", ["--keep", 2, "--domain", "c"], "no domain 'c': there are a, b"),
    case("no such floor", ["--keep", 2, "--floor", "c=0.5"], "no domain 'c': there are a, b"),
    case("domain twice", ["--keep", 2, "--domain", "a", "--domain", "a=2"], "--domain names 'a' twice"),
    case("weight negative", ["--keep", 2, "--domain", "a=-1"], "--domain is {'a': -1.0}", "at least 0"),
    case("weight no number", ["--keep", 2, "--domain", "a=nan"], "--domain", "at least 0"),
    case("weights 0", ["--keep", 2, "--domain", "a=0", "--domain", "b=0"], "no weight is above 0"),
    case("floor without share", ["--keep", 2, "--floor", "a"], "--floor is 'a'", "law=0.9"),
    case("floor above 1", ["--keep", 2, "--floor", "a=1.1"], "--floor", "at most 1"),
    case("floor twice", ["--keep", 2, "--floor", "a=0.1", "--floor", "a=0.2"], "--floor names 'a' twice"),
    case("floor, maxmin", ["--keep", 2, "--floor", "a=0.1", "--blend", "maxmin"], "--floor does not go with"),
    case("coverage, maxmin", ["--coverage", 0.5, "--blend", "maxmin"], "--coverage chooses by the ranking"),
    case("maxmin of one", ["--keep", 2, "--blend", "maxmin", "--domain", "a"], "two domains or more"),
    case("maxmin, weights", ["--keep", 2, "--blend", "maxmin", "--domain", "a=2", "--domain", "b"], "without any"),
    case("drawn, maxmin", ["--keep", 2, "--blend", "maxmin", "--criterion", "random"], "--blend maxmin", "random"),
    case("drawn, floor", ["--keep", 2, "--floor", "a=0.5", "--criterion", "random"], "--floor", "random"),
    case("eaft, coverage", ["--coverage", 0.5, "--criterion", "eaft_reap"], "--coverage", "eaft_reap", "reap_sum"),
    case("outliers negative", ["--keep", 2, "--protect-outliers", -1], "--protect-outliers is -1"),
    case("outliers, few", ["--keep", 1, "--protect-outliers", 9], "--protect-outliers holds", "keep as many"),
    case("seed negative", ["--keep", 2, "--seed", -1], "--seed is -1"),
    case("no such blend", ["--keep", 2, "--blend", "union"], "--blend is 'union'", "weights, maxmin"),
]


@pytest.mark.parametrize(("options", "says"), OPTIONS)
def test_options_that_cannot_be(
    options: list[Any], says: tuple[str, ...], finished: Finished, refused: Refused
) -> None:
    profile = finished("profile", 1, domains=("a", "b"))
    refused("select", profile, *options, says=says)


def test_a_context_or_a_budget_that_the_model_does_not_have(tiny_mxfp4: Path, profile: Path, refused: Refused) -> None:
    of_model = ("select", profile, "--model", tiny_mxfp4, "--budget-gib")
    refused(*of_model, 1, "--context", 18001, says=("--context 18001", "18000"))
    refused(*of_model, 1e-9, says=("--budget-gib 1e-09 is too little", "with 1 expert a layer", "takes 0.000"))


def test_files_of_a_family_are_all_free_or_none_is_written(
    finished: Finished, refused: Refused, tmp_path: Path
) -> None:
    profile = finished("profile", 1)
    (tmp_path / "sets-2.json").write_text("mine")
    refused("select", profile, "--keep", 3, "--keep", 2, "--out", "sets.json", says=("sets-2.json", "exists"))


def test_a_ranking_gives_what_it_can() -> None:
    ranking = gj.Ranking([[2, 0, 1, 3]] * 2)
    assert [one.layers[0] for one in gj.select(ranking, keep=[1, 3])] == [[2], [0, 1, 2]]
    for way in ({"keep": 2, "blend": "maxmin"}, {"coverage": 0.5}, {"keep": 2, "domain": "a"}):
        with pytest.raises(Exception, match="a ranking is given"):
            gj.select(ranking, **way)


def test_what_a_profile_says_of_its_rows_and_domains_is_kept(finished: Finished) -> None:
    profile = finished("profile", 2, domains=("a", "b"))
    found = read_evidence(profile, {"a": 1, "b": 2}, True)
    assert found.origin == profile_origin(profile, {"a": 1, "b": 2}) and found.top_k == 2
    assert gj.select(profile, keep=2, domain={"a": 1, "b": 2}).origin == replace(
        found.origin, criterion="reap", rule="best 2", seed=0
    )
