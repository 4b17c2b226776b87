"""Scores of sets of experts."""

from pathlib import Path

import pandas as pd

from optmerge_core import load_recipe
from optmerge_core.benchmark.experiments import subsets

DATA = Path(__file__).resolve().parents[2] / "data"


def test_scores_of_sets_are_shipped_and_can_be_made_again():
    shipped = pd.read_csv(DATA / "benchmark/subsets.csv")
    sizes = shipped["experts"].str.count(r"\+") + 1
    assert sizes.value_counts().to_dict() == {2: 46, 3: 44, 5: 4, 4: 1}
    recipe = load_recipe(DATA / "recipes/qwen2_vl_various.yaml")
    two = [model for model in recipe.models if model.name in ("OCR", "Scenes")]
    table = subsets.score_sets(recipe.model_copy(update={"models": two}), count=2)
    assert table["experts"].tolist() == ["OCR+Scenes"]
    assert table.columns.tolist() == shipped.columns.tolist()
    assert table.drop(columns=["study", "experts"]).stack().between(0, 100).all()
    assert subsets.trained_tasks("Scenes", recipe.experts["Scenes"]) == ["VQA", "Grounding"]
