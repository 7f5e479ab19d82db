"""The site: every page of the repository is in its navigation, and the reference has all that the code has."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import typer
import yaml
from repository import ROOT, shipped

from aegpo.commands.cli import app
from aegpo.core import hookspecs
from aegpo.core.experiment import Experiment
from aegpo.plugin.manager import load_registries, plugin_manager

sys.path.insert(0, str(ROOT / "tools"))
try:
    import public_names
    import reference_pages
    import site_pages
finally:
    sys.path.pop(0)

NAV = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]


@pytest.fixture(scope="module")
def reference() -> dict[str, str]:
    return reference_pages.reference_pages()


def test_the_navigation_has_every_page_once_and_no_other():
    found = list(site_pages.nav_pages(NAV))
    kept = [path.relative_to(ROOT) for path in shipped(ROOT, "*.md")]
    assert sorted(found) == sorted([*kept, *site_pages.written()])


def test_every_page_is_written_with_what_it_links_to_and_shows(tmp_path):
    site_pages.write(tmp_path / "pages")
    written = {path.relative_to(tmp_path / "pages") for path in (tmp_path / "pages").rglob("*") if path.is_file()}
    assert set(site_pages.nav_pages(NAV)) <= written
    assert {Path("experiments/before-after.png"), Path("LICENSE")} <= written
    for page in (page for page in written if page.suffix == ".md"):
        for link in site_pages.LINK.findall((tmp_path / "pages" / page).read_text()):
            assert (tmp_path / "pages" / page).parent.joinpath(link).exists(), f"{page} links to {link}"


def test_a_folder_of_pages_is_made_anew(tmp_path):
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "old.md").touch()
    site_pages.write(tmp_path / "pages")
    assert not (tmp_path / "pages" / "old.md").exists()


def test_every_command_has_all_its_options(reference):
    page = reference["command-line.md"]
    for name, command in typer.main.get_command(app).commands.items():
        section = page.partition(f"## `aegpo {name}`")[2].partition("\n## ")[0]
        options = {word for each in command.params for word in each.opts if word.startswith("--") and word != "--help"}
        assert options == set(re.findall(r"^\| `(?:-\w, )?(--[\w-]+)", section, re.MULTILINE))


def test_every_part_in_the_box_has_all_its_fields(reference):
    page = reference["parts.md"]
    for registry in load_registries(plugin_manager()):
        for entry in (entry for entry in registry if entry.source == "aegpo"):
            heading = f"### `{entry.name}` {{ #{registry.axis}-{entry.name} }}"
            section = page.partition(heading)[2].partition("\n##")[0]
            assert entry.summary.replace("``", "`") in section
            assert set(entry.spec.model_fields) - {"kind"} == set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE))


def test_every_key_of_an_experiment_file_is_there(reference):
    page = reference["experiment-files.md"]
    keys = {"extends", "arms", "seeds", "comparisons", "margin", "target", "measured", *Experiment.model_fields}
    assert keys - {"seed"} <= set(re.findall(r"^\| `(\w+)`", page, re.MULTILINE))
    assert "## `optimizer`" in page
    assert "### `rollouts.tail`" in page


def test_every_hook_and_every_public_name_is_there(reference):
    hooks = [name for name in vars(hookspecs) if name.startswith("aegpo_")]
    assert all(f"`{name}(" in reference["hooks.md"] for name in hooks)
    names = [f"::: {door}.{name}" for door in public_names.DOORS for name in vars(sys.modules[door])["__all__"]]
    assert names == re.findall(r"^::: .*$", reference["python.md"], re.MULTILINE)
