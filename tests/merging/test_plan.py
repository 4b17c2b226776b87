"""A merge as plain data: its parts give, in any order and after any crash, what `merge` gives."""

import inspect
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from optmerge_core import join, load_plan, merge, merge_part, plan_merge
from optmerge_core.checkpoints.folder import Checkpoint
from optmerge_core.checkpoints.formats import CheckpointError
from optmerge_core.merging import merge as merging
from optmerge_core.merging import plan as module

UP = "language_model.model.layers.0.mlp.up_proj.weight"
SMALL = {"max_shard_size": "20KB", "max_part_size": "6KB"}  # several of each of a small model


OWN = ("seconds", "output_dir", "plan", "workers")
"""What reports of one merge differ in: time, place, and who did it in which parts."""


def weights(folder: Path) -> dict[str, bytes]:
    """The safetensors files and their index, as bytes."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*safetensors*"))}


def report(folder: Path) -> dict:
    """Without what no run repeats."""
    content = json.loads((folder / "merge_report.json").read_text())
    return {k: v for k, v in content.items() if k not in OWN} | {"peak_memory_bytes": None}


@pytest.fixture
def inputs(tiny, tmp_path) -> tuple[Path, dict[str, Path]]:
    """Copies of the tiny models, to change."""
    for folder in (tiny.base, *tiny.experts.values()):
        shutil.copytree(folder, tmp_path / "inputs" / folder.name)
    experts = {name: tmp_path / "inputs" / name for name in tiny.experts}
    return tmp_path / "inputs" / "base", experts


MERGE_PARTS = """
import os, signal, sys
from optmerge_core import load_plan, merge_part
plan, die = load_plan(sys.argv[1]), sys.argv[2] == "die"
own = os.replace
def replace(*paths):
    if die and os.path.exists("first"):
        os.kill(os.getpid(), signal.SIGKILL)  # the part is written, but not yet under its name
    open("first", "w").close()
    return own(*paths)
os.replace = replace
for part in map(int, sys.argv[3:]):
    merge_part(plan, part)
"""


def drawn_order(plan) -> list[int]:
    return torch.randperm(len(plan.parts), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dare_ties", {"seed": 3, "trim": "model", "scope": "all"}),
        ("optmerge", {"method_options": {"steps": 5}, "dtype": "float32"}),
        ("weight_average", {"scope": "all"}),
    ],
)
def test_parts_in_any_order_are_the_merge(tiny, tmp_path, method, options):
    settings = {"method": method, "scaling_coefficient": 0.7, "max_shard_size": "20KB", **options}
    merge(tiny.base, tiny.experts, tmp_path / "whole", **settings)
    settings["max_part_size"] = "6KB"
    plan = plan_merge(tiny.base, tiny.experts, tmp_path / "parts", **settings)
    assert len(plan.parts) >= 6
    for part in drawn_order(plan):
        merge_part(load_plan(plan.save(tmp_path / "plan.json")), part)
    join(load_plan(tmp_path / "plan.json"))
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert report(tmp_path / "parts") == report(tmp_path / "whole")


def test_three_processes_in_any_order_one_killed(tiny, tmp_path):
    settings = {"method": "ties", "trim": "model", "max_shard_size": "20KB"}
    merge(tiny.base, tiny.experts, tmp_path / "whole", **settings)
    settings["max_part_size"] = "6KB"
    plan = plan_merge(tiny.base, tiny.experts, tmp_path / "parts", **settings)
    path = plan.save(tmp_path / "plan.json")
    drawn = drawn_order(plan)
    mine = [drawn[:3], drawn[3:5], drawn[5:]]

    def process(number: int, die: str) -> subprocess.Popen:
        folder = tmp_path / f"process{number}"
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-c", MERGE_PARTS, str(path), die, *map(str, mine[number])]
        return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)

    running = [process(0, "die"), process(1, "live"), process(2, "live")]
    errors = [each.communicate()[1] for each in running]
    assert [each.returncode for each in running] == [-signal.SIGKILL, 0, 0], errors
    left = sorted(p.name for p in plan.parts_folder.iterdir() if p.name.startswith("."))
    assert len(left) == 1  # what the killed process had half done
    with pytest.raises(CheckpointError, match=r"parts: 2 of \d+ parts are not merged yet \(\d+, "):
        join(load_plan(path))
    again = process(0, "live")
    error = again.communicate()[1]
    assert again.returncode == 0, error
    joined = join(load_plan(path))
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert report(tmp_path / "parts") == report(tmp_path / "whole")
    assert joined.seconds > 0 and not plan.parts_folder.parent.exists()
    assert {p.name for p in tmp_path.iterdir() if p.is_dir() and "process" not in p.name} == {
        *("parts", "whole"),
    }


def test_a_plan_says_what_will_be_written_before_a_tensor_is_read(tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "__getitem__", lambda self, name: pytest.fail("was read"))
        plan = plan_merge(tiny.base, tiny.experts, tmp_path / "out", method="ties", **SMALL)
    assert list(tmp_path.iterdir()) == []
    assert len(plan.shards) > 2 and max(part.bytes for part in plan.parts) <= 6000
    assert [name for part in plan.parts for name in part.names] == list(plan.parameters)
    for part in range(len(plan.parts)):
        merge_part(plan, part)
    join(plan)
    for file, names in plan.shards.items():
        tensors = load_file(tmp_path / "out" / file)
        assert sorted(names) == sorted(tensors)
        for name in names:
            planned = plan.parameters[name]
            assert planned["shape"] == list(tensors[name].shape)
            assert planned["dtype"] == str(tensors[name].dtype).removeprefix("torch.")
    merged = {name for name, planned in plan.parameters.items() if planned["merged"]}
    assert merged == {row["name"] for row in report(tmp_path / "out")["parameters"]}


def test_a_plan_has_the_defaults_of_a_merge():
    defaults = {
        "method": "optmerge", "method_options": None, "scaling_coefficient": 1.0, "device": "auto",
        "dtype": None, "trim": "tensor", "seed": 0, "overwrite": False, "family": None,
        "scope": "linear", "router": "merge", "max_shard_size": "400MB", "stream": False,
        "processor": None, "chat_template": None, "layers": None, "learnt": None,
    }  # fmt: skip
    for function, more in ((merge, {}), (plan_merge, {"max_part_size": "256MB"})):
        options = list(inspect.signature(function).parameters.values())[3:]
        assert {option.name: option.default for option in options} == defaults | more


def test_parts_are_bounded_by_size_and_by_cost():
    """Of Qwen2-VL-7B's language model in bfloat16: hundreds, not one a shard."""
    shapes = {"model.embed_tokens.weight": (152064, 3584)}
    for layer in range(28):
        for part, shape in {
            "self_attn.q_proj": (3584, 3584), "self_attn.k_proj": (512, 3584),
            "self_attn.v_proj": (512, 3584), "self_attn.o_proj": (3584, 3584),
            "mlp.gate_proj": (18944, 3584), "mlp.up_proj": (18944, 3584),
            "mlp.down_proj": (3584, 18944), "input_layernorm": (3584,),
        }.items():  # fmt: skip
            shapes[f"model.layers.{layer}.{part}.weight"] = shape
    parameters = {
        name: {"shape": shape, "dtype": "bfloat16", "merged": name if "proj" in name else None}
        for name, shape in shapes.items()
    }
    sizes = {name: 2 * math.prod(shape) for name, shape in shapes.items()}
    parts = module.parts_of(parameters, sizes, 256_000_000)
    assert 150 < len(parts) < 250
    assert [name for part in parts for name in part.names] == list(shapes)
    for part in parts:
        one = len(part.names) == 1
        assert one or (part.bytes <= 256e6 and part.cost <= module.MAX_PART_COST)
        assert part.bytes == sum(sizes[name] for name in part.names)
    gate = next(part for part in parts if "model.layers.3.mlp.gate_proj.weight" in part.names)
    assert gate.cost == 3584**2 * 18944  # smaller² · larger
    stacked = {"e": {"shape": (8, 64, 128), "dtype": "float32", "merged": "e"}}
    assert module.parts_of(stacked, {"e": 8 * 64 * 128 * 4}, 10**9)[0].cost == 8 * 64**2 * 128


def test_what_is_finished_is_not_done_again(tiny, tmp_path, monkeypatch):
    plan = plan_merge(tiny.base, tiny.experts, tmp_path / "out", method="ties", **SMALL)
    first = merge_part(plan, 1)
    assert first.parent == plan.parts_folder == tmp_path / "out.parts" / plan.key
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "__getitem__", lambda self, name: pytest.fail("was read"))
        assert merge_part(plan, 1) == first
    before = first.read_bytes()
    first.unlink()
    assert load_file(merge_part(plan, 1)).keys() == set(plan.parts[1].names)
    assert len(first.read_bytes()) == pytest.approx(len(before), abs=40)  # its seconds differ
    other = plan_merge(tiny.base, tiny.experts, tmp_path / "out", method="ties", seed=1, **SMALL)
    assert other.key != plan.key and other.parts_folder != plan.parts_folder
    again = plan_merge(tiny.base, tiny.experts, tmp_path / "out", method="ties", **SMALL)
    assert again.key == plan.key
    first.write_bytes(b"half a part")
    for part in (n for n in range(len(plan.parts)) if n != 1):
        merge_part(plan, part)
    with pytest.raises(CheckpointError, match="part-00001.safetensors: not a finished part"):
        join(plan)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", [-1, 1000])
def test_a_part_that_the_plan_has_not(tiny, tmp_path, part):
    plan = plan_merge(tiny.base, tiny.experts, tmp_path / "out", method="ties")
    with pytest.raises(IndexError, match=f"part {part}: the plan has parts 0 to 0"):
        merge_part(plan, part)


def test_an_input_that_changes_while_a_process_merges_is_refused(inputs, tmp_path):
    base, experts = inputs
    plan = plan_merge(base, experts, tmp_path / "out", method="ties", **SMALL)
    merge_part(plan, 0)
    shard = sorted(experts["ocr"].glob("*.safetensors"))[0]
    save_file({k: v * 1.01 for k, v in load_file(shard).items()}, shard, {"format": "pt"})
    os.utime(shard, (0, 0))  # as large as before, but of another time
    with pytest.raises(CheckpointError, match=r"inputs.ocr: its files .* plan the merge again"):
        merge_part(plan, 1)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"inputs.ocr: a file is gone .* copy it again"):
        merge_part(plan, 1)


@pytest.mark.filterwarnings("ignore:1 parameters outside the merge differ")
def test_an_input_that_has_changed_is_refused(inputs, tmp_path):
    base, experts = inputs
    plan = plan_merge(base, experts, tmp_path / "out", method="ties", **SMALL)
    path = plan.save(tmp_path / "plan.json")
    merge_part(load_plan(path), 0)
    shard = sorted(experts["ocr"].glob("*.safetensors"))[0]
    tensors = load_file(shard)
    save_file(tensors | {"added": torch.zeros(1)}, shard, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"inputs.ocr: its files .* plan the merge again"):
        merge_part(load_plan(path), 1)
    assert plan_merge(base, experts, tmp_path / "out", method="ties", **SMALL).key != plan.key


def test_an_input_that_has_changed_at_the_same_size_and_time_is_refused(inputs, tmp_path):
    """Between a plan and its parts, in what is read before the first tensor; nothing is lost."""
    base, experts = inputs
    plan = plan_merge(base, experts, tmp_path / "out", method="ties", **SMALL)
    path = plan.save(tmp_path / "plan.json")
    finished = merge_part(load_plan(path), 0)
    config = base / "config.json"
    then, content = config.stat().st_mtime, config.read_bytes()
    config.write_bytes(content.replace(b'"qwen2"', b'"qwen3"', 1))
    assert config.stat().st_size == len(content) and config.read_bytes() != content
    os.utime(config, (then, then))
    with pytest.raises(CheckpointError, match=r"inputs.base: its headers .* plan the merge again"):
        merge_part(load_plan(path), 1)
    config.write_bytes(content)
    merge_part(load_plan(path), 1)
    assert finished.is_file()


def test_a_plan_for_gpus_is_made_and_joined_where_there_is_none(tiny, tmp_path):
    """On a cluster's first machine; those that merge need one, and trimming over the model here."""
    settings = {"method": "ties", "device": "cuda"}
    plan = plan_merge(tiny.base, tiny.experts, tmp_path / "out", **settings)
    with pytest.raises(ValueError, match="this torch sees no CUDA device"):
        merge_part(plan, 0)
    with pytest.raises(ValueError, match="this torch sees no CUDA device"):
        plan_merge(tiny.base, tiny.experts, tmp_path / "out", trim="model", **settings)
    with pytest.raises(ValueError, match="device 'abacus': give 'auto', 'cpu' or 'cuda'"):
        plan_merge(tiny.base, tiny.experts, tmp_path / "out", device="abacus")
    with pytest.raises(CheckpointError, match="1 of 1 parts are not merged yet"):
        join(plan)


def test_a_full_disk_is_told_before_a_part_is_merged(tiny, tmp_path, monkeypatch):
    plan = plan_merge(tiny.base, tiny.experts, tmp_path / "out", method="ties")
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        patched.setattr(Checkpoint, "__getitem__", lambda self, name: pytest.fail("was read"))
        with pytest.raises(CheckpointError, match="needed, 0.00 GB free on that disk; free some"):
            merge_part(plan, 0)
    assert list(tmp_path.iterdir()) == [] and merge_part(plan, 0).is_file()


@pytest.mark.parametrize("removed", [0, 3])
def test_a_join_killed_when_the_output_is_there_is_joined(tiny, tmp_path, monkeypatch, removed):
    """Before or while it removed the parts: whoever tries again finds the work done."""
    plan = plan_merge(tiny.base, tiny.experts, tmp_path / "out", method="ties", **SMALL)
    for part in range(len(plan.parts)):
        merge_part(plan, part)

    def killed(folder):
        for path in sorted(folder.iterdir())[:removed]:
            path.unlink()
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(merging, "remove_parts", killed)
        with pytest.raises(SystemExit):
            join(plan)
    assert len(list(plan.parts_folder.iterdir())) == len(plan.parts) - removed
    written = weights(tmp_path / "out")
    assert join(plan).plan == plan.key and weights(tmp_path / "out") == written
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_refused_merge_leaves_no_parts(inputs, tmp_path):
    base, experts = inputs
    shard = next(p for p in experts["ocr"].glob("*.safetensors") if UP in load_file(p))
    tensors = load_file(shard)
    tensors[UP][2, 3] = torch.nan
    save_file(tensors, shard, {"format": "pt"})
    plan = plan_merge(base, experts, tmp_path / "out", method="tsv", **SMALL)
    bad = next(n for n, part in enumerate(plan.parts) if UP in part.names)
    merge_part(plan, (bad + 1) % len(plan.parts))
    with pytest.raises(ValueError, match=f"1 parameters are not finite:\n  {UP}: expert ocr has 1"):
        merge_part(plan, bad)
    assert [path.name for path in tmp_path.iterdir()] == ["inputs"]


def test_experts_that_change_nothing_are_found_at_the_end(tiny, tmp_path):
    same = {"a": tiny.base, "b": shutil.copytree(tiny.base, tmp_path / "b")}
    with pytest.warns(UserWarning, match="same folder as the base"):
        plan = plan_merge(tiny.base, same, tmp_path / "out", method="ties", **SMALL)
    for part in range(len(plan.parts)):
        merge_part(plan, part)
    with pytest.raises(ValueError, match=r"every expert \(a, b\) equals the base model in all 14"):
        join(plan)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_an_output_that_has_appeared_keeps_the_parts(tiny, tmp_path):
    plan = plan_merge(tiny.base, tiny.experts, tmp_path / "out", method="ties")
    merge_part(plan, 0)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="out exists"):
        join(plan)
    shutil.rmtree(tmp_path / "out")
    done = join(plan)
    assert done.plan == plan.key and join(plan) == done  # nothing is left to do
    other = plan_merge(tiny.base, tiny.experts, tmp_path / "out", method="tsv", overwrite=True)
    with pytest.raises(CheckpointError, match="1 of 1 parts are not merged yet"):
        join(other)
    with pytest.raises(CheckpointError, match="out exists"):
        merge_part(plan, 0)  # which nobody would join
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.filterwarnings("ignore:expert .* has other names")  # those in memory
@pytest.mark.parametrize("kind", ["state dict", "model"])
def test_experts_in_memory_merge_but_cannot_be_saved(tiny, tmp_path, kind):
    from transformers import AutoModelForImageTextToText

    merge(tiny.base, tiny.experts, tmp_path / "folders", method="ties")

    def loaded(folder):
        if kind == "model":
            return AutoModelForImageTextToText.from_pretrained(folder)
        return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}

    experts = {name: loaded(folder) for name, folder in tiny.experts.items()}
    plan = plan_merge(tiny.base, experts, tmp_path / "memory", method="ties")
    with pytest.raises(ValueError, match="chart is a model in memory, which no other process"):
        plan.save(tmp_path / "plan.json")
    assert list(tmp_path.iterdir()) == [tmp_path / "folders"]
    merge_part(plan, 0)
    join(plan)
    assert weights(tmp_path / "memory") == weights(tmp_path / "folders")


@pytest.mark.filterwarnings("ignore:expert .* has other names")
def test_parts_of_models_in_memory_are_no_other_plans(tiny, tmp_path):
    """Nothing that a hash could tell apart differs between the two plans."""

    def experts(scale):
        return {
            name: {
                own: tensor * scale if own == UP else tensor
                for path in folder.glob("*.safetensors")
                for own, tensor in load_file(path).items()
            }
            for name, folder in tiny.experts.items()
        }

    merge_part(plan_merge(tiny.base, experts(1.0), tmp_path / "out", method="ties"), 0)
    plan = plan_merge(tiny.base, experts(1.1), tmp_path / "out", method="ties")
    assert load_file(merge_part(plan, 0)).keys() == plan.parameters.keys()
    join(plan)
    merge(tiny.base, experts(1.1), tmp_path / "whole", method="ties")
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_options_that_json_cannot_say(tiny, tmp_path):
    options = {"steps": 1, "on_step": lambda *values: None}
    plan = plan_merge(tiny.base, tiny.experts, tmp_path / "out", method_options=options)
    assert merge_part(plan, 0).parent == plan.parts_folder
    with pytest.raises(ValueError, match="method_options of optmerge: .*numbers, texts and lists"):
        plan.save(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "not valid JSON"),
        ("[]", "a JSON object is expected"),
        ('{"format": 1}', r"not a plan of this version \(format 2\); plan the merge again"),
    ],
)
def test_what_is_no_plan(tmp_path, content, text):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"plan.json: {text}"):
        load_plan(tmp_path / "plan.json")


@pytest.mark.parametrize("change", ["a part less", "a part twice", "no parts", "another method"])
def test_a_plan_that_was_edited(tiny, tmp_path, change):
    plan = plan_merge(tiny.base, tiny.experts, tmp_path / "out", method="ties", **SMALL)
    path = plan.save(tmp_path / "plan.json")
    content = json.loads(path.read_text())
    parts = content["parts"]
    edited = {
        "a part less": {"parts": parts[1:]},
        "a part twice": {"parts": parts + parts[:1]},
        "no parts": {"parts": 3},
        "another method": {"method": "tsv"},
    }
    path.write_text(json.dumps(content | edited[change]))
    with pytest.raises(CheckpointError, match=r"plan.json: changed since it was saved; plan the"):
        load_plan(path)


def test_where_no_plan_can_be_read_or_written(tiny, tmp_path):
    plan = plan_merge(tiny.base, tiny.experts, tmp_path / "out", method="ties")
    with pytest.raises(CheckpointError, match="nothing.json cannot be read"):
        load_plan(tmp_path / "nothing.json")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "no folder" / "plan.json"):
        with pytest.raises(CheckpointError, match=f"{path} cannot be written"):
            plan.save(path)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_file_that_is_no_part(tiny, tmp_path, metadata):
    plan = plan_merge(tiny.base, tiny.experts, tmp_path / "out", method="ties")
    zeros = {name: torch.zeros(1) for name in plan.parts[0].names}
    for tensors in ({"other": torch.zeros(1)}, zeros):
        save_file(tensors, merge_part(plan, 0), metadata)
        with pytest.raises(CheckpointError, match="part-00000.safetensors: not a finished part"):
            join(plan)


def test_pickles_whose_tensors_share_memory(tiny, tmp_path):
    """A tied head is one memory with two names; a transposed weight is no contiguous one."""
    folders = {}
    for folder in (tiny.base, *tiny.experts.values()):
        folders[folder.name] = tmp_path / folder.name
        shutil.copytree(folder, folders[folder.name], ignore=shutil.ignore_patterns("*safetens*"))
        tensors = {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}
        tensors = {k: v.T.contiguous().T if v.ndim == 2 else v for k, v in tensors.items()}
        tensors["again"] = tensors["language_model.model.norm.weight"]
        torch.save(tensors, folders[folder.name] / "pytorch_model.bin")
    base, settings = folders.pop("base"), {"method": "tsv"}
    merge(base, folders, tmp_path / "whole", **settings)
    plan = plan_merge(base, folders, tmp_path / "parts", **settings)
    merge_part(plan, 0)
    join(plan)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    merged = load_file(tmp_path / "whole" / "model.safetensors")
    assert torch.equal(merged["again"], merged["language_model.model.norm.weight"])


def test_a_plan_of_another_version(tiny, tmp_path):
    path = plan_merge(tiny.base, tiny.experts, tmp_path / "out").save(tmp_path / "plan.json")
    content = json.loads(path.read_text())
    assert load_plan(path).save(tmp_path / "same.json").read_text() == path.read_text()
    path.write_text(json.dumps(content | {"format": 99}))
    with pytest.raises(CheckpointError, match="not a plan of this version"):
        load_plan(path)


def test_a_result_out_of_range_leaves_no_parts(tiny, tmp_path):
    plan = plan_merge(
        tiny.base, tiny.experts, tmp_path / "out", method="ties", scaling_coefficient=1e9, **SMALL
    )
    keeps = next(n for n, part in enumerate(plan.parts) if not part.cost)
    merges = next(n for n, part in enumerate(plan.parts) if part.cost)
    merge_part(plan, keeps)
    with pytest.raises(ValueError, match="out of the range of float16"):
        merge_part(plan, merges)
    assert list(tmp_path.iterdir()) == []
