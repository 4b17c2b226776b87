"""The study of training seeds: the shipped experts are not trained again, each model has a row."""

import pandas as pd
import pytest

from optmerge_core import METHODS, load_recipe
from optmerge_core.benchmark import seeds
from optmerge_core.benchmark.evaluation import Evaluator, load_split
from optmerge_core.benchmark.selection import ablation
from optmerge_core.benchmark.tasks import TASKS


@pytest.mark.parametrize("family", ["internvl", "qwen2_vl"])
def test_the_shipped_table_has_three_seeds_of_every_method(family):
    table = pd.read_csv(f"data/benchmark/{family}/seeds.csv", index_col=["seed", "model"])
    for seed in (seeds.SHIPPED, *seeds.OTHERS):
        assert {"base_model", "mixture", *TASKS, *METHODS} <= set(table.loc[seed].index)
    average = table[list(TASKS)].mean(axis=1)
    pd.testing.assert_series_equal(average, table["Avg"], check_names=False, atol=1e-3)


def test_evaluate_has_a_row_for_every_model(monkeypatch):
    study = load_recipe("data/recipes/qwen2_vl.yaml")
    monkeypatch.setattr(seeds, "METHODS", {m: METHODS[m] for m in ("weight_average", "tsv")})
    few = study.model_copy(update={"scaling_coefficients": [1.0, 3.0]})
    questions = Evaluator(study.base_model, load_split(study.evaluation.data, "validation", 8))
    experts = seeds.expert_folders(few, "not made", seeds.SHIPPED)
    assert experts == study.experts
    table = seeds.evaluate(few, experts, questions, questions)
    steps = [step for step in ablation(study) if step.startswith("+")]
    assert set(table.index) == {"base_model", *TASKS, "mixture", "weight_average", "tsv", *steps}
    assert table.loc["OCR", "OCR"] > table.loc["base_model", "OCR"]
