"""The paper's studies on a stand-in hub, with repositories of their names, tiny (rehearsal.py).

Tables 2, 3 and 5 name all of their experts. Tables 6 and 9 do not, and are refused; Table 9 is also
tried with adapters in their place, and so is Qwen2-Audio, which is in no table.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from rehearsal import TASKS, save_internvl, save_vicuna_family
from rehearsal_qwen import save_qwen2_5_vl, save_qwen2_audio, save_qwen2_vl
from safetensors.torch import load_file

from optmerge_core import check_merged, load_recipe, open_checkpoint
from optmerge_core.__main__ import main
from optmerge_core.evaluation.chat import load_processor
from optmerge_core.evaluation.evaluator import load_model

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "data" / "recipes"
INTERNVL = str(RECIPES / "paper_table02_internvl2_5_1b.yaml")
QWEN = str(RECIPES / "paper_table03_qwen2_vl_7b.yaml")
OMNI = str(RECIPES / "paper_table05_modalities.yaml")
MATRICES = 14  # two layers of seven
QUESTIONS = {
    "data": str(ROOT / "data/benchmark/questions"), "validation_samples": 2, "test_samples": 3,
}  # fmt: skip


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


def recipe_with(source, folder, **changes):
    """A copy of a recipe with other values for some keys."""
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(Path(source).read_text()) | changes))
    return str(path)


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    """The Python files of models are not kept, nor their modules and classes, nor others found."""

    def forget():
        for name in [x for x in sys.modules if x.startswith("transformers_modules")]:
            del sys.modules[name]

    mapping = transformers.AutoModel._model_mapping
    monkeypatch.setattr(mapping, "_extra_content", dict(mapping._extra_content))
    cache = "transformers.dynamic_module_utils.HF_MODULES_CACHE"
    monkeypatch.setattr(cache, str(tmp_path / "code"))
    paths = [path for path in sys.path if not Path(path, "transformers_modules").is_dir()]
    monkeypatch.setattr(sys, "path", paths)
    forget()
    yield
    forget()


def test_table_2(hub, tmp_path, capsys, own_code):
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
    assert code == {path.name for path in folder.glob("*.py")} and len(code) == 4
    card = (folder / "README.md").read_text()
    assert "license: mit\n" in card and "trust_remote_code=True" in card
    with pytest.raises(ValueError, match="no processor for pictures and text"):
        load_processor(folder, trust_remote_code=True)
    with pytest.raises(ValueError, match=r"often named \.\.\.-hf$"):
        load_model(folder, trust_remote_code=True)
    run("benchmarks", folder, "--table", "2", "--output", tmp_path / "evaluation")
    assert "InternVL" in (tmp_path / "evaluation/benchmarks.md").read_text()
    check = check_merged(folder, device="cpu", trust_remote_code=True)
    assert "no attribute 'all_tied_weights_keys'" in check.failed[0]
    assert "its Python code is for another version of transformers than 5" in check.failed[0]


def test_own_code_that_opens_is_not_blamed_for_what_it_takes(hub, own_code):
    """With the call that the published code lacks; then its forward wants a picture."""
    save_internvl(hub.root)
    folder = hub.root / "OpenGVLab/InternVL2_5-1B"
    module, start = folder / "modeling_internvl_chat.py", "self.template = get_"
    module.write_text(module.read_text().replace(start, f"self.post_init()\n        {start}"))
    check = check_merged(folder, device="cpu", trust_remote_code=True)
    assert check.failed == [] and check.model_class == "InternVLChatModel"
    assert "the folder's own code, takes more than a prompt" in " ".join(check.not_checked)


@pytest.mark.parametrize("trust", [True, False])
def test_run_refuses_table_2_before_weights_are_asked_for(trust, hub, tmp_path, capsys):
    """Only its own code answers about pictures, which does not open; so says the recipe."""
    save_internvl(hub.root)
    recipe = recipe_with(INTERNVL, tmp_path, evaluation=QUESTIONS, trust_remote_code=trust)
    refused = "has no class that answers questions about pictures"
    learn = ["learn", recipe, "--samples", "1", "--output", str(tmp_path / "learnt.yaml")]
    sweep = ["run", recipe, "--sweep", "method=ties", "--output", str(tmp_path / "sweep")]
    for command in (["run", recipe, "--output", str(tmp_path / "run")], sweep, learn):
        assert main(command) == 1
        said = capsys.readouterr().err.splitlines()
        assert f"OpenGVLab/InternVL2_5-1B: transformers {refused}" in said[-1]
        assert "'internvl_chat', and its own Python code has none either" in said[-1]
    assert not (tmp_path / "run").exists() and not (tmp_path / "learnt.yaml").exists()
    assert {path.rpartition("/")[2] for path, _ in hub.requests} == {"config.json"}
    assert "`run` refuses" in " ".join(Path(INTERNVL).read_text().split("\n# "))


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
    for table in ("2", "5"):  # the toolkits have neither its class nor Table 5's benchmarks
        assert main(["benchmarks", str(tmp_path / "omni"), "--table", table]) == 1
        said = capsys.readouterr().err
        assert "an Omni model" in said and "generate(modality_inputs=…)" in said
        assert "MUSIC-AVQA and AVQA of the paper's Table 5" in said


def test_table_9_with_adapters_for_its_experts(hub, tmp_path, capsys):
    experts = save_qwen2_5_vl(hub.root)
    models = [{"name": task, "model": place} for task, place in experts.items()]
    table = RECIPES / "paper_table09_qwen2_5_vl_32b.yaml"
    recipe = recipe_with(table, tmp_path, models=models, parameters={"preset": "lora", "steps": 5})
    run("inspect", recipe, "--stream")
    shown = capsys.readouterr().out
    assert f"qwen2_5_vl, {MATRICES} parameters merge" in shown
    folder = merged_and_streamed(recipe, tmp_path / "qwen2_5_vl")
    said = capsys.readouterr()
    assert "opens as Qwen2_5_VLForConditionalGeneration" in said.out and "Failed" not in said.err
    assert "4 of them the image's" in said.out and "greedy answer" in said.out
    base, after = open_checkpoint("Qwen/Qwen2.5-VL-32B-Instruct"), open_checkpoint(folder)
    changed = {name for name in after if not torch.equal(after[name], base[name])}
    assert base.shapes() == after.shapes() and len(changed) == MATRICES and len(base.files) == 18
    run("benchmarks", folder, "--table", "9", "--output", tmp_path / "evaluation")
    assert "Qwen2VLChat" in (tmp_path / "evaluation/vlmevalkit.json").read_text()


def test_qwen2_audio(hub, tmp_path, capsys):
    """It is built on a Qwen, so that it is no specialist of Table 5's Vicuna."""
    places = save_qwen2_audio(hub.root)
    models = [{"name": name, "model": places[name]} for name in ("speech", "music")]
    path = tmp_path / "audio.yaml"
    content = {"base_model": places["base"], "models": models, "merge_method": "task_arithmetic"}
    path.write_text(yaml.safe_dump(content))
    run("inspect", path, "--stream")
    assert f"qwen2_audio, {MATRICES} parameters merge" in capsys.readouterr().out
    folder = merged_and_streamed(path, tmp_path)
    said = capsys.readouterr()
    assert "opens as Qwen2AudioForConditionalGeneration" in said.out and "Failed" not in said.err
    assert "Not checked: prompts of sound" in said.out and "has no rule" not in said.err
    base, after = open_checkpoint(places["base"]), open_checkpoint(folder)
    changed = {name for name in after if not torch.equal(after[name], base[name])}
    assert len(changed) == MATRICES and len(base.files) == 5
    assert all(name.startswith("language_model.model.layers.") for name in changed)
    assert main(["benchmarks", str(folder)]) == 1
    assert "no toolkit is known to load model type 'qwen2_audio'" in capsys.readouterr().err
    save_vicuna_family(hub.root)
    models = [{"name": "audio", "model": places["base"]}]
    omni = recipe_with(OMNI, tmp_path, models=models)
    assert main(["merge", omni, "--output", str(tmp_path / "omni")]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "audio: " in said and "specialists must share one language model" in said


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
    options = yaml.safe_load(Path(QWEN).read_text())["method_options"] | {"wudi": {"steps": 10}}
    path = recipe_with(
        QWEN, tmp_path, scaling_coefficients=[1.0], method_options=options, evaluation=QUESTIONS,
        parameters={"preset": "lora", "steps": 10},
    )  # fmt: skip
    command = [sys.executable, "-m", "optmerge_core", "run", path, "--output", tmp_path / "run"]
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
