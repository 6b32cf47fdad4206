"""Pictures of the demo's page as a browser shows it: those of README.

    make pictures
    python -m experiments.screenshots demo/page.html docs/page

The second needs a page that `make demo` made, Chromium, and the extra `test`.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import click


class Shot(NamedTuple):
    """A view, and how it is looked at."""

    name: str
    address: str
    width: int = 1280
    colours: str = "light"
    part: str = "body"


SHOTS = (
    Shot("overview", "overview?group=lists&keep=greedy_cosine.json"),
    Shot("quality", "tradeoff?group=lists", part="#quality-0"),
    Shot("answers", "answers?than_trace=half-of-them&token=60"),
    Shot("phone", "compare?group=lists&than_group=times", width=390, colours="dark"),
)


def chromium() -> str | None:
    """Where the browser is; None where there is none."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def browsing() -> Iterator[Any]:
    """A browser without a window. FileNotFoundError where no Chromium is installed."""
    from playwright.sync_api import sync_playwright

    if (found := chromium()) is None:
        raise FileNotFoundError("no Chromium is installed: install the package chromium")
    with sync_playwright() as playwright:
        # In a container that is run as root there is no sandbox within it.
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


def taken(browser: Any, page: Path, shot: Shot) -> bytes:
    """A picture of a part, by default of the whole length of the page but its footer, whose commands name folders, as
    PNG."""
    size = {"width": shot.width, "height": 800}
    context = browser.new_context(viewport=size, color_scheme=shot.colours)
    window = context.new_page()
    window.goto(f"file://{page.absolute()}#{shot.address}")
    window.wait_for_selector("main figure svg")
    window.locator("footer").evaluate("footer => footer.remove()")
    picture: bytes = window.locator(shot.part).screenshot()
    context.close()
    return picture


@click.command()
@click.argument("page", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path))
def main(page: Path, out: Path) -> None:
    """Write the pictures into a folder."""
    if chromium() is None:
        raise click.ClickException("no Chromium is installed: install the package chromium")
    out.mkdir(parents=True, exist_ok=True)
    with browsing() as browser:
        for shot in SHOTS:
            picture = taken(browser, page, shot)
            (out / f"{shot.name}.png").write_bytes(picture)
            click.echo(f"{out / shot.name}.png: {len(picture):,} bytes")


if __name__ == "__main__":
    main()
