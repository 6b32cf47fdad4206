"""The page as people use it: by clicks and keys in a browser, at two widths, light and dark."""

import csv
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import gptoss_jax as gj
from experiments.screenshots import Shot, browsing, chromium, taken
from gptoss_jax.config import TINY
from gptoss_jax.selection.origin import Origin

from . import shown
from .bad_input import dump
from .made_up import Finished
from .test_page import HOSTILE, read

pytestmark = pytest.mark.slow
VIEWS = ("overview", "tradeoff", "compare", "expert?layer=2&expert=5", "answers?than_trace=pruned")
L, E = TINY.num_layers, TINY.num_experts
LOOKED = Path(__file__).parent / "golden" / "page"
ANEW = "LOOKS_ANEW"  # set, the pictures are made anew
LOOKS = [
    Shot(f"{view.partition('?')[0]}-{width}-{colours}", view, width, colours)
    for view in VIEWS
    for width in (1280, 390)
    for colours in ("light", "dark")
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if chromium() is None:
        pytest.skip("no Chromium here")
    with browsing() as browser:
        yield browser


@pytest.fixture(scope="module")
def made(tiny_mxfp4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shown.make(tmp_path_factory.mktemp("page"), str(tiny_mxfp4))


class Opened:
    """A page in a window of its own; what went wrong in it is kept."""

    def __init__(self, browser: Any, file: Path, width: int = 1280, colours: str = "light"):
        self.file = file
        size = {"width": width, "height": 900}
        self.window = browser.new_context(viewport=size, color_scheme=colours, accept_downloads=True).new_page()
        self.wrong: list[str] = []
        self.asked: list[str] = []
        self.window.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.window.on(
            "console", lambda said: self.wrong.append(said.text) if said.type in ("error", "warning") else None
        )
        self.window.on("request", lambda request: self.asked.append(request.url))

    def go(self, address: str) -> Any:
        self.window.goto(f"file://{self.file}#{address}")
        self.window.wait_for_selector("main figure, main section, main .lead")
        return self.window

    def saved(self, button: str) -> bytes:
        """The file that a button gives."""
        with self.window.expect_download() as given:
            self.window.get_by_role("button", name=button, exact=True).click()
        return Path(given.value.path()).read_bytes()


@pytest.fixture
def opened(browser: Any, made: Path) -> Iterator[Opened]:
    page = Opened(browser, made / "page.html")
    yield page
    assert page.wrong == []
    page.window.context.close()


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_view_is_whole_and_for_everyone(browser: Any, made: Path, width: int, colours: str) -> None:
    """No error, nothing wider than the window, no finding of axe-core, no request but for the page itself."""
    from axe_playwright_python.sync_playwright import Axe

    page = Opened(browser, made / "page.html", width, colours)
    for view in VIEWS:
        window = page.go(view)
        assert window.locator("main figure svg").count() > 0
        assert window.evaluate("document.documentElement.scrollWidth - innerWidth") == 0, view
        found = Axe().run(window).response["violations"]
        assert [(one["id"], one["nodes"][0]["html"]) for one in found] == [], view
    assert page.wrong == [] and {url.partition("#")[0] for url in page.asked} == {f"file://{made / 'page.html'}"}
    page.window.context.close()


@pytest.mark.parametrize("shot", LOOKS, ids=lambda shot: shot.name)
def test_it_looks_as_it_did(shot: Shot, made: Path, browser: Any) -> None:
    """Small pictures, in which letters are smears: other fonts look alike, another order or other colours do not."""
    if os.environ.get(ANEW):
        thumbnail(taken(browser, made / "page.html", shot)).save(LOOKED / f"{shot.name}.png")
    ours, theirs = thumbnail(taken(browser, made / "page.html", shot)), Image.open(LOOKED / f"{shot.name}.png")
    assert abs(ours.height / theirs.height - 1) < 0.06
    apart = np.abs(np.subtract(ours.resize(theirs.size), theirs, dtype=np.float64))
    assert apart.mean() < 3, f"if this is meant: {ANEW}=1 pytest tests/test_page_in_browser.py"


def thumbnail(picture: bytes) -> Image.Image:
    """As wide as 96 pixels."""
    whole = Image.open(io.BytesIO(picture)).convert("RGB")
    return whole.resize((96, round(96 * whole.height / whole.width)), Image.Resampling.BOX)


def test_nothing_moves_once_it_is_there(opened: Opened) -> None:
    """The sum of layout shifts, as browsers measure it."""
    opened.window.add_init_script(
        "window.moved = 0; new PerformanceObserver(list => list.getEntries().forEach(e => window.moved += e.value))"
        ".observe({type: 'layout-shift', buffered: true})"
    )
    window = opened.go("overview")
    window.wait_for_timeout(300)
    assert window.evaluate("window.moved") < 0.01


def test_a_link_opens_an_expert_and_its_figures_are_those_of_the_profile(opened: Opened, made: Path) -> None:
    window = opened.go("expert?layer=2&expert=5&criterion=frequency&group=b")
    profile = gj.Profile.open(made / "profile")
    count = int(profile.columns("b")["count"][2, 5])
    place = profile.rank("frequency", "b").layers[2].index(5) + 1
    lead = window.locator("main .lead").inner_text()
    assert f"Layer 2, expert 5: {count} tokens of b" in lead and f"{place} of {E}" in lead
    table = window.locator("#expert-by-domain details")
    table.locator("summary").click()
    table.locator("tbody tr").nth(2).wait_for()
    cells = table.locator("tbody tr").nth(2).locator("td").all_inner_texts()
    assert cells[0] == "b" and cells[4] == str(count)
    kept = gj.KeepSets.read(made / "keep.json", TINY)
    decision = window.locator("section table tbody tr").first.locator("td").nth(1).inner_text()
    assert decision == ("stays" if 5 in kept.layers[2] else "goes")


def test_keys_and_clicks_choose_and_the_address_follows(opened: Opened) -> None:
    window = opened.go("overview")
    window.locator("#experts-plot").focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowUp"):
        window.keyboard.press(key)
    assert "layer=1" in window.url and "expert=1" in window.url
    assert window.evaluate("document.activeElement.id") == "experts-plot"
    assert "layer 1, expert 1" in window.locator("#told").inner_text()
    window.keyboard.press("Enter")
    window.wait_for_selector("#expert-by-domain")
    assert "Layer 1, expert 1:" in window.locator("main .lead").inner_text()
    window.go_back()
    window.wait_for_selector("#experts")
    # The cells stand first in the plot, layer by layer.
    window.locator("#experts-plot svg:last-of-type g:has(> rect) > rect").nth(3 * E + 4).click()
    assert "layer=3" in window.url and "expert=4" in window.url


def test_choices_show_other_scores(opened: Opened, made: Path) -> None:
    window = opened.go("overview")
    window.get_by_label("Criterion").select_option("frequency")
    window.get_by_label("Rows").select_option("a")
    window.get_by_label("Shown as").select_option("plain")
    rows = [*csv.reader(io.StringIO(opened.saved("Experts by layer as CSV").decode()))]
    assert rows[0][:4] == ["layer", "expert", "tokens", "frequency"]
    counts = gj.Profile.open(made / "profile").columns("a")["count"]
    assert [[int(float(x)) for x in row[:4]] for row in rows[1:]] == [
        [layer, expert, counts[layer, expert], counts[layer, expert]] for layer, expert in np.ndindex(L, E)
    ]


def test_every_plot_and_table_can_be_taken_along(opened: Opened, made: Path) -> None:
    window = opened.go("tradeoff")
    title = "Mass that goes"
    picture = opened.saved(f"{title} as SVG").decode()
    assert picture.startswith("<svg") and all(f">{name}</text>" in picture for name in ("reap", "frequency"))
    whole = Image.open(io.BytesIO(opened.saved(f"{title} as PNG")))
    assert whole.width > 1000 and whole.height > 2 * 340
    points = json.loads(opened.saved(f"{title} as JSON"))
    profile = gj.Profile.open(made / "profile")
    mass, order = profile.columns()["gate_norm_sum"], profile.rank("reap").layers
    for point in (point for point in points if point["chosen by"] == "reap"):
        kept = [mass[layer, order[layer][: point["experts"]]].sum() / mass[layer].sum() for layer in range(L)]
        assert point["share that goes"] == pytest.approx(1 - np.mean(kept), abs=1e-4)
    assert len([point for point in points if point["chosen by"] == "reap"]) == E + 1
    leads, kept = profile.columns()["lead_count"], gj.KeepSets.read(made / "keep.json", TINY).layers
    goes = np.array([~np.isin(np.arange(E), of) for of in kept])
    risk = next(p for p in json.loads(opened.saved("Tail risk as JSON")) if p["chosen by"] == "keep.json")
    assert risk["experts gone that led a token"] == ((leads > 0) & goes).sum()
    assert risk["share of tokens"] == pytest.approx(((leads * goes).sum(1) / leads.sum(1)).mean())
    assert opened.saved("keep.json as keep.json") == (made / "keep.json").read_bytes()
    buttons = window.locator(".files button").all()
    names = {button.get_attribute("aria-label") or button.inner_text() for button in buttons}
    assert len(names) == len(buttons)


def test_tables_without_a_plot_can_be_taken_along_too(
    browser: Any, made: Path, finished: Finished, tmp_path: Path
) -> None:
    """Each stands beside its files, and columns have names of their own, so that JSON loses none."""
    tried = [{"name": "greedy", "keep": 2, "kl": [0.1, 0.05, 0.2], "match": [0.9, 0.8, 1.0]}]
    sets = gj.KeepSets([[0, 1]] * L, Origin(criterion="greedy"), tried=tried, elsewhere={"b": [0.3, 0.2, 0.4]})
    profile = finished("tried", 3, shape=(L, E), folds=2)
    gj.report(profile, sets, made / "eval", out=tmp_path / "page.html")
    page = Opened(browser, tmp_path / "page.html")
    window = page.go("tradeoff")
    columns = ("KL low", "KL high", "right answers", "right low", "right high")
    expected = {"keep-sets": "keep-sets", "of": "greedy", "experts": 2, "KL": 0.1} | dict(
        zip(columns, (0.05, 0.2, 0.9, 0.8, 1.0), strict=True)
    )
    assert json.loads(page.saved("What was tried as JSON")) == [expected]
    assert page.saved("Lost elsewhere as CSV").decode().splitlines()[1] == "keep-sets,b,0.3,0.2,0.4"
    for view in ("tradeoff", "expert"):
        window = page.go(view)
        for table in window.locator("main table, footer table").all():
            section = table.locator("xpath=ancestor::*[self::section or self::figure][1]")
            assert section.get_by_role("button", name=" as CSV").count() == 1
            heads = table.locator("thead th").all_inner_texts()
            assert len({*heads}) == len(heads)
    assert page.wrong == []
    page.window.context.close()


def test_thoughts_are_compared_to_answers(opened: Opened, made: Path) -> None:
    """Those of a trace: the difference between shares of choices, with its interval."""
    window = opened.go("compare?profile=full&group=prompt&than_profile=full&than_group=other")
    assert "prompt minus other, by share of choices" in window.locator("main .lead").inner_text()
    found = json.loads(opened.saved("Differences by expert as JSON"))
    share = {}
    for number, name in ((0, "prompt"), (3, "other")):
        counts = np.zeros((L, E))
        for prompt in gj.Trace.open(made / "full"):
            for experts in prompt.experts[prompt.segments[: len(prompt.experts)] == number]:
                np.add.at(counts, (np.arange(L)[:, None], experts), 1)
        share[name] = np.where(counts, counts / counts.sum(1, keepdims=True), np.nan)
    known = [one for one in found if one["difference"] is not None]
    assert known
    for one in known:
        expected = (share["prompt"] - share["other"])[one["layer"], one["expert"]]
        assert one["difference"] == pytest.approx(expected, abs=1e-4)
    clear = {(one["layer"], one["expert"]) for one in known if one["low"] is not None}
    assert all(np.isfinite(share[name][at]) for at in clear for name in share)


def test_an_expert_that_the_model_lacks_is_the_nearest(opened: Opened) -> None:
    window = opened.go("overview?layer=99&expert=x")
    window.locator("#experts-plot").focus()
    window.keyboard.press("ArrowRight")
    assert f"layer={L - 1}" in window.url and "expert=1" in window.url
    window = opened.go("expert?layer=-3&expert=99")
    assert f"Layer 0, expert {E - 1}:" in window.locator("main .lead").first.inner_text()


def test_an_address_that_does_not_fit_shows_what_there_is(opened: Opened) -> None:
    window = opened.go("overview?scale=none&keep=none&profile=none&group=none&criterion=none")
    assert "share of the layer's highest" in window.locator("#experts-plot").text_content()
    assert "pale" not in window.locator("#experts figcaption").inner_text()
    for token, expected in (("x", 0), ("-3", 0), ("999", None)):
        window = opened.go(f"answers?prompt=1&token={token}")
        last = window.locator("#token-strip .token").count() - 1
        now = window.locator("#token-strip [aria-selected=true]").get_attribute("id")
        assert now == f"token-{last if expected is None else expected}"
        assert window.get_by_text(f"Token {last if expected is None else expected}, ").count() == 1


def test_shares_over_domains_are_one_together(browser: Any, activations: Path, tmp_path: Path) -> None:
    """Also of a dataset, whose groups are segments too; of what is no domain there is no share, and it is said."""
    gj.report(activations, out=tmp_path / "page.html")
    page = Opened(browser, tmp_path / "page.html")
    said, array = read(tmp_path / "page.html")
    (profile,) = said["profiles"]
    names, total = [profile["groups"][n] for n in profile["parts"]], 0.0
    assert len(names) > 1
    for name in names:
        page.go(f"overview?scale=domain&group={name}")
        shares = [one["shown"] for one in json.loads(page.saved("Experts by layer as JSON"))]
        total = total + np.array(shares, dtype=np.float64)
    some = array(profile["scores"])[0][profile["parts"]].sum(0).ravel() > 0
    np.testing.assert_allclose(total[some], 1)
    window = page.go("overview?scale=domain&group=think")
    assert f"Shares are over {', '.join(names)}: choose" in window.locator("#experts figcaption").inner_text()
    assert {one["shown"] for one in json.loads(page.saved("Experts by layer as JSON"))} == {None}
    assert page.wrong == []
    page.window.context.close()


def test_choices_of_compare_say_what_is_drawn(opened: Opened) -> None:
    """Also where nobody chose, and for all rows, whose name is empty."""
    window = opened.go("compare?group=a")
    for group, name in ((None, "all rows"), ("b", "b"), ("", "all rows")):
        if group is not None:
            window.get_by_label("minus rows").select_option(group)
        lead, sides = window.locator("main .lead").inner_text(), ("than_profile", "than_group")
        profile, rows = (
            window.evaluate("name => document.getElementById(name).selectedOptions[0].text", f"choose-{side}")
            for side in sides
        )
        # Of two profiles the lead names both.
        assert rows == name and (f"minus {rows}" in lead or f"minus {profile}, {rows}" in lead)
    window = opened.go("compare?profile=profile")
    window.get_by_label("minus profile").select_option("full")
    assert "no criterion in common" in window.locator("main").inner_text()


def test_focus_tables_and_places_stay(opened: Opened) -> None:
    window = opened.go("overview?group=a")
    window.keyboard.press("Tab")
    window.keyboard.press("Enter")
    assert window.evaluate("document.activeElement.id") == "main" and window.url.endswith("#overview?group=a")
    window.locator("#view-tradeoff").focus()
    window.keyboard.press("Enter")
    window.wait_for_selector("#mass-dropped")
    assert window.evaluate("document.activeElement.id") == "view-tradeoff"
    window = opened.go("overview")
    window.locator("#experts summary").click()
    window.locator("#experts tbody tr").first.wait_for()
    window.locator("#experts-plot").focus()
    window.keyboard.press("ArrowDown")
    assert window.locator("#experts tbody tr").count() == L * E
    window = opened.go("answers?prompt=1&trace=pruned&than_trace=full")
    assert window.locator("#routes").count() == window.locator("#routes-beside").count() == 1
    window.add_style_tag(content=".strip { max-height: 3em }")
    strip = window.locator("#token-strip")
    strip.locator(".token").last.click()
    around, token = (of.bounding_box() for of in (strip, strip.locator("[aria-selected=true]")))
    assert token["y"] >= around["y"] and token["y"] + token["height"] <= around["y"] + around["height"] + 1
    assert strip.evaluate("of => of.scrollTop") > 0


def test_what_goes_is_shown_against_gib_too(opened: Opened, made: Path) -> None:
    window = opened.go("tradeoff")
    window.get_by_label("Against", exact=True).select_option("GiB")
    assert "GiB of the checkpoint" in window.locator("#mass-dropped-plot").text_content()
    half = next(one for one in json.loads(opened.saved("Keep-sets side by side as JSON")) if one["experts"] == 4)
    pruned = Path(
        str(gj.prune(str(made / "tiny"), gj.KeepSets.read(made / "keep.json", TINY), out=made / "cut").folder)
    )
    size = json.loads((pruned / "model.safetensors.index.json").read_text(encoding="utf-8"))["metadata"]["total_size"]
    assert half["GiB"] == pytest.approx(size / 2**30, rel=1e-4)


def test_quality_has_its_intervals(opened: Opened, made: Path) -> None:
    opened.go("tradeoff")
    (one, control) = json.loads(opened.saved("Quality: eval as JSON"))
    stored = json.loads((made / "eval" / "eval.json").read_text(encoding="utf-8"))["entries"]
    for ours, theirs in zip((one, control), stored, strict=True):
        kl = theirs["quality"]["16"]["estimates"]["kl"]
        assert [ours["model"], ours["experts"], ours["KL"]] == [theirs["name"], 4, kl["value"]]
        assert ours["near-lossless gate"] == ("passes" if theirs["gate"]["passed"] else "fails")
    opened.go("tradeoff?group=b")
    for ours, theirs in zip(json.loads(opened.saved("Quality: eval as JSON")), stored, strict=True):
        assert ours["KL"] == theirs["by_domain"]["b"]["estimates"]["kl"]["value"]


def test_replies_are_judged_as_the_evaluation_says(opened: Opened, made: Path) -> None:
    opened.go("tradeoff")
    found = {(one["model"], one["what"]): one["share"] for one in json.loads(opened.saved("Replies: eval as JSON"))}
    stored = json.loads((made / "eval" / "eval.json").read_text(encoding="utf-8"))
    for entry in (stored["baseline"], *stored["entries"]):
        for name, label in (("loops", "loops"), ("ended", "ends naturally"), ("harmony", "valid harmony")):
            assert found[entry["name"], label] == entry["replies"]["estimates"][name]["value"]


def test_a_token_shows_its_experts_in_both_traces(opened: Opened, made: Path) -> None:
    window = opened.go("answers?prompt=1&than_trace=pruned")
    full, pruned = (gj.Trace.open(made / name)["1"] for name in ("full", "pruned"))
    window.locator("#token-strip").focus()
    for _ in range(3):
        window.keyboard.press("ArrowRight")
    for name, prompt in (("routes", full), ("routes-beside", pruned)):
        table = window.locator(f"#{name} details")
        table.locator("summary").click()
        table.locator("tbody tr").first.wait_for()
        cells = [row.split("\t") for row in table.locator("tbody tr").all_inner_texts()]
        assert [int(cell[1]) for cell in cells] == prompt.experts[3].ravel().tolist()
    together = min(len(full), len(pruned))
    apart = np.flatnonzero(full.token_ids[:together] != pruned.token_ids[:together])
    marked = [item.get_attribute("id") for item in window.locator(".differs").all()]
    assert marked == ([f"token-{apart[0]}", f"than_token-{apart[0]}"] if len(apart) else [])
    segments = [item.get_attribute("class") for item in window.locator("#token-strip .token").all()]
    assert [name.split()[1] for name in segments] == [("prompt", "think", "answer", "other")[s] for s in full.segments]


def test_a_notebook_shows_it_in_place(browser: Any, made: Path, tmp_path: Path) -> None:
    """In a frame that is apart from what is around it."""
    shown_ = gj.show(made / "profile", made / "keep.json")
    (tmp_path / "cell.html").write_text(f"<!doctype html><body>{shown_._repr_html_()}", encoding="utf-8")
    page = Opened(browser, tmp_path / "cell.html")
    page.window.goto(f"file://{page.file}")
    frame = page.window.frame_locator("iframe")
    frame.locator("#experts-plot").focus()
    page.window.keyboard.press("ArrowRight")
    frame.get_by_role("link", name="Compare").click()
    frame.locator("#differences").wait_for()
    frame.get_by_role("link", name="Expert").click()
    frame.locator("#expert-by-domain").wait_for()
    assert frame.locator("main .lead").inner_text().startswith("Layer 0, expert 1:")
    assert page.wrong == []
    page.window.context.close()


def test_hostile_names_do_nothing(browser: Any, made: Path, finished: Finished, tmp_path: Path) -> None:
    """Of domains, models, keep-sets, evaluations, healings and replies: all of it is text."""
    folder = finished("hostile", 3, domains=(HOSTILE, "=1+1", "toString"), shape=(L, E), folds=2)
    shutil.copytree(made / "eval", tmp_path / "eval")
    said = json.loads((tmp_path / "eval" / "eval.json").read_text(encoding="utf-8"))
    said["entries"][0]["name"] = said["setting"]["baseline"] = said["baseline"]["name"] = HOSTILE
    dump(tmp_path / "eval" / "eval.json", said)
    lines = (tmp_path / "eval" / "replies.jsonl").read_text(encoding="utf-8").splitlines()
    replies = [json.loads(line) | {"text": HOSTILE, "id": HOSTILE, "domain": HOSTILE} for line in lines]
    (tmp_path / "eval" / "replies.jsonl").write_text("".join(json.dumps(r) + "\n" for r in replies), encoding="utf-8")
    kept = gj.KeepSets([[0, 1]] * L, Origin(criterion=HOSTILE, domains={HOSTILE: 1.0}), reasons=[[HOSTILE] * 2] * L)
    change = {side: {"value": 0.1, "low": 0.0, "high": 0.2} for side in ("pruned", "healed", "difference")}
    curve = {"steps": [0, 1], "held": [0.2, 0.1]}
    healed = {"is_kept": True, "command": HOSTILE, "learnt_rows": 3, "curve": curve, "overall": change}
    dump(tmp_path / "heal.json", healed | {"domains": {HOSTILE: {"rows": 2} | change}})
    things = [gj.Profile.open(folder), kept, tmp_path / "eval", tmp_path / "heal.json"]
    gj.report(*things, title=HOSTILE, out=tmp_path / "page.html")
    page = Opened(browser, tmp_path / "page.html")
    page.window.add_init_script("window.hurt = () => console.error('hurt')")
    # JavaScript's objects have a toString and a constructor of their own.
    for view in ("constructor", "tradeoff?group=toString", *VIEWS[:4], "answers"):
        window = page.go(view)
        assert window.locator("h1").inner_text() == HOSTILE and window.locator("img").count() == 0
    assert window.locator(".strip").first.inner_text() == HOSTILE
    window = page.go("expert?layer=0&expert=1")
    assert window.get_by_role("cell", name=HOSTILE, exact=True).first.inner_text() == HOSTILE
    rows = page.saved("By domain as CSV").decode()
    assert "'=1+1" in rows  # a spreadsheet reads no formula
    assert page.wrong == []
    page.window.context.close()


def test_the_largest_model_opens_soon(browser: Any, finished: Finished, tmp_path: Path) -> None:
    """36 layers of 128 experts: everything is there, and no key is lost."""
    folder = finished("large", 5, domains=("a", "b"), shape=(36, 128), folds=2)
    gj.report(folder, out=tmp_path / "page.html")
    page = Opened(browser, tmp_path / "page.html")
    window = page.go("overview")
    said, _ = read(tmp_path / "page.html")
    assert said["sizes"] == {"layers": 36, "experts": 128, "top_k": 2}
    assert window.locator("#experts-plot rect").count() >= 36 * 128
    window.locator("#experts-plot").focus()
    window.keyboard.press("ArrowRight")
    assert "expert=1" in window.url and page.wrong == []
    page.window.context.close()
