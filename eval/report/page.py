"""The report as one HTML page that needs nothing else, and as one Markdown page."""

from __future__ import annotations

import re
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

import dma_hf

from ..results import prepare_folder, write_file
from .caveats import caveats
from .numbers import commit
from .results import KINDS, Results, read_results
from .sections import Table, sections
from .verdict import Level, headline, judge, limits_table, verdict_table

HTML, MARKDOWN = "report.html", "report.md"
ENVIRONMENT_ROWS = {
    "hardware": "hardware",
    "dtype": "dtype",
    "torch": "PyTorch",
    "triton": "Triton",
    "transformers": "Transformers",
    "python": "Python",
    "dma_hf": "dma_hf",
    "commit": "commit",
    "dirty": "uncommitted changes",
    "date": "started",
}


def write_report(folder: Path, output: Path | None = None) -> list[Path]:
    """Writes ``report.html`` and ``report.md`` on the results in ``folder``; returns their paths.

    Args:
        folder: what the other commands wrote with ``--output``.
        output: where the report goes; ``folder`` itself by default.

    Raises:
        UsageError: if ``folder`` holds no results.
        EvalError: if a file cannot be written.
    """
    results = read_results(folder)
    target = prepare_folder(str(output or folder))
    content = report_content(results)
    written = []
    for name, text in ((HTML, render_html(content)), (MARKDOWN, render_markdown(content))):
        write_file(target / name, text.encode("utf-8"))
        written.append(target / name)
    return written


def report_content(results: Results) -> dict[str, Any]:
    """Everything that the two templates show."""
    verdicts = judge(results)
    models = dict.fromkeys(str(file.content["model"]) for file in results.files if "model" in file.content)
    best = min((v.level for v in verdicts if not v.setting.is_control), default=Level.UNKNOWN)
    return {
        "title": f"DMA against SDPA: {', '.join(models) or 'attention alone'}",
        "headline": headline(verdicts),
        "level": best.words,
        "levels": [level.words for level in Level],
        "verdicts": Table("Every setting that was measured", *verdict_table(verdicts)),
        "limits": Table("The most that counts as safe, and as safe with care", *limits_table()),
        "caveats": caveats(results, verdicts),
        "sections": sections(results, verdicts),
        "environments": _environments(results),
        "commands": [(file.name, file.environment["command"]) for file in results.files],
        "missing": [(kind, KINDS[kind]) for kind in results.missing],
        "version": dma_hf.__version__,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _environments(results: Results) -> Table:
    rows = []
    for field, title in ENVIRONMENT_ROWS.items():
        rows.append([title, *(_plain(field, file.environment[field]) for file in results.files)])
    return Table("Where each file was measured", ["", *(file.name for file in results.files)], rows)


def _plain(field: str, value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return commit(value) if field == "commit" else str(value)


def render_html(content: dict[str, Any]) -> str:
    """The page for a browser. Whatever stands in the results is text there, never markup."""
    return _template("page.html", autoescape=True).render(content)


def render_markdown(content: dict[str, Any]) -> str:
    """The same without pictures."""
    page = _template("page.md", autoescape=False).render(content)
    lines = (line.rstrip() for line in page.splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def _template(name: str, *, autoescape: bool) -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=autoescape, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    # a setting's name may go on in a new line after a comma, and nowhere else
    environment.filters["breakable"] = lambda text: escape(text).replace(",", Markup(",<wbr>"))
    return environment.from_string(files(__package__).joinpath(name).read_text(encoding="utf-8"))
