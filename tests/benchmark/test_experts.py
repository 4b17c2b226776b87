"""Training: the loss falls, the same seed gives the same bytes, only the merged part moves."""

import numpy as np
import pytest
import torch

from optmerge_core import open_checkpoint
from optmerge_core.benchmark.tasks.samples import sample
from optmerge_core.benchmark.training import build as build_module
from optmerge_core.benchmark.training.build import build, plan
from optmerge_core.benchmark.training.experts import fine_tune, train, train_base
from optmerge_core.benchmark.training.loop import Samples, save
from optmerge_core.checkpoints.open import open_expert
from optmerge_core.merging.families import mergeable

BASE = "data/benchmark/internvl/base"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folders, losses = [], []
    for run in range(2):
        model, processor, curve = fine_tune(
            BASE, ["OCR"], steps=12, learning_rate=2e-3, seed=4, batch=8, workers=0
        )
        folder = tmp_path_factory.mktemp("trained") / str(run)
        save(model, processor, folder)
        folders.append(folder)
        losses.append(curve)
    return folders, losses


def test_loss_falls(trained):
    _, (losses, _) = trained
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])


def test_same_seed_same_bytes(trained):
    (first, again), losses = trained
    assert losses[0] == losses[1]
    name = "model.safetensors"
    assert (first / name).read_bytes() == (again / name).read_bytes()


def test_only_the_language_model_s_linear_layers_move(trained):
    (folder, _), _ = trained
    base, expert = open_checkpoint(BASE), open_checkpoint(folder)
    merging = set(mergeable(base.shapes(), base.config()["model_type"]))
    for name in base:
        assert torch.equal(base[name], expert[name]) != (name in merging), name


def test_mixture_sees_as_many_samples_as_the_experts():
    jobs = plan()
    for regime in ("gentle", "stressed"):
        experts = [
            job for name, job in jobs.items() if name.startswith(regime) and "mix" not in name
        ]
        assert jobs[f"{regime}/mixture"]["steps"] == sum(job["steps"] for job in experts)
        assert len({job["seed"] for job in experts}) == len(experts)


def test_a_batch_has_one_level():
    data = Samples(sample, 160, 16, {"VQA": 1.0}, {"caption": 0.5, "full": 0.5}, seed=0)
    levels = [{data[i].kind == "caption" for i in range(s, s + 16)} for s in range(0, 160, 16)]
    assert all(len(level) == 1 for level in levels)
    assert {True} in levels and {False} in levels


def test_a_mixture_draws_every_task():
    data = Samples(sample, 200, 20, {"VQA": 0.5, "OCR": 0.5}, {"full": 1.0}, seed=0)
    ocr = sum("letter" in data[i].question or "text" in data[i].question for i in range(200))
    assert 60 < ocr < 140


def test_build_keeps_what_is_there(tmp_path):
    (tmp_path / "base").mkdir()
    build(tmp_path, only="base")
    assert list((tmp_path / "base").iterdir()) == []


def test_smol_keeps_a_base_that_was_trained_and_refuses_a_width(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(build_module, "base_folder", made.append)
    monkeypatch.setattr(build_module.smol, "fine_tune", lambda *_, **given: made.append(given))
    (tmp_path / "base.json").write_text("{}")
    build(tmp_path, "smol", only="tower")
    assert made == [tmp_path]
    with pytest.raises(TypeError):  # nothing is saved of what this one trains
        build(tmp_path, "smol", only="lora/OCR")
    assert made[2]["tasks"] == ["OCR"] and made[2]["label"] == "lora/OCR"
    with pytest.raises(ValueError, match="leave --width out"):
        build(tmp_path, "smol", width=2)
    with pytest.raises(ValueError, match="no model 'gentle/OCR'; it has tower, .*lora/VQA"):
        build(tmp_path, "smol", only="gentle/OCR")


@pytest.mark.parametrize(("there", "next_one"), [(None, "tower"), ("stage2", "tower2")])
def test_smol_goes_on_from_the_last_stage_that_is_there(tmp_path, monkeypatch, there, next_one):
    begun = []

    def train(output, name, settings):
        begun.append(name)
        raise KeyboardInterrupt

    monkeypatch.setattr(build_module, "_train_smol", train)
    if there:
        (tmp_path / there).mkdir()
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, "smol")
    assert begun == [next_one]


def test_lora_fine_tuning_gives_an_adapter_of_the_base(tmp_path):
    settings = {"steps": 4, "learning_rate": 1e-2, "seed": 4, "batch": 8, "workers": 0, "rank": 2}
    for run in ("first", "again"):
        middle = {2: tmp_path / run}
        model, processor, _ = fine_tune(BASE, ["OCR"], **settings, snapshots=middle)
        save(model, processor, tmp_path / "lora" / run, tmp_path / "base")
    folders = [tmp_path / "lora" / run for run in ("first", "again")]
    files = [folder / "adapter_model.safetensors" for folder in folders]
    assert files[0].read_bytes() == files[1].read_bytes()
    on_the_way = [tmp_path / run / files[0].name for run in ("first", "again")]
    assert on_the_way[0].read_bytes() == on_the_way[1].read_bytes() != files[0].read_bytes()
    written = (folders[0] / "adapter_config.json").read_text()
    assert '"base_model_name_or_path": "../../base"' in written and str(tmp_path) not in written
    base = open_checkpoint(BASE)
    adapter = open_expert(folders[0], base)
    assert set(adapter.modules) == set(mergeable(base.shapes(), "internvl"))
    name = next(iter(adapter.modules))
    assert torch.linalg.matrix_rank(adapter.task_vector(name)) == 2


def test_without_decay_the_learning_rate_stays():
    """One weight, gradient 1 throughout: Adam moves it by the learning rate at every step."""

    class Slope(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def set_attn_implementation(self, _):
            pass

        def forward(self):
            return type("Output", (), {"loss": self.weight.sum()})

    ends = {}
    for decay in (True, False):
        model = Slope()
        settings = {"learning_rate": 1e-2, "steps": 40, "warmup": 0.0, "decay": decay}
        train(model, [{}] * 40, parameters={"weight"}, **settings)
        ends[decay] = model.weight.item()
    assert ends[False] == pytest.approx(-0.4, rel=1e-4)
    assert ends[True] == pytest.approx(-0.2, rel=0.06)  # half of it, under a cosine


def test_snapshots_and_other_recipes_have_a_seed_and_a_folder_of_their_own():
    jobs = plan("qwen2_vl")
    assert len({str(job["seed"]) for job in jobs.values()}) == len(jobs)
    folders = [f for job in jobs.values() for f in job.get("snapshots", {}).values()]
    assert len({*jobs, *folders}) == len(jobs) + len(folders)
    assert set(plan("qwen2_vl", 11)) == set(jobs)


@pytest.mark.parametrize("family", ["internvl", "qwen2_vl"])
def test_twice_the_width_has_about_four_times_the_parameters(family):
    settings = {"steps": 1, "learning_rate": 0.0, "seed": 3, "batch": 4, "workers": 0}
    sizes = []
    for width in (1, 2):
        model, _, _ = train_base(family, width=width, **settings)
        sizes.append(sum(p.numel() for n, p in model.named_parameters() if "embed" not in n))
    assert 3.5 < sizes[1] / sizes[0] < 4.2


def test_a_base_can_start_from_another_family_s_language_model():
    model, _, losses = train_base(
        "qwen2_vl", steps=1, learning_rate=0.0, seed=3, start=BASE, batch=4, workers=0
    )
    base, weights = open_checkpoint(BASE), model.state_dict()
    name = "layers.2.mlp.up_proj.weight"
    ours = weights[f"model.language_model.{name}"]
    torch.testing.assert_close(ours, base[f"language_model.model.{name}"].float())
    assert np.isfinite(losses).all()
