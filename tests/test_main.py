import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from lora import make_adapter, make_lora_family
from safetensors.torch import load_file, save_file
from web import Web

from optmerge_core.__main__ import main
from optmerge_core.checkpoints.open import open_checkpoint
from optmerge_core.checkpoints.writer import CheckpointWriter
from optmerge_core.errors import exit_status

RECIPES = Path(__file__).parents[1] / "data" / "recipes"


@pytest.fixture
def recipe(tiny, tmp_path):
    models = [{"model": str(folder), "name": name} for name, folder in tiny.experts.items()]
    content = {"merge_method": "ties", "base_model": str(tiny.base), "models": models}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_merge(recipe, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["merge", recipe, "--output", out, "--scaling-coefficient", "0.5"]) == 0
    assert "14 parameters of 3 experts merged by ties" in capsys.readouterr().out
    assert '"scaling_coefficient": 0.5' in (tmp_path / "out" / "merge_report.json").read_text()
    assert main(["merge", recipe, "--output", out]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {out} exists")
    assert main(["merge", recipe, "--output", out, "--method", "tsv", "--overwrite"]) == 0
    assert len(open_checkpoint(out)) > 14


def test_merge_says_when_an_expert_looks_like_another_base(tiny, recipe, tmp_path, capsys):
    content = yaml.safe_load(Path(recipe).read_text())
    folder = tmp_path / "other"
    shutil.copytree(content["models"][0]["model"], folder)
    for path in folder.glob("*.safetensors"):
        weights = {name: torch.randn_like(tensor) for name, tensor in load_file(path).items()}
        save_file(weights, path, metadata={"format": "pt"})
    content["models"][0]["model"] = str(folder)
    content["models"].append({"model": content["base_model"], "name": "itself"})
    Path(recipe).write_text(yaml.safe_dump(content))
    assert main(["merge", recipe, "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    name = content["models"][0]["name"]
    assert re.search(rf"notice: expert {name} differs from the base by \d+% of its norm", said)
    assert "notice: models: itself is the base model itself; left out" in said


def test_merge_warns_of_more_than_30_per_cent_of_the_base(tiny, recipe, tmp_path, capsys):
    content = yaml.safe_load(Path(recipe).read_text())
    content["models"] = []
    for name, share in (("near", 0.295), ("far", 0.305)):
        shutil.copytree(tiny.base, tmp_path / name)
        for path in (tmp_path / name).glob("*.safetensors"):
            weights = {k: (v.float() * (1 + share)).half() for k, v in load_file(path).items()}
            save_file(weights, path, metadata={"format": "pt"})
        content["models"].append({"model": str(tmp_path / name), "name": name})
    Path(recipe).write_text(yaml.safe_dump(content))
    assert main(["merge", recipe, "--output", str(tmp_path / "out")]) == 0
    warned = re.findall(r"expert (\w+) differs from the base by", capsys.readouterr().err)
    assert warned == ["far"]


def test_merge_says_of_a_large_adapter_that_its_update_is_large(tmp_path, capsys):
    _, experts = make_lora_family(tmp_path)
    make_adapter(tmp_path / "large", 1, lora_alpha=300)
    models = [{"model": "large"}, {"model": str(experts["e0"]), "name": "e0"}]
    path = tmp_path / "adapters.yaml"
    path.write_text(
        yaml.safe_dump({"merge_method": "ties", "base_model": "base", "models": models})
    )
    assert main(["merge", str(path), "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert re.search(r"expert large differs .* fine-tuning does: its alpha, rank or learning", said)
    assert "another base" not in said


def test_inspect(recipe, capsys):
    assert main(["inspect", recipe]) == 0
    shown = capsys.readouterr().out
    assert "internvl, 14 parameters merge" in shown
    assert all(name in shown for name in ("chart", "ocr", "vqa")) and "%" in shown
    assert "language_model.model.layers.*.mlp.up_proj.weight" in shown  # what merges
    assert "sign conflict" in shown and "warning: ocr, vqa: moved by 10.0% to 10.1%" in shown


def test_inspect_says_what_it_found(recipe, tiny, tmp_path, capsys):
    content = yaml.safe_load(Path(recipe).read_text())
    shutil.copytree(tiny.base, tmp_path / "lazy")
    content["models"].append({"model": str(tmp_path / "lazy")})
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(content))
    assert main(["inspect", str(again)]) == 0
    shown = capsys.readouterr().out
    assert "problem: lazy: its task vector is zero." in shown
    content["models"] = content["models"][:1]
    again.write_text(yaml.safe_dump(content))
    assert main(["inspect", str(again)]) == 0
    assert "Nothing measured speaks against this merge." in capsys.readouterr().out


def test_the_omni_recipe_is_inspected_and_merged(tmp_path, capsys):
    recipe = str(RECIPES / "omni.yaml")
    assert main(["inspect", recipe]) == 0
    said = capsys.readouterr().out
    assert "28 parameters merge, 11 are averaged" in said and "not merged" not in said
    assert re.search(r"vision *│ *video", said)
    assert main(["merge", recipe, "--method", "ties", "--output", str(tmp_path / "omni")]) == 0
    assert "one Omni model of vision, audio, video" in capsys.readouterr().out
    report = json.loads((tmp_path / "omni" / "merge_report.json").read_text())
    assert report["method"] == "ties" and len(report["parameters"]) == 28
    for command in (["inspect", recipe], ["merge", recipe, "--output", str(tmp_path / "no")]):
        assert main([*command, "--stream"]) == 1
        assert "specialists cannot be streamed" in capsys.readouterr().err


def test_inspect_streams_each_tensor_once(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    huggingface_hub.close_session()
    folders = {"base": tiny.base} | tiny.experts
    with Web(folders) as web:
        models = [{"model": f"{web.url}/{name}", "name": name} for name in tiny.experts]
        path = tmp_path / "web.yaml"
        path.write_text(yaml.safe_dump({"base_model": f"{web.url}/base", "models": models}))
        assert main(["inspect", str(path), "--stream"]) == 0
        base = open_checkpoint(tiny.base)
        weights = [end - start for file, start, end in web.sent if file.startswith("/base/")]
        held = sum(base.nbytes(name) for name in base)
        files = sum(file.stat().st_size for file in base.files)
        assert held <= sum(weights) <= files + 8 * len(base.files)
    huggingface_hub.close_session()
    assert "sign conflict" in capsys.readouterr().out


def test_an_interrupted_merge_leaves_nothing(recipe, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointWriter, "add", interrupt)
    assert main(["merge", recipe, "--output", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_a_notice_is_told_once(capsys):
    """Also where filters change between two openings of a folder, as transformers does it."""

    def command():
        for _ in range(2):
            for text in ("the folder holds both", "another"):
                warnings.warn(text, stacklevel=1)
            with warnings.catch_warnings(action="ignore"):
                warnings.warn("not a notice", stacklevel=1)

    for _ in range(2):  # of each command
        assert exit_status(command) == 0
        assert capsys.readouterr().err == "notice: the folder holds both\nnotice: another\n"


def test_errors_are_one_line_and_exit_status_1(tmp_path):
    command = [sys.executable, "-m", "optmerge_core", "merge", "missing.yaml", "--output", "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: missing.yaml: cannot be read")
    assert len(done.stderr.splitlines()) == 1
