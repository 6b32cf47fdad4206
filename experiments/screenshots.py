"""Pictures of a page as a browser shows it.

    make demo
    python -m experiments.screenshots demo/page.html docs/page

Each view is taken light, and the first one dark and as narrow as a phone too. It needs Chromium, and the extra `test`.
"""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import click


class Shot(NamedTuple):
    """A view, and how it is looked at."""

    name: str
    address: str
    width: int = 1280
    colours: str = "light"


SHOTS = (
    Shot("overview", "overview?group=lists&keep=greedy_cosine.json"),
    Shot("overview-dark", "overview?group=lists", colours="dark"),
    Shot("overview-narrow", "overview?group=lists", width=390),
    Shot("tradeoff", "tradeoff?group=lists"),
    Shot("compare", "compare?group=lists&than_group=times"),
    Shot("expert", "expert?group=lists&layer=3&expert=5"),
    Shot("answers", "answers?than_trace=half-of-them&token=60"),
)


def taken(page: Path, shots: Sequence[Shot]) -> Iterator[tuple[Shot, bytes]]:
    """Each as PNG, the whole length of the page. FileNotFoundError where there is no Chromium."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        raise FileNotFoundError("no Chromium is installed: install the package chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for shot in shots:
            size = {"width": shot.width, "height": 800}
            window = browser.new_context(viewport=size, color_scheme=shot.colours).new_page()  # type: ignore[arg-type]
            window.goto(f"file://{page.absolute()}#{shot.address}")
            window.wait_for_selector("main figure svg")
            yield shot, window.locator("body").screenshot()
            window.close()
        browser.close()


@click.command()
@click.argument("page", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path))
def main(page: Path, out: Path) -> None:
    """Write the pictures into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    for shot, picture in taken(page, SHOTS):
        (out / f"{shot.name}.png").write_bytes(picture)
        click.echo(f"{out / shot.name}.png: {len(picture):,} bytes")


if __name__ == "__main__":
    main()
