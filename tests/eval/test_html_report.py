"""The report's pages: complete, self-contained, safe to open; and what a real browser makes of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
import report_cases
from dma_hf_eval.cli import main
from dma_hf_eval.report.page import write_report
from dma_hf_eval.report.plots import inline
from dma_hf_eval.report.results import KINDS
from dma_hf_eval.report.sections import BUILDERS, Table

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
MARKUP = '<script>alert("x")</script> | <b>'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases and their report. One text has a name that would be markup."""
    path = tmp_path_factory.mktemp("results")
    contents = {name: case() for name, case in report_cases.CASES.items()}
    contents["perplexity"]["corpora"][0]["name"] = MARKUP
    for run in contents["perplexity"]["runs"]:
        run["data"] = MARKUP
    report_cases.write(path, contents)
    write_report(path)
    return path


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def markdown(folder: Path) -> str:
    return (folder / "report.md").read_text(encoding="utf-8")


class Page(HTMLParser):
    """The tags of a page with their attributes, and whether every element that was opened is closed."""

    VOID = ("meta", "br", "wbr", "hr", "img", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_verdict_comes_first(html: str, markdown: str) -> None:
    verdict = "low=int8,high=none: safe at KL 2e-4; 1.3× prefill at 32k."
    assert markdown.startswith(f"# DMA against SDPA: my-model\n\n**{verdict}**\n")
    words = re.sub(r"<[^>]+>", " ", html[html.index("<body>") :]).split()
    assert " ".join(words).startswith(f"DMA against SDPA: my-model {verdict}")


def test_every_kind_of_results_has_a_section(html: str) -> None:
    assert BUILDERS.keys() == KINDS.keys()
    identifiers = [attributes["id"] for _, attributes in Page(html).tags if "id" in attributes]
    assert {"pareto", *report_cases.CASES} <= set(identifiers)
    assert len(identifiers) == len(set(identifiers)), "the pictures' ids must not clash"


def test_the_page_needs_nothing_else(html: str) -> None:
    page = Page(html)
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"} == set()
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            target = attributes.get(name)
            assert target is None or target.startswith(("#", "data:")), target
    assert "@import" not in html
    assert re.findall(r"url\((?!#)", html) == []


def test_what_stands_in_the_results_is_text_not_markup(html: str, markdown: str) -> None:
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in tables}
    assert all(width > 2 for width in widths)


def test_the_pages_hold_every_command_and_every_caveat(html: str, markdown: str) -> None:
    for name in report_cases.CASES:
        for page in (html, markdown):
            assert f"dma-eval {name}" in page
    assert "Not measured: calibration" in markdown
    assert "Not measured: calibration" in html


def test_markdown_tables_are_whole(markdown: str) -> None:
    for table in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table


def test_numbers_stand_on_the_right_and_words_on_the_left() -> None:
    table = Table("", ["name", "value", "head"], [["a", "+1.5 %", "layer 1"], ["b", "–", "mean"]])
    assert [table.is_text(column) for column in range(3)] == [True, False, True]


def test_pictures_take_the_pages_colour_and_keep_to_themselves() -> None:
    svg = (
        '<?xml version="1.0"?><!DOCTYPE svg>'
        '<svg height="50pt" version="1.1" viewBox="0 0 100 50" width="100pt"'
        ' xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
        '<style type="text/css">*{fill: red}</style><defs><path id="p" d="M 0 0"/></defs>'
        "<text style=\"font-family: 'DejaVu Sans', sans-serif; fill: #010203\">a</text>"
        '<g id="axes"><use xlink:href="#p" clip-path="url(#p)"/></g></svg>'
    )
    drawn = inline(svg, "one")
    ElementTree.fromstring(drawn)
    assert re.findall(r'\bid="[^"]*"', drawn) == ['id="one-p"'], "only what is referred to keeps its id"
    assert 'xlink:href="#one-p" clip-path="url(#one-p)"' in drawn
    assert "font-family: inherit; fill: currentColor" in drawn
    assert 'style="min-width: 80px; max-width: 140px"' in drawn
    assert not {"<style", "height=", "DOCTYPE", "#010203"} & set(
        re.findall(r"<style|height=|DOCTYPE|#010203", drawn)
    )


def test_the_command_writes_both_pages(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(folder), "--output", str(tmp_path / "site")]) == 0
    assert sorted(path.name for path in (tmp_path / "site").iterdir()) == ["report.html", "report.md"]
    assert capsys.readouterr().out.count("written: ") == 2
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_the_results_of_this_project_make_a_report(tmp_path: Path) -> None:
    """Whatever is committed under eval/results."""
    results = Path(__file__).parents[2] / "eval" / "results"
    for source in sorted(path for path in results.iterdir() if path.is_dir()):
        report = write_report(source, tmp_path / source.name)
        assert all(path.stat().st_size > 1000 for path in report)


@pytest.mark.skipif(BROWSER is None, reason=f"needs a browser: {', '.join(BROWSERS)}")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280], ids=["phone", "desktop"])
def test_a_browser_shows_the_page_without_complaint(
    folder: Path, tmp_path: Path, width: int, scheme: str
) -> None:
    from matplotlib.image import imread

    picture = tmp_path / "page.png"
    command = [
        str(BROWSER),
        "--headless=new",
        "--no-sandbox",  # Chromium refuses to run as root with it, and CI often is
        "--disable-gpu",
        "--hide-scrollbars",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
        f"--window-size={width},1400",
        f"--screenshot={picture}",
        (folder / "report.html").as_uri(),
    ]
    quiet = {**os.environ, "DBUS_SESSION_BUS_ADDRESS": "disabled:"}
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, env=quiet)
    complaints = [line for line in finished.stderr.splitlines() if "CONSOLE" in line]
    assert (finished.returncode, complaints) == (0, [])
    pixels = imread(picture)[..., :3]
    background = pixels[2, 2].mean()
    assert background < 0.2 if scheme == "dark" else background > 0.9
    assert pixels.std() > 0.05, "an empty page"
