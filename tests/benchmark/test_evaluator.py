"""The benchmark's own models' evaluators: answers as `generate` gives them, one by one."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import InternVLConfig, InternVLForConditionalGeneration

from optmerge_core import load_recipe, open_checkpoint
from optmerge_core.benchmark.evaluator import (
    EmbeddedEvaluator,
    SmolEvaluator,
    evaluator_for,
    is_correct,
)
from optmerge_core.benchmark.models import smol
from optmerge_core.benchmark.tasks.scenes import BIN, IMAGE_SIZE
from optmerge_core.evaluation import answers
from optmerge_core.evaluation.chat import load_processor
from optmerge_core.evaluation.evaluator import load_model
from optmerge_core.evaluation.metrics import LOCATIONS, METRICS
from optmerge_core.evaluation.questions import blanked, load_split
from optmerge_core.merging.families import mergeable

RECIPE = "data/recipes/internvl.yaml"
QUESTIONS = "data/benchmark/questions"
ENGLISH = (
    "What is left of the dog?",
    "Where is it?",
    "How many of the things in the picture can fly, and are not birds?",
    "Is it red?",
    "What does the sign say?",
)


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


def save_small_smol(folder):
    """A folder with the study's classes, tokenizer and processor, and a Llama of two layers."""
    processor = smol.build_processor()
    tokenizer = processor.tokenizer
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": (112, 112), "patch_size": (8, 8)}
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.5}
    config = InternVLConfig(
        vision_config=vision | {"initializer_range": 0.5},
        text_config=text | {"model_type": "llama", "vocab_size": len(tokenizer)},
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=processor.image_seq_length,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = InternVLForConditionalGeneration(config)
    with torch.no_grad():  # random weights would hardly ever end an answer
        model.get_input_embeddings().weight[tokenizer.eos_token_id] *= 2
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smol")
    save_small_smol(folder)
    return folder


@pytest.fixture(scope="module")
def english():
    """Fifteen questions about four pictures, of which one is asked about once."""
    pixels = np.random.default_rng(0).integers(0, 255, (4, 112, 112, 3), np.uint8)
    pictures = [Image.fromarray(picture) for picture in pixels]
    about = {"answer": "red", "kind": "color", "task": "VQA"}
    rows = [
        {"image": pictures[3 if i == 7 else i % 3], "question": ENGLISH[i % 5]} | about
        for i in range(15)
    ]
    return Dataset.from_list(rows)


@pytest.fixture(scope="module")
def smol_evaluator(small, english):
    return evaluator_for(small, english)


def generated(evaluator, item):
    """What the evaluator's model, as it is, answers to one question by itself: tokens."""
    model, processor = evaluator.model, evaluator.processor
    prompt = processor.prompt(item["question"])
    inputs = processor(images=[item["image"]], text=[prompt], return_tensors="pt")
    ends = {"eos_token_id": processor.tokenizer.eos_token_id, "pad_token_id": 0}
    limit = evaluator.max_new_tokens
    tokens = model.generate(**inputs, **ends, max_new_tokens=limit, do_sample=False)
    return tokens[0, inputs["input_ids"].shape[1] :].tolist()


def test_smol_is_asked_by_its_own_evaluator_and_in_its_own_words(smol_evaluator, english):
    assert type(smol_evaluator) is SmolEvaluator
    assert smol_evaluator.model.dtype == torch.float32  # on disk float16
    assert smol_evaluator.is_correct(METRICS["VQA"], "Red.", "red")


@pytest.fixture(scope="module")
def said(smol_evaluator, english):
    """The base's answers to all questions, as lists of tokens."""
    return [generated(smol_evaluator, item) for item in english]


def test_smol_answers_as_generate_does_one_by_one(smol_evaluator, english, said):
    lengths = [len(row) for row in said]
    assert min(lengths) < max(lengths) == smol_evaluator.max_new_tokens  # some never end
    expected = smol_evaluator.tokenizer.batch_decode(said, skip_special_tokens=True)
    for batch_size in (1, 4, 48):
        evaluator = smol_evaluator.asking(english)
        evaluator.batch_size = batch_size
        table = evaluator.answer()
        assert list(table["prediction"]) == expected
        assert list(table["question"]) == english["question"]
    # One question has other answers about other pictures.
    assert (table.groupby("question")["prediction"].nunique() > 1).any()


def test_smol_computes_a_picture_once_and_no_more_of_an_answer_that_ended(small, english, said):
    evaluator = SmolEvaluator(small, english)
    answered = [len(row) for row in said]
    pictures, tokens = [], []
    evaluator.model.model.vision_tower.register_forward_pre_hook(
        lambda _, __, given: pictures.append(len(given["pixel_values"])), with_kwargs=True
    )
    evaluator.model.model.language_model.norm.register_forward_pre_hook(
        lambda _, given: tokens.append(given[0].shape[:2])
    )
    evaluator = evaluator.asking(english)
    evaluator.answer()
    evaluator.answer()
    assert sum(pictures) == 4
    read, asked, *spoken = tokens[: len(tokens) // 2]
    prompt = evaluator.processor.prompt("", evaluator.processor.block)
    before = prompt[: prompt.index("</img>") + len("</img>")]
    longest = max(len(row) for row in evaluator._questions)
    assert read == (4, len(evaluator.tokenizer(before)["input_ids"]))
    assert asked == (15, longest)
    assert spoken == [(sum(n > i for n in answered), 1) for i in range(1, max(answered))]


def test_smol_takes_replaced_layers_and_finds_its_way_back(smol_evaluator, small):
    base = open_checkpoint(small)
    names = mergeable(base.shapes(), base.config()["model_type"])
    before = smol_evaluator.answer()["prediction"]
    noise = torch.Generator().manual_seed(0)
    vectors = {n: 0.1 * torch.randn(base[n].shape, generator=noise) for n in names}
    merged = smol_evaluator.answer_merged(base, vectors, 1.0)["prediction"]
    assert (merged != before).any()
    tokens = [generated(smol_evaluator, item) for item in smol_evaluator.questions]
    assert list(merged) == smol_evaluator.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    assert (smol_evaluator.answer()["prediction"] == before).all()
    name = next(n for n in base.shapes() if "multi_modal_projector" in n)
    with pytest.raises(ValueError, match="layers alone"):
        smol_evaluator.answer({name: base[name] + 1})


def test_answers_are_remembered_of_one_way_to_ask(
    smol_evaluator, small, english, tmp_path, monkeypatch
):
    monkeypatch.setenv(answers.FOLDER, str(tmp_path))
    one = english.select([0])
    fast, plain = smol_evaluator.asking(one), EmbeddedEvaluator(small, one)
    ways = (fast, 3, 1), (fast, 3, 1), (fast, 3, 2), (fast, 4, 1), (plain, 3, 1)
    for evaluator, limit, batch_size in ways:
        evaluator.max_new_tokens, evaluator.batch_size = limit, batch_size
        evaluator.answer()
    assert len(list(tmp_path.glob("*.json"))) == 4


def test_blanked_pictures_are_one_picture(smol_evaluator, english):
    blank = blanked(english)
    assert blank["question"] == english["question"] and blank.features == english.features
    colors = [picture.getcolors() for picture in blank["image"]]
    assert colors == 15 * [[(112 * 112, (128, 128, 128))]]
    table = smol_evaluator.asking(blank).answer()
    assert (table.groupby("question")["prediction"].nunique() == 1).all()
