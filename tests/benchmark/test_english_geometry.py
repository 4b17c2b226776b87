"""Labelled figures: answers follow from what is written, reserved facts are never trained."""

import numpy as np
import pytest

from optmerge_core.benchmark.tasks.english.drawing import reserved
from optmerge_core.benchmark.tasks.english.figures import FIGURES, UNKNOWN, outside, within
from optmerge_core.benchmark.tasks.english.geometry import COMPUTE, geometry, questions

LEVELS = ("caption", "easy", "medium", "full")


def drawn(split, level="full", count=150):
    return [geometry(np.random.default_rng([5, i]), split, level) for i in range(count)]


@pytest.mark.parametrize("level", LEVELS)
def test_a_drawing_is_decided_by_its_generator(level):
    one, other = (geometry(np.random.default_rng(3), "train", level) for _ in range(2))
    assert one.image.tobytes() == other.image.tobytes() and one.image.size == (112, 112)
    assert (one.turns, one.cells) == (other.turns, other.cells)


def right_answers(name, numbers):
    """What follows from the written numbers, in order of their place, by schoolbook rules."""
    total = sum(numbers)
    if name in ("square", "pentagon", "hexagon", "octagon"):
        sides = {"square": 4, "pentagon": 5, "hexagon": 6, "octagon": 8}[name]
        return {"perimeter": sides * total, "area": total**2}
    if name == "rectangle":
        return {"perimeter": 2 * total, "area": numbers[0] * numbers[1]}
    if name == "circle":
        return {"diameter": 2 * total, "radius": total / 2}
    if name == "triangle" and len(numbers) == 3:
        return {"perimeter": total}
    if name == "triangle":
        squares = [n * n for n in numbers]
        return {
            "angle": 180 - total,
            "area": numbers[0] * numbers[1] / 2,
            "length": (sum(squares) ** 0.5, abs(squares[0] - squares[1]) ** 0.5),
        }
    if name.startswith("two"):
        return {"angle": (total, 180 - total), "parallel": (total, 180 - total)}
    return {"angle": (90 if name.startswith("right") else 180) - total}


@pytest.mark.parametrize("make", dict.fromkeys(FIGURES), ids=lambda make: make.__name__)
def test_answers_follow_from_the_labels(make):
    rng = np.random.default_rng(2)
    for small in 40 * (True, False):
        figure = make(rng, small)
        numbers = [int(text.rstrip("°")) for text, _, _ in figure.labels if text != UNKNOWN]
        right = right_answers(figure.name, numbers)
        assert sorted(numbers) == sorted(figure.given) or figure.name in ("square",)
        for kind, value in figure.results.items():
            assert value in np.atleast_1d(right[kind]), (str(figure), figure.labels)
        texts = {turn.answer for turn in questions(rng, figure, False)}
        assert {str(v) for v in figure.results.values()} <= texts


def test_labels_lie_in_the_picture_and_are_named_in_their_cells():
    for drawing in drawn("test"):
        assert all(0 <= r < 7 and 0 <= c < 7 for r, c in drawing.cells)
        named = {word for words in drawing.cells.values() for word in words}
        assert {turn.answer for turn in drawing.turns if turn.kind in ("read", "shape")} <= named


def test_places_by_hand():
    assert np.allclose(outside((0, 10), (20, 10), 5), (10, 5))  # above a line drawn to the right
    assert np.allclose(within((0, 0), 0, 180), (0, 19))  # below a straight line
    assert np.allclose(within((0, 0), -90, 0), (14, -14))


def test_training_never_asks_reserved_facts():
    for split, level in (("train", "easy"), ("train", "full"), ("validation", "full")):
        assert not any(turn.held_out for d in drawn(split, level) for turn in d.turns)
    computed = [t.held_out for d in drawn("test") for t in d.turns if t.kind in COMPUTE]
    assert 0.25 < np.mean(computed) < 0.75
    assert not any(t.held_out for d in drawn("test") for t in d.turns if t.kind not in COMPUTE)


def test_a_fact_is_its_numbers_in_any_order():
    rng = np.random.default_rng(0)
    facts = {}
    for _ in range(600):
        figure = FIGURES[0](rng, False)
        facts.setdefault(tuple(sorted(figure.given)), set()).add(reserved("geometry", figure))
    assert len(facts) > 60 and all(len(held) == 1 for held in facts.values())


def test_medium_keeps_kinds_for_the_experts():
    kinds = {level: {t.kind for d in drawn("train", level) for t in d.turns} for level in LEVELS}
    assert kinds["full"] - kinds["medium"] == {"area", "radius", "parallel", "length"}
    assert kinds["easy"] == kinds["full"]
