"""A study is what its recipe says, and everybody who merges it gives the merge the same."""

import json
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
import yaml

from optmerge_core import __main__ as command
from optmerge_core import (
    join,
    load_plan,
    load_recipe,
    merge_part,
    open_checkpoint,
    plan_merge,
    svc,
)
from optmerge_core.benchmark.experiments import seeds, subsets
from optmerge_core.benchmark.tasks.samples import TASKS
from optmerge_core.merging import merge as merging
from optmerge_core.methods import TABLE_METHODS
from optmerge_core.methods.registry import METHODS
from optmerge_core.study import open as opening
from optmerge_core.study.open import open_study, settings, settings_in_memory
from optmerge_core.study.sweep import sweep
from optmerge_core.task_vectors.stack import apply

RECIPES = Path(__file__).resolve().parents[2] / "data" / "recipes"
SAID = {
    "parameters": {"lambda": 0.5},
    "trim": "model",
    "scope": "all",
    "router": "base",
    "family": "llava_onevision",
    "dtype": "float16",
    "seed": 7,
    "processor": "ocr",
}

PLACE = ("dtype", "family", "scope", "router")
ON_DISK = {"scaling_coefficient": 0.5} | {key: SAID[key] for key in PLACE}
ON_DISK |= {"processor": "ocr", "chat_template": None}


@pytest.fixture
def recipe(tiny, tmp_path):
    """A function that writes a recipe of the tiny experts that says all there is to say."""

    def write(**changes):
        models = [{"model": str(folder), "name": name} for name, folder in tiny.experts.items()]
        content = {"merge_method": "ties", "base_model": str(tiny.base), "models": models}
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(content | SAID | changes))
        return path

    return write


@pytest.fixture
def calls(monkeypatch):
    """What reaches the merge, in memory or to disk: keyword arguments, one entry a call."""
    calls = []

    def recorded(function):
        def call(*args, **kwargs):
            calls.append(kwargs)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(opening, "merge_tensors", recorded(opening.merge_tensors))
    monkeypatch.setattr(merging, "merge", recorded(merging.merge))
    monkeypatch.setattr(opening, "diagnose", recorded(opening.diagnose))
    return calls


def expected(method, **more):
    trim = "model" if method in ("ties", "dare_ties") else "tensor"
    return {"method": method, "method_options": {}, "seed": 7, "trim": trim} | more


@pytest.mark.parametrize("method", METHODS)
def test_what_a_merge_takes_of_a_recipe(recipe, method):
    found = load_recipe(recipe())
    assert settings_in_memory(found, method) == expected(method)
    assert settings(found, method) == expected(method, **ON_DISK)
    assert settings(found) == settings(found, "ties")


def test_mergekits_names_and_a_methods_own_options(recipe):
    found = load_recipe(recipe(method_options={"weight_average": {}, "dare_ties": {"density": 1}}))
    assert settings(found, "linear")["method"] == "weight_average"
    assert settings_in_memory(found, "dare_ties") == expected(
        "dare_ties", method_options={"density": 1}
    )


@pytest.mark.parametrize("method", ["ties", "dare_ties", "tsv"])
def test_every_reader_of_a_recipe_merges_by_all_that_it_says(recipe, calls, tmp_path, method):
    path = str(recipe())
    output = ["--output", str(tmp_path / "out"), "--method", method]
    assert command.main(["merge", path, *output]) == 0
    assert expected(method, **ON_DISK).items() <= calls.pop().items()

    names = open_study(load_recipe(path)).names
    sweep([path], {"method": [method]}, tmp_path / "sweep")
    merged = calls.pop()
    assert expected(method).items() <= merged.items()
    assert merged["names"] == names and any(name.endswith("norm.weight") for name in names)

    open_study(load_recipe(path)).merge_tensors(method)
    assert expected(method).items() <= calls.pop().items()

    assert command.main(["inspect", path]) == 0
    assert calls.pop() == {"method": "ties", "options": {}, "scaling_coefficient": 0.5}
    assert not calls


@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "tsv"])
def test_svc_follows_on_every_route(tiny, recipe, tmp_path, method):
    """In memory, by the command, and in parts by a plan in a file; the report's recipe has it."""
    linear = {"scope": "linear", "trim": "tensor", "family": "internvl", "dtype": "float32"}
    path = recipe(then="svc", **linear)
    study = open_study(load_recipe(path))
    task_vectors, alpha = study.task_vectors(), 1.0 if method == "tsv" else 1 / 3
    merged = study.merge_tensors(method)
    for name in study.names:
        plain = METHODS[method](task_vectors[name])
        assert torch.equal(merged[name], svc(plain, task_vectors[name], alpha))
        assert not torch.allclose(merged[name], plain)

    assert (
        command.main(["merge", str(path), "--output", f"{tmp_path}/out", "--method", method]) == 0
    )
    written = open_checkpoint(tmp_path / "out")
    for name in study.names:
        assert torch.equal(written[name], apply(study.base[name].float(), merged[name], 0.5))
    plan = plan_merge(
        tiny.base,
        tiny.experts,
        tmp_path / "parts",
        max_part_size="10KB",
        **settings(study.recipe, method),
    )
    plan = load_plan(plan.save(tmp_path / "plan.json"))
    assert len(plan.parts) > 2
    for part in range(len(plan.parts)):
        merge_part(plan, part)
    again = join(plan).recipe()
    parts = open_checkpoint(tmp_path / "parts")
    assert all(torch.equal(parts[name], written[name]) for name in written)
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(again))
    assert load_recipe(tmp_path / "again.yaml").options() == {"then": "svc"}


def test_a_method_may_have_nothing_follow_it(tiny, recipe, tmp_path):
    path = recipe(then="svc", method_options={"ties": {"then": None}}, dtype=None, scope="linear")
    study = open_study(load_recipe(path))
    report = merging.merge(tiny.base, tiny.experts, tmp_path / "out", **settings(study.recipe))
    norms = {name: float(x.norm()) for name, x in study.merge_tensors(method_options={}).items()}
    assert {r["name"]: r["merged_norm"] for r in report.parameters} == pytest.approx(norms)


def test_a_study_has_what_merge_merges(tiny, recipe, tmp_path):
    """The merged task vectors in memory are those of the merge to disk, by name and value."""
    study = open_study(load_recipe(recipe(dtype=None)))
    report = merging.merge(tiny.base, tiny.experts, tmp_path / "out", **settings(study.recipe))
    assert [record["name"] for record in report.parameters] == study.names
    norms = {name: float(tensor.norm()) for name, tensor in study.merge_tensors().items()}
    assert {r["name"]: r["merged_norm"] for r in report.parameters} == pytest.approx(norms)
    linear = open_study(study.recipe, scope="linear")
    assert set(linear.names) < set(study.names) and linear.experts.keys() == tiny.experts.keys()
    assert list(linear.task_vectors()) == linear.names


def test_other_experts_and_another_base_in_the_recipes_place(tiny, recipe):
    found = load_recipe(recipe(scope="linear"))
    first = dict([next(iter(tiny.experts.items()))])
    study = open_study(found, experts=first, base_model=str(tiny.base))
    assert study.processor.folder.resolve() == tiny.experts["ocr"] and "ocr" not in first
    assert list(study.experts) == list(first) and study.recipe is found
    alone = study.merge_tensors("task_arithmetic")
    assert all(torch.equal(alone[n], study.task_vectors()[n][0]) for n in study.names)


def test_specialists_are_opened_and_merged_as_compose_does(calls):
    found = load_recipe(RECIPES / "omni.yaml")
    silent = found.model_copy(update={"parameters": {}, "method_options": {}})
    assert settings(silent)["method_options"] == {"preset": "modality"}
    study = open_study(silent)
    assert list(study.specialists) == list(study.experts) == list(found.experts)
    assert all(list(expert) == study.names for expert in study.experts.values())
    study.merge_tensors(names=study.names[:1])
    assert calls.pop()["method_options"] == {"preset": "modality"}
    half = found.model_copy(update={"method_options": {"optmerge": {"steps": 3, "preset": None}}})
    half = half.model_copy(update={"parameters": {}})
    assert settings(half)["method_options"] == {"preset": "modality", "steps": 3}
    with pytest.raises(ValueError, match="omni: specialists cannot be streamed"):
        open_study(found, stream=True)


class Answered(Exception):
    """All that was asked for is merged; what is answered is another test's."""


def refuse(*_, **__):
    raise Answered


def test_experiments_merge_by_all_that_a_recipe_says(tiny, recipe, calls, monkeypatch):
    """Their evaluators see the first question after the merges."""
    found = load_recipe(recipe())
    names = open_study(found).names
    monkeypatch.setattr(seeds, "search_scaling", refuse)
    with pytest.raises(Answered):
        seeds.evaluate(found, None, None)
    by_method = {call["method"]: call for call in calls if not call["method_options"]}
    assert list(by_method) == list(TABLE_METHODS)
    for method, call in by_method.items():
        assert expected(method).items() <= call.items() and call["names"] == names
    assert {call["seed"] for call in calls} == {7}
    calls.clear()

    monkeypatch.setattr(subsets, "MERGES", {"ties": ("ties", 1.0)})
    monkeypatch.setattr(subsets, "trained_tasks", lambda *_: ["OCR"])
    monkeypatch.setattr(subsets, "load_split", lambda *_: None)
    monkeypatch.setattr(subsets, "evaluator_for", lambda *_: MagicMock())
    monkeypatch.setattr(subsets, "accuracy", lambda *_: dict.fromkeys(TASKS, 1.0))
    subsets.score_sets(found)
    assert [len(call["experts"]) for call in calls] == [2, 2, 2, 3]
    for call in calls:
        assert expected("ties").items() <= call.items() and call["names"] == names


def test_an_omni_recipe_is_composed_by_all_that_it_says(tmp_path, capsys):
    content = yaml.safe_load((RECIPES / "omni.yaml").read_text())
    for place in (content, *content["models"], content["evaluation"]["references"]):
        for key in place.keys() & {"base_model", "model", "vision", "audio", "video"}:
            place[key] = str((RECIPES / place[key]).resolve())
    path = tmp_path / "all.yaml"
    said = SAID | {"parameters": {"lambda": 0.5}, "family": "qwen2", "merge_method": "ties"}
    del said["processor"]  # each specialist's is its own
    path.write_text(yaml.safe_dump(content | said))
    assert command.main(["merge", str(path), "--output", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out/merge_report.json").read_text())
    wanted = settings(load_recipe(path))
    assert wanted.items() <= report.items() and wanted["trim"] == "model"
    study = open_study(load_recipe(path))
    assert [record["name"] for record in report["parameters"]] == study.names == list(study.base)
    norms = {name: float(tensor.norm()) for name, tensor in study.merge_tensors().items()}
    found = {record["name"]: record["merged_norm"] for record in report["parameters"]}
    assert found == pytest.approx(norms, rel=1e-5)
