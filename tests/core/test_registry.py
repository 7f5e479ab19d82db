"""Specs and registries: how a name becomes a part."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import Field, TypeAdapter, ValidationError

from aegpo.core.registry import Registry, Spec, kind_of, suggestion
from aegpo.errors import AegpoError, PluginError


class ShapeSpec(Spec):
    """Any shape."""

    kind: str


class Circle(ShapeSpec):
    """A circle.

    Round.
    """

    kind: Literal["circle"] = "circle"
    radius: float = Field(1.0, gt=0, description="in pixels")


class Square(ShapeSpec):
    """A square."""

    kind: Literal["square"] = "square"


@pytest.fixture
def shapes():
    registry = Registry("shapes", ShapeSpec)
    registry.add(Circle)
    registry.source = "aegpo-square"
    registry.add(Square)
    return registry


def test_a_spec_is_frozen_and_refuses_unknown_keys():
    with pytest.raises(ValidationError):
        Circle().radius = 2.0
    with pytest.raises(ValidationError):
        Circle(radios=2.0)


def test_entries_know_their_order_their_summary_and_who_ships_them(shapes):
    assert shapes.names == ("circle", "square")
    assert [(entry.summary, entry.source) for entry in shapes] == [
        ("A circle.", "aegpo"),
        ("A square.", "aegpo-square"),
    ]
    assert shapes.get("square") is Square


def test_a_name_that_is_not_registered_is_answered_with_the_nearest_or_all(shapes):
    with pytest.raises(AegpoError, match=r"^no shapes part is called 'cirkle'; did you mean 'circle'\?$"):
        shapes.get("cirkle")
    with pytest.raises(AegpoError, match=r"^no shapes part is called 'x'; known: circle, square$"):
        shapes.get("x")


@pytest.mark.parametrize(("data", "spec"), [("square", Square()), ({"kind": "circle", "radius": 2}, Circle(radius=2))])
def test_the_union_reads_short_and_long_forms(shapes, data, spec):
    assert TypeAdapter(shapes.union()).validate_python(data) == spec


def test_the_union_of_one_spec_reads_both_forms_too():
    registry = Registry("shapes", ShapeSpec)
    registry.add(Square)
    adapter = TypeAdapter(registry.union())
    assert adapter.validate_python("square") == adapter.validate_python({"kind": "square"}) == Square()


class NoKind(ShapeSpec):
    """No kind."""


class BadKind(ShapeSpec):
    """A kind that is no kebab-case."""

    kind: Literal["Bad_Kind"] = "Bad_Kind"


class NoDoc(ShapeSpec):
    kind: Literal["no-doc"] = "no-doc"


class SecondCircle(ShapeSpec):
    """Another circle."""

    kind: Literal["circle"] = "circle"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (int, "evil registers 'int' in 'shapes', which is not a subclass of ShapeSpec"),
        (3, "evil registers 3 in 'shapes', which is not a subclass of ShapeSpec"),
        (
            NoKind,
            "evil registers 'NoKind' in 'shapes' without a kind: give it  kind: Literal['my-name'] = 'my-name'  "
            "(kebab-case)",
        ),
        (
            BadKind,
            "evil registers 'BadKind' in 'shapes' without a kind: give it  kind: Literal['my-name'] = 'my-name'  "
            "(kebab-case)",
        ),
        (
            NoDoc,
            "evil registers 'NoDoc' in 'shapes' without a docstring; its first line is what 'aegpo plugins' shows",
        ),
        (
            SecondCircle,
            "evil registers shapes 'circle', a name aegpo has taken; rename it, or leave the plugin out with "
            "AEGPO_BLOCK_PLUGINS=evil",
        ),
    ],
)
def test_what_cannot_be_registered_is_refused_in_words(shapes, spec, message):
    shapes.source = "evil"
    with pytest.raises(PluginError) as caught:
        shapes.add(spec)
    assert str(caught.value) == message
    assert shapes.names == ("circle", "square")


def test_a_kind_is_one_literal_text():
    assert kind_of(Circle) == "circle"
    assert kind_of(ShapeSpec) is None
    assert kind_of(Spec) is None


def test_a_suggestion_is_made_only_when_it_is_close():
    assert suggestion("entrpy", ["uniform", "entropy"]) == "did you mean 'entropy'?"
    assert suggestion("zzz", ["uniform", "entropy"]) == "known: entropy, uniform"
    assert suggestion("zzz", []) == "known: none"
