"""Whatever a page shows is text: no name, prompt, caption or cell becomes a part of the page."""

from __future__ import annotations

import re

import pytest
from jinja2 import UndefinedError

from aegpo.report.page import Sample
from aegpo.report.plots import Plot
from aegpo.report.style import looks
from aegpo.report.tables import Table
from aegpo.report.templating import render

EVIL = "\"'><script>alert(1)</script>"
TABLE = Table(EVIL, ("arm", EVIL), ((EVIL, EVIL),), EVIL)
PLOT = Plot("gains", EVIL, EVIL, EVIL, "<svg ></svg>")
REPORT = {
    "name": EVIL,
    "verdict": [EVIL],
    "about": [(EVIL, EVIL)],
    "glance": [TABLE],
    "glance_words": EVIL,
    "numbers": [EVIL],
    "notes": [EVIL],
    "looks": looks([EVIL]),
    "scores": [TABLE],
    "equal_cost": [TABLE],
    "of_scores": [PLOT],
    "costs": [TABLE],
    "signals": TABLE,
    "others": [PLOT],
    "samples": [Sample(EVIL, EVIL)],
    "prompts": [EVIL],
    "glossary": [(EVIL, EVIL)],
    "setting": [(EVIL, EVIL)],
    "differences": [TABLE],
    "versions": TABLE,
}
EVALUATION = {
    "name": EVIL,
    "tables": [TABLE],
    "meaning": EVIL,
    "alternative": EVIL,
    "sheet": EVIL,
    "settings": [(EVIL, EVIL)],
}
PROFILE = {
    "name": EVIL,
    "headline": [EVIL],
    "findings": [EVIL],
    "evidence_plots": [PLOT],
    "evidence_tables": [TABLE],
    "measured": [(PLOT, TABLE)],
    "prompts": TABLE,
    "setting": [(EVIL, EVIL)],
}
PAGES = {"report.html": REPORT, "evaluation.html": EVALUATION, "profile.html": PROFILE}


@pytest.mark.parametrize("template", PAGES)
def test_a_script_in_any_value_is_shown_and_never_run(template):
    html = render(template, PAGES[template])
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "\"'>" not in html
    assert not re.search(r'="[^"]*\'>', html)


@pytest.mark.parametrize("template", PAGES)
def test_a_value_that_is_left_out_is_an_error(template):
    for name in PAGES[template]:
        with pytest.raises(UndefinedError, match=f"'{name}' is undefined"):
            render(template, {key: value for key, value in PAGES[template].items() if key != name})
