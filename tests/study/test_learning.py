"""The command `learn`: what it refuses, the recipe that it writes, and the merge of that."""

import argparse

import pandas as pd
import pytest
import torch
import yaml

from optmerge_core import load_recipe, merge, open_checkpoint
from optmerge_core.__main__ import main
from optmerge_core.evaluation.expert_merging import Learnt, Settings
from optmerge_core.merging.experts import open_models
from optmerge_core.study import learning
from optmerge_core.study.open import open_study, settings

OMNI = "data/recipes/omni.yaml"


@pytest.fixture
def recipe(tiny, tmp_path):
    content = {
        "base_model": str(tiny.base),
        "models": [{"name": name, "model": str(folder)} for name, folder in tiny.experts.items()],
        "merge_method": "ties",
        "parameters": {"density": 0.5, "lambda": 0.7},
        "trim": "model",
        "method_options": {"wudi": {"steps": 3}},
        "processor": "ocr",
        "evaluation": {"data": "data/benchmark/questions", "validation_samples": 7},
    }
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def learnt(tiny, by=str):
    names = open_models(tiny.base, tiny.experts).names
    units = list(dict.fromkeys(map(by, names)))
    shape = (len(tiny.experts), len(units))
    numbers = torch.rand(shape, generator=torch.Generator().manual_seed(0)).double().numpy()
    table = pd.DataFrame(numbers.round(6), index=list(tiny.experts), columns=units)
    return Learnt(table, [2.0, 1.0], Settings(steps=1), dict.fromkeys(tiny.experts, 5))


def test_the_recipe_that_is_written_merges_by_the_coefficients(tiny, recipe, tmp_path):
    found, target = learnt(tiny), tmp_path / "below" / "learnt.yaml"
    learning.write(target, load_recipe(recipe), found)
    written = load_recipe(target)
    assert (written.name, written.merge_method, written.trim) == (
        "learnt",
        "task_arithmetic",
        "tensor",
    )
    assert written.scaling_coefficient == 1 and written.processor == "ocr"
    assert written.evaluation.validation_samples == 7 and not written.method_options
    report = merge(written.base_model, written.experts, tmp_path / "merged", **settings(written))
    base, merged = open_checkpoint(tiny.base), open_checkpoint(tmp_path / "merged")
    experts = [open_checkpoint(folder) for folder in tiny.experts.values()]
    for name, weights in found.coefficients.items():
        changes = [expert[name].float() - base[name].float() for expert in experts]
        total = sum(weight * tau for weight, tau in zip(weights, changes, strict=True))
        assert torch.allclose(merged[name].float(), base[name].float() + total, atol=1e-4)
    assert report.learnt == found.facts()
    in_memory = found.merged(open_study(written))
    name = found.coefficients.columns[0]
    stored = (base[name].float() + in_memory[name]).to(base.dtype(name))
    assert torch.equal(merged[name], stored)


def test_the_card_says_it_and_its_recipe_makes_the_model_again(tiny, recipe, tmp_path):
    target = tmp_path / "learnt.yaml"
    found = learnt(tiny, by=lambda name: f"{name.partition('.self_attn')[0].partition('.mlp')[0]}.")
    learning.write(target, load_recipe(recipe), found)
    written = load_recipe(target)
    merge(written.base_model, written.experts, tmp_path / "merged", **settings(written))
    card = (tmp_path / "merged" / "README.md").read_text()
    said = "This merge is not data-free: the experts' weights were learnt by Expert Merging"
    assert said in " ".join(card.split())
    assert "5 of chart, 5 of ocr, 5 of vqa." in card
    again = tmp_path / "again.yaml"
    again.write_text(card.partition("```yaml\n")[2].partition("```")[0])
    same = load_recipe(again)
    report = merge(same.base_model, same.experts, tmp_path / "second", **settings(same))
    first, second = (open_checkpoint(tmp_path / name) for name in ("merged", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert report.learnt == found.facts()


def test_another_method_of_that_recipe_learnt_nothing(tiny, recipe, tmp_path):
    target = tmp_path / "learnt.yaml"
    learning.write(target, load_recipe(recipe), learnt(tiny))
    written = load_recipe(target)
    assert "learnt" in settings(written) and "learnt" not in settings(written, "tsv")
    assert "learnt" not in settings(load_recipe(recipe))


def test_a_merge_without_data_says_nothing_of_any(tiny, tmp_path):
    report = merge(tiny.base, tiny.experts, tmp_path / "merged", method="task_arithmetic")
    assert report.learnt is None and "learnt" not in report.recipe()
    assert "data-free" not in (tmp_path / "merged" / "README.md").read_text()


def test_the_whole_command(tmp_path, capsys):
    target = tmp_path / "learnt.yaml"
    words = ["learn", "data/recipes/qwen2_vl.yaml", "--samples", "1", "--output", str(target)]
    assert main([*words, "--set", "steps=1", "unit=layer", "batch_size=8"]) == 0
    said = capsys.readouterr().out
    assert "20 coefficients from 1 unlabelled questions of each expert's task" in said
    written = load_recipe(target)
    assert written.learnt["samples"] == dict.fromkeys(written.experts, 1)
    assert written.learnt["settings"]["unit"] == "layer"
    assert [len(x) for x in written.options()["weights"]] == [4] * 5
    assert (
        written.scaling_coefficients
        == load_recipe("data/recipes/qwen2_vl.yaml").scaling_coefficients
    )


@pytest.mark.parametrize(
    "words, text",
    [
        (["--output", "learnt"], "learnt: a recipe is written; give a name that ends in .yaml"),
        (["--set", "rate=1"], "--set 'rate=1': write NAME=VALUE, with one of learning_rate"),
        (["--set", "steps=many"], "--set 'steps=many': steps is of another type (int)"),
        (["--set", "steps=0"], "steps is 0; give a whole number from 1"),
        (["--samples", "0"], "samples 0: give a whole number from 1, of each task"),
        (["--data", "."], "chart.parquet, ocr.parquet, vqa.parquet is missing"),
    ],
)
def test_what_is_refused_before_any_model_is_opened(recipe, tmp_path, capsys, words, text):
    target = str(tmp_path / "learnt.yaml")
    assert main(["learn", str(recipe), "--output", target, *words]) == 1
    assert text in capsys.readouterr().err
    assert not (tmp_path / "learnt.yaml").exists()


def test_a_file_that_is_there_stays(recipe, capsys):
    before = recipe.read_text()
    assert main(["learn", str(recipe), "--output", str(recipe)]) == 1
    assert "is there already: choose another name, or remove it" in capsys.readouterr().err
    assert recipe.read_text() == before


def test_modalities_and_recipes_without_questions_are_refused(recipe, tmp_path):
    given = argparse.Namespace(output=str(tmp_path / "x.yaml"), set=[], data=None, samples=1)
    omni = load_recipe(OMNI)
    with pytest.raises(ValueError, match="merges modalities, which share no questions"):
        learning.learn_recipe(omni, given, None)
    content = yaml.safe_load(recipe.read_text())
    del content["evaluation"]
    recipe.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="--data: name a folder with EXPERT.parquet"):
        learning.learn_recipe(load_recipe(recipe), given, None)
