"""Writes the hook reference of plugins/README.md from the hook specifications; `--check` only compares the two."""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path

from aegpo.core import hookspecs

README = Path(__file__).parent.parent / "plugins" / "README.md"
BEGIN = "<!-- hooks: written by tools/hook_reference.py -->"
END = "<!-- end of hooks -->"


def hook_reference() -> str:
    """The reference in Markdown: every hook with its arguments and what it is for."""
    hooks = [function for name, function in vars(hookspecs).items() if name.startswith("aegpo_")]
    registrations = [hook for hook in hooks if hook.__name__.startswith("aegpo_register_")]
    observers = [hook for hook in hooks if hook not in registrations]
    lines = []
    for title, members in (("Registration", registrations), ("Observation", observers)):
        lines += [f"**{title}**", "", "| hook | what it is for |", "|---|---|"]
        for hook in members:
            arguments = ", ".join(inspect.signature(hook).parameters)
            lines.append(f"| `{hook.__name__}({arguments})` | {' '.join((inspect.getdoc(hook) or '').split())} |")
        lines.append("")
    return "\n".join(lines)


def updated(text: str) -> str:
    """The README with the reference between its markers."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert rest, "the README has both markers"
    return f"{before}{BEGIN}\n\n{hook_reference()}\n{END}{after}"


def main() -> int:
    """Writes, or checks; 1 if a check fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    old = README.read_text(encoding="utf-8")
    new = updated(old)
    if check:
        return int(old != new)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
