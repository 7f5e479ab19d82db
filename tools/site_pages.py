"""Writes the pages of the documentation into a folder for `mkdocs build` or `zensical build`.

The site has the layout of the repository, so that links between pages are the same here and there. Copied are the pages
that `mkdocs.yml` names and the files they link to; the reference is written from the code. `nox -s docs` calls both.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import reference_pages
import yaml

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "build" / "pages"  # `docs_dir` of mkdocs.yml
REFERENCE = Path("docs/reference")
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")


def nav_pages(nav: Any) -> Iterator[Path]:
    """The pages that the navigation names, relative to the repository."""
    if isinstance(nav, str):
        yield Path(nav)
    for item in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from nav_pages(item)


def written() -> dict[Path, str]:
    """The pages that are written from the code, relative to the repository."""
    return {REFERENCE / name: text for name, text in reference_pages.reference_pages().items()}


def linked(page: Path) -> Iterator[Path]:
    """The files of the repository that a page links to or shows, relative to the repository."""
    for link in LINK.findall((ROOT / page).read_text(encoding="utf-8")):
        target = ((ROOT / page).parent / link).resolve()
        if target.is_file() and target.suffix != ".md":
            yield target.relative_to(ROOT)


def write(folder: Path) -> None:
    """Makes the folder anew, with every page of the navigation and what pages link to."""
    shutil.rmtree(folder, ignore_errors=True)
    generated = written()
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    pages = [page for page in nav_pages(nav) if page not in generated]
    for path in dict.fromkeys([*pages, *(file for page in pages for file in linked(page))]):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, folder / path)
    for path, text in generated.items():
        (folder / path).write_text(text, encoding="utf-8")


def command_line() -> argparse.ArgumentParser:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=PAGES, help="folder that is made anew; default: build/pages")
    return parser


def main() -> int:
    """Writes the folder."""
    write(command_line().parse_args().to)
    return 0


if __name__ == "__main__":
    sys.exit(main())
