"""The language of the embedded world: scenes, their captions, and the split into training and evaluation.

A scene is one or two groups of equal objects on a plain background; a caption says it in a fixed grammar::

    three red circles
    a red circle and a blue square on a yellow background
    two green squares and a purple triangle
    a green square left of a yellow triangle on a blue background

`parse` is the exact inverse of `Scene.caption`. Evaluation holds out *combinations*: which scenes are held out is a
hash of everything but the background, so an evaluation caption, in any order of its groups and on any background,
never occurs in training.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import permutations, product
from typing import Literal

from aegpo.errors import AegpoError

COLOURS = ("red", "green", "blue", "yellow", "purple")
SHAPES = ("circle", "square", "triangle")
COUNTS = ("a", "two", "three", "four")
RELATIONS = ("left of", "right of", "above", "below")
MIXED_COUNTS = ((2, 1), (1, 2), (3, 1), (2, 2))
KINDS = ("count", "pair", "relation", "mixed")
HELD_OUT_ONE_IN = 5

Split = Literal["train", "evaluation"]


@dataclass(frozen=True)
class Group:
    """`count` objects of one colour and one shape."""

    count: int
    colour: str
    shape: str

    @property
    def phrase(self) -> str:
        """The words for this group, for example ``two red circles``."""
        return f"{COUNTS[self.count - 1]} {self.colour} {self.shape}{'s' if self.count > 1 else ''}"


@dataclass(frozen=True)
class Scene:
    """What a caption asks for: one or two groups, an optional relation between two single objects, a background.

    `background` is None where the caption does not name one; the renderer then paints white.
    """

    groups: tuple[Group, ...]
    relation: str | None = None
    background: str | None = None

    @property
    def kind(self) -> str:
        """`count`, `pair`, `relation` or `mixed`: the row of an accuracy table this scene belongs to."""
        if len(self.groups) == 1:
            return "count"
        if self.relation is not None:
            return "relation"
        return "pair" if all(group.count == 1 for group in self.groups) else "mixed"

    @property
    def caption(self) -> str:
        """The scene in words; `parse` reads it back."""
        joint = f" {self.relation or 'and'} "
        words = joint.join(group.phrase for group in self.groups)
        return words if self.background is None else f"{words} on a {self.background} background"

    @property
    def held_out(self) -> bool:
        """True if this combination belongs to the evaluation split."""
        first, *rest = (group.phrase for group in self.groups)
        words = [self.relation or "", first, *rest]
        if self.relation is None:
            words[1:] = sorted(words[1:])
        elif self.relation in ("right of", "below"):  # "A right of B" shows what "B left of A" shows
            words = [{"right of": "left of", "below": "above"}[self.relation], *words[:0:-1]]
        digest = hashlib.sha256("|".join(words).encode()).digest()
        return digest[0] % HELD_OUT_ONE_IN == 0


def _plain_scenes() -> Iterator[Scene]:
    objects = list(product(COLOURS, SHAPES))
    for colour, shape in objects:
        for count in range(1, len(COUNTS) + 1):
            yield Scene((Group(count, colour, shape),))
    for first, second in permutations(objects, 2):
        yield Scene((Group(1, *first), Group(1, *second)))
        for relation in RELATIONS:
            yield Scene((Group(1, *first), Group(1, *second)), relation)
        for one, two in MIXED_COUNTS:
            yield Scene((Group(one, *first), Group(two, *second)))


@cache
def scenes(split: Split) -> dict[str, tuple[Scene, ...]]:
    """Every scene of a split by kind, in a fixed order."""
    found: dict[str, list[Scene]] = {kind: [] for kind in KINDS}
    for plain in _plain_scenes():
        if plain.held_out != (split == "evaluation"):
            continue
        used = {group.colour for group in plain.groups}
        for background in (None, *(colour for colour in COLOURS if colour not in used)):
            found[plain.kind].append(replace(plain, background=background))
    return {kind: tuple(members) for kind, members in found.items()}


@cache
def drawn(split: Split, count: int, seed: int = 0) -> tuple[Scene, ...]:
    """`count` distinct scenes of a split, the four kinds in turn, the same for the same seed.

    Raises:
        AegpoError: if the split has fewer captions of some kind than asked for.
    """
    rng = random.Random(f"shapes {split} {seed}")
    pools = {kind: list(members) for kind, members in scenes(split).items()}
    found: list[Scene] = []
    for index in range(count):
        pool = pools[KINDS[index % len(KINDS)]]
        if not pool:
            most = len(KINDS) * min(len(members) for members in scenes(split).values())
            raise AegpoError(f"the {split} split of 'shapes' has too few captions: {count} asked for, at most {most}")
        found.append(pool.pop(rng.randrange(len(pool))))
    return tuple(found)


def captions(split: Split, count: int, seed: int = 0) -> tuple[str, ...]:
    """The captions of `drawn`."""
    return tuple(scene.caption for scene in drawn(split, count, seed))


def parse(caption: str) -> Scene:
    """The scene a caption asks for.

    Raises:
        AegpoError: if the caption is not a sentence of the grammar; the message says what a caption looks like.
    """
    text, background = caption.strip(), None
    if text.endswith(" background") and " on a " in text:
        text, _, tail = text.rpartition(" on a ")
        background = tail.removesuffix(" background")
    relation = next((word for word in RELATIONS if f" {word} " in text), None)
    parts = text.split(f" {relation or 'and'} ")
    groups = tuple(group for part in parts if (group := _parse_group(part)) is not None)
    scene = Scene(groups, relation, background)
    well_formed = 1 <= len(parts) <= 2 and len(groups) == len(parts) and background in (None, *COLOURS)
    if not well_formed or scene.caption != caption.strip():
        raise AegpoError(
            f"caption {caption!r} is not a sentence of the embedded world; one is 'two red circles and a blue square "
            f"on a yellow background' (colours: {', '.join(COLOURS)}; shapes: {', '.join(SHAPES)}; "
            f"counts: {', '.join(COUNTS)}; relations: {', '.join(RELATIONS)})"
        )
    return scene


def why_not(caption: str) -> str | None:
    """Why `parse` refuses a caption; None: it does not."""
    try:
        parse(caption)
    except AegpoError as error:
        return str(error)
    return None


def _parse_group(phrase: str) -> Group | None:
    words = phrase.split()
    if len(words) != 3 or words[0] not in COUNTS or words[1] not in COLOURS:
        return None
    count = COUNTS.index(words[0]) + 1
    shape = words[2].removesuffix("s") if count > 1 else words[2]
    return Group(count, words[1], shape) if shape in SHAPES else None
