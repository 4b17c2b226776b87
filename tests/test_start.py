"""What starting costs, said in modules, and what works where the core alone is installed."""

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from optmerge_core import methods
from optmerge_core.__main__ import main
from optmerge_core.methods.contract import check_option_names
from optmerge_core.methods.registry import METHODS

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "data" / "recipes"
EXTRAS = {
    "transformers", "tokenizers", "peft", "PIL", "datasets", "pyarrow", "matplotlib", "seaborn",
    "nbformat", "papermill", "traitlets", "jsonschema", "IPython",
}  # fmt: skip
HEAVY = {"torch", "numpy", "pandas", "scipy", "safetensors", "huggingface_hub", "jinja2", *EXTRAS}
READER = {"yaml", "pydantic"}


AT_THE_END = """
import atexit, runpy, sys
end = sys.stderr.write
atexit.register(lambda: end("modules: " + " ".join(sys.modules)))
"""


def start(code: str, *arguments: str) -> tuple[subprocess.CompletedProcess, set[str]]:
    """What a Python process of its own printed, and the modules that it had at its end."""
    command = [sys.executable, "-c", AT_THE_END + code, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    done.stderr, _, modules = done.stderr.partition("modules: ")
    return done, set(modules.split())


def call(package: str, *arguments: str) -> tuple[subprocess.CompletedProcess, set[str]]:
    """The same of `python -m package`."""
    code = f"runpy.run_module({package!r}, run_name='__main__', alter_sys=True)"
    return start(code, *arguments)


PARSERS = {
    "optmerge_core": ["", "merge", "inspect", "run", "learn", "benchmarks"],
    "optmerge_core.benchmark": ["", "questions", "train", "omni-train", "seeds", "subsets"],
}


@pytest.mark.parametrize(
    ("package", "command"), [(p, command) for p, names in PARSERS.items() for command in names]
)
def test_help_imports_nothing_slow(package, command):
    done, modules = call(package, *command.split(), "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"usage: python -m {package} {command}")
    assert "argparse" in modules and modules & (HEAVY | READER | {"rich", "tqdm"}) == set()


REFUSED = {
    "merge_method: [": "not valid YAML",
    "layers: []": "layers: unknown key",
    "merge_method: tiess": "there is no merge method 'tiess'",
    "parameters: {densty: 1}": "optmerge has no option 'densty'",
    "method_options: {ties: {densty: 1}}": "ties has no option 'densty'",
    "name: a/b": "name: 'a/b' is to be a folder's name",
    "base_model: no/such/folder": "base_model: 'no/such/folder' is neither a folder",
    "parameters: {lambda: [1, x]}": "one finite number",
}
STARTS = {
    "merge": "merge {} --output out",
    "inspect": "inspect {}",
    "run": "run {}",
    "sweep": "run {} --output out --sweep lambda=1",
    "seeds": "seeds {} out",
    "subsets": "subsets {} --output out",
}


def refused(command: str, path: Path) -> tuple[subprocess.CompletedProcess, set[str]]:
    package = "optmerge_core.benchmark" if command in ("seeds", "subsets") else "optmerge_core"
    return call(package, *STARTS[command].format(path).split())


@pytest.mark.parametrize("text", REFUSED)
def test_a_recipe_is_refused_before_anything_slow_is_imported(tmp_path, text):
    models = "models: [owner/one, owner/two]"
    base = "" if text.startswith("base_model") else "base_model: owner/base"
    path = tmp_path / "bad.yaml"
    path.write_text(f"{base}\n{models}\n{text}\n")
    done, modules = refused("merge", path)
    assert done.returncode == 1 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"error: {path}: ") and REFUSED[text] in done.stderr
    assert READER <= modules and modules & HEAVY == set()


@pytest.mark.parametrize("command", STARTS)
def test_a_missing_recipe_is_one_quick_line(command):
    done, modules = refused(command, Path("missing.yaml"))
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"error: missing.yaml: cannot be read .*\n", done.stderr)
    assert modules & (HEAVY - {"jinja2"}) == set()


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import optmerge_core", HEAVY | READER),
        ("import optmerge_core.methods, optmerge_core.checkpoints", HEAVY | READER),
        ("from optmerge_core import load_recipe", HEAVY),
        ("from optmerge_core import *", EXTRAS | {"pandas", "scipy", "huggingface_hub", "jinja2"}),
        (  # pandas looks for pyarrow
            "from optmerge_core.study import inspect, sweep; from optmerge_core import figures",
            EXTRAS - {"pyarrow"},
        ),
    ],
)
def test_what_an_import_leaves_out(code, absent):
    done, modules = start(code)
    assert done.returncode == 0 and "optmerge_core" in modules
    assert modules & absent == set()


@pytest.mark.parametrize("method", METHODS)
def test_names_told_without_torch_are_the_methods_own(method):
    """One message, whether the names are read from the source or from the function."""
    texts = []
    for check in (methods.check_names, lambda name, x: check_option_names(METHODS[name], x)):
        with pytest.raises(ValueError) as caught:
            check(method, {"nothing": 1})
        texts.append(str(caught.value))
    assert texts[0] == texts[1] and texts[0].startswith(f"{method} has no option 'nothing'")


@pytest.mark.parametrize(
    ("argv", "prog"),
    [("/somewhere/bin/optmerge", "optmerge"), ("__main__.py", "python -m optmerge_core")],
)
def test_the_name_that_was_called_is_the_name_in_help_and_errors(argv, prog, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [argv])
    for arguments in (["merge", "--help"], ["merge"]):
        with pytest.raises(SystemExit):
            main(arguments)
    said = capsys.readouterr()
    assert said.out.startswith(f"usage: {prog} merge [-h]")
    assert f"{prog} merge: error: the following arguments" in said.err


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_console_script_is_main():
    module, _, name = project()["scripts"]["optmerge"].partition(":")
    assert getattr(sys.modules[module], name) is main


def extra_modules() -> list[str]:
    """The modules of all that `pip install optmerge_core` alone would not bring, by pyproject."""
    declared = project()
    core = {canonicalize_name(Requirement(text).name) for text in declared["dependencies"]}
    texts = [text for extra in declared["optional-dependencies"].values() for text in extra]
    names = {canonicalize_name(Requirement(text).name) for text in texts}
    names -= {*core, "optmerge-core", "triton"}  # torch brings triton, where there is CUDA
    owners = packages_distributions()
    return [m for m, found in owners.items() if names & {canonicalize_name(x) for x in found}]


CORE_ALONE = """
import json, sys
from importlib.machinery import PathFinder

class CoreAlone(PathFinder):
    @classmethod
    def find_spec(cls, name, *places):
        return None if name.split(".")[0] in absent else super().find_spec(name, *places)

absent, work = set(json.loads(sys.argv[1])), json.loads(sys.argv[2])
sys.meta_path[sys.meta_path.index(PathFinder)] = CoreAlone
from optmerge_core.__main__ import main
from optmerge_core.benchmark.__main__ import main as benchmark
from optmerge_core.errors import MissingExtra

for item in work:
    print(">", flush=True)
    print(">", file=sys.stderr, flush=True)
    if isinstance(item, str):
        try:
            exec(item)
        except MissingExtra as error:
            print("refused:", error)
    else:
        command = benchmark if item[0] == "benchmark" else main
        print("status", command(item[item[0] == "benchmark" :]))
assert not absent & sys.modules.keys()
"""


CHECKED = re.compile(rb"## Check\n.*(?=## Load\n)", re.DOTALL)
"""What a card says of the model, which is opened only where transformers is installed."""


def core_alone(*work: list[str] | str) -> list[tuple[str, str]]:
    """Commands, or code, in one process without the extras' modules: stdout and stderr of each."""
    command = [sys.executable, "-c", CORE_ALONE, json.dumps(extra_modules()), json.dumps(work)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(zip(done.stdout.split(">\n")[1:], done.stderr.split(">\n")[1:], strict=True))


def test_the_core_alone_merges_and_inspects(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models = [{"model": str(folder), "name": name} for name, folder in tiny.experts.items()]
    content = {"merge_method": "ties", "base_model": str(tiny.base), "models": models}
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(content))
    experts = {name: str(folder) for name, folder in tiny.experts.items()}
    adapters = yaml.safe_load((RECIPES / "qwen2_vl.yaml").read_text())["models"][:2]
    adapters = {x["name"]: str(RECIPES / x["model"]) for x in adapters}
    parts = f"""
from optmerge_core import join, load_plan, merge_adapters, merge_part, plan_merge
plan = plan_merge({str(tiny.base)!r}, {experts}, {str(tmp_path / "parts")!r}, method="ties")
path = plan.save({str(tmp_path / "plan.json")!r})
for number in range(len(plan.parts)):
    merge_part(load_plan(path), number)
print(len(join(load_plan(path)).parameters))
merge_adapters({adapters}, {str(tmp_path / "adapter")!r}, method="task_arithmetic")
"""
    outcomes = core_alone(
        ["merge", str(recipe), "--output", str(tmp_path / "alone")],
        ["inspect", str(recipe)],
        ["run", str(recipe), "--output", str(tmp_path / "sweep"), "--sweep", "lambda=0.5,1"],
        ["benchmarks", str(tmp_path / "alone"), "--table", "3"],
        parts,
    )
    (merged, _), (inspected, _), (swept, _), (benchmarks, _), (joined, _) = outcomes
    assert "14 parameters of 3 experts merged by ties" in merged and "status 0" in merged
    assert "Not checked: the model, this needs transformers, which is not installed: " in merged
    assert "task vectors" in inspected and "status 0" in inspected
    assert "interference loss" in swept and "status 0" in swept
    assert "lmms_eval" in benchmarks and "status 0" in benchmarks
    assert joined == "14\n" and (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert main(["merge", str(recipe), "--output", str(tmp_path / "whole")]) == 0
    for file in (tmp_path / "whole").glob("*"):
        if file.name != "merge_report.json":
            alone = (tmp_path / "alone" / file.name).read_bytes()
            assert CHECKED.sub(b"", file.read_bytes()) == CHECKED.sub(b"", alone), file.name


def test_what_needs_an_extra_says_which(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe, omni = str(RECIPES / "internvl.yaml"), str(RECIPES / "omni.yaml")
    needs = {
        "models": [
            ["merge", omni, "--output", "out"],
            ["inspect", omni],
            "from optmerge_core.omni import compose",
            "from optmerge_core.evaluation.evaluator import load_model",
        ],
        "datasets": ["from optmerge_core.evaluation.questions import load_split"],
        "plots": ["from optmerge_core import figures; figures.use_style()"],
        "benchmark": [
            ["run", recipe, "--output", "out", "--sweep", "lambda=1"],
            ["benchmark", "questions", "out"],
            ["benchmark", "train", "out"],
            ["benchmark", "omni-seeds", omni, "out"],
            "from optmerge_core.benchmark.evaluator import evaluator_for",
            "from optmerge_core.benchmark.experiments import omni_evaluation",
        ],
        "notebooks": [["run", recipe]],
    }
    asked = [(name, work) for name, works in needs.items() for work in works]
    outcomes = core_alone(*(work for _, work in asked))
    for (name, work), (out, err) in zip(asked, outcomes, strict=True):
        said = out if isinstance(work, str) else err.splitlines()[-1]
        found = re.search(r": this needs (\w+), which is not installed: (.*)", said)
        assert found, (work, out, err)
        assert found[1] in extra_modules() and found[2] == f'pip install "optmerge_core[{name}]"'
        assert isinstance(work, str) or out == "status 1\n"
