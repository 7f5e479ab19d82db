"""What the page, its plots and the terminal show of a report."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from PIL import Image
from rich.console import Console
from studies import AEGPO, ARMS, GRPO, RANDOM, Arm, report, write_experiment

from aegpo.report.recorded import read_study
from aegpo.report.summary import summarize
from aegpo.report.tables import Table
from aegpo.report.terminal import print_table, show


def test_the_probe_is_told_as_a_share_of_a_step_beside_how_exact_it_is(tmp_path):
    whole = {"block": "joint", "steps": "all", "rows": "all", "samples": 1, "refresh": 1, "source": "probe"}
    fewer = replace(AEGPO, name="fewer-rows", probe={**whole, "rows": 12, "source": "rollout"})
    arms = (GRPO, replace(AEGPO, probe=whole), fewer)
    html, numbers, terminal = report(write_experiment(tmp_path, arms))
    exact, cheap = numbers["signals"]
    assert (exact["arm"], exact["forwards"], exact["exact"]) == ("aegpo", 160, True)
    assert exact["forwards_share"] == pytest.approx(160 / 580)
    assert exact["seconds"] == pytest.approx(0.4)
    assert exact["seconds_share"] == pytest.approx(0.4 / (0.4 + 0.001 + 1.05 + 0.2 + 1.6))
    assert (cheap["arm"], cheap["exact"]) == ("fewer-rows", False)
    row = r"aegpo +source probe, samples 1, steps all, rows all, refresh 1 +160 +27\.6 % +0\.40 +12\.3 % +exact"
    assert re.search(row, terminal)
    assert re.search(r"fewer-rows +source rollout, samples 1, steps all, rows 12, .* not measured", terminal)
    assert "What signals cost" in html


def test_noise_left_in_images_gets_a_panel_where_it_was_recorded(tmp_path):
    arms = (replace(GRPO, noise=0.0), replace(AEGPO, noise=0.02), RANDOM)
    html, numbers, terminal = report(write_experiment(tmp_path, arms))
    assert [row["arm"] for row in numbers["noise"]] == ["grpo", "aegpo"]
    assert numbers["noise"][1] == pytest.approx({"arm": "aegpo", "mean": 0.025, "low": 0.02, "high": 0.03})
    assert "Noise left in training images" in html
    assert re.search(r"aegpo +0\.0250 +0\.0200 +0\.0300", terminal)
    assert (tmp_path / "report" / "noise.png").exists()


def test_neither_probe_nor_noise_is_mentioned_where_there_is_none(tmp_path):
    html, numbers, terminal = report(write_experiment(tmp_path, (GRPO, RANDOM)))
    assert numbers["signals"] == numbers["noise"] == []
    for text in (html, terminal):
        assert "signals cost" not in text
        assert "Noise left" not in text
    assert not (tmp_path / "report" / "noise.png").exists()


def test_every_plot_is_a_small_png(written, reported):
    plots = sorted((written / "report").glob("*.png"))
    assert [path.stem for path in plots] == ["allocation", "curves", "gains", "seconds", "steps"]
    for path in plots:
        assert path.stat().st_size < 200_000
        with Image.open(path) as image:
            assert image.width >= 900


def test_the_page_loads_nothing_from_elsewhere_and_is_well_formed(reported):
    html, _, _ = reported

    class Reader(HTMLParser):
        open_tags, links, ids = [], [], []

        def handle_starttag(self, tag, attributes):
            values = dict(attributes)
            self.links += [values[name] for name in ("src", "href", "xlink:href") if name in values]
            self.ids += [values["id"]] if "id" in values else []
            if tag not in ("meta", "img", "link", "br"):
                self.open_tags.append(tag)

        def handle_endtag(self, tag):
            assert self.open_tags.pop() == tag

        def handle_startendtag(self, tag, attributes):
            self.handle_starttag(tag, attributes)
            if tag not in ("meta", "img", "link", "br"):
                self.open_tags.pop()

    reader = Reader()
    reader.feed(html)
    assert reader.open_tags == []
    assert reader.links
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in reader.links)
    assert {link[1:] for link in reader.links if link.startswith("#")} <= set(reader.ids)
    assert len(reader.ids) == len(set(reader.ids))
    assert "<script" not in html
    assert "@import" not in html
    assert "prefers-color-scheme: dark" in html


def test_names_and_prompts_are_escaped(tmp_path):
    arms = [Arm("<b>$x$</b>", {"palette": 0.1, "<i>": 0.0}), Arm("[bold]&", {"palette": 0.1, "<i>": 0.0})]
    html, _, terminal = report(write_experiment(tmp_path, arms))
    assert "<b>" not in re.sub(r"<!--.*?-->", "", html)
    assert "<i>" not in html
    assert "&lt;b&gt;$x$&lt;/b&gt;" in html
    assert "&lt;blue&gt;" in html
    assert "[bold]&" in terminal


def test_the_page_says_what_differed_between_arms_and_what_made_it(reported):
    html, _, _ = reported
    assert "allocator.kind" in html
    assert "selector.top_k" in html
    assert "rollouts.rollouts_per_step" not in html
    assert "aegpo-jpeg" in html
    assert "3da94a6" in html
    assert "48 held-out prompts" in html


def test_the_grid_before_training_is_shown_once_if_it_is_the_same(reported, written):
    html, _, _ = reported
    assert html.count("<img ") == 1 + len(ARMS)
    assert "before training, every arm" in html


def test_a_narrow_terminal_gets_tables_that_fit(written):
    stream = io.StringIO()
    show(summarize(read_study(written)), written / "report.html", Console(file=stream, width=80))
    lines = [line for line in stream.getvalue().splitlines() if not line.startswith("report:")]
    assert max(map(len, lines)) <= 80
    interval = r"\[\+0\.\d+, \+0\.\d+\]"
    assert re.search(rf"aegpo +3 +0\.\d+ +0\.\d+ +\+0\.\d+ +{interval}", stream.getvalue())
    assert re.search(rf"aegpo +grpo +\+0\.\d+ +{interval} +[\de.-]+ +1\n", stream.getvalue())
    assert "only on the page: seeds, detectable, margin, CI also prompts\n" in stream.getvalue()


def test_a_narrow_terminal_keeps_the_first_column_whatever_it_is_called():
    stream, table = io.StringIO(), Table("palette", ("base", "prompts", "base"), (("photo", "3", "0." + 30 * "1"),))
    print_table(table, Console(file=stream, width=30))
    assert re.search(r"base +prompts *\n.*\n *photo +3", stream.getvalue())
    assert "only on the page: base\n" in stream.getvalue()


def test_importing_the_report_imports_no_large_library():
    late = {"torch", "matplotlib", "scipy", "jinja2"}
    code = f"import sys, aegpo.report; print(sorted({late!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
