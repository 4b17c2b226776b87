"""The map of merging's learning rates: what is tried, chosen and scored."""

import math

import pandas as pd
import pytest
import torch

from optmerge_core import TABLE_METHODS, load_recipe
from optmerge_core.benchmark.evaluator import evaluator_for
from optmerge_core.benchmark.experiments import rate_map
from optmerge_core.benchmark.experiments.rate_map import RATES, chosen, root_mean_square, ways
from optmerge_core.evaluation.questions import load_split
from optmerge_core.methods.registry import METHODS, check_options
from optmerge_core.study.open import open_study

FULL, LORA = (load_recipe(f"data/recipes/{name}.yaml") for name in ("internvl", "qwen2_vl"))


def test_root_mean_square_by_hand():
    stacks = {"a": torch.tensor([[3.0, 4.0]]), "b": torch.zeros(1, 2, 1)}
    assert root_mean_square(stacks) == pytest.approx(2.5)


def test_what_is_tried_of_a_method():
    assert [w[0] for w in ways(FULL, "tsv", 0.5)] == ["recipe"]
    tried = {which: rate for which, rate, _ in ways(FULL, "wudi", 0.01) if which != "grid"}
    assert tried == {"recipe": 0.01, "published": pytest.approx(1e-3), "limit": math.inf}
    sgd = {which: rate for which, rate, _ in ways(LORA, "optmerge", 0.01) if which != "grid"}
    assert sgd == {"recipe": 1e-4, "published": 1e-4, "limit": math.inf}
    for study in (FULL, LORA):
        for method in TABLE_METHODS:
            for _, _, options in ways(study, method, 0.01):
                check_options(method, options)


def test_published_rate_is_the_published_one_and_the_grid_follows_the_size():
    task_vectors = torch.randn(3, 12, 8, generator=torch.Generator().manual_seed(0)) / 100
    rms = task_vectors.square().mean().sqrt().item()
    options = {which: o for which, rate, o in ways(FULL, "wudi", rms) if which != "grid"}
    assert torch.equal(METHODS["wudi"](task_vectors, **options["published"]),
                       METHODS["wudi"](task_vectors))  # fmt: skip
    grid = {rate: o for which, rate, o in ways(FULL, "wudi", rms) if which == "grid"}
    assert tuple(grid) == RATES["adam"]
    one, ten = (METHODS["wudi"](factor * task_vectors, **grid[1e-2]) for factor in (1, 10))
    torch.testing.assert_close(ten, 10 * one, rtol=1e-3, atol=1e-6)


def test_the_limit_is_that_of_many_steps():
    task_vectors = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0)).double()
    limit = next(o for which, _, o in ways(LORA, "optmerge", 1.0) if which == "limit")
    many = {"preset": "lora", "learning_rate": 0.3, "steps": 10**6}
    expected = METHODS["optmerge"](task_vectors, **many)
    torch.testing.assert_close(
        METHODS["optmerge"](task_vectors, **limit), expected, rtol=1e-3, atol=1e-4
    )


def test_of_equal_scores_the_smaller_rate_and_scale_are_chosen():
    rows = [("a", 1.0, 0.5, 70.0), ("a", 0.1, 0.7, 70.0), ("a", 0.1, 0.5, 70.0)]
    rows += [("b", math.nan, 0.3, 60.0), ("b", math.nan, 1.0, 61.0)]
    columns = ["method", "learning_rate", "scaling_coefficient", "accuracy"]
    best = chosen(pd.DataFrame(rows, columns=columns))
    assert best.loc["a", "learning_rate"] == 0.1
    assert best["scaling_coefficient"].to_dict() == {"a": 0.5, "b": 1.0}


def test_all_is_scored_and_the_best_are_tested(tmp_path, monkeypatch):
    few = [
        evaluator_for(LORA.base_model, load_split(LORA.evaluation.data, split, 4))
        for split in ("validation", "test")
    ]
    monkeypatch.setattr(rate_map, "evaluators", lambda study: few)
    monkeypatch.setattr(rate_map, "SCALINGS", (0.5, 40.0))
    monkeypatch.setattr(rate_map, "RATES", {"adam": (1e-2,), "sgd": (5e-2,)})
    monkeypatch.setattr(rate_map.search, "__defaults__", (("task_arithmetic", "optmerge"),))
    rate_map.main("data/recipes/qwen2_vl.yaml", tmp_path, seeds=[1])
    table, tuned = (pd.read_csv(tmp_path / f"{n}.csv") for n in ("rate_map", "tuned"))
    assert table.groupby("method").size().to_dict() == {"task_arithmetic": 2, "optmerge": 8}
    assert tuned.set_index("method")["trials"].to_dict() == {"task_arithmetic": 2, "optmerge": 8}
    one = table[table["scaling_coefficient"] == 0.5].set_index(["method", "which"])["norm"]
    assert one["task_arithmetic", "recipe"] == pytest.approx(1)
    assert one["optmerge", "published"] == pytest.approx(one["optmerge", "recipe"])
    assert one["optmerge", "grid"] > one["optmerge", "published"]
    opened = open_study(LORA)
    sums = opened.merge_tensors("task_arithmetic")
    row = tuned.set_index("method").loc["task_arithmetic"]
    answers = few[1].answer_merged(opened.base, sums, row["scaling_coefficient"])
    assert row["test"] == pytest.approx(100 * answers["correct"].mean(), abs=1e-3)
