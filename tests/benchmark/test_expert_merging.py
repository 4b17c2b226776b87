"""The experiment on unlabelled questions: its draws, its intervals, and what is not done again."""

import numpy as np
import pandas as pd
import pytest

from optmerge_core import load_recipe
from optmerge_core.benchmark.experiments import expert_merging as experiment
from optmerge_core.evaluation.questions import load_unlabelled

RECIPE = "data/recipes/internvl.yaml"


@pytest.fixture(scope="module")
def study():
    return load_recipe(RECIPE)


def test_who_has_labels_has_them_of_the_same_questions(study):
    folder = f"{study.evaluation.data}/validation"
    data = experiment.labelled(study, 3, 1)
    unlabelled = load_unlabelled(folder, list(study.experts), 3, 1)
    assert list(data["question"]) == list(unlabelled["question"])
    assert data["image"][0] == unlabelled["image"][0]
    assert "answer" in data.column_names and "answer" not in unlabelled.column_names


def test_the_interval_by_hand():
    """Of 1, 2, 3, 4, 5: deviation √2.5, Student's t with four degrees of freedom 2.776445."""
    expected = 2.776445 * np.sqrt(2.5) / np.sqrt(5)
    assert experiment.half_width(pd.Series([1, 2, 3, 4, 5])) == pytest.approx(expected, rel=1e-6)
    assert np.isnan(experiment.half_width(pd.Series([1.0])))


def results(scores):
    """A table of results in which a model's accuracy on all five tasks is one number."""
    rows = [
        {"seed": 1, "draw": draw, "samples": count, "model": model, "Avg": x}
        | dict.fromkeys(("VQA", "Geometry", "Chart", "OCR", "Grounding"), x)
        for draw, count, model, x in scores
    ]
    return pd.DataFrame(rows)


def test_the_summary_by_hand(study):
    nan = np.nan
    table = experiment.summary(
        results([
            *[(draw, 1, "optmerge", x) for draw, x in enumerate((50.0, 54.0))],
            *[(draw, 5, "optmerge", x) for draw, x in enumerate((59.0, 61.0))],
            *[(draw, 5, "Expert Merging", x) for draw, x in enumerate((66.0, 68.0))],
            *[(nan, nan, name, 90.0 - 10 * i) for i, name in enumerate(study.experts)],
            (nan, nan, "base_model", 40.0), (nan, nan, "mixture", 74.0),
        ]), study,
    )  # fmt: skip
    labels = table["model"] + table["samples"].map("{:.0f}".format)
    rows = table.set_index(labels)
    assert rows.loc["expertsnan", "accuracy"] == 70
    assert rows.loc["optmerge1", "accuracy"] == 52
    learnt = rows.loc["Expert Merging5"]
    assert learnt["accuracy"] == 67 and learnt["runs"] == 2
    assert learnt["closed, mixture"] == pytest.approx(50)  # 60 to 74, of which 7 points
    assert rows.loc["mixturenan", "closed, mixture"] == pytest.approx(100)


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    made = []

    class Fake:
        def __init__(self, study, folder):
            folder.mkdir(parents=True, exist_ok=True)
            others = ["base_model", "mixture", *study.experts]
            rows = results([(np.nan, np.nan, name, 50.0 + i) for i, name in enumerate(others)])
            rows.drop(columns="seed").to_csv(folder / "references.csv", index=False)

        def results(self, draw, count):
            made.append((draw, count))
            rows = [(draw, count, "optmerge", 40.0), (draw, count, "Expert Merging", 60.0 + draw)]
            return results(rows).drop(columns="seed"), pd.DataFrame({"layer": [0.5]})

    monkeypatch.setattr(experiment, "Study", Fake)
    experiment.main(RECIPE, tmp_path, samples=[1], draws=[0])
    experiment.main(RECIPE, tmp_path, samples=[1, 2], draws=[0, 1])
    assert made == [(0, 1), (0, 2), (1, 1), (1, 2)]
    table = pd.read_csv(tmp_path / "results.csv", index_col=experiment.KEYS)
    assert table.loc[(1, 1, 2, "Expert Merging"), "Avg"] == 61
    summary = pd.read_csv(tmp_path / "summary.csv", index_col=["model", "samples"])
    assert summary.loc[("Expert Merging", 2), "accuracy"] == 60.5
    assert summary.loc[("Expert Merging", 2), "runs"] == 2
