from __future__ import annotations

import numpy as np
import pytest

from aegpo.models.shapes.captions import RELATIONS, Scene, captions, parse, scenes
from aegpo.models.shapes.rendering import CELL, CELLS, PALETTE, SIZE, WHITE, Placed, coverage, paint, place, render

# Closed forms of the shapes in rendering.coverage, in pixels.
AREAS = {"circle": np.pi * 3.3**2, "square": 6.0**2, "triangle": 6.4 * (6.4 / 1.75)}


def some(kind: str) -> list[Scene]:
    return [*scenes("train")[kind][::17], *scenes("evaluation")[kind][::17]]


@pytest.mark.parametrize("shape", AREAS)
def test_coverage_is_a_fraction_that_adds_up_to_the_area_of_the_shape(shape):
    mask = coverage(shape)
    assert mask.shape == (CELL, CELL)
    assert mask.min() == 0
    assert mask.max() == 1
    assert mask.sum() == pytest.approx(AREAS[shape], rel=0.01)


@pytest.mark.parametrize("shape", ["circle", "triangle"])
def test_slanted_and_round_edges_are_anti_aliased(shape):
    mask = coverage(shape)
    assert ((mask > 0) & (mask < 1)).sum() >= 8


@pytest.mark.parametrize("shape", AREAS)
def test_shapes_are_mirror_images_of_themselves(shape):
    assert np.array_equal(coverage(shape), coverage(shape)[:, ::-1])


def test_a_triangle_points_up_and_the_others_have_no_direction():
    rows = np.arange(CELL) + 0.5
    assert np.average(rows, weights=coverage("triangle").sum(axis=1)) > CELL / 2 + 0.5
    for shape in ("circle", "square"):
        assert np.array_equal(coverage(shape), coverage(shape)[::-1])


@pytest.mark.parametrize("kind", ["count", "pair", "relation", "mixed"])
def test_pictures_are_float32_in_the_unit_interval(kind):
    rng = np.random.default_rng(0)
    for scene in some(kind):
        image = render(scene, rng)
        assert image.shape == (SIZE, SIZE, 3)
        assert image.dtype == np.float32
        assert image.min() >= 0
        assert image.max() <= 1


def test_a_picture_is_a_function_of_scene_and_generator():
    scene = parse("two red circles and a blue square")
    first, again = (render(scene, np.random.default_rng(5)) for _ in range(2))
    assert np.array_equal(first, again)
    rng = np.random.default_rng(5)
    pictures = {render(scene, rng).tobytes() for _ in range(10)}
    assert len(pictures) > 5


@pytest.mark.parametrize("kind", ["count", "pair", "mixed", "relation"])
def test_placed_objects_are_those_of_the_caption_in_cells_of_their_own(kind):
    rng = np.random.default_rng(1)
    for scene in some(kind):
        objects = place(scene, rng)
        asked = [(group.colour, group.shape) for group in scene.groups for _ in range(group.count)]
        assert [(item.colour, item.shape) for item in objects] == asked
        cells = {(item.row, item.column) for item in objects}
        assert len(cells) == len(objects)
        assert all(0 <= index < CELLS for cell in cells for index in cell)


@pytest.mark.parametrize("relation", RELATIONS)
def test_relations_are_honoured_along_one_line_of_cells(relation):
    rng = np.random.default_rng(2)
    scene = parse(f"a red circle {relation} a blue square")
    seen = set()
    for _ in range(200):
        first, second = place(scene, rng)
        step = (second.row - first.row, second.column - first.column)
        seen.add((first.row, first.column, *step))
        direction = {"left of": (0, 1), "right of": (0, -1), "above": (1, 0), "below": (-1, 0)}[relation]
        assert tuple(np.sign(step)) == direction
    assert len(seen) == CELLS * 3  # every line, and each of the three ways to choose two of its cells


def test_objects_reach_every_cell():
    rng = np.random.default_rng(3)
    scene = parse("a green triangle")
    assert {(item.row, item.column) for _ in range(300) for item in place(scene, rng)} == {
        (row, column) for row in range(CELLS) for column in range(CELLS)
    }


def test_an_unnamed_background_is_white_and_a_named_one_is_its_colour():
    assert np.array_equal(np.unique(paint([], None)), [WHITE[0]])
    for colour, value in PALETTE.items():
        assert np.allclose(paint([], colour), value)


def test_edges_mix_object_and_background_by_coverage():
    image = paint([Placed(1, 2, "red", "circle")], "blue")
    alpha = coverage("circle")[..., None]
    expected = alpha * np.array(PALETTE["red"]) + (1 - alpha) * np.array(PALETTE["blue"])
    assert np.allclose(image[CELL : 2 * CELL, 2 * CELL :], expected, atol=1e-6)
    image[CELL : 2 * CELL, 2 * CELL :] = PALETTE["blue"]
    assert np.allclose(image, PALETTE["blue"], atol=1e-6)


def test_captions_of_both_splits_can_be_drawn():
    rng = np.random.default_rng(4)
    for split in ("train", "evaluation"):
        for caption in captions(split, 40):
            background = parse(caption).background
            corner_colours = render(parse(caption), rng).reshape(-1, 3)
            colour = WHITE if background is None else PALETTE[background]
            assert np.isclose(corner_colours, colour, atol=1e-6).all(axis=1).mean() > 0.5
