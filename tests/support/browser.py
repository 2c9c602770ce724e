"""Pages in a headless Chromium, and the addresses that a page refers to."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--virtual-time-budget=2000")
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
ADDRESSES = {"src", "href", "xlink:href", "srcset", "action", "formaction", "data", "poster", "background", "ping"}


def dom_after(html: str, script: str, folder: Path, *, policy: bool = False) -> str:
    """The document as HTML after `script` has run at its end; skips without a Chromium.

    Args:
        html: a page.
        script: JavaScript.
        folder: for files.
        policy: whether the page keeps its content security policy, which refuses foreign scripts.
    """
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        pytest.skip(f"no Chromium: none of {', '.join(NAMES)} is installed")
    page = folder / "page.html"
    text = html if policy else POLICY.sub("", html)
    page.write_text(text.replace("</body>", f"<script>{{{script}}}</script></body>"))
    call = [browser, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", page.as_uri()]
    done = subprocess.run(call, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout


class _Addresses(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attributes if name in ADDRESSES]
        self.found += [f"<{tag}>"] if tag in ("link", "base", "iframe", "object", "embed") else []


def foreign_addresses(html: str) -> list[str]:
    """What a page refers to outside of itself: addresses, elements that load something, styles that import."""
    parser = _Addresses()
    parser.feed(html)
    outside = [address for address in parser.found if not address.startswith(("#", "data:image/"))]
    return outside + re.findall(r"@import.*|url\((?!#)[^)]*\)|\b(?:fetch|XMLHttpRequest|sendBeacon|WebSocket)\b", html)
