"""The files of the page are whole, and safe under a policy that allows nothing from elsewhere."""

from __future__ import annotations

import re

import pytest

from core_splitfuse.serving.page import FILES, HEADERS

TEXTS = {path: file.read().decode() for path, file in FILES.items()}


def test_everything_that_is_referred_to_is_there() -> None:
    found = set(re.findall(r'(?:src|href)="([^"#]+)"', TEXTS["/"]))
    for path, text in TEXTS.items():
        found |= {
            f"/page/{name}" for name in re.findall(r'from "\./([\w.]+)"', text) if path != "/"
        }
    assert found == set(FILES) - {"/"}


@pytest.mark.parametrize("path", FILES)
def test_nothing_comes_from_elsewhere(path: str) -> None:
    text = TEXTS[path].replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", text)


def test_markup_holds_no_code_and_no_style() -> None:
    assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=", TEXTS["/"])


def test_scripts_never_make_markup_of_text() -> None:
    scripts = "".join(text for path, text in TEXTS.items() if path.endswith(".js"))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", scripts)


def test_every_control_has_a_name() -> None:
    page = TEXTS["/"]
    labelled = set(re.findall(r'<label for="([\w-]+)"', page))
    assert set(re.findall(r'<(?:input|textarea) id="([\w-]+)"', page)) <= labelled
    for button in re.findall(r"<button[^>]*>.*?</button>", page, re.DOTALL):
        assert "aria-label=" in button or re.sub(r"<[^>]*>", "", button).strip()


def test_the_policy_allows_the_page_only() -> None:
    assert HEADERS["Content-Security-Policy"].startswith("default-src 'self';")
    assert "unsafe" not in HEADERS["Content-Security-Policy"]
