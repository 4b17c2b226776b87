"""The drawn questions: splits by pixels, answers that are true, the same samples everywhere."""

import re

import numpy as np
import pytest

from optmerge_core.benchmark import diagrams, scenes
from optmerge_core.benchmark.evaluation import load_split
from optmerge_core.benchmark.tasks import SPLITS, TASKS, image_hash, make_dataset, sample

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


@pytest.mark.parametrize("task", TASKS)
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


def test_counting_and_places_are_true():
    found = 0
    for seed in range(300):
        image, question, answer, kind = scenes.vqa(np.random.default_rng(seed), "full")
        if kind != "place":
            continue
        found += 1
        color = re.search(r"the (\w+) ", question)[1]
        pixels = np.asarray(image).astype(int)
        near = np.abs(pixels - scenes.COLORS[color]).max(axis=2) <= 14
        assert near.any()
        vertical, horizontal = answer.split()
        half = near[:28] if vertical == "top" else near[28:]
        half = half[:, :28] if horizontal == "left" else half[:, 28:]
        assert half.any(), (question, answer)
    assert found > 20


def test_bar_values_can_be_read_off_the_pixels():
    checked = 0
    for seed in range(200):
        image, question, answer, kind = diagrams.bar_chart(np.random.default_rng(seed), "full")
        if kind != "value":
            continue
        checked += 1
        color = re.search(r"the (\w+) bar", question)[1]
        pixels = np.asarray(image).astype(int)
        rows = np.where((np.abs(pixels - scenes.COLORS[color]).max(axis=2) <= 14).any(axis=1))[0]
        assert diagrams.height(int(answer)) == rows.min()
    assert checked > 50


def test_geometry_answers_follow_from_the_caption():
    for seed in range(300):
        full = diagrams.geometry(np.random.default_rng(seed), "full")
        caption = diagrams.geometry(np.random.default_rng(seed), "caption")
        if full[3] not in ("perimeter", "area"):
            continue
        form, *sides = caption[2].split()
        sides = [int(s) for s in sides]
        perimeter = {"square": 4 * sides[0], "rectangle": 2 * sum(sides), "triangle": sum(sides)}
        area = {1: sides[0] ** 2, 2: int(np.prod(sides)) // (2 if form == "triangle" else 1)}
        expected = perimeter[form] if full[3] == "perimeter" else area[len(sides)]
        assert full[2] == str(expected), (caption, full)
