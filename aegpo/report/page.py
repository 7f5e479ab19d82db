"""The report as one self-contained HTML file: no script, nothing loaded from elsewhere, light and dark."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path

from aegpo.report.plots import Plot
from aegpo.report.recorded import RecordedRun, Study
from aegpo.report.style import GRID, INK, looks
from aegpo.report.summary import Summary
from aegpo.report.tables import (
    Table,
    cost_table,
    difference_table,
    probe_table,
    reach_table,
    score_tables,
    setting,
    versions_table,
)
from aegpo.report.wording import verdict

LARGEST_GRID = 768  # pixels; larger sample grids are made smaller for the page, the files stay as they are
STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #24292e; --soft: #5b646d; --grid: #d9dde2; --tint: #f5f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16191d; --ink: #e4e7ea; --soft: #9aa4ae; --grid: #363c43; --tint: #1e2227; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
header p { margin: 0; color: var(--soft); }
h1 { margin: .2rem 0 1.2rem; font-size: 1.9rem; line-height: 1.2; }
h2 { margin: 3rem 0 .6rem; font-size: 1.25rem; }
h3 { margin: 1.8rem 0 .4rem; font-size: 1rem; }
.verdict { padding: 1.1rem 1.4rem; background: var(--tint); border-left: 4px solid #4477aa; border-radius: 4px; }
.verdict p { margin: 0 0 .45rem; max-width: 62rem; }
.verdict p:first-child { font-size: 1.2rem; font-weight: 600; }
.verdict p:last-child { margin: 0; }
.missing { border-left-color: #ee6677; margin-top: 1rem; }
.missing ul { margin: .3rem 0 0; padding-left: 1.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .34rem .5rem; text-align: right; border-bottom: 1px solid var(--grid); }
th { color: var(--soft); font-weight: 500; }
td:first-child, th:first-child { text-align: left; padding-left: 0; }
.text th, .text td { text-align: left; }
.dot { display: inline-block; width: .65rem; height: .65rem; margin-right: .5rem; border-radius: 50%; }
.note, figcaption { margin: .4rem 0 0; color: var(--soft); font-size: .85rem; max-width: 62rem; }
figure { margin: 0; }
figure svg { display: block; width: 100%; height: auto; }
.grids { display: grid; gap: 1.2rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
.grids img { display: block; width: 100%; border-radius: 4px; }
dl { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .45rem 1.4rem; font-size: .92rem; }
dt { font-weight: 600; } dd { margin: 0; max-width: 58rem; }
summary { cursor: pointer; color: var(--soft); font-size: .9rem; }
details { margin-top: .8rem; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .6rem; } }
"""


def page(study: Study, summary: Summary, plots: Sequence[Plot]) -> str:
    """The whole page."""
    return document(f"{study.name}: report", _parts(study, summary, plots))


def document(title: str, parts: Iterable[str]) -> str:
    """A self-contained page of such parts, empty ones left out."""
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _parts(study: Study, summary: Summary, plots: Sequence[Plot]) -> Iterator[str]:
    yield f"<header><p>aegpo report</p><h1>{escape(study.name)}</h1></header>"
    yield verdict_html(verdict(summary))
    if study.notes:
        items = "".join(f"<li>{escape(note)}</li>" for note in study.notes)
        yield f'<section class="verdict missing"><p>Not everything is there</p><ul>{items}</ul></section>'
    if summary.scores:
        yield "<h2>Final scores</h2>"
        yield from (table_html(table, study.arms) for table in score_tables(summary))
        yield '<p class="note">What each interval means: see How it was measured, below.</p>'
    yield from (figure_html(plot) for plot in plots if plot.name in ("gains", "curves"))
    if summary.costs:
        yield "<h2>Cost</h2>"
        yield from (table_html(table, study.arms) for table in (cost_table(summary), reach_table(summary)))
    if summary.probes:
        yield table_html(probe_table(summary), study.arms)
    yield from (figure_html(plot) for plot in plots if plot.name not in ("gains", "curves"))
    yield _samples(study)
    yield "<h2>How it was measured</h2>"
    terms = "".join(f"<dt>{escape(term)}</dt><dd>{escape(words)}</dd>" for term, words in setting(study, summary))
    yield f"<dl>{terms}</dl>"
    yield table_html(difference_table(study), text=True)
    yield f"<details><summary>Versions</summary>{table_html(versions_table(study), text=True)}</details>"


def verdict_html(sentences: Sequence[str]) -> str:
    """What matters most, in words; the first sentence is the headline."""
    return f'<section class="verdict">{"".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)}</section>'


def table_html(table: Table, arms: Sequence[str] = (), text: bool = False) -> str:
    """A table with its heading and note; a dot in the colour of each of the `arms`; `text`: all cells to the left."""
    look = looks(arms)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.columns)
    rows = []
    for name, *cells in table.rows:
        known = look.get(name) if table.columns[0] == "arm" else None
        dot = f'<span class="dot" style="background:{known.color}"></span>' if known else ""
        rows.append(f"<tr><td>{dot}{escape(name)}</td>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f'<h3>{escape(table.title)}</h3><div class="wide"><table{" class=text" if text else ""}>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{note}"
    )


def figure_html(plot: Plot) -> str:
    """A plot with its heading and caption, in the page's colours."""
    svg = plot.svg.replace(INK, "var(--ink)").replace(GRID, "var(--grid)")
    # matplotlib names parts of every figure alike; in one page the names must differ
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{plot.name}-", svg)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(plot.alternative)}" ', 1)
    return f"<h2>{escape(plot.title)}</h2><figure>{svg}<figcaption>{escape(plot.caption)}</figcaption></figure>"


# --- samples ---------------------------------------------------------------------------------------------------------


def _samples(study: Study) -> str:
    runs = [study.of(arm)[0] for arm in study.arms if study.of(arm) and len(study.of(arm)[0].images) > 1]
    if not runs:
        return ""
    same = len({run.images[0].read_bytes() for run in runs}) == 1
    shown = [_grid(runs[0], 0, "before training, every arm")] if same else []
    for run in runs:
        shown += [] if same else [_grid(run, 0, f"{run.arm}, before training")]
        shown.append(_grid(run, -1, f"{run.arm}, seed {run.seed}, step {_step(run.images[-1])}"))
    kept = study.example.experiment["evaluation"].get("images", 16)
    prompts = study.example.evaluations[0].prompts[:kept] if study.example.evaluations else ()
    words = "".join(f"<li>{escape(prompt)}</li>" for prompt in prompts)
    return (
        f'<h2>Samples before and after</h2><div class="grids">{"".join(shown)}</div>'
        f'<p class="note">The same held-out prompts and start noise in every grid.</p>'
        f"<details><summary>The prompts, row by row</summary><ol>{words}</ol></details>"
    )


def _grid(run: RecordedRun, index: int, caption: str) -> str:
    source = base64.b64encode(_small(run.images[index])).decode()
    text = escape(caption)
    image = f'<img alt="Samples, {text}" src="data:image/png;base64,{source}">'
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def _small(path: Path) -> bytes:
    from PIL import Image

    with Image.open(path) as image:
        if max(image.size) <= LARGEST_GRID:
            return path.read_bytes()
        small = image.convert("RGB")
        small.thumbnail((LARGEST_GRID, LARGEST_GRID))
        stream = io.BytesIO()
        small.save(stream, format="PNG", optimize=True)
        return stream.getvalue()
