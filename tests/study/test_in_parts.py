"""plan, part and join as commands: what schedulers start and retry."""

import re
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from optmerge_core.__main__ import main
from optmerge_core.checkpoints import writer
from optmerge_core.merging.plan import MAX_PART_COST, load_plan
from optmerge_core.study.in_parts import share_of

SIZES = ["--max-part-size", "6KB"]


@pytest.fixture
def recipe(tiny, tmp_path) -> str:
    """A recipe of the tiny models."""
    path = tmp_path / "study.yaml"
    content = {
        "name": "tiny",
        "family": "internvl",
        "base_model": str(tiny.base),
        "models": [{"name": name, "model": str(place)} for name, place in tiny.experts.items()],
        "merge_method": "ties",
        "parameters": {"lambda": 0.7},
    }
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.fixture
def planned(recipe, tmp_path, capsys) -> tuple[str, Path]:
    """The plan's file and the output folder."""
    output = tmp_path / "merged"
    assert main(["plan", recipe, "--output", str(output), *SIZES]) == 0
    said = capsys.readouterr().out
    path = f"{output}.plan.json"
    count = len(load_plan(path).parts)
    assert f"{path}: " in said and f"in {count} parts." in said and f"join {path}" in said
    return path, output


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*safetensors*"))}


def test_workers_of_a_plan_make_what_merge_makes(recipe, planned, tmp_path, capsys):
    path, output = planned
    assert main(["merge", recipe, "--output", str(tmp_path / "whole"), "--no-check"]) == 0
    for worker in "201":
        assert main(["part", path, worker, "3"]) == 0
    assert main(["join", path]) == 0
    assert files(output) == files(tmp_path / "whole")
    capsys.readouterr()
    for command in (["join", path], ["part", path, "0"], ["part", path, "1", "3"]):  # retried
        assert main(command) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("merged by ties") and said[1:] == [f"{output}: joined already"] * 2
    assert not list(tmp_path.glob("merged.parts/*"))


def test_what_may_succeed_later_ends_with_75(planned, capsys, monkeypatch):
    path, output = planned
    assert main(["part", path, "0"]) == 0
    assert main(["join", path]) == 75
    said = capsys.readouterr().err
    assert re.search(r"\d+ of \d+ parts are not merged yet \(1, 2", said)
    count = len(load_plan(path).parts)
    for part in range(1, count):
        assert main(["part", path, str(part)]) == 0
    lock = writer._lock(output)  # another process joins
    assert main(["join", path]) == 75
    assert "another process is writing there" in capsys.readouterr().err
    writer.os.close(lock)
    assert main(["join", path]) == 0


def test_two_joins_at_once_leave_one_output(planned, tmp_path):
    path, output = planned
    count = len(load_plan(path).parts)
    assert main(["part", path, "0", "1"]) == 0
    with ThreadPoolExecutor() as pool:
        ended = sorted(pool.map(lambda _: main(["join", path]), range(2)))
    assert ended in ([0, 0], [0, 75])  # done, or wait
    assert main(["join", path]) == 0 and count > 1
    assert (output / "config.json").is_file()
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name or "parts" in p.name] == []


def test_what_cannot_succeed_ends_with_1(planned, recipe, capsys, tmp_path):
    path, _ = planned
    wrong = {
        ("part", path, "99"): "part 99: the plan has parts 0 to",
        ("part", path, "3", "3"): "worker 3 of 3: workers are 0 to 2",
        ("part", path, "0", "0"): "worker 0 of 0: workers are 0 to -1",
        ("join", recipe): "Expecting value|not a plan",
        ("join", str(tmp_path / "none.json")): "none.json",
        ("plan", recipe, "--output", str(tmp_path / "x"), "--max-part-size", "x"): "max_part_size",
    }
    for command, said in wrong.items():
        assert main(list(command)) == 1, command
        assert re.search(said, capsys.readouterr().err), command
    assert not (tmp_path / "x.plan.json").exists()


def test_the_readmes_array_of_slurm_makes_what_merge_makes(recipe, tmp_path, monkeypatch):
    """Its three commands as they stand there, by a scheduler that starts two of the parts twice."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    section = readme.partition("## More than one machine\n")[2].partition("\n## ")[0]
    block = next(x for x in re.findall(r"```bash\n(.*?)```", section, re.DOTALL) if "sbatch" in x)
    commands = re.findall(r"python -m optmerge_core ([^'\n]+)", block)
    assert [command.split()[0] for command in commands] == ["plan", "part", "join"]
    first, last = map(int, re.search(r"--array=(\d+)-(\d+)", block).groups())
    assert commands[1].endswith(f" $SLURM_ARRAY_TASK_ID {last + 1}") and first == 0
    monkeypatch.chdir(tmp_path)
    Path(recipe).rename(tmp_path / "recipe.yaml")
    assert main(["merge", "recipe.yaml", "--output", "whole", "--no-check"]) == 0
    assert main([*shlex.split(commands[0]), *SIZES]) == 0
    for task in (*range(last + 1), 0, last):
        assert main(commands[1].replace("$SLURM_ARRAY_TASK_ID", str(task)).split()) == 0
    assert main(shlex.split(commands[2])) == 0
    assert files(tmp_path / "merged") == files(tmp_path / "whole")


def part(cost, size):
    return SimpleNamespace(cost=cost * MAX_PART_COST, bytes=size)


def test_shares_are_even_by_cost_and_bytes_and_each_part_is_one_worker_s():
    plan = SimpleNamespace(parts=[part(1, 4), part(0, 8), part(5, 4), part(2, 4), part(2, 4)])
    # 5.5 to the first; 2.5, 2.5 and 1.5 to the second; 1 to the first, who has less to do.
    assert share_of(plan, 0, 2) == [2, 1] and share_of(plan, 1, 2) == [3, 4, 0]
    assert share_of(plan, 0, 1) == [2, 3, 4, 0, 1]
    many = [share_of(plan, worker, 7) for worker in range(7)]
    assert sorted(sum(many, [])) == [0, 1, 2, 3, 4] and many[5:] == [[], []]


def test_modalities_have_no_plan(capsys, tmp_path):
    recipe = Path(__file__).parents[2] / "data" / "recipes" / "omni.yaml"
    assert main(["plan", str(recipe), "--output", str(tmp_path / "omni")]) == 1
    assert "whose specialists have no plan: use `merge`" in capsys.readouterr().err
