"""The embedded families' evaluator: answers as `generate` gives them, read to the letter."""

import pytest
import torch

from optmerge_core import load_recipe, open_checkpoint
from optmerge_core.benchmark.evaluator import EmbeddedEvaluator, evaluator_for, is_correct
from optmerge_core.benchmark.tasks.scenes import BIN, IMAGE_SIZE
from optmerge_core.evaluation.chat import load_processor
from optmerge_core.evaluation.evaluator import load_model
from optmerge_core.evaluation.metrics import LOCATIONS, METRICS
from optmerge_core.evaluation.questions import load_split
from optmerge_core.merging.families import mergeable

RECIPE = "data/recipes/internvl.yaml"
QUESTIONS = "data/benchmark/questions"


@pytest.fixture(scope="module")
def study():
    return load_recipe(RECIPE)


@pytest.fixture(scope="module")
def evaluator(study):
    return evaluator_for(study.base_model, load_split(QUESTIONS, "validation", 12))


@pytest.mark.parametrize(
    "task, prediction, answer, correct",
    [
        ("VQA", "red", "red", True),
        ("VQA", "red ", "red", False),
        ("OCR", "27P", "27p", False),
        ("Chart", "42", "40", True),
        ("Chart", "43", "40", False),
        ("Chart", "", "40", False),
        ("Chart", "-40", "40", False),
        ("Chart", "red", "red", True),
        ("Chart", "2", "2", True),
        ("Geometry", "41", "40", False),
        ("Grounding", "<loc1><loc1><loc3><loc3>", "<loc1><loc1><loc3><loc3>", True),
        ("Grounding", "<loc1><loc1><loc3><loc2>", "<loc1><loc1><loc3><loc3>", True),
        ("Grounding", "<loc1><loc1><loc2><loc2>", "<loc1><loc1><loc3><loc3>", False),
        ("Grounding", "<loc1><loc1><loc3>", "<loc1><loc1><loc3><loc3>", False),
        ("Grounding", "red", "<loc1><loc1><loc3><loc3>", False),
    ],
)
def test_metrics_by_hand(task, prediction, answer, correct):
    assert is_correct(METRICS[task], prediction, answer) == correct


def test_location_tokens_count_what_the_questions_boxes_do():
    assert LOCATIONS == IMAGE_SIZE / BIN


def test_answers_are_what_generate_gives_one_by_one(study, evaluator):
    model, processor = load_model(study.base_model), load_processor(study.base_model)
    data = load_split(QUESTIONS, "validation", 12)
    table = evaluator.answer()
    for index in range(0, len(data), 7):
        item = data[index]
        inputs = processor(
            images=[item["image"]], text=[processor.prompt(item["question"])], return_tensors="pt"
        )
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        text = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert table.loc[index, "prediction"] == text
        assert table.loc[index, "question"] == item["question"]


def test_weights_replace_the_base_and_leave_it_unchanged(study, evaluator):
    base = open_checkpoint(study.base_model)
    names = mergeable(base.shapes(), base.config()["model_type"])
    before = evaluator.answer()["prediction"]
    expert = open_checkpoint(study.experts["OCR"])
    as_expert = evaluator.answer({n: expert[n] for n in names})
    zero = evaluator.answer_merged(base, {n: torch.zeros_like(base[n]) for n in names}, 1.0)
    task_vector = {n: expert[n].float() - base[n].float() for n in names}
    rebuilt = evaluator.answer_merged(base, task_vector, 1.0)
    assert (zero["prediction"] == before).all()
    assert (rebuilt["prediction"] == as_expert["prediction"]).all()
    assert (as_expert["prediction"] != before).any()


def test_foreign_weights_are_refused(evaluator):
    with pytest.raises(ValueError, match=r"layers\.99.*another family"):
        evaluator.answer({"language_model.model.layers.99.mlp.up_proj.weight": torch.zeros(1)})


def test_embedded_families_are_known_by_their_processor():
    data = load_split(QUESTIONS, "validation", 1)
    evaluator = evaluator_for("data/benchmark/qwen2_vl/base", data)
    assert isinstance(evaluator, EmbeddedEvaluator) and evaluator.model.dtype == torch.float32
    assert load_processor("data/benchmark/qwen2_vl/base").image_processor.patch_size == 7
