"""What standard streams are given: everything that can be shown, and nothing that steers a terminal."""

from __future__ import annotations

import pytest
from command_line import aegpo

from aegpo.commands.streams import harmless


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\nc é 💥 漢字", "a\tb\nc é 💥 漢字"),
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("back\r\x9b\x7f", "back\\r\\x9b\\x7f"),
        ("\u202eegral\u2069", "\\u202eegral\\u2069"),
    ],
)
def test_what_would_steer_a_terminal_is_escaped(text, shown):
    assert harmless(text) == shown


def test_errors_are_shown_so():
    done = aegpo("check", "gone\x1b[2J.yaml")
    assert done.code == 2
    assert "gone\\x1b[2J.yaml" in done.stderr
