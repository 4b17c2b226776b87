"""The files at the top level agree with each other and keep to the house's rules."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
TOP_LEVEL = {
    *("README.md", "LICENSE", "Makefile", "CITATION.cff", "CONTRIBUTING.md", "CHANGELOG.md"),
    *("environment.yml", "pyproject.toml", "requirements.txt"),
    *("optmerge_core", "notebooks", "data", "figures", "tests"),
}
MAX_DATA_BYTES = 150e6
PYTHONS = ("3.11", "3.12", "3.13")


def repository_files() -> list[Path]:
    """Files that are committed or would be: what git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"git cannot list the repository's files: {error}")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


def read_pins() -> list[Requirement]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def read_project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def direct_requirements() -> list[Requirement]:
    project = read_project()
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    requirements = [Requirement(text) for group in groups for text in group]
    return [entry for entry in requirements if entry.name != project["name"]]


def test_requirements_are_exact_pins_each_named_once():
    pins = read_pins()
    for pin in pins:
        (specifier,) = pin.specifier
        assert specifier.operator == "==" and "*" not in specifier.version, pin
        assert "+" not in specifier.version and pin.url is None and not pin.extras, pin
    names = [canonicalize_name(pin.name) for pin in pins]
    assert names == sorted(set(names))


def test_requirements_satisfy_pyproject():
    pins = {canonicalize_name(pin.name): pin for pin in read_pins()}
    for requirement in direct_requirements():
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement} of pyproject.toml is not pinned"
        (specifier,) = pin.specifier
        assert specifier.version in requirement.specifier, f"{pin} is not {requirement}"


def test_environment_takes_the_same_pins_and_python():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, nested = environment["dependencies"]
    assert pip == "pip" and nested == {"pip": ["-r requirements.txt", "-e ."]}
    conda = SpecifierSet(python.removeprefix("python").strip())
    project = SpecifierSet(read_project()["requires-python"])
    for version in ("3.10", *PYTHONS):
        assert (version in conda) == (version in project) == (version != "3.10"), version


def test_binder_takes_the_same_pins_and_python():
    """Its folder hides the environment.yml of the root; relative paths belong into postBuild."""
    root, binder = (
        yaml.safe_load((ROOT / folder / "environment.yml").read_text())["dependencies"]
        for folder in (".", ".binder")
    )
    assert binder == root[:2]
    script = ROOT / ".binder" / "postBuild"
    assert script.stat().st_mode & 0o111
    lines = script.read_text().splitlines()
    assert [line.split()[-2:] for line in lines if "pip install" in line] == [
        ["-r", "requirements.txt"],
        ["-e", "."],
    ]


def installed_by(*extras: str) -> set[str]:
    """The packages that pyproject.toml names for the core, and for these extras with their own."""
    project = read_project()
    texts = list(project["dependencies"])
    for extra in extras:
        texts += project["optional-dependencies"][extra]
    found = [Requirement(text) for text in texts]
    inner = {name for entry in found if entry.name == project["name"] for name in entry.extras}
    names = {canonicalize_name(entry.name) for entry in found if entry.name != project["name"]}
    return names | (installed_by(*inner) if inner else set())


def extras_of(node: ast.AST) -> set[str]:
    """The extras of `with extra("name"):`; any where an import may fail."""
    if isinstance(node, ast.Try):
        handled = {getattr(handler.type, "id", "") for handler in node.handlers}
        return {"dev"} if handled == {"ModuleNotFoundError"} else set()
    calls = [item.context_expr for item in node.items] if isinstance(node, ast.With) else []
    calls = [call for call in calls if isinstance(call, ast.Call)]
    return {call.args[0].value for call in calls if getattr(call.func, "id", "") == "extra"}


def third_party(node: ast.AST, extras: set[str]) -> Iterator[tuple[str, set[str]]]:
    """Module that is imported, and the extras named around the import."""
    extras = extras | extras_of(node)
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    names += [node.module] if isinstance(node, ast.ImportFrom) else []
    for name in {name.split(".")[0] for name in names} - {"optmerge_core"}:
        if name not in sys.stdlib_module_names:
            yield name, extras
    for child in ast.iter_child_nodes(node):
        yield from third_party(child, extras)


def test_every_import_is_the_cores_or_in_an_extra_that_is_named():
    """In the file, by `with extra("name"):`, or for the whole room, by that in its __init__.py."""
    distributions, package = packages_distributions(), ROOT / "optmerge_core"
    guarded = 0
    for path in package.rglob("*.py"):
        rooms = [
            folder / "__init__.py" for folder in path.parents if folder.is_relative_to(package)
        ]
        inits = [node for room in rooms for node in ast.parse(room.read_text()).body]
        named = {extra for node in inits for extra in extras_of(node)}
        for module, extras in third_party(ast.parse(path.read_text()), named):
            declared = installed_by(*extras) | {"triton"}  # comes with torch where there is CUDA
            owners = {canonicalize_name(name) for name in distributions.get(module, [module])}
            where = f"not installed by {' or '.join(extras) or 'the core'} in pyproject.toml"
            assert owners & declared, f"{path.relative_to(ROOT)} imports {module}, {where}"
            guarded += not owners & installed_by()
    assert guarded > 20


def test_dev_is_everything():
    project = read_project()
    names = {canonicalize_name(entry.name) for entry in direct_requirements()}
    assert installed_by("dev") == names and "optmerge" in project["scripts"]


def test_an_installed_package_has_every_file_of_the_core():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = ["*.py", *settings["package-data"]["*"]]
    core = [path for path in repository_files() if path.is_relative_to(ROOT / "optmerge_core")]
    left_out = [path for path in core if not any(path.match(pattern) for pattern in patterns)]
    assert len(core) > 20 and left_out == []
    assert all((path.parent / "__init__.py").is_file() for path in core)


def test_top_level_holds_only_what_belongs_there():
    names = {path.relative_to(ROOT).parts[0] for path in repository_files()}
    assert {name for name in names if not name.startswith(".")} <= TOP_LEVEL


def test_no_index_address_and_no_absolute_path():
    # What precedes must not be part of an address, of a longer path or of an image in base64.
    local = re.compile(r"(?<![\w+/.~-])(?:/(?:home|root|Users|work|tmp|mnt|opt)/\w|[A-Z]:\\\w)")
    index = re.compile(r"--(?:extra-)?index-url|--find-links|/(?:simple|whl)/|//pypi\.")
    for path in repository_files():
        content = path.read_bytes()
        if b"\0" in content or path == Path(__file__):
            continue
        for number, line in enumerate(content.decode().splitlines(), start=1):
            found = local.search(line) or index.search(line)
            assert not found, f"{path.relative_to(ROOT)}:{number}: {found[0]}"


def test_data_is_small():
    data = [path for path in repository_files() if path.is_relative_to(ROOT / "data")]
    assert sum(path.stat().st_size for path in data) < MAX_DATA_BYTES


def test_recipes_are_named_as_their_files():
    """The Makefile finds a recipe's runs by the file's name."""
    for path in (ROOT / "data" / "recipes").glob("*.yaml"):
        assert yaml.safe_load(path.read_text()).get("name", path.stem) == path.stem


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_pages_name_only_what_exists(page):
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    named = re.findall(r"`((?:figures|notebooks|data|tests|optmerge_core)/[\w./-]+)`", text)
    missing = [
        name
        for name in links + named
        if not name.startswith("https://") and not (ROOT / name).exists()
    ]
    assert missing == []


def test_readme_says_where_published_numbers_stand_beside_ours():
    readme = (ROOT / "README.md").read_text()
    said = re.search(r"set them beside ours: (.*?)\. The scores", readme, flags=re.DOTALL)[1]
    parts = re.findall(r"(\d\d) (?:those )?of Tables? (.+?)(?=,\s\d\d|$)", said)
    assert len(parts) > 3
    for notebook, tables in parts:
        source = next((ROOT / "notebooks").glob(f"{notebook}_*.ipynb")).read_text()
        for table in re.findall(r"\d+", tables):
            assert f'"table{table}_' in source.replace("\\", ""), (notebook, table)


@pytest.mark.parametrize("command", (["check"], ["format", "--check"]), ids=("check", "format"))
def test_ruff(command):
    """Over every .py and .ipynb."""
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def make(*arguments: str) -> subprocess.CompletedProcess:
    command = ["make", "--always-make", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_make_plans():
    for target in (
        "setup",
        "reproduce",
        "figures",
        "test",
        "test-slow",
        "coverage",
        "lab",
        "clean",
    ):
        done = make("--dry-run", target)
        assert done.returncode == 0, done.stderr
        assert ("pip install" in done.stdout) == (target != "clean"), target
    assert "runs/qwen/notebooks" in make("--dry-run", "figures", "RECIPE=a/qwen.yaml").stdout


def test_make_refuses_an_old_python(tmp_path):
    old = tmp_path / "python3.10"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = make("setup", f"PYTHON={old}")
    assert done.returncode != 0
    assert f"error: Python 3.11 or newer is needed, '{old}' is not" in done.stderr


def test_the_packages_without_dependencies_are_pinned_in_one_place():
    """In comments of requirements.txt, which make reads; whoever else names one names the same."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [line.removeprefix("# --no-deps ") for line in lines if "--no-deps" in line]
    assert f"--no-deps {' '.join(pins)} ||" in make("--dry-run", "setup").stdout
    models = ROOT / "optmerge_core" / "benchmark" / "models"
    for pin, module in zip(pins, ("smol.py", "whisper.py"), strict=True):
        (specifier,) = Requirement(pin).specifier
        assert specifier.operator == "==" and "*" not in specifier.version
        name = Requirement(pin).name
        assert name not in make("--dry-run", "setup", "WEIGHTS=").stdout
        for path in (ROOT / "README.md", models / module):
            assert set(re.findall(rf"{name}==[\w.]*\w", path.read_text())) == {pin}


def test_make_says_that_other_studies_work_without_the_weights(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *--no-deps\\ llm-*) exit 1;; esac\n')
    python.chmod(0o755)
    installed = tmp_path / "installed"
    given = [f"PYTHON={python}", f"PY={python}", f"INSTALLED={installed}", "BASE="]
    done = make("setup", *given)
    assert done.returncode != 0 and not installed.exists()
    assert re.search("^error: llm-.* cannot be installed; all studies but smol", done.stderr, re.M)
    assert make("setup", *given, "WEIGHTS=").returncode == 0 and installed.exists()


def test_make_builds_a_recorded_base_once(tmp_path):
    def plans(*given):
        command = ["make", "--dry-run", "setup", f"SMOL={tmp_path}", *given]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return "smol-base" in done.stdout

    assert not plans()
    (tmp_path / "base.json").touch()
    assert plans() and not plans("WEIGHTS=")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").touch()
    assert not plans()


def test_ci_runs_all_tests():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert script.read_text().splitlines()[-3:] == [
        "make test",
        "make test-slow",
        "exec make coverage",
    ]


def test_citation_is_valid_and_of_this_version():
    """The fields that the Citation File Format 1.2.0 requires, and no other than it has."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    known = "abstract authors cff-version keywords license message preferred-citation title type"
    assert set(citation) <= {*known.split(), "version"} and citation["cff-version"] == "1.2.0"
    assert citation["message"] and citation["title"] == read_project()["name"]
    assert citation["version"] == read_project()["version"]
    assert citation["license"] == read_project()["license"]
    paper = citation["preferred-citation"]
    assert paper["type"] == "conference-paper" and paper["title"].startswith("OptMerge: ")
    assert isinstance(paper["conference"]["name"], str) and isinstance(paper["year"], int)
    assert paper["url"] in (ROOT / "README.md").read_text()
    for author in (*citation["authors"], *paper["authors"]):
        assert set(author) in ({"name"}, {"given-names", "family-names"}), author
    assert len(paper["authors"]) == 10


def test_ci_runs_make_for_every_python():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    matrix = jobs["test"]["strategy"]["matrix"]
    assert matrix == {"os": ["ubuntu-latest", "macos-latest"], "python": list(PYTHONS)}
    for name, job in jobs.items():
        (command,) = [step["run"] for step in job["steps"] if "run" in step]
        assert command == f"make {name}" and make("--dry-run", name).returncode == 0


def test_hooks_run_what_make_installs():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    for hook in repository["hooks"]:
        interpreter, option, module, *_ = hook["entry"].split()
        assert (interpreter, option) == (".venv/bin/python", "-m") and hook["language"] == "system"
        assert module in {pin.name for pin in read_pins()}


def test_contributing_names_targets_that_exist():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    targets = set(re.findall(r"(?:^|`)make ([a-z-]+)", page, flags=re.MULTILINE))
    assert targets >= {"setup", "test"}
    for target in targets:
        assert make("--dry-run", target).returncode == 0, target
