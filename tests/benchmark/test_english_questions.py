"""The shipped questions of the study `smol`: drawn as said, and nothing of the test elsewhere."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from optmerge_core.benchmark.tasks.english import charts, geometry, scenes, writing
from optmerge_core.benchmark.tasks.english.datasets import ABOUT, BLIND, COUNTS, chosen, drawn
from optmerge_core.benchmark.tasks.english.drawing import Turn, reserved
from optmerge_core.benchmark.tasks.english.lettering import words
from optmerge_core.benchmark.tasks.english.samples import TASKS, sample
from optmerge_core.benchmark.tasks.samples import SPLITS, image_hash
from optmerge_core.evaluation.metrics import Box, found_box, is_correct, metric_of
from optmerge_core.evaluation.questions import load_split, tasks_of

QUESTIONS = Path("data/benchmark/smol/questions")
KINDS = {
    "VQA": scenes.VQA_FULL,
    "Geometry": geometry.WEIGHTS["full"],
    "Chart": charts.WEIGHTS["full"],
    "OCR": writing.WEIGHTS["full"],
    "Grounding": scenes.GROUNDING_FULL,
}
GROUPS = ("words", "names", "goods", "signs")


@pytest.fixture(scope="module")
def shipped():
    """{split: its questions}, a `datasets.Dataset` each."""
    return {split: load_split(QUESTIONS, split) for split in COUNTS}


@pytest.fixture(scope="module")
def tables(shipped):
    """{split: its questions without the pictures}, a table each."""
    return {split: data.remove_columns("image").to_pandas() for split, data in shipped.items()}


def test_a_picture_is_asked_what_was_asked_least_before_and_nothing_twice():
    turns = [
        Turn("Read it.", "For Anna", "read"),
        Turn("Whose name is it?", "Anna", "name", held_out=True),
        Turn("How many words?", "2", "words"),
        Turn("How many words are there?", "two", "words"),
        Turn("What is its first letter?", "A", "letter"),
    ]
    asked = Counter({("read", False, False): 5, ("words", False, False): 1})
    assert [turn.answer for turn in chosen(turns, asked)] == ["Anna", "A"]
    assert [turn.answer for turn in chosen(turns[:4], asked)] == ["Anna", "2"]
    assert [turn.answer for turn in chosen(turns[:2], asked)] == ["Anna"]
    legs = Turn("How many legs does a cat have?", "4", "legs", blind=True)
    asked["legs", True, False] = 9
    assert [turn.answer for turn in chosen([*turns, legs], asked)] == ["4", "Anna"]


def test_there_are_as_many_as_said_and_few_pictures(tables):
    assert tasks_of(QUESTIONS) == list(TASKS)
    for split, table in tables.items():
        assert table["task"].value_counts().to_dict() == dict.fromkeys(TASKS, COUNTS[split])
        assert set(table.groupby("hash").size()) == {ABOUT}
        assert (table["hash"][::ABOUT].values == table["hash"][1::ABOUT].values).all()
    assert sum(path.stat().st_size for path in QUESTIONS.rglob("*.parquet")) <= 5e6


@pytest.mark.parametrize("split", COUNTS)
@pytest.mark.parametrize("task", TASKS)
def test_they_are_what_the_package_draws(task, split, shipped, tables):
    table = tables[split][tables[split]["task"] == task]
    columns = ["question", "answer", "kind", "blind", "held_out"]
    first = [turn for *_, turns in drawn(task, split, 3 * ABOUT) for turn in turns]
    assert [tuple(row) for row in table[columns][: 3 * ABOUT].to_numpy()] == first
    for row in (0, len(table) // 2, len(table) - 1):
        picture = sample(task, split, int(table["number"].iloc[row]))
        assert np.array_equal(picture.image, np.array(shipped[split][table.index[row]]["image"]))
        assert tuple(table[columns].iloc[row]) in picture.turns


def test_pixels_decide_the_split_and_no_question_comes_twice(shipped, tables):
    for split, table in tables.items():
        images = shipped[split].select(range(0, len(table), ABOUT))["image"]
        found = [image_hash(np.array(image)) for image in images]
        assert found == list(table["hash"][::ABOUT])
        assert all(int(name, 16) % 10 in SPLITS[split] for name in found)
        assert not table.duplicated(["hash", "question"]).any()
    assert not set(SPLITS["train"]) & {*SPLITS["test"], *SPLITS["validation"]}


def test_what_is_kept_for_the_test_is_about_half_of_it(tables):
    assert not tables["validation"]["held_out"].any()
    test = tables["test"]
    can_be = test[test.groupby(["task", "kind"])["held_out"].transform("any")]
    shares = can_be.groupby("task")["held_out"].mean()
    assert ((shares > 0.35) & (shares < 0.65)).all(), shares
    for task in TASKS:
        turns = [turn for index in range(3) for turn in sample(task, "train", index).turns]
        assert not any(turn.held_out for turn in turns)


def test_what_is_read_is_held_out_where_the_rule_keeps_it_and_nowhere_else(tables):
    """Words, prices, dates, times and numbers of OCR: their hash alone decides."""
    kept = {w.lower() for group in GROUPS for w in words(group) if reserved("word", w)}
    seen = Counter()
    for split, table in tables.items():
        for row in table[table["task"] == "OCR"].to_dict("records"):
            kind, answer, held_out = row["kind"], row["answer"], row["held_out"]
            if kind in ("price", "date", "time", "number"):
                assert held_out == reserved(kind, answer)
            elif kind in ("name", "thing"):
                assert held_out == (answer.lower() in kept)
            elif kind == "read" and not held_out:
                assert not kept & set(answer.lower().split())
            seen[split, held_out] += 1
    assert seen["test", True] > 75 < seen["test", False] and not seen["validation", True]


def test_every_kind_is_asked_and_words_alone_answer_some(tables):
    test = tables["test"]
    for task, kinds in KINDS.items():
        assert set(test["kind"][test["task"] == task]) == set(kinds) - {"caption"}
    assert set(test["task"][test["blind"]]) == BLIND.keys() == {"VQA"}
    assert test["blind"].sum() >= 60


def test_an_answer_is_right_by_the_metric_that_the_data_says(tables):
    for row in tables["test"].to_dict("records"):
        metric = metric_of(row)
        assert is_correct(metric, row["answer"], row["answer"])
        if row["task"] == "Grounding":
            assert metric == Box(100)
            left, top, right, bottom = found_box(row["answer"], metric.unit)
            assert 0 <= left < right < 1 and 0 <= top < bottom < 1
