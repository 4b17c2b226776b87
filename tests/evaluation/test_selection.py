"""Choosing scaling coefficients."""

import numpy as np
import pandas as pd

from optmerge_core.evaluation.metrics import accuracy
from optmerge_core.evaluation.selection import best_scaling, search_scaling

TASKS = ("VQA", "Geometry", "Chart", "OCR", "Grounding")


def answers(rates, count=200):
    rows = [(t, i < r * count) for t, r in zip(TASKS, rates, strict=True) for i in range(count)]
    return pd.DataFrame(rows, columns=["task", "correct"])


def test_accuracy_averages_tasks():
    scores = accuracy(answers([0.0, 0.25, 0.5, 0.75, 1.0]))
    assert list(scores.index) == [*TASKS, "Avg"]
    assert list(scores) == [0, 25, 50, 75, 100, 50]


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
