"""YAML that is too deep, too long, or holds what no experiment can: refused at once, with the place."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from aegpo.config.loading import load_experiment_file
from aegpo.config.parsing import DEEPEST, parse
from aegpo.errors import SpecError
from aegpo.plugin.manager import load_registries, plugin_manager

LAUGHS = "x0: &x0 [a, b]\n" + "".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]\n" for n in range(1, 30))
CHAIN = "x0: &x0 [[[[[[[[[[[[]]]]]]]]]]]]\n" + "".join(f"x{n}: &x{n} [[[[[[[*x{n - 1}]]]]]]]\n" for n in range(1, 90))
DEEP, MANY = f"nested deeper than {DEEPEST} lists and mappings", "more than 5,000 values"
LARGEST = "is beyond whole numbers, which end at 9223372036854775807; give a smaller one"
REFUSED = [
    ("aliases of aliases", LAUGHS, f"x.yaml:5:15: {MANY}, with what aliases stand for"),
    ("aliases of depth", CHAIN, f"x.yaml:4:16: {DEEP}, with what aliases stand for"),
    ("lists", "a: " + "[" * 100_000, f"x.yaml:1:35: {DEEP}"),
    ("mappings", "{a: " * 40_000, f"x.yaml:1:126: {DEEP}"),
    ("blocks", "- " * 90_000, f"x.yaml:1:65: {DEEP}"),
    ("keys", "? " * 90_000, f"x.yaml:1:65: {DEEP}"),
    ("items", "a: [" + "1," * 90_000 + "1]", f"x.yaml:1:9999: {MANY}"),
    ("entries", "".join(f"k{n}: 1\n" for n in range(9_000)), f"x.yaml:2500:8: {MANY}"),
    ("characters", "# " * 200_000, "x.yaml:1:1: has 400,000 characters; an experiment has 200,000 at most"),
    ("an alias of itself", "a: &a [1, *a]", "x.yaml:1:4: a.1: an alias of something it is inside of"),
    ("a byte 0", "a: b\nc: \0", "x.yaml:2:4: the character U+0000 cannot stand here as it is"),
    ("an odd break", "a: b\nc: 'd\u2028e'", "x.yaml:2:6: the character U+2028 cannot stand here as it is; remove it, "
     'or write it in double quotes: "\\u2028"'),
    ("an escaped byte 0", 'a: "b\\0"', "x.yaml:1:4: a: has the character U+0000, which text cannot have; remove it"),
    ("half a character", 'a: "\\ud83d"', "x.yaml:1:4: a: has the character U+D83D, which text cannot have; remove it"),
    ("a whole number", "a: 9223372036854775808", f"x.yaml:1:4: a: 9223372036854775808 {LARGEST}"),
    ("a long number", "a: -" + "1" * 9000, f"x.yaml:1:4: a: -{'1' * 39} {LARGEST}"),
    ("an endless number", "a: 1e999", "x.yaml:1:4: a: 1e999 is not a finite number; give a finite one"),
    ("a vanishing number", "a: 1e-999", "x.yaml:1:4: a: 1e-999 is too near to 0 to be told from it; write 0"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), [pytest.param(*case[1:], id=case[0]) for case in REFUSED])
def test_what_no_experiment_has_is_refused_at_once_with_its_place(text, message):
    begin = time.process_time()
    _, mistakes = parse(text, "x.yaml")
    assert time.process_time() - begin < 1
    assert str(mistakes[0]).startswith(message)
    assert max(map(len, str(mistakes[0]).splitlines())) < 200


VALUES = {
    "9223372036854775807": 2**63 - 1,
    "-9223372036854775807": 1 - 2**63,
    "0000000000000000000000012": 12,
    "0e-999": 0.0,
    '"\\u2028"': "\u2028",
}


@pytest.mark.parametrize(("text", "value"), VALUES.items())
def test_what_is_just_within_is_read(text, value):
    document, mistakes = parse(f"key: {text}\r\nother: 1\r\n", "x.yaml")
    assert (document.plain, mistakes) == ({"key": value, "other": 1}, [])


def test_aliases_as_people_use_them_are_read():
    document, mistakes = parse("a: &a {b: [1, 2]}\nc: [*a, *a]\n", "x.yaml")
    assert (document.plain["c"], mistakes) == ([{"b": [1, 2]}] * 2, [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name: a\nmodel: caf\xe9\n", "x.yaml:2:11: not UTF-8 text (byte 0xe9); save it as UTF-8\n  model: caf"),
        ("name: a\n".encode("utf-16"), "x.yaml:1:1: UTF-16 text; save it as UTF-8"),
        (b"name: a\nmodel: \0\n", "x.yaml:2:8: a byte 0, which text does not have"),
    ],
)
def test_a_file_in_another_encoding_is_refused_with_its_place(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_bytes(content)
    with pytest.raises(SpecError) as error:
        load_experiment_file(Path("x.yaml"), load_registries(plugin_manager(())))
    assert str(error.value).startswith(message)


def test_a_prompts_count_beyond_what_there_is_gets_its_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text("model: shapes\nrewards: [scene]\nprompts:\n  train_count: 100000\n")
    with pytest.raises(SpecError) as error:
        load_experiment_file(Path("x.yaml"), load_registries(plugin_manager(())))
    assert str(error.value).splitlines()[0] == (
        "x.yaml:4:16: prompts.train_count: the train split of 'shapes' has too few captions: 100000 asked for, at most "
        "840"
    )
