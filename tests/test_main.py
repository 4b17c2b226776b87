import subprocess
import sys

import pytest
import yaml

from optmerge_core.__main__ import main
from optmerge_core.checkpoints import open_checkpoint


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


def test_inspect(recipe, capsys):
    assert main(["inspect", recipe]) == 0
    shown = capsys.readouterr().out
    assert "internvl, 14 parameters merge" in shown
    assert all(name in shown for name in ("chart", "ocr", "vqa")) and "%" in shown


def test_errors_are_one_line_and_exit_status_1(tmp_path):
    command = [sys.executable, "-m", "optmerge_core", "merge", "missing.yaml", "--output", "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: missing.yaml: cannot be read")
    assert len(done.stderr.splitlines()) == 1
