"""Pictures of the playground's page, of archives that are served: `python tests/playground_pictures.py docs NAME [OTHER]`.

Each is the page after its form was asked: NAME in light and dark, and where there is OTHER, both side by side.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any, List

from browsing import launched, playground
from playwright.sync_api import sync_playwright

_SIZE = {"width": 1240, "height": 610}


def picture(browser: Any, url: str, file: Path, text: str, scheme: str) -> None:
    """The page with an answer to this text, or to the sample."""
    page = browser.new_context(viewport=_SIZE, color_scheme=scheme).new_page()
    page.goto(url)
    page.locator("#board-0-ask").wait_for()
    if text:
        page.locator("#board-0-text textarea").fill(text)
    page.locator("#board-0-ask").click()
    page.locator("#board-0-answer-0 .ts-facts b").first.wait_for()
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur(); window.scrollTo(0, 0)")
    page.wait_for_timeout(1000)
    page.screenshot(path=str(file))
    page.context.close()


def main() -> None:
    """Make them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument("--text", default="", help="what is asked [the task's sample]")
    parser.add_argument("--port", type=int, default=7869)
    options = parser.parse_args()
    names: List[str] = options.names
    with sync_playwright() as driver, tempfile.TemporaryDirectory() as temporary:
        browser = launched(driver)
        with playground(Path(temporary), options.port, names[0]) as url:
            for scheme in ("light", "dark"):
                picture(browser, url, options.folder / f"playground-{scheme}.png", options.text, scheme)
        if len(names) > 1:
            with playground(Path(temporary), options.port, *names) as url:
                picture(browser, url, options.folder / "playground-two.png", options.text, "light")
        browser.close()


if __name__ == "__main__":
    main()
