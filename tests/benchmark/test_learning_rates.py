"""The search for a learning rate: every model once a rate, scored on what it was trained on."""

import pandas as pd
import pytest

from optmerge_core import load_recipe
from optmerge_core.benchmark.experiments import learning_rates
from optmerge_core.benchmark.tasks.samples import TASKS
from optmerge_core.benchmark.training import build


def test_every_model_at_every_rate(tmp_path, monkeypatch):
    recipe = "data/recipes/qwen2_vl.yaml"
    study = load_recipe(recipe)
    few = study.evaluation.model_copy(update={"validation_samples": 20})
    study = study.model_copy(update={"evaluation": few})
    monkeypatch.setattr(learning_rates, "load_recipe", lambda _: study)
    short = {"steps": 1, "rank": 2, "batch": 2, "workers": 0}
    monkeypatch.setitem(build.REGIMES, "qwen2_vl", {"lora": short | {"learning_rate": 1e-3}})
    learning_rates.main(recipe, tmp_path, [1e-4, 0.3])
    table = pd.read_csv(tmp_path / "learning_rates.csv")
    assert table.groupby("learning_rate")["model"].apply(list).to_dict() == dict.fromkeys(
        [1e-4, 0.3], [*TASKS, "mixture"]
    )
    gentle, wild = (table[table["learning_rate"] == rate] for rate in (1e-4, 0.3))
    assert wild["accuracy"].mean() < gentle["accuracy"].mean()  # one step of 0.3 ruins a model
    assert gentle["accuracy"].between(0, 100).all() and gentle["accuracy"].max() > 20
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("adapter_model.*")}
    assert len(before) == 12
    learning_rates.main(recipe, tmp_path, [0.3])
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("adapter_model.*")}


def test_a_rate_of_its_own_reaches_the_training(tmp_path, monkeypatch):
    given = {}

    def fine_tune(base, **settings):
        given.update(settings)
        raise InterruptedError

    monkeypatch.setattr(build.experts, "fine_tune", fine_tune)
    with pytest.raises(InterruptedError):
        build.build(tmp_path, "qwen2_vl", only="lora/OCR", learning_rate=0.25)
    assert given["learning_rate"] == 0.25 and given["tasks"] == ["OCR"]
