"""Pages from the templates beside this module; whatever a page shows is escaped, but for plots, which we draw.

A page is one self-contained HTML file: no script, nothing loaded from elsewhere, light and dark.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from aegpo.report.plots import Plot
from aegpo.report.style import GRID, INK

if TYPE_CHECKING:
    from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, values: Mapping[str, object]) -> str:
    """The page that a template makes of these values; a name that is not among them is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["drawing"] = drawing
    return environment.get_template(template).render(values)


def drawing(plot: Plot) -> Markup:
    """The plot itself, in the page's colours."""
    from markupsafe import Markup

    svg = plot.svg.replace(INK, "var(--ink)").replace(GRID, "var(--grid)")
    # matplotlib names parts of every figure alike; in one page the names must differ
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{plot.name}-", svg)
    told = Markup('<svg role="img" aria-label="{}" ').format(plot.alternative)
    return Markup(svg.replace("<svg ", told, 1))
