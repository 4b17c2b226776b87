"""Folders of questions, the shipped ones and anybody's."""

from types import SimpleNamespace

import pytest
from datasets import Dataset
from PIL import Image

from optmerge_core.evaluation.metrics import exact, metric_of, relaxed
from optmerge_core.evaluation.questions import load_split, own_tasks, tasks_of

QUESTIONS = "data/benchmark/questions"
TASKS = ["VQA", "Geometry", "Chart", "OCR", "Grounding"]


def test_asking_for_more_questions_than_there_are():
    with pytest.raises(ValueError, match="has 300 samples, not 301"):
        load_split(QUESTIONS, "validation", 301)


def test_own_questions(tmp_path):
    for split in ("validation", "test"):
        (tmp_path / split).mkdir()
        columns = {
            "image": [Image.new("RGB", (8, 8))] * 2,
            "question": ["?"] * 2,
            "answer": ["a"] * 2,
        }
        Dataset.from_dict(columns).to_parquet(tmp_path / split / "maths.parquet")
    assert tasks_of(tmp_path) == ["maths"]
    data = load_split(tmp_path, "test", 1)
    assert data["task"][0] == data["kind"][0] == "maths" and data[0]["image"].size == (8, 8)
    columns["metric"] = ["relaxed"] * 2
    Dataset.from_dict(columns).to_parquet(tmp_path / "test" / "numbers.parquet")
    both = load_split(tmp_path, "test", tasks=["maths", "numbers"])
    assert [metric_of(sample) for sample in both] == [exact] * 2 + [relaxed] * 2
    table = both.remove_columns("image").to_pandas()  # where one file has no such column
    assert [metric_of(row) for row in table.to_dict("records")] == [exact] * 2 + [relaxed] * 2
    with pytest.raises(ValueError, match="evaluation.data None"):
        load_split(None, "test")


def test_experts_named_after_no_task_are_asked_everything():
    study = SimpleNamespace(
        evaluation=SimpleNamespace(data=QUESTIONS), experts={"OCR": "", "maths": ""}
    )
    assert own_tasks(study) == {"OCR": ["OCR"], "maths": TASKS}
