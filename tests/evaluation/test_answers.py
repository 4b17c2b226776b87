"""Answers that were given before: the same to the same, and nothing but the same."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from optmerge_core.evaluation import answers


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def asking(model, tmp_path, monkeypatch):
    """`ask(asked)` gives the answers, `ask.calls` counts how often the model had to speak."""
    monkeypatch.setenv(answers.FOLDER, str(tmp_path))

    def ask(asked):
        def answer():
            ask.calls += 1
            return np.array(["red", f"{ask.calls}"], dtype=object)

        return answers.remembered(model, asked, answer)

    ask.calls = 0
    return ask


QUESTIONS = [["what ?", "where ?"], [b"\x00\x01", None], torch.arange(3), 6]


def test_the_same_question_is_asked_once(asking, tmp_path):
    first, second = asking(QUESTIONS), asking(QUESTIONS)
    assert list(first) == list(second) == ["red", "1"] and second.dtype == object
    assert asking.calls == 1 and [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_without_a_folder_nothing_is_kept(asking, tmp_path, monkeypatch):
    monkeypatch.delenv(answers.FOLDER)
    assert [list(asking(QUESTIONS))[1] for _ in range(2)] == ["1", "2"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "asked",
    [
        [["what ?where ?"], [b"\x00\x01", None], torch.arange(3), 6],
        [["what ?", "where ?"], [b"\x00", b"\x01", None], torch.arange(3), 6],
        [["what ?", "where ?"], [b"\x00\x01", "None"], torch.arange(3), 6],
        [["what ?", "where ?"], [b"\x00\x01", None], torch.arange(3).int(), 6],
        [["what ?", "where ?"], [b"\x00\x01", None], torch.arange(3)[None], 6],
        [["what ?", "where ?"], [b"\x00\x01", None], torch.tensor([0, 1, 3]), 6],
        [["what ?", "where ?"], [b"\x00\x01", None], torch.arange(3), 6.0],
    ],
)
def test_other_questions_are_other_answers(asking, asked):
    assert list(asking(QUESTIONS)) != list(asking(asked))


def smallest_change(model):
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(torch.inf))


def another_configuration(model):
    model.config.rope_parameters = model.config.rope_parameters | {"rope_theta": 7.0}


def another_end(model):
    model.generation_config.eos_token_id = 3


def another_layer(model):
    model.model.layers[0].mlp.add_module("extra", torch.nn.Linear(1, 1, bias=False))


@pytest.mark.parametrize(
    "change", [smallest_change, another_configuration, another_end, another_layer]
)
def test_another_model_gives_other_answers(model, asking, change):
    before = list(asking(QUESTIONS))
    change(model)
    assert list(asking(QUESTIONS)) != before


def test_other_code_gives_other_answers(asking, monkeypatch):
    before = list(asking(QUESTIONS))
    monkeypatch.setattr(answers, "code", lambda: "changed")
    assert list(asking(QUESTIONS)) != before


def test_the_code_is_all_files_and_versions(tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "__file__", str(tmp_path / "evaluation" / "answers.py"))
    monkeypatch.setattr(answers, "version", versions := {"torch": "2"}.get)
    (tmp_path / "omni").mkdir()
    digests = [answers.code.__wrapped__()]
    for change in (
        lambda: (tmp_path / "omni" / "model.py").write_text("x = 1"),
        lambda: (tmp_path / "omni" / "model.py").write_text("x = 2"),
        lambda: monkeypatch.setattr(answers, "version", SimpleNamespace(get=str).get),
    ):
        change()
        digests.append(answers.code.__wrapped__())
    assert len(set(digests)) == 4 and versions("torch") == "2"
