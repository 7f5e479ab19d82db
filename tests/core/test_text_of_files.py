"""Bytes as text, or where they are none."""

from __future__ import annotations

import pytest

from aegpo.core.texts import NotTextError, utf8


def test_utf_8_is_text_with_or_without_the_mark_of_some_programs():
    assert utf8("a caf\u00e9\r\n".encode()) == "a caf\u00e9\r\n"
    assert utf8("\ufeffa caf\u00e9".encode()) == "a caf\u00e9"


@pytest.mark.parametrize(
    ("content", "line", "column", "row"),
    [
        (b"\xe9", 1, 1, "\ufffd"),
        ("a\n\u00e9\u00e9".encode() + b"\xff b\r\nc", 2, 3, "\u00e9\u00e9\ufffd b"),
        (b"a\nb\n\nc\0d", 4, 2, "c\0d"),
        ("caf\u00e9".encode("utf-16-be"), 1, 1, "\0c\0a\0f\0\ufffd"),
    ],
)
def test_what_is_no_utf_8_is_refused_with_its_place(content, line, column, row):
    with pytest.raises(NotTextError) as error:
        utf8(content)
    assert (error.value.line, error.value.column, error.value.row) == (line, column, row)
