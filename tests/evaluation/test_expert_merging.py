"""Coefficients learnt on unlabelled questions: loss by hand, gradient by differences."""

import math

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from optmerge_core import load_recipe
from optmerge_core.benchmark.evaluator import evaluator_for
from optmerge_core.evaluation import questions
from optmerge_core.evaluation.expert_merging import Alignment, Learnt, Settings, difference, learn
from optmerge_core.evaluation.questions import load_split, load_unlabelled
from optmerge_core.study.open import open_study
from optmerge_core.task_vectors.stack import apply

QUESTIONS = "data/benchmark/questions"
EXPERTS = ("OCR", "VQA")


def opened(family):
    """Two of a family's experts, and an evaluator of one unlabelled question of each."""
    recipe = load_recipe(f"data/recipes/{family}.yaml")
    study = open_study(recipe, experts={name: recipe.experts[name] for name in EXPERTS})
    data = load_unlabelled(f"{QUESTIONS}/validation", EXPERTS, 1)
    return study, evaluator_for(recipe.base_model, data)


@pytest.fixture(scope="module", params=["internvl", "qwen2_vl"])
def either(request):
    return opened(request.param)


@pytest.fixture(scope="module")
def internvl():
    return opened("internvl")


def test_the_difference_by_hand():
    """p = (1/4, 3/4), q = (1/2, 1/2), logits divided by T; hidden states (0, 0) and (1, 2)."""
    T = 3.0
    expert = torch.tensor([[[0.0, T * math.log(3)]]]), torch.tensor([[[1.0, 2.0]]])
    merged = torch.zeros(1, 1, 2), torch.zeros(1, 1, 2)
    kl = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    found = difference(merged, expert, Settings(temperature=T, hidden_weight=0.1))
    assert found.tolist() == pytest.approx([9 * kl + 0.1 * 2.5])
    assert difference(expert, expert, Settings()).tolist() == [0.0]


def norm_in_its_own_precision(self, x):
    """Qwen2's RMSNorm without its detour over float32."""
    return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


def test_the_gradient_is_that_of_finite_differences(internvl, monkeypatch):
    """In float64, of the whole model; answers and what the experts compute stay as they are."""
    monkeypatch.setattr(Qwen2RMSNorm, "forward", norm_in_its_own_precision)
    study, evaluator = internvl
    settings = Settings(unit="layer", batch_size=2)
    stacks = dict(study.task_vectors())
    alignment = Alignment(evaluator, stacks, list(EXPERTS), settings)
    alignment.model.double()
    alignment.task_vectors = {name: stack.double() for name, stack in stacks.items()}
    alignment._batches = [
        ({k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}, *others)
        for inputs, *others in alignment._batches
    ]
    try:
        shape = (len(EXPERTS), len(alignment.units))
        alpha = 0.3 + 0.2 * torch.rand(shape, dtype=torch.float64, generator=torch.manual_seed(0))
        _, gradient = alignment(alpha)
        assert gradient.abs().max() > 1e-3
        step = 1e-4
        for entry in ((0, 0), (1, shape[1] - 1)):
            moved = torch.zeros(shape, dtype=torch.float64)
            moved[entry] = step
            slope = (alignment(alpha + moved)[0] - alignment(alpha - moved)[0]) / (2 * step)
            assert slope == pytest.approx(gradient[entry].item(), rel=1e-4)
    finally:
        alignment.model.float()
        alignment.close()


def test_an_expert_alone_is_aligned_with_itself_and_says_its_own_answer(either):
    """Prompt, picture and tokens in one pass give what `generate` gives, token by token."""
    study, evaluator = either
    settings = Settings(regularisation=0.0)
    for name in EXPERTS:
        vectors = {n: stack[[EXPERTS.index(name)]] for n, stack in study.task_vectors().items()}
        alignment = Alignment(evaluator, vectors, [name], settings)
        one = torch.ones(1, len(alignment.units), dtype=torch.float64)
        assert alignment(one)[0] == pytest.approx(0, abs=1e-5)
        assert alignment(0 * one)[0] > 1e-3
        alignment.hold(lambda name: [1.0])
        (row,) = alignment._rows[name]
        prompt = evaluator.inputs(row)
        said = alignment.model.generate(**prompt, max_new_tokens=6, do_sample=False)
        said = said[0, prompt["input_ids"].shape[1] :]
        (batch,) = alignment._batches
        assert torch.equal(batch[2][0][0].argmax(-1), said) and len(said) > 1
        alignment.close()


def test_learning_lowers_the_loss_repeats_itself_and_leaves_the_base(internvl):
    study, evaluator = internvl
    settings = Settings(learning_rate=0.05, steps=4, unit="layer", batch_size=2)
    first, again = learn(study, evaluator, settings), learn(study, evaluator, settings)
    assert len(first.losses) == 5 and first.losses[-1] < 0.9 * first.losses[0]
    pd.testing.assert_frame_equal(first.coefficients, again.coefficients, check_exact=True)
    assert first.losses == again.losses and first.samples == {"OCR": 1, "VQA": 1}
    for name, parameter in evaluator.model.named_parameters():
        assert not parameter.requires_grad and parameter.grad is None, name
    name = study.names[0]
    held = dict(evaluator.model.named_parameters())[evaluator.memory_name(name)]
    assert torch.equal(held, study.base[name].float())
    layer = next(unit for unit in first.coefficients if name.startswith(unit))
    stack, weights = study.task_vectors()[name], first.coefficients[layer]
    expected = sum(w * tau for w, tau in zip(weights, stack, strict=True))
    assert torch.allclose(first.merged(study)[name], expected, atol=1e-7)
    said = first.facts()
    assert said["samples"] == first.samples and said["loss"] == [first.losses[0], first.losses[-1]]


def test_the_default_settings_hardly_move(internvl):
    """The published learning rate, over a step: Adam's first moves every coefficient by it."""
    study, evaluator = internvl
    found = learn(study, evaluator, Settings(steps=1, batch_size=2)).coefficients
    assert list(found) == study.names and list(found.index) == list(EXPERTS)
    assert (found - 0.1).abs().max().max() == pytest.approx(1e-4, abs=1e-6)


def test_weights_by_filter_put_longer_names_first():
    table = pd.DataFrame([[0.5, 0.25]], index=["VQA"], columns=["layers.0.q", "own.layers.0.q"])
    assert Learnt(table, [1, 0], Settings(), {"VQA": 1}).weights() == [
        [{"filter": "own.layers.0.q", "value": 0.25}, {"filter": "layers.0.q", "value": 0.5}]
    ]


def test_answers_are_never_read(monkeypatch):
    columns = []

    def read_table(path, columns=None, read=pq.read_table):
        asked.extend(columns)
        return read(path, columns=columns)

    asked = columns
    monkeypatch.setattr(questions.pq, "read_table", read_table)
    data = load_unlabelled(f"{QUESTIONS}/validation", ["VQA", "OCR"], 3)
    assert set(asked) == {"image", "question"}
    assert set(data.column_names) == {"image", "question", "task", "kind"}


def test_of_two_counts_the_smaller_ones_are_among_the_larger_ones():
    def asked(count, draw):
        return load_unlabelled(f"{QUESTIONS}/validation", ["VQA", "OCR"], count, draw)["question"]

    few, more, other = list(asked(2, 0)), list(asked(5, 0)), list(asked(5, 1))
    assert few[:2] == more[:2] and few[2:] == more[5:7]
    assert more != other and len(other) == 10
    first = load_split(QUESTIONS, "validation", 5, ["VQA", "OCR"])["question"]
    assert list(asked(5, None)) == list(first)


def test_questions_with_answers_are_refused(internvl):
    study, evaluator = internvl
    labelled = evaluator.asking(load_split(QUESTIONS, "validation", 1, list(EXPERTS)))
    with pytest.raises(ValueError, match="have answers, which are not to be seen"):
        learn(study, labelled)


def test_an_expert_without_questions_is_refused(internvl):
    study, evaluator = internvl
    few = evaluator.asking(load_unlabelled(f"{QUESTIONS}/validation", ["OCR"], 1))
    with pytest.raises(ValueError, match=r"expert VQA has no question of its own.*\(found: OCR\)"):
        learn(study, few)


@pytest.mark.parametrize(
    "tasks, count, text",
    [
        (["VQA", "maths"], 1, "maths.parquet is missing"),
        (["VQA"], 301, "has 300 samples, not 301"),
        (["VQA"], 0, "samples 0: give a whole number from 1"),
    ],
)
def test_questions_that_are_not_there(tasks, count, text):
    with pytest.raises(ValueError, match=text):
        load_unlabelled(f"{QUESTIONS}/validation", tasks, count)


@pytest.mark.parametrize(
    "given, text",
    [
        ({"learning_rate": 0.0}, "learning_rate is 0.0; give a number above 0"),
        ({"hidden_weight": -1.0}, "hidden_weight is -1.0; give a number from 0"),
        ({"steps": 0}, "steps is 0; give a whole number from 1"),
        ({"initial": math.nan}, "initial is nan"),
        ({"unit": "head"}, "unit is 'head'; valid are 'parameter', 'layer'"),
        ({"tokens": "some"}, "tokens is 'some'; valid are 'answer', 'all'"),
    ],
)
def test_settings_that_are_none(given, text):
    with pytest.raises(ValueError, match=text):
        Settings(**given)


def test_two_parameters_of_one_layer_share_a_coefficient(internvl):
    study, evaluator = internvl
    alignment = Alignment(
        evaluator, dict(study.task_vectors()), list(EXPERTS), Settings(unit="layer", batch_size=2)
    )
    alignment.hold(lambda name: [0.5, 0.25])
    name = study.names[-1]
    stack = study.task_vectors()[name]
    merged = 0.5 * stack[0] + 0.25 * stack[1]
    assert torch.equal(
        alignment._parameters[name], apply(study.base[name], merged, 1.0, torch.float32)
    )
    layers = {name.split("layers.")[1].split(".")[0] for name in study.names}
    assert len(alignment.units) == len(layers) < len(study.names)
    alignment.close()
