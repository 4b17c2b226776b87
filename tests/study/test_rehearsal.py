"""The paper's studies on a stand-in hub, with repositories of their names, tiny (rehearsal.py).

Tables 2, 3 and 5 name all of their experts. Tables 6 and 9 do not, and are refused.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from rehearsal import TASKS, save_internvl, save_qwen2_vl, save_vicuna_family
from safetensors.torch import load_file

from optmerge_core import load_recipe, open_checkpoint
from optmerge_core.__main__ import main
from optmerge_core.evaluation.chat import load_processor
from optmerge_core.evaluation.evaluator import load_model

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "data" / "recipes"
INTERNVL = str(RECIPES / "paper_table02_internvl2_5_1b.yaml")
QWEN = str(RECIPES / "paper_table03_qwen2_vl_7b.yaml")
OMNI = str(RECIPES / "paper_table05_modalities.yaml")
MATRICES = 14  # two layers of seven


def run(*command):
    assert main([str(part) for part in command]) == 0


def merged_and_streamed(recipe, tmp_path):
    """Both are one model, byte for byte; no weights were in the cache while it was streamed."""
    for name, more in (("streamed", ["--stream"]), ("merged", [])):
        run("merge", recipe, "--output", tmp_path / name, "--device", "cpu", *more)
    one, two = tmp_path / "streamed", tmp_path / "merged"
    files = sorted(path.name for path in two.glob("*.safetensors"))
    assert files and all((one / name).read_bytes() == (two / name).read_bytes() for name in files)
    return two


def test_table_2(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "code")
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    save_internvl(hub.root)
    run("inspect", INTERNVL, "--stream")
    shown = capsys.readouterr().out
    assert f"internvl_chat, {MATRICES} parameters merge" in shown
    assert all(task in shown for task in TASKS) and "vision_model.*" in shown
    folder = merged_and_streamed(INTERNVL, tmp_path)
    said = capsys.readouterr()
    assert f"{MATRICES} parameters of 5 experts merged by optmerge" in said.out
    base = hub.root / "OpenGVLab/InternVL2_5-1B"
    before, after = load_file(base / "model.safetensors"), open_checkpoint(folder)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert before.keys() == after.keys() and len(changed) == MATRICES
    assert all(name.startswith("language_model.model.layers.") for name in changed)
    code = {path.name for path in base.glob("*.py")}
    assert code == {path.name for path in folder.glob("*.py")} and len(code) == 3
    card = (folder / "README.md").read_text()
    assert "license: mit\n" in card and "trust_remote_code=True" in card
    with pytest.raises(ValueError, match="no processor for pictures and text"):
        load_processor(folder, trust_remote_code=True)
    with pytest.raises(ValueError, match=r"often named \.\.\.-hf$"):
        load_model(folder, trust_remote_code=True)
    run("benchmarks", folder, "--table", "2", "--output", tmp_path / "evaluation")
    assert "InternVL" in (tmp_path / "evaluation/benchmarks.md").read_text()


def test_table_3(hub, tmp_path, capsys):
    save_qwen2_vl(hub.root)
    run("inspect", QWEN, "--stream")
    shown = capsys.readouterr().out
    assert f"qwen2_vl, {MATRICES} parameters merge" in shown and "visual.*" in shown
    folder = merged_and_streamed(QWEN, tmp_path)
    said = capsys.readouterr()
    assert "processor and chat template are those of expert OCR" in said.err
    assert "opens as Qwen2VLForConditionalGeneration" in said.out and "Failed" not in said.err
    assert "4 of them the image's" in said.out and "greedy answer" in said.out
    base, after = open_checkpoint("Qwen/Qwen2-VL-7B"), open_checkpoint(folder)
    changed = {name for name in after if not torch.equal(after[name], base[name])}
    assert base.shapes() == after.shapes() and len(changed) == MATRICES
    assert all(name.startswith("model.layers.") for name in changed)
    front_matter = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    assert front_matter["license"] == "apache-2.0"
    assert (
        front_matter["base_model"][0] == "Qwen/Qwen2-VL-7B" and len(front_matter["base_model"]) == 6
    )
    report = json.loads((folder / "merge_report.json").read_text())
    assert report["base_model"]["revision"] == hub.commit("Qwen/Qwen2-VL-7B")
    run("benchmarks", folder, "--table", "3", "--output", tmp_path / "evaluation")
    assert "Qwen2-VL" in (tmp_path / "evaluation/benchmarks.md").read_text()


def test_table_5(hub, tmp_path, capsys):
    save_vicuna_family(hub.root)
    run("inspect", OMNI)
    assert f"{MATRICES} parameters merge" in capsys.readouterr().out
    run("merge", OMNI, "--output", tmp_path / "omni", "--device", "cpu")
    assert "one Omni model of vision, video" in capsys.readouterr().out
    report = json.loads((tmp_path / "omni/merge_report.json").read_text())
    assert len(report["parameters"]) == MATRICES
    assert report["base_model"]["licence"] == {"license": "llama2"}
    assert main(["merge", OMNI, "--output", str(tmp_path / "no"), "--stream"]) == 1
    assert "specialists cannot be streamed" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["paper_table06_different_makers", "paper_table09_qwen2_5_vl_32b"])
@pytest.mark.parametrize("command", ["inspect", "merge", "run"])
def test_studies_without_all_their_experts_are_refused(name, command, hub, tmp_path, capsys):
    more = [] if command == "inspect" else ["--output", str(tmp_path / "out")]
    assert main([command, str(RECIPES / f"{name}.yaml"), *more]) == 1
    said = capsys.readouterr().err
    assert "is neither a folder beside the recipe" in said and len(said.splitlines()) == 1
    assert hub.requests == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", [INTERNVL, QWEN])
def test_run_asks_for_questions(recipe, hub, tmp_path, capsys):
    assert main(["run", recipe, "--output", str(tmp_path / "out")]) == 1
    assert "add evaluation: {data: FOLDER}" in capsys.readouterr().err
    assert hub.requests == [] and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_table_5_to_the_last_notebook(hub, tmp_path):
    """Its notebook composes these specialists, and asks those of the embedded benchmark."""
    save_vicuna_family(hub.root)
    command = [sys.executable, "-m", "optmerge_core", "run", OMNI, "--output", tmp_path / "run"]
    environment = hub.environment(tmp_path / "home")
    done = subprocess.run(
        [*command, "--device", "cpu"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.name[:2] for path in (tmp_path / "run/notebooks").glob("*.ipynb")] == ["04"]
    assert (tmp_path / "run/figures/tablexx_overlaps.md").is_file()


@pytest.mark.slow
def test_table_3_to_the_last_notebook(hub, tmp_path):
    """With a few of the embedded benchmark's questions; settings are as small as they may be."""
    save_qwen2_vl(hub.root)
    recipe = yaml.safe_load(Path(QWEN).read_text())
    recipe |= {"scaling_coefficients": [1.0], "parameters": {"preset": "lora", "steps": 10}}
    recipe["method_options"]["wudi"] = {"steps": 10}
    questions = ROOT / "data/benchmark/questions"
    recipe["evaluation"] = {"data": str(questions), "validation_samples": 2, "test_samples": 3}
    path = tmp_path / "rehearsed.yaml"
    path.write_text(yaml.safe_dump(recipe))
    command = [
        sys.executable,
        "-m",
        "optmerge_core",
        "run",
        str(path),
        "--output",
        tmp_path / "run",
    ]
    environment = hub.environment(tmp_path / "home")
    done = subprocess.run(
        [*command, "--device", "cpu"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    copies = {path.name[:2] for path in (tmp_path / "run/notebooks").glob("*.ipynb")}
    assert copies == {"00", "01", "02", "03", "05"}
    assert (tmp_path / "run/index.html").is_file()
    assert (tmp_path / "run/figures/table03_lora.md").is_file()
    assert load_recipe(path).name == "paper_table03_qwen2_vl_7b"
