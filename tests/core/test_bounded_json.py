from __future__ import annotations

import json

import pytest

from aegpo.core.bounded_json import DEEPEST, loads, most_values


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def test_json_of_bearable_size_is_read_as_json():
    value = {"a": [1, 2.5, None, "x, y: [z]"], "b": {"c": True}}
    assert loads(json.dumps(value), 30) == loads(json.dumps(value).encode(), 30) == value
    assert loads(nested(DEEPEST), 100) is not None


@pytest.mark.parametrize("text", [nested(DEEPEST + 1), nested(100_000), "[" * 100_000, '{"a":' * 100_000])
def test_what_is_too_deep_is_a_value_error_in_words(text):
    with pytest.raises(ValueError, match=f"too deep; {DEEPEST} lists and mappings inside one another at most"):
        loads(text, len(text))


def test_values_are_counted_before_they_are_made():
    text = "[" + "[]," * 1000 + "[]]"
    with pytest.raises(ValueError, match="it has 2002 values and more; 100 at most were expected"):
        loads(text, 100)
    assert len(loads(text, 2002)) == 1001
    assert most_values(1600) == 100


@pytest.mark.parametrize("text", ["", "{", b"\xff", "9" * 5000])
def test_what_is_no_json_is_a_value_error_as_ever(text):
    with pytest.raises(ValueError):  # noqa: PT011 - of the library, in its own words
        loads(text, 10_000)
