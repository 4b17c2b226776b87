"""Evaluation: metrics, greedy answers as `generate` gives them, intervals, the choice of lambda."""

import numpy as np
import pandas as pd
import pytest
import torch

from optmerge_core import load_recipe, open_checkpoint
from optmerge_core.benchmark.tasks.samples import TASKS
from optmerge_core.evaluation.evaluator import Evaluator, load_model, load_processor
from optmerge_core.evaluation.metrics import accuracy, box_iou, is_correct
from optmerge_core.evaluation.questions import load_split
from optmerge_core.evaluation.selection import best_scaling, bootstrap, interval, search_scaling
from optmerge_core.merging.families import mergeable

RECIPE = "data/recipes/internvl.yaml"
QUESTIONS = "data/benchmark/questions"


@pytest.fixture(scope="module")
def study():
    return load_recipe(RECIPE)


@pytest.fixture(scope="module")
def evaluator(study):
    return Evaluator(study.base_model, load_split(QUESTIONS, "validation", 12))


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
    "task, kind, prediction, answer, correct",
    [
        ("VQA", "color", "red", "red", True),
        ("VQA", "color", "red ", "red", False),
        ("OCR", "read", "27P", "27p", False),
        ("Chart", "value", "42", "40", True),
        ("Chart", "value", "43", "40", False),
        ("Chart", "value", "", "40", False),
        ("Chart", "value", "-40", "40", False),
        ("Chart", "compare", "red", "red", True),
        ("Chart", "above", "2", "2", True),
        ("Geometry", "area", "41", "40", False),
        ("Grounding", "name", "<loc1><loc1><loc3><loc3>", "<loc1><loc1><loc3><loc3>", True),
        ("Grounding", "name", "<loc1><loc1><loc3><loc2>", "<loc1><loc1><loc3><loc3>", True),
        ("Grounding", "name", "<loc1><loc1><loc2><loc2>", "<loc1><loc1><loc3><loc3>", False),
        ("Grounding", "name", "<loc1><loc1><loc3>", "<loc1><loc1><loc3><loc3>", False),
        ("Grounding", "name", "red", "<loc1><loc1><loc3><loc3>", False),
    ],
)
def test_metrics_by_hand(task, kind, prediction, answer, correct):
    assert is_correct(task, kind, prediction, answer) == correct


def test_answers_are_what_generate_gives_one_by_one(study, evaluator):
    model, processor = load_model(study.base_model), load_processor(study.base_model)
    data = load_split(QUESTIONS, "validation", 12)
    table = evaluator.answer()
    for index in range(0, len(data), 7):
        item = data[index]
        inputs = processor(
            images=[item["image"]], text=[processor.prompt(item["question"])], return_tensors="pt"
        )
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        text = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert table.loc[index, "prediction"] == text
        assert table.loc[index, "question"] == item["question"]


def test_weights_replace_the_base_and_leave_it_unchanged(study, evaluator):
    base = open_checkpoint(study.base_model)
    names = mergeable(base.shapes(), base.config()["model_type"])
    before = evaluator.answer()["prediction"]
    expert = open_checkpoint(study.experts["OCR"])
    as_expert = evaluator.answer({n: expert[n] for n in names})
    zero = evaluator.merged(base, {n: torch.zeros_like(base[n]) for n in names}, 1.0)
    task_vector = {n: expert[n].float() - base[n].float() for n in names}
    rebuilt = evaluator.merged(base, task_vector, 1.0)
    assert (zero["prediction"] == before).all()
    assert (rebuilt["prediction"] == as_expert["prediction"]).all()
    assert (as_expert["prediction"] != before).any()


def test_foreign_weights_are_refused(evaluator):
    with pytest.raises(ValueError, match=r"layers\.99.*another family"):
        evaluator.answer({"language_model.model.layers.99.mlp.up_proj.weight": torch.zeros(1)})


def test_asking_for_more_questions_than_there_are():
    with pytest.raises(ValueError, match="has 300 samples, not 301"):
        load_split(QUESTIONS, "validation", 301)


def answers(rates, count=200):
    rows = [(t, i < r * count) for t, r in zip(TASKS, rates, strict=True) for i in range(count)]
    return pd.DataFrame(rows, columns=["task", "correct"])


def test_accuracy_averages_tasks():
    scores = accuracy(answers([0.0, 0.25, 0.5, 0.75, 1.0]))
    assert list(scores.index) == [*TASKS, "Avg"]
    assert list(scores) == [0, 25, 50, 75, 100, 50]


def test_bootstrap_is_centred_paired_and_as_wide_as_theory():
    table = answers([0.5] * 5)
    samples = bootstrap(table, resamples=2000)
    assert samples.shape == (2000, 6)
    assert np.array_equal(samples, bootstrap(table, resamples=2000))
    assert samples[:, -1].mean() == pytest.approx(50, abs=0.3)
    assert samples[:, 0].std() == pytest.approx(100 * (0.25 / 200) ** 0.5, rel=0.1)
    low, high = interval(samples[:, -1])
    assert low < 50 < high
    assert np.allclose(samples[:, -1], samples[:, :5].mean(1))


def test_search_grows_a_methods_grid_until_its_choice_is_not_at_the_edge():
    peaks = {"short": 0.02, "middle": 1.0, "long": 9.0}
    table = search_scaling(lambda m, c: -abs(np.log(c / peaks[m])), peaks, [0.1, 1.0, 1.5])
    best = best_scaling(table)
    for method, rows in table.groupby("method"):
        tried = rows["scaling_coefficient"]
        assert tried.is_unique and {0.1, 1.0, 1.5} <= set(tried)
        assert tried.min() < best[method] < tried.max()
    assert best["middle"] == 1.0 and best["short"] < 0.05 and best["long"] > 5
    assert (table["method"] == "middle").sum() == 4  # 2.25 beside the grid's own


def test_one_dip_does_not_end_the_search():
    scores = {1.0: 5.0, 1.5: 4.0, 2.25: 6.0, 3.375: 5.0, 5.0625: 4.0}
    table = search_scaling(lambda m, c: scores.get(c, 0.0), ["mean"], [0.5, 1.0, 1.5])
    assert best_scaling(table) == {"mean": 2.25}
    assert table["scaling_coefficient"].max() == 5.0625


def test_the_search_ends_where_merging_only_harms():
    table = search_scaling(lambda m, c: -c, ["harmful"], [0.1, 1.0], extensions=3)
    assert sorted(table["scaling_coefficient"]) == [0.0125, 0.025, 0.05, 0.1, 1.0, 1.5]
    assert best_scaling(table) == {"harmful": 0.0125}


def test_of_equal_accuracies_the_smaller_coefficient_is_chosen():
    table = pd.DataFrame(
        {"method": "a", "scaling_coefficient": [1.5, 0.5, 1.0], "accuracy": [7.0, 7.0, 6.0]}
    )
    assert best_scaling(table) == {"a": 0.5}
