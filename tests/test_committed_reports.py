"""The committed reports: light enough to mail, sufficient to themselves, and quiet in a browser by day and by night."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from test_report import FLAGS, Page, a_browser

RESULTS = Path(__file__).resolve().parents[1] / "results"
PAGES = sorted(RESULTS.glob("*/report/report.html"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parts[-3])
def test_a_committed_page_is_light_and_asks_for_nothing(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(text.encode()) < 2_000_000
    found = Page(text)
    assert len(found.ids) == len(set(found.ids))
    for tag, attributes in found.attributes:
        target = attributes.get("href") or attributes.get("src") or ""
        assert not target.startswith(("http:", "https:", "//")), (tag, target)
        if target.startswith("#"):
            assert target[1:] in found.ids, target
    assert "@import" not in text and "url(http" not in text


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parts[-3])
def test_a_committed_page_opens_without_a_word_on_the_console(page: Path, scheme: str, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    prefers = f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"
    words = [a_browser(), *FLAGS, prefers, f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}"]
    shot = subprocess.run([*words, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert picture.read_bytes().startswith(b"\x89PNG"), shot.stderr[-500:]
    assert "CONSOLE" not in shot.stderr, shot.stderr[-2000:]
