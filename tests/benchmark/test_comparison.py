"""All methods on one study alike: what is compared, and each number of a row on its own way."""

import pandas as pd
import pytest
import torch

from optmerge_core import METHODS, load_recipe
from optmerge_core.benchmark.evaluator import evaluator_for
from optmerge_core.benchmark.experiments import comparison
from optmerge_core.benchmark.experiments.comparison import Captions, rows_of, variants
from optmerge_core.evaluation.metrics import accuracy
from optmerge_core.evaluation.questions import load_split
from optmerge_core.methods.registry import check_options
from optmerge_core.study.open import open_study
from optmerge_core.task_vectors.tables import inner

LORA = load_recipe("data/recipes/qwen2_vl.yaml")
FEW = ["task_arithmetic", "tsv, SVC", "Ridge"]


def test_every_method_for_any_number_of_experts_is_compared():
    found = variants(LORA)
    assert {method for method, _ in found.values()} == METHODS.keys() - {"slerp", "nuslerp"}
    assert found["tsv, SVC"] == ("tsv", LORA.options("tsv") | {"then": "svc"})
    for method, options in found.values():
        check_options(method, options, 5)
    assert list(variants(LORA, FEW)) == FEW
    with pytest.raises(ValueError, match=r"no variant tvs; there are .*tsv"):
        variants(LORA, ["tvs"])


@pytest.fixture(scope="module")
def asked():
    return [
        evaluator_for(LORA.base_model, load_split(LORA.evaluation.data, split, 4))
        for split in ("validation", "test")
    ]


def test_captions_are_what_the_base_learnt(asked):
    captions = Captions(LORA, asked[0], count=4)
    assert [len(batch["labels"]) for batch in captions.batches] == [4] * 5
    base = captions()
    opened = open_study(LORA)
    zero = {n: torch.zeros_like(opened.base[n]) for n in opened.names}
    assert 0 < base < 3 < captions(zero)  # 237 words, told blindly: 5.5
    assert captions() == base  # its weights are back


def test_each_number_of_a_row(asked, tmp_path, monkeypatch):
    study = LORA.model_copy(update={"scaling_coefficients": [0.5, 1.0]})
    monkeypatch.setattr(comparison, "load_recipe", lambda _: study)
    monkeypatch.setattr(comparison, "evaluators", lambda _: asked)
    monkeypatch.setattr(comparison, "CAPTIONS", 2)
    comparison.main("", tmp_path, seeds=[1], methods=FEW)
    table = pd.read_csv(tmp_path / "comparison.csv", index_col=["seed", "model"]).loc[1]
    assert [*table.index] == ["base_model", *study.experts, "mixture", *FEW]
    row, opened = table.loc["tsv, SVC"], open_study(study)
    merged = opened.merge_tensors("tsv", method_options={"then": "svc"})
    total = opened.merge_tensors("task_arithmetic")
    length = row["scaling_coefficient"] * (inner(merged, merged) / inner(total, total)) ** 0.5
    assert row["length"] == pytest.approx(length, rel=1e-4)
    answers = asked[1].answer_merged(opened.base, merged, row["scaling_coefficient"])
    assert row["Avg"] == pytest.approx(accuracy(answers)["Avg"])
    control = asked[1].answer_merged(opened.base, total, row["length"])
    assert row["control"] == pytest.approx(accuracy(control)["Avg"])
    sums = table.loc["task_arithmetic"]
    assert sums["control"] == sums["Avg"] and sums["cosine"] == pytest.approx(1)
    correct = pd.read_parquet(tmp_path / "correct.parquet").loc[1]
    found = 100 * correct.groupby(["model", "task"])["correct"].mean().unstack().mean(axis=1)
    assert found.to_dict() == pytest.approx(table["Avg"].to_dict())


def test_experts_of_one_seed_are_compared_once(asked, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(comparison, "evaluators", lambda _: asked)
    monkeypatch.setattr(comparison, "Captions", lambda *_: lambda weights=None: 1.0)

    def counted(*arguments):
        calls.append(1)
        return rows_of(*arguments)

    monkeypatch.setattr(comparison, "rows_of", counted)
    for _ in range(2):
        comparison.main("data/recipes/qwen2_vl.yaml", tmp_path, seeds=[1], methods=FEW[:1])
    assert calls == [1]
