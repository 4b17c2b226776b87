"""Charts: answers follow from what is drawn, and training never shows what is reserved."""

import matplotlib
import numpy as np
import pytest

from optmerge_core.benchmark.tasks.english.charts import (
    ABOUT,
    KINDS,
    WEIGHTS,
    Data,
    chart,
    lying,
    questions,
    standing,
)
from optmerge_core.benchmark.tasks.english.charts import held as is_reserved
from optmerge_core.benchmark.tasks.english.easel import Easel

LEVELS = ("caption", "easy", "medium", "full")


def drawn(split, level="full", count=120):
    return [chart(np.random.default_rng([5, i]), split, level) for i in range(count)]


@pytest.mark.parametrize("level", LEVELS)
def test_a_drawing_is_decided_by_its_generator_whatever_a_notebook_has_set(level):
    for seed in range(6):
        one = chart(np.random.default_rng(seed), "train", level)
        chart(np.random.default_rng(99), "test", "full")
        loud = {"lines.antialiased": False, "patch.force_edgecolor": True, "path.sketch": (3, 9, 1)}
        with matplotlib.rc_context(loud):
            other = chart(np.random.default_rng(seed), "train", level)
        assert one.image.tobytes() == other.image.tobytes() and one.image.size == (112, 112)
        assert (one.turns, one.cells) == (other.turns, other.cells)


def asked(data, kind):
    """Kind of question -> answers, of all questions whatever their words."""
    answers = {}
    for turn in questions(np.random.default_rng(0), data, kind):
        answers.setdefault(turn.kind, []).append(turn.answer)
    return answers


def test_answers_by_hand():
    data = Data(["cat", "dog", "fox"], [30, 45, 10], ["red", "blue", "red"], 50, False)
    assert asked(data, "bar chart") == {
        "highest": ["dog"],
        "lowest": ["fox"],
        "count": ["3"],
        "color": ["red", "blue", "red"],
        "compare": ["no", "yes", "yes", "yes", "no", "no"],
        "value": ["30", "45", "10"],
        "difference": ["20", "15", "35"],
        "sum": ["40", "75", "55"],
        "above": ["2", "1"],  # above 20 and 40: 10 and 30 are values themselves
    }


def test_a_pie_without_numbers_is_not_asked_for_them():
    data = Data(["cat", "dog"], [30, 70], ["red", "blue"], 100, False)
    assert set(asked(data, "pie chart")) == {"highest", "lowest", "count", "color", "compare"}


def test_bars_are_as_long_as_their_values():
    data = Data(["cat", "dog"], [10, 40], ["red", "red"], 50, False)
    for draw, along in ((standing, 0), (lying, 1)):
        easel = Easel(np.random.default_rng(0))
        draw(np.random.default_rng(0), data, easel)
        red = np.asarray(easel.drawing([]).image).astype(int) @ (1, -1, 0) > 120
        lengths = np.sort(red.sum(along))
        lengths = lengths[lengths > 0]
        assert lengths[-1] / lengths[0] == pytest.approx(4, rel=0.1)


def test_what_is_asked_about_is_named_in_the_cells():
    for drawing in drawn("train"):
        assert all(0 <= r < 7 and 0 <= c < 7 for r, c in drawing.cells)
        named = {word for words in drawing.cells.values() for word in words}
        shown = {t.answer for t in drawing.turns if t.kind in ("highest", "lowest", "color")}
        assert shown <= named


def test_training_never_shows_reserved_facts():
    for split in ("train", "validation"):
        for level in LEVELS:
            assert not any(t.held_out for d in drawn(split, level, 60) for t in d.turns)
    told = [d.turns[0].answer.split(": ")[1] for d in drawn("train", "caption")]
    facts = [fact.split() for answer in told for fact in answer.split(", ")]
    assert not any(is_reserved(name, value) for name, value in facts)
    tested = [turn.held_out for d in drawn("test") for turn in d.turns]
    assert 0.15 < np.mean(tested) < 0.6


def test_a_question_is_held_out_by_the_facts_it_needs():
    names = ["cat", "dog", "fox"]
    held = {(n, v) for n in names for v in range(1, 11) if is_reserved(n, v)}
    value, other = (next(v for v in range(1, 11) if (n, v) not in held) for n in names[1:])
    new = next(v for n, v in sorted(held) if n == "cat" and v not in (value, other))
    data = Data(names, [new, value, other], ["red"] * 3, 10, True)
    turns = list(questions(np.random.default_rng(0), data, "bar chart"))
    values = {t.answer: t.held_out for t in turns if t.kind == "value"}
    assert values[str(new)] and list(values.values()).count(True) == 1
    assert not any(t.held_out for t in turns if t.kind == "count")


def test_a_full_chart_says_its_kind_and_whether_it_prints_its_values():
    told = {"kind": set(), "printed": set()}
    for drawing in drawn("train"):
        for turn in drawing.turns:
            told.get(turn.kind, set()).add(turn.answer)
        answers = {turn.kind: turn.answer for turn in drawing.turns}
        if "percent" in answers:
            assert answers.get("kind", "pie chart") == "pie chart"
            assert answers.get("printed", "yes") == "yes"
    assert told == {"kind": set(KINDS), "printed": {"yes", "no"}}


def test_levels_keep_kinds_for_the_experts_and_all_charts_are_drawn():
    kinds = {level: {t.kind for d in drawn("train", level) for t in d.turns} for level in LEVELS}
    assert kinds["medium"] == set(WEIGHTS["medium"]) and kinds["full"] == set(WEIGHTS["full"])
    assert kinds["full"] - kinds["easy"] == set(ABOUT)
    told = {d.turns[0].answer.split(":")[0].split(" ", 1)[1] for d in drawn("train", "caption")}
    assert told == set(KINDS)
