# SPDX-License-Identifier: MIT
"""Make ``docs/images/report.png`` from the demonstration: the table, and one query's matches.

Needs Chromium and Playwright (``apt-get install chromium``, ``pip install playwright``)::

    make demo
    python docs/make_report_picture.py
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image

from patchnetvlad.report.write import write_report

DOCS = Path(__file__).resolve().parent
WIDTH = 1300


def main(results: Path) -> int:
    """Write the picture from a folder of results."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        print("error: docs/images/report.png needs Chromium; it is left as it is", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page_file = write_report(results, Path(folder) / "report.html", title="Demonstration")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 800}, color_scheme="light")
        page.goto(page_file.as_uri())
        page.wait_for_selector("html[data-ready]")
        # The folder of the photographs is that of this machine.
        page.eval_on_selector(".prefix", "element => element.remove()")
        table = page.locator("#queries").screenshot()
        page.locator("#rows a").first.click()
        page.wait_for_timeout(500)  # pictures are decoded on the side
        detail = page.screenshot()
        browser.close()
    parts = [Image.open(io.BytesIO(part)).convert("RGB") for part in (table, detail)]
    gap = 24
    picture = Image.new("RGB", (WIDTH, sum(part.height for part in parts) + gap), "white")
    top = 0
    for part in parts:
        picture.paste(part, ((WIDTH - part.width) // 2, top))
        top += part.height + gap
    picture = picture.resize((1000, round(picture.height * 1000 / WIDTH)), Image.Resampling.LANCZOS)
    picture = picture.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    picture.save(DOCS / "images" / "report.png", optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo/results")))
