"""The changelog: its versions are the package's, its links lead somewhere; what plugins change stands in one place."""

from __future__ import annotations

import re

import pytest
from repository import ROOT

import aegpo
from aegpo.core import first_edition

TEXT = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "plugins" / "README.md").read_text(encoding="utf-8")
VERSION = re.compile(r"^## \[(\d+\.\d+\.\d+)\](?: - (unreleased|\d{4}-\d\d-\d\d))?$")
SECTIONS = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")  # of Keep a Changelog
RECORDS = {"Signals": "signals", "StepReport": "report"}  # as the guide calls them


def rows() -> list[list[str]]:
    """The guide's table of what a plugin of 0.1 has to change, without its head: subject, 0.1, now."""
    section = GUIDE.partition("\n## What changed since 0.1\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    assert lines[0] == "| | 0.1 | now |"
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def test_every_version_has_a_heading_and_the_newest_is_the_packages():
    headings = [line for line in TEXT.splitlines() if line.startswith("## ")]
    found = [VERSION.match(line) for line in headings]
    assert all(found)
    numbers = [tuple(map(int, match[1].split("."))) for match in found]
    assert numbers == sorted(set(numbers), reverse=True)
    released, is_development, _ = aegpo.__version__.partition(".dev")
    assert (found[0][1], found[0][2] == "unreleased") == (released, bool(is_development))
    assert all(match[2] != "unreleased" for match in found[1:])


def test_changes_are_sorted_under_the_words_of_keep_a_changelog():
    for version in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]:
        used = re.findall(r"^### (.*)$", version, re.MULTILINE)
        assert used
        assert used == [section for section in SECTIONS if section in used]


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("link", re.findall(r"\]\((?!https?://)([^)]+)\)", TEXT))
def test_every_link_leads_to_a_heading_of_a_file_of_the_repository(link):
    path, _, anchor = link.partition("#")
    assert not anchor or anchor in anchors((ROOT / path).read_text(encoding="utf-8"))
    assert (ROOT / path).is_file()


def test_what_plugins_have_to_change_stands_in_the_guide_alone_and_is_linked():
    assert "](plugins/README.md#what-changed-since-01)" in TEXT
    assert "\n|" not in TEXT
    assert len(rows()) > 10
    assert all(len(row) == 3 for row in rows())


@pytest.mark.parametrize(("record", "name"), list(first_edition.READ), ids=".".join)
def test_the_guide_has_every_attribute_that_is_answered_with_another(record, name):
    old = rf"`{RECORDS[record]}\.{name}`"
    row = next(row for row in rows() if re.search(old, row[1]))
    answered = re.match(r"[a-z]+\.[a-z_]+[(\[]\"[a-z-]+\"[)\]]", first_edition.READ[record, name])
    if answered is not None and record == "Signals":
        assert answered[0] in row[2]


@pytest.mark.parametrize("name", list(first_edition.DECLARED))
def test_the_guide_has_every_declaration_that_is_refused_with_the_line_to_write(name):
    row = next(row for row in rows() if name in row[1])
    assert first_edition.DECLARED[name] in row[2]
