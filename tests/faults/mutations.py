"""Experiment files with something changed that their writer did not mean: what the fuzzer of specs draws.

Half of a file's mutations are of its tree (keys, kinds, values, nesting), half of its text (aliases, tags, encodings,
bytes). Every one follows from its generator alone.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

Tree = dict[str, Any]
Spot = tuple[Any, Any]  # a mapping or list, and a key or position in it

NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    64,
    65537,
    10**6,
    2**31,
    2**32 - 1,
    2**53,
    2**63 - 1,
    2**63,
    2**64,
    10**17,
    10**18,
    10**40,
)
FRACTIONS = (0.5, -0.5, 1e-300, 5e-324, 1e-12, 1e12, 1e38, 1e300, 1.7e308, 0.999999999999, 1.0, 3.0)
OTHERS = (None, True, False, "", " ", "~", "x", "no", "1e3", "0x10", "main", "a" * 5000, "\u2028", "caf\u00e9", [], {})
OTHERS += ([1, 2], [[]], ["x"], {"kind": "x"}, {"kind": None}, {"kind": ["uniform"]}, {"": 1}, "../../x", "/dev/null")
SCALARS = ("1e999", "-1e999", ".inf", "-.inf", ".nan", "1_000", "0o17", "1:30", "+7", "1.", ".5", "1" * 400, "1e-999")
SCALARS += (
    "2026-01-31",
    "=",
    "<<",
    "!!int '3'",
    "!!python/object:os.system x",
    "!x y",
    "*gone",
    "&a",
    "? x",
    "| ",
    "@",
)
SCALARS += ('"\\ud800"', '"\\0"', '"\\x1b[31m"', '"\\N\\L"', "'", '"', "[1, 2", "{a: 1", "]", "%TAG ! x", "---", "...")


@dataclass(frozen=True)
class Mutation:
    """An experiment file, and what was done to it."""

    what: str
    content: bytes


def mutated(base: Tree, parts: Mapping[str, Sequence[Tree]], rng: random.Random) -> Mutation:
    """The base with one to three changes.

    Args:
        base: an experiment as a mapping.
        parts: for each key of an experiment, parts it may have, with their options written out.
        rng: what everything is drawn with.
    """
    tree, said = copy.deepcopy(base), list[str]()
    for key in rng.sample(sorted(parts), rng.randrange(3)):
        chosen = copy.deepcopy(rng.choice(parts[key]))
        tree[key] = [chosen] if isinstance(base.get(key), list) else chosen
        said.append(f"{key} {chosen['kind']}")
    if rng.random() < 0.3:
        tree["arms"] = {"one": {}, "two": {key: copy.deepcopy(tree[key]) for key in rng.sample(sorted(tree), 2)}}
    for _ in range(rng.randint(1, 3)):
        change = rng.choice(_OF_TREES)
        said.append(f"{change.__name__} {change(tree, rng)}")
    flow = rng.random() < 0.3
    text = json.dumps(tree, indent=1) if flow else yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    if rng.random() < 0.5:
        change_text = rng.choice(_OF_TEXTS)
        said.append(change_text.__name__)
        content = change_text(text, rng)
        return Mutation("; ".join(said), content if isinstance(content, bytes) else content.encode("utf-8", "replace"))
    return Mutation("; ".join(said), text.encode())


# --- of the tree -----------------------------------------------------------------------------------------------------


def _spots(node: Any) -> list[Spot]:
    """Every key and position below a value."""
    keys = list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []
    return [(node, key) for key in keys] + [spot for key in keys for spot in _spots(node[key])]


def a_key_gone(tree: Tree, rng: random.Random) -> str:
    owner, key = rng.choice(_spots(tree))
    del owner[key]
    return str(key)


def a_key_more(tree: Tree, rng: random.Random) -> str:
    owners = [tree, *(owner[key] for owner, key in _spots(tree) if isinstance(owner[key], dict))]
    key = rng.choice(
        ("x", "kind", "seed", "seeds", "arms", "extends", "<<", "", "name", "rewards", "0", "traning_steps")
    )
    rng.choice(owners)[key] = copy.deepcopy(rng.choice((1, "x", [], {}, None, tree.get("model", 2))))
    return key


def a_key_misspelt(tree: Tree, rng: random.Random) -> str:
    named = [(owner, key) for owner, key in _spots(tree) if isinstance(owner, dict)]
    owner, key = rng.choice(named)
    wrong = rng.choice((key[:-1], key.upper(), key + "s", key.replace("_", "-"), f" {key}", key[::-1]))
    owner[wrong] = owner.pop(key)
    return f"{key} as {wrong}"


def another_kind(tree: Tree, rng: random.Random) -> str:
    parts = [(owner, key) for owner, key in _spots(tree) if key == "kind"]
    owner, key = rng.choice(parts or _spots(tree))
    owner[key] = rng.choice(
        ("uniform", "entropy", "random", "branching", "ddim", "group", "clip", "sd3", "shapes", "x")
    )
    return str(owner[key])


def another_number(tree: Tree, rng: random.Random) -> str:
    numbers = [(owner, key) for owner, key in _spots(tree) if type(owner[key]) in (int, float)]
    owner, key = rng.choice(numbers or _spots(tree))
    owner[key] = rng.choice(NUMBERS + FRACTIONS)
    return f"{key} {owner[key]:.3g}" if isinstance(owner[key], float) else f"{key} {owner[key]}"


def another_value(tree: Tree, rng: random.Random) -> str:
    owner, key = rng.choice(_spots(tree))
    owner[key] = copy.deepcopy(rng.choice(OTHERS))
    return f"{key} {str(owner[key])[:20]}"


def a_value_of_elsewhere(tree: Tree, rng: random.Random) -> str:
    (source, name), (owner, key) = rng.choice(_spots(tree)), rng.choice(_spots(tree))
    owner[key] = copy.deepcopy(source[name])
    return f"{key} from {name}"


def deeper(tree: Tree, rng: random.Random) -> str:
    owner, key = rng.choice(_spots(tree))
    depth = rng.choice((1, 2, 5, 30, 60))
    for _ in range(depth):
        owner[key] = [owner[key]] if rng.random() < 0.5 else {"kind": owner[key]}
    return f"{key} by {depth}"


def longer(tree: Tree, rng: random.Random) -> str:
    owner, key = rng.choice(_spots(tree))
    count = rng.choice((2, 50, 400))
    owner[key] = [copy.deepcopy(owner[key]) for _ in range(count)]
    return f"{key} by {count}"


_OF_TREES: tuple[Callable[[Tree, random.Random], str], ...] = (
    *(a_key_gone, a_key_more, a_key_misspelt, another_kind, another_value, a_value_of_elsewhere, deeper, longer),
    *(another_number, another_number, another_number, another_number),
)


# --- of the text -----------------------------------------------------------------------------------------------------


def another_scalar(text: str, rng: random.Random) -> str:
    lines = text.splitlines(keepends=True)
    place = rng.randrange(len(lines))
    key, colon, _ = lines[place].partition(":")
    lines[place] = f"{key}{colon} {rng.choice(SCALARS)}\n"
    return "".join(lines)


def bytes_flipped(text: str, rng: random.Random) -> bytes:
    content = bytearray(text.encode())
    for _ in range(rng.choice((1, 1, 2, 8))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def cut_off(text: str, rng: random.Random) -> bytes:
    content = text.encode()
    return content[: rng.randrange(len(content))]


def said_twice(text: str, rng: random.Random) -> str:
    lines = text.splitlines(keepends=True)
    place = rng.randrange(len(lines))
    return "".join([*lines[:place], lines[place], *lines[place:]])


def strange_characters(text: str, rng: random.Random) -> str:
    place = rng.randrange(len(text) + 1)
    return text[:place] + rng.choice("\t\0\ufeff\u2028\u0085\u200b\x1b\x7f\r\v\f\ufffe#&*!|>%@`") + text[place:]


def another_encoding(text: str, rng: random.Random) -> bytes:
    noted = text + "# caf\u00e9\n"
    return noted.encode(rng.choice(("utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "utf-8-sig", "utf-7")))


def aliases(text: str, rng: random.Random) -> str:
    """Aliases as people use them, of themselves, of nothing, and as a bomb of 2 to 8 levels of 2 to 9."""
    wide, levels = rng.randint(2, 9), rng.randint(2, 8)
    bomb = "x0: &x0 [a, b]\n" + "".join(
        f"x{level}: &x{level} [{', '.join([f'*x{level - 1}'] * wide)}]\n" for level in range(1, levels + 1)
    )
    own = "seeds: &s [*s]\n", "loop: &l {kind: *l}\n", "seeds: *none\n", "a: &a 1\na2: *a\n", bomb, "x: &x {<<: *x}\n"
    return text + rng.choice(own) if not text.startswith("{") else rng.choice(own) + f"y: {text}"


def nested_text(text: str, rng: random.Random) -> str:
    depth, opened = rng.choice((10, 100, 3000, 100_000)), rng.choice(("[", "{a: ", "- ", "? ", "!!seq [", "&a ["))
    return text + f"deep: {opened * depth}" if rng.random() < 0.5 else opened * depth + text


def huge(text: str, rng: random.Random) -> str:
    return text + rng.choice(("x: [" + "1, " * 30_000 + "1]\n", "".join(f"k{n}: {n}\n" for n in range(20_000))))


_OF_TEXTS: tuple[Callable[[str, random.Random], str | bytes], ...] = (
    *(another_scalar, another_scalar, another_scalar, bytes_flipped, cut_off, said_twice, strange_characters),
    *(another_encoding, aliases, nested_text, huge),
)
