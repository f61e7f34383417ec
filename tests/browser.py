"""Headless Chromium, by its command line: what a page becomes in it, and what it complains about."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--hide-scrollbars", "--enable-logging=stderr",
)  # fmt: skip
SECONDS = 120


def in_browser(page: Path, width: int, profile: Path, script: str = "null", dark: bool = False) -> tuple[Any, str]:
    """Show a page in a frame of so many pixels and run a script in it, an expression; return its value and the log.

    In a frame, because Chromium's windows are no narrower than 500 pixels. The script is not the page's own, so that
    the copy that it runs in is without the page's policy.
    """
    asked = f"""<script>addEventListener("load", () => {{
        const answer = parent.document.createElement("pre");
        answer.id = "answer";
        answer.textContent = JSON.stringify({script});
        parent.document.body.append(answer);
    }});</script></body>"""
    text = page.read_text(encoding="utf-8")
    open_text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text).replace("</body>", asked)
    copy = profile.parent / f"{profile.name}.html"
    frame = f'<iframe width="{width}" height="900" style="border:0" srcdoc="{html.escape(open_text)}"></iframe>'
    copy.write_text(f'<!DOCTYPE html><meta charset="utf-8"><body>{frame}</body>', encoding="utf-8")
    done = _chromium(copy, max(width + 40, 600), profile, "--dump-dom", dark=dark)
    found = re.search(r'<pre id="answer">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stderr
    return json.loads(html.unescape(found[1])), complaints(done.stderr)


def opened(page: Path, width: int, profile: Path) -> tuple[str, str]:
    """Open a page as it is; return what it has become, and the browser's complaints."""
    done = _chromium(page, width, profile, "--dump-dom")
    return done.stdout, complaints(done.stderr)


def complaints(log: str) -> str:
    """Return what the console said, line by line."""
    return "\n".join(line for line in log.splitlines() if "CONSOLE" in line)


def _chromium(page: Path, width: int, profile: Path, *arguments: str, dark: bool = False) -> Any:
    assert CHROMIUM is not None
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    return subprocess.run(
        [CHROMIUM, *QUIET, scheme, f"--user-data-dir={profile}", f"--window-size={width},900", *arguments,
         page.resolve().as_uri()],
        capture_output=True, text=True, check=False, timeout=SECONDS,
    )  # fmt: skip
