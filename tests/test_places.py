"""Where the repository's own files are, in a checkout and outside of one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from optmerge_core.places import checkout


def test_the_checkout_is_around_the_package_or_the_working_directory(tmp_path, monkeypatch):
    root = Path(__file__).resolve().parents[1]
    monkeypatch.chdir(tmp_path)
    assert checkout() == root


def test_an_installed_package_outside_a_checkout_says_what_is_missing(tmp_path):
    root, site = Path(__file__).resolve().parents[1], tmp_path / "site"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(root / "optmerge_core", site / "optmerge_core", ignore=ignored)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    results = {"results": {"gqa": {"exact_match,none": 0.5}}, "model_name": "mine"}
    (tmp_path / "results.json").write_text(json.dumps(results))
    recipe = root / "data" / "recipes" / "internvl.yaml"
    reading = ["benchmarks", "--results", str(tmp_path / "results.json")]
    commands = [["benchmarks", str(model)], reading, ["run", str(recipe)]]
    text = "import json, sys; from optmerge_core.__main__ import main\n"
    text += "sys.exit(sum(main(command) for command in json.loads(sys.argv[1])))"

    def failed(commands, folder):
        environment = os.environ | {"PYTHONPATH": str(site)}
        return subprocess.run(
            [sys.executable, "-c", text, json.dumps(commands)], cwd=folder, env=environment,
            capture_output=True, text=True,
        )  # fmt: skip

    outside = failed(commands, tmp_path)
    errors = [line for line in outside.stderr.splitlines() if line.startswith("error: ")]
    assert outside.returncode == len(errors) == len(commands)
    assert all("no data/paper beside the package" in e and "clone" in e for e in errors)
    inside = failed(commands[:2], root / "notebooks")
    assert inside.returncode == 0 and "lmms-eval" in inside.stdout, inside.stderr
