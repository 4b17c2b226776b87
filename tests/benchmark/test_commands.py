import re
from importlib import import_module
from inspect import signature
from pathlib import Path

import pytest

from optmerge_core.benchmark import __main__ as commands
from optmerge_core.benchmark.__main__ import COMMANDS, FAMILIES, MODALITIES, main, parser
from optmerge_core.benchmark.models import omni
from optmerge_core.benchmark.training.build import REGIMES

ROOT = Path(__file__).resolve().parents[2]
RECIPE = str(ROOT / "data" / "recipes" / "omni.yaml")
GIVEN = {
    "questions": "folder",
    "questions smol": "folder",
    "questions smol_omni": "folder",
    "train": "out --family qwen2_vl --only gentle/VQA --seed 2 --width 2 --learning-rate 1e-3",
    "omni-train": "out --seeds 1 2 --modalities vision audio",
    "smol-omni-train": "out --only seed1/vision --seeds 1 2 --sight sight.safetensors",
    "smol-omni-base": "--place folder --sight sight.safetensors",
    "smol-base": "--place folder",
    "smol-texts": "folder",
    "seeds": f"{RECIPE} out --seeds 1 2 --references --regime long",
    "omni-seeds": f"{RECIPE} out --seeds 1 2",
    "smol-omni-seeds": f"{RECIPE} out --seeds 1 2",
    "subsets": f"{RECIPE} {RECIPE} --output out",
    "ranks": f"{RECIPE} out",
    "null-directions": f"{RECIPE} out --count 20",
    "expert-merging": f"{RECIPE} out --samples 1 5 --draws 0 1 --seeds 1",
    "learning-rates": f"{RECIPE} out --rates 1e-3 2e-3",
    "rate-map": f"{RECIPE} out --seeds 1 2",
    "comparison": f"{RECIPE} out --seeds 1 2 --methods tsv",
    "play": f"{RECIPE} {RECIPE} --output out",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_given_reaches_the_function(command, monkeypatch):
    file, name = COMMANDS[command].split(":")
    module, reached = import_module(f"optmerge_core.benchmark.{file}"), []
    parameters = signature(getattr(module, name)).parameters
    monkeypatch.setattr(module, name, lambda **given: reached.append(given))
    words = command.replace(" ", " --study ").split()
    assert main([*words, *GIVEN[command].split()]) == 0
    assert reached[0].keys() == parameters.keys()
    needed = [p for p in parameters.values() if p.default is p.empty]
    least = (
        [RECIPE, "--output", "out"] if command in ("subsets", "play") else [RECIPE] * len(needed)
    )
    assert main([*words, *least]) == 0
    assert reached[1].keys() == {p.name for p in needed}  # all else is the function's default


def test_every_command_that_is_written_somewhere_exists():
    texts = [ROOT / "README.md", *ROOT.glob("notebooks/**/*.ipynb")]
    texts += (ROOT / "optmerge_core").rglob("*.py")
    written = {
        found
        for path in texts
        for found in re.findall(r"-m optmerge_core\.benchmark([ .][\w-]+)", path.read_text())
    }
    assert {f" {command}" for command in ("train", "seeds", "subsets", "ranks")} <= written
    assert {word.strip(" ") for word in written} <= COMMANDS.keys()


@pytest.mark.parametrize(
    "words", ["trian", "train out --family qwen", "omni-train out --modalities touch"]
)
def test_what_there_is_not(words, capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(words.split())
    assert f"invalid choice: '{words.split()[-1]}'" in capsys.readouterr().err


def test_what_may_be_chosen_is_what_can_be_trained():
    assert FAMILIES == tuple(REGIMES) and MODALITIES == omni.MODALITIES
    assert set(commands.REGIMES) == {name for regimes in REGIMES.values() for name in regimes}
