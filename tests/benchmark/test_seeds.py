"""The study of training seeds: the shipped experts are not trained again, each model has a row."""

import json
from pathlib import Path

import pandas as pd
import pytest

from optmerge_core import TABLE_METHODS, load_recipe
from optmerge_core.benchmark.evaluator import evaluator_for
from optmerge_core.benchmark.experiments import ranks, seeds
from optmerge_core.benchmark.experiments.variants import ablation, beyond
from optmerge_core.benchmark.tasks.samples import TASKS
from optmerge_core.benchmark.training.build import SEEDS
from optmerge_core.evaluation.questions import load_split


@pytest.mark.parametrize("family", ["internvl", "qwen2_vl"])
def test_the_shipped_table_has_three_seeds_of_every_method(family):
    table = pd.read_csv(f"data/benchmark/{family}/seeds.csv", index_col=["seed", "model"])
    for seed in SEEDS:
        assert {"base_model", "mixture", *TASKS, *TABLE_METHODS} <= set(table.loc[seed].index)
    average = table[list(TASKS)].mean(axis=1)
    pd.testing.assert_series_equal(average, table["Avg"], check_names=False, atol=1e-3)


def test_evaluate_has_a_row_for_every_model(monkeypatch):
    study = load_recipe("data/recipes/qwen2_vl.yaml")
    monkeypatch.setattr(seeds, "TABLE_METHODS", ("weight_average", "tsv"))
    few = study.model_copy(update={"scaling_coefficients": [1.0, 3.0]})
    questions = evaluator_for(study.base_model, load_split(study.evaluation.data, "validation", 8))
    assert seeds.trained(few, "not made", SEEDS[0]) is few
    answers, search = seeds.evaluate(few, questions, questions)
    table = seeds.scores(answers)
    variants = [step for step in ablation(study) if step.startswith("+")] + list(beyond())
    models = {"base_model", *TASKS, "mixture", "weight_average", "tsv", *variants}
    assert set(table.index) == models
    assert table.loc["OCR", "OCR"] > table.loc["base_model", "OCR"]
    assert {1.0, 3.0} <= set(search.query("method == 'tsv'")["scaling_coefficient"])
    best = search.groupby("method")["accuracy"].max()  # the same questions were asked for both
    pd.testing.assert_series_equal(
        best, table.loc[best.index, "Avg"], check_names=False, check_dtype=False
    )


def test_a_seed_that_is_done_is_not_done_again(tmp_path, monkeypatch):
    """Two models with two answers each, one seed there already and one to be made."""
    answers = pd.DataFrame(
        {"task": ["OCR", "VQA"], "prediction": ["a", "b"], "correct": [True, False]}
    )
    worse = answers.assign(correct=False)
    search = pd.DataFrame({"method": ["tsv"], "scaling_coefficient": [0.5], "accuracy": [50.0]})
    made = []

    def evaluate(study, *_):
        made.append(study)
        return {"base_model": worse, "OCR": answers}, search

    monkeypatch.setattr(seeds, "evaluators", lambda _: (None, None))
    monkeypatch.setattr(seeds, "evaluate", evaluate)
    monkeypatch.setattr(seeds, "trained", lambda study, folder, seed, *how: (seed, *how))
    seeds.main("data/recipes/qwen2_vl.yaml", tmp_path, [1, 11])
    seeds.main("data/recipes/qwen2_vl.yaml", tmp_path, [1, 11, 21], references=True)
    assert made == [(1, False, None), (11, False, None), (21, True, None)]
    table = pd.read_csv(tmp_path / "seeds.csv", index_col=["seed", "model"])
    assert table.loc[21].to_dict("index") == {
        "base_model": {"OCR": 0, "VQA": 0, "Avg": 0}, "OCR": {"OCR": 100, "VQA": 0, "Avg": 50},
    }  # fmt: skip
    tried = pd.read_csv(tmp_path / "search.csv", index_col=["seed", "method"])
    assert tried.loc[(11, "tsv")].to_dict() == {"scaling_coefficient": 0.5, "accuracy": 50}
    kept = pd.read_parquet(tmp_path / "answers.parquet").sort_index().loc[(11, "OCR")]
    assert kept.reset_index(drop=True).equals(answers)


def test_another_seed_trains_experts_and_references(tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr(seeds, "build", lambda *given, **named: built.append((*given, named)))
    study = seeds.trained(load_recipe("data/recipes/qwen2_vl.yaml"), tmp_path, 11, references=True)
    names = [f"lora/{name}" for name in (*TASKS, "mixture")]
    assert built == [(tmp_path, "qwen2_vl", {"only": name, "seed": 11}) for name in names]
    assert study.experts == {task: str(tmp_path / "lora" / task) for task in TASKS}
    assert study.evaluation.references == {"mixture": str(tmp_path / "lora" / "mixture")}
    assert (tmp_path / "base" / "config.json").exists()


def test_another_regime_trains_the_shipped_seed_too(tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr(seeds, "build", lambda *given, **named: built.append((*given, named)))
    study = seeds.trained(load_recipe("data/recipes/qwen2_vl.yaml"), tmp_path, 1, regime="long")
    assert built == [(tmp_path, "qwen2_vl", {"only": f"long/{t}", "seed": 1}) for t in TASKS]
    assert study.experts == {task: str(tmp_path / "long" / task) for task in TASKS}


def test_experts_of_other_ranks_are_made_once(tmp_path):
    study = load_recipe("data/recipes/qwen2_vl.yaml")
    settings = {"steps": 1, "learning_rate": 1e-3, "batch": 4, "workers": 0}
    for name, rank in {"low": 2, "full": None}.items():
        folders = ranks.expert_folders(study, tmp_path / name, settings | {"rank": rank})
        assert list(folders) == list(TASKS)
        adapter = Path(folders["OCR"], "adapter_config.json")
        assert adapter.exists() == (rank is not None)
        assert rank is None or json.loads(adapter.read_text())["r"] == rank
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    ranks.expert_folders(study, tmp_path / "full", settings)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}


def test_the_shipped_table_of_ranks():
    table = pd.read_csv("data/benchmark/qwen2_vl/ranks.csv", index_col=["rank", "model"])
    for name in ranks.SETTINGS:
        assert {"base_model", *TASKS, *TABLE_METHODS} <= set(table.loc[name].index)
