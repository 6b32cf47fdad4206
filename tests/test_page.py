"""The page's file: what it holds is what the tables say, and nothing of it is markup or comes from elsewhere."""

import base64
import gzip
import hashlib
import json
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import gptoss_jax as gj
from gptoss_jax.config import TINY
from gptoss_jax.errors import InputError, OptionError
from gptoss_jax.evaluation import stored
from gptoss_jax.fingerprints.folder import Activations
from gptoss_jax.page import answers
from gptoss_jax.page.packing import TYPES, Packed
from gptoss_jax.selection.keep_sets import KeepSets
from gptoss_jax.selection.origin import Origin
from gptoss_jax.selection.ranking import Ranking

from . import shown
from .bad_input import Program, Refused, case, dump, edit
from .made_up import Finished
from .shown import THINGS

HOSTILE = '</script><img src=x onerror="hurt()">'


class Scripts(HTMLParser):
    """The scripts of a page, each with its attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[dict[str, Any], str]] = []
        self.policy, self._is_in = "", False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Any]]) -> None:
        self._is_in = tag == "script"
        if self._is_in:
            self.found.append((dict(attrs), ""))
        if tag == "meta" and dict(attrs).get("http-equiv") == "Content-Security-Policy":
            self.policy = dict(attrs)["content"]

    def handle_data(self, data: str) -> None:
        if self._is_in:
            self.found[-1] = (self.found[-1][0], self.found[-1][1] + data)

    def handle_endtag(self, tag: str) -> None:
        self._is_in = False


def read(file: Path) -> tuple[dict[str, Any], Any]:
    """What a page says, and what reads one of its arrays."""
    parts = {attrs.get("id"): text for attrs, text in Scripts(file.read_text(encoding="utf-8")).found}
    block = gzip.decompress(base64.b64decode(parts["arrays"]))

    def array(named: dict[str, Any]) -> np.ndarray:
        count = int(np.prod(named["shape"]))
        return (
            np.frombuffer(block, TYPES[named["array"]], count, named["at"]).reshape(named["shape"]).astype(np.float64)
        )

    return json.loads(parts["said"]), array


@pytest.fixture(scope="module")
def made(tiny_mxfp4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shown.make(tmp_path_factory.mktemp("page"), str(tiny_mxfp4))


@pytest.fixture(scope="module")
def page(made: Path) -> Path:
    return made / "page.html"


def test_scores_and_intervals_are_those_of_the_profile(page: Path, made: Path) -> None:
    said, array = read(page)
    profile = gj.Profile.open(made / "profile")
    one = said["profiles"][0]
    assert one["groups"] == ["", "a", "b"] and one["tokens"][0] == profile.info["kept_tokens"] == sum(one["tokens"][1:])
    names = one["criteria"]
    assert {"reap", "frequency"} <= {*names} and "random" not in names and "aimer" not in names
    scores, order, halves, counts, leads = (
        array(one[name]) for name in ("scores", "order", "halves", "counts", "leads")
    )
    for (c, criterion), (g, group) in [(c, g) for c in enumerate(names) for g in enumerate(one["groups"])]:
        expected = profile.intervals(criterion, group or None)
        np.testing.assert_allclose(scores[c, g], expected.score, rtol=1e-5)
        np.testing.assert_array_equal(order[c, g], profile.rank(criterion, group or None).layers)
        finite = np.isfinite(expected.high)
        np.testing.assert_array_equal(np.isfinite(halves[c, g]), finite)
        half = np.where(finite, expected.high - expected.score, 0)
        np.testing.assert_allclose(halves[c, g][finite], half[finite], rtol=0.01)
        np.testing.assert_array_equal(counts[g], profile.columns(group or None)["count"])
        np.testing.assert_array_equal(leads[g], profile.columns(group or None)["lead_count"])


def test_partners_are_those_that_ran_on_the_same_tokens(page: Path, made: Path) -> None:
    said, array = read(page)
    statistics, _ = gj.Profile.open(made / "profile").sums.total()
    others, times = (array(said["profiles"][0][name]).astype(int) for name in ("partners", "together"))
    for layer, expert in np.ndindex(TINY.num_layers, TINY.num_experts):
        of = statistics.coactivation[layer, expert]
        assert expert not in others[layer, expert][times[layer, expert] > 0]
        np.testing.assert_array_equal(times[layer, expert], np.sort(of)[::-1][: times.shape[-1]])
        np.testing.assert_array_equal(of[others[layer, expert]], times[layer, expert])


def test_keep_sets_and_evaluations_are_those_of_their_files(page: Path, made: Path) -> None:
    said, array = read(page)
    for sets in said["keep_sets"]:
        kept = KeepSets.read(made / sets["name"], TINY)
        assert [np.flatnonzero(layer).tolist() for layer in array(sets["kept"])] == kept.layers
        assert sets["file"] == (made / sets["name"]).read_text(encoding="utf-8")
    (evaluation,) = said["evaluations"]
    stored = json.loads((made / "eval" / "eval.json").read_text(encoding="utf-8"))
    assert {name: evaluation[name] for name in ("setting", "entries")} == {n: stored[n] for n in ("setting", "entries")}
    lines = (made / "eval" / "replies.jsonl").read_text(encoding="utf-8").splitlines()
    replies = [json.loads(line) for line in lines]
    for question in evaluation["replies"]:
        own = [reply for reply in replies if str(reply["id"] or reply["row"]) == question["id"]]
        assert question["said"] == {reply["model"] or "": reply["text"] for reply in own}
        assert len(question["said"]) == 3


def test_a_ranking_has_its_order_and_losses(made: Path, tmp_path: Path) -> None:
    order = [[*np.random.default_rng(layer).permutation(TINY.num_experts).tolist()] for layer in range(TINY.num_layers)]
    losses = [[None, *np.linspace(0.5, 0.01, TINY.num_experts - 1).tolist()] for _ in order]
    Ranking(order, Origin(criterion="greedy"), losses=losses).write(tmp_path / "ranking.json")
    gj.report(made / "profile", tmp_path / "ranking.json", out=tmp_path / "page.html")
    said, array = read(tmp_path / "page.html")
    (one,) = said["rankings"]
    assert array(one["order"]).tolist() == order
    np.testing.assert_allclose(array(one["losses"]), [of[1:] for of in losses], rtol=1e-5)


def test_tokens_choose_what_their_trace_says(page: Path, made: Path, tiny_mxfp4: Path) -> None:
    said, array = read(page)
    tokenizer = gj.open(str(tiny_mxfp4)).tokenizer
    for of in said["traces"]:
        prompts = [*gj.Trace.open(made / of["name"])]
        ids = array(of["pieces"]).astype(int)
        assert of["tokens"] == of["shown"] == [*map(len, prompts)]
        text = [said["pieces"][place] for place in ids]
        assert text == [tokenizer.decode([int(token)]) for prompt in prompts for token in prompt.token_ids]
        np.testing.assert_array_equal(array(of["of_segment"]), np.concatenate([p.segments for p in prompts]))
        np.testing.assert_array_equal(array(of["experts"]), np.concatenate([p.experts for p in prompts]))
        gates = np.concatenate([p.gates for p in prompts]).astype(np.float64)
        np.testing.assert_allclose(array(of["gates"]) / answers.GATE_STEPS, gates, atol=0.5001 / answers.GATE_STEPS)


def test_choices_of_a_trace_are_a_profile_by_segment(page: Path, made: Path, tmp_path: Path) -> None:
    said, array = read(page)
    of = {one["name"]: one for one in said["profiles"]}["full"]
    prompts = [*gj.Trace.open(made / "full")]
    routed = [(p.segments[: len(p.experts)], p.experts, p.gates.astype(float)) for p in prompts]
    names = ("prompt", "think", "answer", "other")
    there = {names[s] for segments, *_ in routed for s in segments}
    assert of["groups"] == ["", *(name for name in names if name in there)] and len(there) > 1
    assert of["criteria"] == ["share of choices", "share of gates"] and of["rows"] == len(prompts) == 2
    scores, halves, counts = (array(of[name]) for name in ("scores", "halves", "counts"))
    for g, group in enumerate(of["groups"]):
        sums = np.zeros((2, len(prompts), TINY.num_layers, TINY.num_experts))
        for n, (segments, experts, gates) in enumerate(routed):
            for t, layer, k in np.ndindex(experts.shape):
                if group in ("", names[segments[t]]):
                    sums[:, n, layer, experts[t, layer, k]] += 1, gates[t, layer, k]
        np.testing.assert_array_equal(counts[g], sums[0].sum(0))
        shares = sums.sum(1) / sums.sum(1).sum(-1, keepdims=True)
        np.testing.assert_allclose(scores[:, g], shares, rtol=1e-4)
        never = counts[g] == 0
        assert np.isinf(halves[0, g][never]).all()
        if sums[0].any((1, 2)).all():  # two prompts, of which each is left out once
            own = sums[0] / sums[0].sum(-1, keepdims=True)
            width = 12.7062 * np.abs(own[0] - own[1]) / 2  # Student's t of one degree
            np.testing.assert_allclose(halves[0, g][~never], width[~never], rtol=0.01, atol=1e-6)


def test_what_was_tried_and_what_is_lost_elsewhere_come_along(finished: Finished, tmp_path: Path) -> None:
    tried = [{"name": "greedy", "keep": 2, "kl": [0.1, 0.05, 0.2], "match": [0.9, 0.8, 1.0]}]
    lost = {"b": [0.3, 0.2, 0.4]}
    sets = KeepSets([[0, 1]] * 2, Origin(criterion="greedy"), tried=tried, elsewhere=lost)
    gj.report(finished("seen", 1), sets, out=tmp_path / "page.html")
    (one,) = read(tmp_path / "page.html")[0]["keep_sets"]
    assert (one["tried"], one["elsewhere"]) == (tried, lost)


LISTS = [[0, 2], [1, 4]]


@pytest.mark.parametrize("theirs", [LISTS, {"keep": LISTS}, {"layer_0": LISTS[0], "layer_1": LISTS[1]}])
def test_lists_of_other_programs_are_keep_sets(theirs: Any, finished: Finished, tmp_path: Path) -> None:
    dump(tmp_path / "theirs.json", theirs)
    gj.report(finished("seen", 1), tmp_path / "theirs.json", out=tmp_path / "page.html")
    said, array = read(tmp_path / "page.html")
    (one,) = said["keep_sets"]
    assert [np.flatnonzero(layer).tolist() for layer in array(one["kept"])] == LISTS


def test_answers_of_a_dataset_are_a_profile_by_domain_and_segment(activations: Path, tmp_path: Path) -> None:
    dataset = Activations.open(activations)
    # An imported one does not say of which model it is: nothing is of another.
    sets = gj.KeepSets([[0]] * dataset.info["num_layers"], Origin(criterion="reap", model_fingerprint="f"))
    gj.report(activations, sets, out=tmp_path / "page.html")
    said, array = read(tmp_path / "page.html")
    (one,) = said["profiles"]
    there = {summary.group.name for summary in dataset.summaries}
    domains = [domain for domain, names in dataset.domains.items() if there & {*names}]
    assert one["groups"][:3] == ["", "think", "answer"] and [one["groups"][n] for n in one["parts"]] == domains
    assert said["warnings"] == [
        f"{activations.name}: no answer is of the domain {d}" for d in {*dataset.domains} - {*domains}
    ]
    assert one["criteria"] == ["share of choices"] and not np.isfinite(array(one["halves"])).any()
    for group, scores, counts in zip(one["groups"], array(one["scores"])[0], array(one["counts"]), strict=True):
        domain, _, segment = group.rpartition(", ") if group.endswith((", think", ", answer")) else (group, "", "")
        if group in ("think", "answer"):
            domain, segment = "", group
        some = [
            summary
            for summary in dataset.summaries
            if segment in ("", summary.segment) and (not domain or summary.group.name in dataset.domains[domain])
        ]
        used = sum(summary.sample_count * summary.count_frequency_LE for summary in some)
        np.testing.assert_allclose(scores, used / used.sum(-1, keepdims=True), rtol=1e-4)
        assert (counts[used == 0] == 0).all()


def test_a_single_row_has_no_interval(finished: Finished, tmp_path: Path) -> None:
    sides = ("pruned", "healed", "difference")
    change = {side: {"value": 0.1, "low": -math.inf, "high": math.inf} for side in sides}
    said = {"is_kept": False, "command": "heal", "learnt_rows": 3, "curve": {"steps": [0], "held": [0.1]}}
    dump(tmp_path / "heal.json", said | {"overall": {"rows": 1, **change}, "domains": {}})
    gj.report(finished("seen", 1), tmp_path / "heal.json", out=tmp_path / "page.html")
    (healing,) = read(tmp_path / "page.html")[0]["healings"]
    assert healing["changes"] == [{"name": "", "rows": 1} | {side: [0.1, None, None] for side in sides}]


def test_numbers_that_are_not_finite_are_none(finished: Finished, tmp_path: Path) -> None:
    """As the interval of one row: JSON has no word for it."""
    profile = finished("some", 3, folds=2)
    inf, nan = math.inf, math.nan
    tried = [{"name": "greedy", "keep": 2, "kl": [0.1, -inf, inf]}]
    sets = gj.KeepSets([[0, 1]] * 2, Origin(criterion="greedy"), tried=tried, elsewhere={"b": [0.3, nan, nan]})
    gj.report(profile, sets, out=tmp_path / "page.html")
    (one,) = read(tmp_path / "page.html")[0]["keep_sets"]
    assert one["tried"] == [tried[0] | {"kl": [0.1, None, None]}]
    assert one["elsewhere"] == {"b": [0.3, None, None]}


def test_replies_of_any_text_are_told_apart(made: Path, refused: Refused, tmp_path: Path) -> None:
    """Also where what a text calls the end of a line stands in one, and where two questions have the same id."""
    shutil.copytree(made / "eval", tmp_path / "eval")
    texts = ["one\u2028line", "the\x85same\u2029", "\x0bthis\x1e"]
    replies = [
        {"model": None, "row": row, "id": id, "domain": "", "text": text, "ended": True}
        for row, id, text in zip((0, 1, 4), ("q", "4", ""), texts, strict=True)
    ]
    file = tmp_path / "eval" / "replies.jsonl"
    file.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in replies), encoding="utf-8")
    gj.report(made / "profile", tmp_path / "eval", out=tmp_path / "page.html")
    (evaluation,) = read(tmp_path / "page.html")[0]["evaluations"]
    assert evaluation["replies"] == [
        {"id": name, "said": {"": text}} for name, text in zip(("q", "4 (row 1)", "4 (row 4)"), texts, strict=True)
    ]
    file.write_bytes(b'{"model": null}\xff\n')
    refused("report", made / "profile", "eval", says=("replies.jsonl: line 1 is no reply",))


def test_a_path_is_not_taken_for_what_is_open(finished: Finished, tmp_path: Path) -> None:
    one, other = finished("one", 3), finished("profile", 4)
    gj.report(gj.Profile.open(one), other, out=tmp_path / "page.html")
    said, _ = read(tmp_path / "page.html")
    assert [of["name"] for of in said["profiles"]] == ["profile 2", "profile"]


def test_the_first_length_of_an_evaluation_is_the_one_that_domains_are_of(made: Path, tmp_path: Path) -> None:
    """Also where a shorter one stands behind it: JavaScript sorts names that are numbers."""
    said = json.loads((made / "eval" / "eval.json").read_text(encoding="utf-8"))
    said["setting"]["blocks"] = {"16": 3, "8": 6}
    for entry in (said["baseline"], *said["entries"]):
        entry["quality"]["8"] = entry["quality"]["16"]
        entry["corrected"]["8"] = entry["corrected"].get("16", {})
    dump(tmp_path / "eval.json", said)
    gj.report(made / "profile", tmp_path / "eval.json", out=tmp_path / "page.html")
    (evaluation,) = read(tmp_path / "page.html")[0]["evaluations"]
    assert evaluation["length"] == 16


def test_long_traces_are_cut_and_it_is_said(made: Path, tiny_mxfp4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "ROUTED_BYTES", 400)
    monkeypatch.setattr(answers, "PROMPTS_SHOWN", 1)
    file = gj.report(made / "profile", made / "full", model=tiny_mxfp4, out=made / "cut.html", overwrite=True)
    said, array = read(Path(str(file)))
    (of,) = said["traces"]
    ((shown_, tokens),) = zip(of["shown"], of["tokens"], strict=True)
    assert 1 < shown_ < tokens and of["prompts"] == 2
    experts, gates = (array(of[name]) for name in ("experts", "gates"))
    assert experts.shape == (shown_, TINY.num_layers, TINY.top_k)
    packed = Packed()
    for array_ in (experts, gates):
        packed.add(array_, "u1")
    assert len(packed.text()) <= 400


def test_no_program_runs_but_its_own_and_nothing_is_fetched(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    scripts = Scripts(text)
    allowed = {*re.findall(r"'sha256-([^']+)'", scripts.policy)}
    run = [body for attrs, body in scripts.found if "type" not in attrs]
    assert {base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for body in run} == allowed
    assert scripts.policy.startswith("default-src 'none'; ") and "unsafe-eval" not in scripts.policy
    assert all("src" not in attrs for attrs, _ in scripts.found)
    assert not re.search(r"<(link|img|iframe|object|embed)\b", re.sub(r"(?s)<script.*?</script>", "", text))
    assert "Permission to use, copy, modify" in text  # the licence of the libraries on it


def test_hostile_names_are_text(finished: Finished, tmp_path: Path) -> None:
    folder = finished("hostile", 3, domains=(HOSTILE, "b"), folds=2)
    edit(folder / "profile.json", model=HOSTILE, warnings=[HOSTILE])
    gj.report(folder, out=tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    said, _ = read(tmp_path / "page.html")
    assert said["profiles"][0]["groups"] == ["", HOSTILE, "b"] and said["title"] == HOSTILE
    assert "<img" not in text and text.count("</script>") == text.count("<script")


def test_a_page_of_the_published_shape_is_small(finished: Finished, tmp_path: Path) -> None:
    """12 domains of 24 layers of 32 experts; made-up numbers have more digits than can be packed."""
    folder = finished("large", 5, domains=[f"domain {n}" for n in range(12)], shape=(24, 32), folds=4)
    gj.report(folder, out=tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size + answers.ROUTED_BYTES < 3e6


def test_equal_things_give_equal_bytes(made: Path, page: Path, tiny_mxfp4: Path) -> None:
    again = gj.report(*(made / name for name in THINGS), model=tiny_mxfp4, out=made / "again.html", overwrite=True)
    assert Path(str(again)).read_bytes() == page.read_bytes()


def test_arrays_keep_what_is_seen() -> None:
    packed, rng = Packed(), np.random.default_rng(0)
    whole = [0.0, 131073.0, 1000034.0]  # which are no others, cut short
    values = np.concatenate([rng.normal(size=99) * 10.0 ** rng.integers(-30, 30, 99), [np.inf, -np.inf], whole])
    wide, narrow, odd = packed.add(values, "f4"), packed.add(values, "b2"), packed.add([1, 2, 3], "u1")
    block = gzip.decompress(base64.b64decode(packed.text()))
    found = np.frombuffer(block, np.float32, len(values), wide["at"])
    np.testing.assert_allclose(found, values, rtol=2**-16)
    assert found[-3:].tolist() == whole
    found = np.frombuffer(block, ml_dtypes.bfloat16, len(values), narrow["at"]).astype(np.float64)
    np.testing.assert_allclose(found, values, rtol=2**-8)
    assert np.frombuffer(block, np.uint8, 3, odd["at"]).tolist() == [1, 2, 3]
    assert [named["at"] % 4 for named in (wide, narrow, odd)] == [0, 0, 0]


def test_what_is_open_is_shown_as_what_lies_in_files(made: Path, page: Path, tiny_mxfp4: Path, tmp_path: Path) -> None:
    things = [gj.Profile.open(made / "profile"), stored.read(made / "eval"), gj.Trace.open(made / "full")]
    sets = [KeepSets.read(made / name, TINY) for name in ("keep.json", "random.json")]
    shown_ = gj.show(*things, *sets, model=tiny_mxfp4)
    (tmp_path / "shown.html").write_text(shown_.html, encoding="utf-8")
    (ours, array), (theirs, array_of) = read(tmp_path / "shown.html"), read(page)
    assert [one["name"] for one in ours["keep_sets"]] == ["keep-sets", "keep-sets 2"]
    for name in ("scores", "order", "halves", "counts", "masses"):
        np.testing.assert_array_equal(array(ours["profiles"][0][name]), array_of(theirs["profiles"][0][name]))
    assert ours["evaluations"][0]["entries"] == theirs["evaluations"][0]["entries"]
    assert "data:text/html;base64," in shown_._repr_html_()
    with pytest.raises(InputError, match="int is nothing that a page shows"):
        gj.show(things[0], 5)


@pytest.mark.parametrize("kind", ["experts", "concentration", "mass", "quality"])
def test_plots_for_papers_have_what_the_tables_say(kind: str, made: Path, tmp_path: Path) -> None:
    profile, kept = gj.Profile.open(made / "profile"), KeepSets.read(made / "keep.json", TINY)
    options: dict[str, Any] = {"mass": {"keep_sets": {"mine": kept}}, "experts": {"keep_sets": kept}}.get(kind, {})
    figure = gj.plot(made / "eval" if kind == "quality" else profile, kind, **options)
    figure.savefig(tmp_path / "plot.pdf")
    figure.savefig(tmp_path / "plot.svg")
    assert (tmp_path / "plot.pdf").read_bytes().startswith(b"%PDF")
    axes = figure.axes[0]
    mass = profile.columns()["gate_norm_sum"]
    if kind == "experts":
        score = profile.intervals("reap").score
        np.testing.assert_allclose(axes.images[0].get_array().filled(0), score / score.max(1, keepdims=True))
    elif kind == "concentration":
        held = np.sort(mass, 1)[:, ::-1][:, :3].sum(1) / mass.sum(1)
        np.testing.assert_allclose([line.get_ydata()[3] for line in axes.lines[: TINY.num_layers]], held)
    elif kind == "mass":
        (reap,) = [line for line in axes.lines if line.get_label() == "reap"]
        gone = [1 - mass[i, kept.layers[i]].sum() / mass[i].sum() for i in range(TINY.num_layers)]
        assert reap.get_ydata()[4] == pytest.approx(np.mean(gone)) and axes.texts[0].get_text() == "mine"
    else:
        found = stored.read(made / "eval")
        assert [text.get_text() for text in axes.texts] == [one.name for one in found.entries]
        older = replace(found, entries=(*found.entries, replace(found.entries[0], name="other", experts=())))
        axes = gj.plot(older, kind).axes[0]
        assert len(axes.texts) == len(found.entries) and axes.get_title().endswith("not drawn: other")


def test_a_plot_that_there_is_not(made: Path) -> None:
    with pytest.raises(InputError, match="there is no plot 'map': there are experts"):
        gj.plot(made / "profile", "map")
    with pytest.raises(InputError, match="'quality' is of a Summary, not of Profile"):
        gj.plot(gj.Profile.open(made / "profile"), "quality")
    with pytest.raises(OptionError, match="no option 'color' of the plot 'mass': there are domain, keep_sets"):
        gj.plot(made / "profile", "mass", color="red")


# The command, and bad input.


def test_the_command_writes_what_the_function_does(
    program: Program, made: Path, tiny_mxfp4: Path, tmp_path: Path
) -> None:
    paths = [made / name for name in THINGS]
    assert program("report", *paths, "--model", tiny_mxfp4, "--title", "Seen", "--out", "it.html") == (0, "")
    said, _ = read(tmp_path / "it.html")
    ours, _ = read(Path(str(gj.report(*paths, model=tiny_mxfp4, title="Seen", out=tmp_path / "ours.html"))))
    assert said.pop("command").startswith("gptoss-jax report ") and ours.pop("command")
    assert said == ours and said["title"] == "Seen"


BAD = [
    case("no such file", ["none"], "none: no such file or folder"),
    case("no artifact", ["rows.jsonl"], "rows.jsonl: is nothing that a page shows"),
    case("no JSON", ["broken.json"], "broken.json: not a JSON file"),
    case("another file", ["other.json"], "other.json: is nothing that a page shows"),
    case("another list", ["list.json"], "list.json"),
    case("a ranking of other sizes", ["ranking.json"], "ranking.json: has 1 layers"),
    case("the same twice", ["profile"], "is given twice"),
    case("a trace without its model", ["full"], "full: holds tokens by their numbers", "--model"),
    case("another model's tokenizer", ["full", "--model", "nano"], "not of the tokenizer of nano"),
    case("another model's sizes", ["other"], "other: is of a model of 2 layers of 5 experts", "4 layers of 7"),
    case("keep-sets of other sizes", ["wide.json"], "wide.json"),
    case("no healing", ["heal.json"], "heal.json: is no heal.json"),
]


@pytest.mark.parametrize(("more", "says"), BAD)
def test_bad_input(
    more: list[str], says: tuple[str, ...], refused: Refused, made: Path, finished: Finished, tmp_path: Path
) -> None:
    for name in ("profile", "full"):
        (tmp_path / name).symlink_to(made / name)
    finished("other", 1)
    (tmp_path / "rows.jsonl").write_text("{}", encoding="utf-8")
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    dump(tmp_path / "heal.json", {"is_kept": True})
    dump(tmp_path / "ranking.json", {"kind": "ranking", "version": 1, "layers": [[0]]})
    dump(tmp_path / "other.json", {"layers": 1})
    dump(tmp_path / "list.json", [1])
    dump(tmp_path / "wide.json", {"kind": "keep_sets", "version": 1, "layers": [[0, 9]] * 4})
    refused("report", "profile", *more, says=says)


def test_without_a_profile(refused: Refused, made: Path) -> None:
    refused("report", made / "keep.json", says=("no profile among",))
    refused("report", says=("Missing argument",))


def test_an_output_in_the_way(refused: Refused, made: Path, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("mine", encoding="utf-8")
    refused("report", made / "profile", says=("report.html", "exists already"))
