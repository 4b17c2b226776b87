"""Metrics by hand: each task's own, and the rule for tasks that have none."""

import pandas as pd
import pytest

from optmerge_core.evaluation.metrics import (
    Box,
    accuracy,
    box_iou,
    exact,
    found_box,
    is_correct,
    metric_of,
    relaxed,
)


@pytest.mark.parametrize(
    "first, second, expected",
    [
        ((0, 0, 2, 2), (0, 0, 2, 2), 1.0),
        ((0, 0, 2, 2), (1, 0, 3, 2), 1 / 3),
        ((0, 0, 2, 2), (2, 0, 4, 2), 0.0),
        ((0, 0, 2, 2), (2, 2, 0, 0), 0.0),
        ((1, 1, 1, 1), (1, 1, 1, 1), 0.0),
    ],
)
def test_box_iou_by_hand(first, second, expected):
    assert box_iou(first, second) == pytest.approx(expected)


@pytest.mark.parametrize(
    "task, prediction, answer, right",
    [
        ("VQA", " Red.", "red", True),
        ("VQA", "Top  left\n", "top left", True),
        ("VQA", "it is red", "red", False),
        ("VQA", "A cat.", "cat", True),
        ("VQA", "cat", "the cat", True),
        ("OCR", "A", "A", True),
        ("OCR", "Anna", "Anna", True),
        ("OCR", "na", "Anna", False),
        ("Chart", "42%", "40", True),
        ("Chart", "43", "40", False),
        ("Geometry", "80°", "80", True),
        ("Grounding", "[500, 286, 643, 429]", "<loc7><loc4><loc9><loc6>", True),
        (
            "Grounding",
            '{"bbox_2d": [500, 286, 643, 429]}',
            "<loc7><loc4><loc9><loc6>",
            True,
        ),
        ("Grounding", "(500,286),(643,429)", "<loc7><loc4><loc9><loc6>", True),
        ("Grounding", "0, 0, 143, 143", "<loc7><loc4><loc9><loc6>", False),
        ("Grounding", "500, 286, 643", "<loc7><loc4><loc9><loc6>", False),
        ("mine", "10 10 20 20", "[10, 10, 20, 19]", True),
    ],
)
def test_answers_are_read_leniently(task, prediction, answer, right):
    metric = metric_of({"task": task, "answer": answer})
    assert is_correct(metric, prediction, answer) == right


@pytest.mark.parametrize(
    "sample, metric",
    [
        ({"task": "Chart", "answer": "40"}, relaxed),
        ({"task": "Grounding", "answer": "<loc1><loc2><loc3><loc4>"}, Box(1000)),
        ({"task": "Grounding", "answer": "12 30 48 75", "box_unit": 100}, Box(100)),
        ({"task": "Grounding", "answer": "1 2 3 4", "box_unit": float("nan")}, Box(1000)),
        ({"task": "find", "answer": "1 2 3 4", "metric": "box", "box_unit": 10.0}, Box(10)),
        ({"task": "VQA", "answer": "red", "box_unit": 100}, exact),
        ({"task": "Geometry", "answer": "40"}, exact),
        ({"task": "maths", "answer": "40"}, exact),
        ({"task": "maths", "answer": "40", "metric": None}, exact),
        ({"task": "maths", "answer": "40", "metric": "relaxed"}, relaxed),
        ({"task": "find", "answer": "[1, 2, 3, 4]"}, Box(1000)),
        ({"task": "Grounding", "answer": "left", "metric": "exact"}, exact),
    ],
)
def test_the_questions_say_their_metric_or_else_their_task_does(sample, metric):
    assert metric_of(sample) == metric


def test_a_metric_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="mine: metric 'f1' is unknown; give one of exact, relax"):
        metric_of({"task": "mine", "answer": "red", "metric": "f1"})
    with pytest.raises(ValueError, match="Grounding: the answer 'left' is no box; name another"):
        metric_of({"task": "Grounding", "answer": "left"})


def test_a_chart_s_value_may_have_decimals():
    assert relaxed("12.9", "12.5") and not relaxed("13.2", "12.5") and not relaxed("x", "12.5")


def test_boxes_by_hand():
    assert found_box("[0, 250, 500, 1000]") == [0, 0.25, 0.5, 1]
    assert found_box("<loc0><loc7><loc14><loc14>") == [0, 0.5, 1, 1]
    assert found_box("none") is None
    assert found_box("12 30 48 75", 100) == [0.12, 0.3, 0.48, 0.75]


def test_the_questions_unit_reads_answer_and_prediction():
    """Thousandths said where hundredths were asked for are another box; location tokens are not."""
    metric = metric_of({"task": "Grounding", "answer": "12 30 48 75", "box_unit": 100})
    assert is_correct(metric, "[13, 30, 50, 75].", "12 30 48 75")
    assert not is_correct(metric, "120 300 480 750", "12 30 48 75")
    assert is_correct(metric, "50 29 64 43", "<loc7><loc4><loc9><loc6>")
    assert not is_correct(Box(), "50 29 64 43", "<loc7><loc4><loc9><loc6>")


def test_accuracy_of_any_tasks():
    table = pd.DataFrame({"task": ["b", "a", "a"], "correct": [True, True, False]})
    assert accuracy(table).to_dict() == {"b": 100, "a": 50, "Avg": 75}
