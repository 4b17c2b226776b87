"""The drawn questions: splits by pixels, answers that are true, the same samples everywhere."""

import re

import numpy as np
import pytest

from optmerge_core.benchmark.tasks import combined, diagrams, scenes
from optmerge_core.benchmark.tasks.combined import COMBINED
from optmerge_core.benchmark.tasks.samples import SPLITS, TASKS, image_hash, make_dataset, sample
from optmerge_core.evaluation.questions import load_split

QUESTIONS = "data/benchmark/questions"


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("level", ["grid", "caption", "easy", "full"])
def test_a_sample_is_decided_by_its_arguments(task, level):
    first, again = sample(task, "train", 7, level), sample(task, "train", 7, level)
    assert (first.question, first.answer) == (again.question, again.answer)
    assert np.array_equal(first.image, again.image)
    assert first.image.shape == (56, 56, 3) and first.image.dtype == np.uint8
    other = sample(task, "train", 7, level, seed=1)
    assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("task", [*TASKS, *COMBINED])
def test_pixels_decide_the_split(task):
    for split, buckets in SPLITS.items():
        for index in range(10):
            assert int(image_hash(sample(task, split, index).image), 16) % 10 in buckets


def test_shipped_questions_are_what_the_package_draws():
    data = load_split(QUESTIONS, "validation", 3)
    for row, item in enumerate(data):
        drawn = sample(item["task"], "validation", row % 3)
        assert (item["question"], item["answer"]) == (drawn.question, drawn.answer)
        assert np.array_equal(np.array(item["image"]), drawn.image)


def test_shipped_combined_questions_are_what_the_package_draws():
    data = load_split(QUESTIONS, "test", tasks=COMBINED)
    assert len(data) == 500 * len(COMBINED)
    for row in range(0, len(data), 250):
        item = data[row]
        drawn = sample(item["task"], "test", row % 500)
        assert (item["question"], item["answer"]) == (drawn.question, drawn.answer)
        assert np.array_equal(np.array(item["image"]), drawn.image)
        assert int(item["hash"], 16) % 10 in SPLITS["test"]


def test_no_shipped_test_image_can_be_trained_on():
    test, validation = (
        load_split(QUESTIONS, s).to_pandas()["hash"] for s in ("test", "validation")
    )
    assert len(test) >= 1500 * len(TASKS)
    assert all(int(h, 16) % 10 in SPLITS["test"] for h in test)
    assert all(int(h, 16) % 10 in SPLITS["validation"] for h in validation)


def test_hashes_beside_the_questions_are_those_of_the_pixels():
    data = load_split(QUESTIONS, "test", 20)
    assert [image_hash(np.array(i)) for i in data["image"]] == list(data["hash"])


def test_dataset_has_the_columns_the_evaluation_reads():
    data = make_dataset("OCR", "train", 4)
    assert set(data.column_names) == {"question", "answer", "kind", "task", "hash", "image"}
    assert np.array_equal(np.array(data[2]["image"]), sample("OCR", "train", 2).image)


def test_shapes_stay_in_their_image_and_apart():
    for seed in range(50):
        _, objects = scenes.scene(np.random.default_rng(seed), 5)
        assert len({(o.color, o.shape) for o in objects}) == 5
        for o in objects:
            assert min(o.box) >= 0 and max(o.box) < scenes.IMAGE_SIZE
        cells = {tuple(int(v) // scenes.CELL for v in o.box[:2]) for o in objects}
        assert len(cells) == 5


def turns(draw, level, kind, count):
    """(image, question, answer) of every turn of one kind in `count` conversations."""
    for seed in range(count):
        image, asked = draw(np.random.default_rng(seed), level)
        yield from ((np.asarray(image).astype(int), q, a) for q, a, k in asked if k == kind)


def drawn_in(pixels, color):
    return np.abs(pixels - scenes.COLORS[color]).max(axis=2) <= 14


def test_places_are_true():
    found = 0
    for pixels, question, answer in turns(scenes.vqa, "full", "place", 300):
        found += 1
        near = drawn_in(pixels, re.search(r"the (\w+) ", question)[1])
        vertical, horizontal = answer.split()
        half = near[:28] if vertical == "top" else near[28:]
        half = half[:, :28] if horizontal == "left" else half[:, 28:]
        assert half.any(), (question, answer)
    assert found > 20


def test_counts_are_true():
    found = set()
    for pixels, question, answer in turns(scenes.vqa, "full", "count", 300):
        if match := re.fullmatch(r"how many (\w+) shapes \?", question):
            near = drawn_in(pixels, match[1]).reshape(4, 14, 4, 14)
            assert int(answer) == (near.sum(axis=(1, 3)) > 9).sum(), question
            found.add(answer)
    assert {"0", "1", "2", "3"} <= found


def test_relations_are_true():
    first, second = (scenes.Shape("red", "square", (x, 30, x + 9, 39)) for x in (3, 20))
    assert dict((q, a) for q, a, _ in scenes.relations(first, second)) == {
        "is the red square left of the red square ?": "yes",
        "is the red square right of the red square ?": "no",
    }
    assert {a for _, _, a in turns(scenes.vqa, "full", "relation", 100)} == {"yes", "no"}


def test_bar_values_can_be_read_off_the_pixels():
    checked = 0
    for pixels, question, answer in turns(diagrams.bar_chart, "full", "value", 100):
        checked += 1
        near = drawn_in(pixels, re.search(r"the (\w+) bar", question)[1])
        assert diagrams.height(int(answer)) == np.where(near.any(axis=1))[0].min()
    assert checked > 50


def test_bars_above_a_limit_are_counted():
    checked = 0
    for seed in range(200):
        _, asked = diagrams.bar_chart(np.random.default_rng(seed), "full")
        values = {q.split()[-3]: int(a) for q, a, k in asked if k == "value"}
        for question, answer, kind in asked:
            if kind == "above" and values:
                limit = int(question.split()[-2])
                assert int(answer) >= sum(v > limit for v in values.values())
                checked += 1
    assert checked > 20


def test_geometry_answers_follow_from_the_caption():
    checked = set()
    for seed in range(300):
        full = diagrams.geometry(np.random.default_rng(seed), "full")[1]
        read = diagrams.geometry(np.random.default_rng(seed), "caption")[1][0]
        if full[0][2] == "third angle":
            a, b = read[1].split(" and ")
            assert int(full[0][1]) == 180 - int(a) - int(b)
        if full[0][2] not in ("perimeter", "area"):
            continue
        form, *sides = read[1].split()
        sides = [int(s) for s in sides]
        perimeter = {"square": 4 * sides[0], "rectangle": 2 * sum(sides), "triangle": sum(sides)}
        area = {1: sides[0] ** 2, 2: int(np.prod(sides)) // (2 if form == "triangle" else 1)}
        for _, answer, kind in full:
            expected = perimeter[form] if kind == "perimeter" else area[len(sides)]
            assert answer == str(expected), (read, full)
            checked.add((form, len(sides), kind))
    assert len(checked) == 6


def coloured(pixels):
    return pixels.max(axis=2) - pixels.min(axis=2) > 60


def test_combined_answers_are_true(monkeypatch):
    written = []
    monkeypatch.setattr(combined, "label", lambda *call: written.append(call[2:]))
    for pixels, question, answer in turns(combined.labelled_bars, "full", "letter", 40):
        tall = coloured(pixels).reshape(56, 4, 14).any(axis=2).sum(axis=0)
        column = tall.argmax() if "highest" in question else tall.argmin()
        assert {c: text for (c, _), text in written[-4:]}[column] == answer
    for pixels, _, answer in turns(combined.labelled_shapes, "full", "box", 40):
        left, top, right, bottom = (4 * int(v) for v in re.findall(r"\d+", answer))
        inside = pixels[top : bottom + 1, left : right + 1]
        assert coloured(inside).mean() > 0.3 and (inside.max(axis=2) < 80).sum() > 5
    for pixels, _, answer in turns(combined.side_color, "full", "color", 40):
        assert drawn_in(pixels, answer).any()


def test_the_colour_asked_for_is_that_of_the_outermost_shape():
    box = {"left": (0, 20, 9, 29), "middle": (20, 1, 29, 10), "low": (25, 40, 34, 49)}
    names = {"leftmost": "left", "rightmost": "low", "highest": "middle", "lowest": "low"}
    colors = dict(zip(box, ("red", "green", "blue"), strict=True))
    objects = [scenes.Shape(colors[n], "square", b) for n, b in box.items()]
    for side, expected in names.items():
        assert scenes.outermost(objects, side).color == colors[expected]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("level", ["easy", "medium", "full"])
def test_no_question_is_asked_twice_about_an_image(task, level):
    for index in range(40):
        questions = [q for q, _, _ in sample(task, "train", index, level).turns]
        assert 1 <= len(questions) == len(set(questions)) <= scenes.TURNS


def test_some_kinds_of_question_are_kept_for_the_experts():
    kept = {
        "VQA": {"count", "relation"},
        "Geometry": {"perimeter", "area", "third angle"},
        "Chart": {"above", "percent"},
        "Grounding": {"side"},
    }
    for task, kinds in kept.items():
        asked = {
            level: {k for i in range(150) for _, _, k in sample(task, "train", i, level).turns}
            for level in ("medium", "full")
        }
        assert not kinds & asked["medium"] and kinds <= asked["full"], task


def test_kinds_are_asked_by_their_weight():
    rng = np.random.default_rng(0)
    questions = [("a", "1", "often"), ("b", "2", "rarely"), ("c", "3", "never")]
    first = [scenes.converse(rng, questions, {"often": 3, "rarely": 1})[0][2] for _ in range(2000)]
    assert 0.72 < first.count("often") / 2000 < 0.78 and "never" not in first
