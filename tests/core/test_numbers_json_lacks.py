"""JSON that holds NaN and infinities, and that any reader of JSON accepts."""

from __future__ import annotations

import json
import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aegpo.core.as_json import dumps, loads
from aegpo.core.files import write_json


def strict(text: str):
    """The reading of a program that knows JSON only."""

    def refuse(word: str):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


NUMBERS = st.floats(width=64)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBERS | st.text() | st.sampled_from(["NaN", "Infinity", "-Infinity"]),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def same(one, other) -> bool:
    if isinstance(one, float):
        return isinstance(other, float) and (one == other or (math.isnan(one) and math.isnan(other)))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@given(VALUES)
def test_what_is_written_is_json_and_is_read_back(value):
    strict(dumps(value))
    assert same(value, loads(dumps(value)))


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_finite_number_keeps_every_bit_and_is_written_as_before(value):
    assert dumps({"x": value}) == json.dumps({"x": value})
    assert struct.pack("d", loads(dumps(value))) == struct.pack("d", value)


def test_a_number_that_json_lacks_is_written_as_what_no_text_looks_like():
    value = {"loss": math.nan, "ratio": math.inf, "least": -math.inf, "prompt": "NaN"}
    assert strict(dumps(value)) == {
        "loss": {"float": "NaN"},
        "ratio": {"float": "Infinity"},
        "least": {"float": "-Infinity"},
        "prompt": "NaN",
    }
    assert loads(dumps(value))["prompt"] == "NaN"


@pytest.mark.parametrize("value", [{"float": "half"}, {"float": 1.5}, {"float": ["NaN"]}, {"float": "NaN", "more": 1}])
def test_what_only_resembles_such_a_number_stays_what_it_is(value):
    assert loads(dumps(value)) == value


def test_files_of_before_are_read():
    found = loads('{"a": NaN, "b": [Infinity, -Infinity], "c": 1.5}')
    assert math.isnan(found["a"])
    assert found["b"] == [math.inf, -math.inf]
    assert found["c"] == 1.5


def test_a_file_of_json_is_json(tmp_path):
    write_json(tmp_path / "file.json", {"gain": math.nan})
    assert strict((tmp_path / "file.json").read_text()) == {"gain": {"float": "NaN"}}
