"""All methods on one study alike: what is compared, and each number of a row on its own way."""

import pandas as pd
import pytest
import torch

from optmerge_core import METHODS, load_recipe
from optmerge_core.benchmark.evaluator import evaluator_for
from optmerge_core.benchmark.experiments import comparison, kept
from optmerge_core.benchmark.experiments.comparison import Asked, rows_of, variants
from optmerge_core.evaluation.metrics import accuracy
from optmerge_core.evaluation.questions import blanked, load_split
from optmerge_core.methods.registry import check_options
from optmerge_core.study.open import open_study
from optmerge_core.task_vectors.tables import inner

LORA = load_recipe("data/recipes/qwen2_vl.yaml")
FEW = ["task_arithmetic", "tsv, SVC", "Ridge"]


def test_every_method_for_any_number_of_experts_is_compared():
    found = variants(LORA)
    assert {method for method, _ in found.values()} == METHODS.keys() - {"slerp", "nuslerp"}
    assert found["+ Low-rank"][1]["preset"] == "lora"
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


def test_captions_are_what_the_base_learnt(asked, monkeypatch):
    monkeypatch.setattr(kept, "CAPTIONS", 4)
    told, opened = kept.kept_by(LORA, asked[0]), open_study(LORA)
    base = told()["captions"]
    zero = {n: torch.zeros_like(opened.base[n]) for n in opened.names}
    assert 0 < base < 3 < told(zero)["captions"]  # 237 words, told blindly: 5.5
    assert told() == {"captions": base}  # its weights are back


def test_of_the_real_language_model_its_knowledge_is_told_too(asked, tmp_path, monkeypatch):
    (tmp_path / "page.txt").write_text("A page.")
    pd.DataFrame({"question": ["How?"], "key": ["so"]}).to_csv(tmp_path / "knowledge.csv")
    study = LORA.model_copy(update={"base_model": str(tmp_path / "base")})
    given, models = [], []

    class Told:
        def __init__(self, *arguments):
            given.append(arguments)

        def __call__(self, model, processor):
            models.append((model, processor))
            return ["so"], {"knows": 100.0}

    monkeypatch.setattr(kept, "Forgetting", Told)
    monkeypatch.setattr(kept, "language_model", lambda: "SmolLM2")
    monkeypatch.setattr(kept, "build_processor", lambda: "its own")
    monkeypatch.setattr(kept, "Captions", lambda *_: lambda model: 0.5)
    assert kept.kept_by(study, asked[0])() == {"captions": 0.5, "knows": 100.0}
    ((original, processor, questions, page),) = given
    assert (original, processor, page) == ("SmolLM2", "its own", "A page.")
    assert questions["key"].tolist() == ["so"]
    assert models == [(asked[0].model, asked[0].processor)]


def test_a_question_that_needs_no_eyes_is_asked_blindly_too(asked):
    data = asked[1].questions
    without = Asked(asked[1])()
    assert not without["blanked"].any() and len(without) == len(data)
    some = asked[1].asking(data.add_column("blind", [row < 3 for row in range(len(data))]))
    both = Asked(some)()
    pd.testing.assert_frame_equal(both[~both["blanked"]], without)
    blind = both[both["blanked"]]
    grey = some.asking(blanked(data.select(range(3)))).answer()
    assert blind["prediction"].tolist() == grey["prediction"].tolist()
    assert accuracy(comparison.seen(both)).equals(accuracy(without))


def test_each_number_of_a_row(asked, tmp_path, monkeypatch):
    study = LORA.model_copy(update={"scaling_coefficients": [0.5, 1.0]})
    monkeypatch.setattr(comparison, "load_recipe", lambda _: study)
    monkeypatch.setattr(comparison, "evaluators", lambda _: asked)
    monkeypatch.setattr(kept, "CAPTIONS", 2)
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
    said = pd.read_parquet(tmp_path / "answers.parquet").loc[1]
    found = 100 * said.groupby(["model", "task"])["correct"].mean().unstack().mean(axis=1)
    assert found.to_dict() == pytest.approx(table["Avg"].to_dict())
    shipped = pd.read_csv(tmp_path / "seeds.csv", index_col=["seed", "model"]).loc[1]
    assert shipped["Avg"].to_dict() == pytest.approx(table["Avg"].to_dict(), abs=1e-4)
    search = pd.read_csv(tmp_path / "search.csv", index_col=["seed", "method"]).loc[1]
    assert search.loc["tsv, SVC", "accuracy"].max() == pytest.approx(row["validation"])
    assert len(search.loc["tsv, SVC"]) == row["trials"]


def test_experts_of_one_seed_are_compared_once(asked, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(comparison, "evaluators", lambda _: asked)
    monkeypatch.setattr(comparison, "kept_by", lambda *_: lambda weights=None: {"captions": 1.0})

    def counted(*arguments):
        calls.append(1)
        return rows_of(*arguments)

    monkeypatch.setattr(comparison, "rows_of", counted)
    for _ in range(2):
        comparison.main("data/recipes/qwen2_vl.yaml", tmp_path, seeds=[1], methods=FEW[:1])
    assert calls == [1]
