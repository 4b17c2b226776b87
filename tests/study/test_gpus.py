"""All GPUs of a machine, by processes that take the CPU for one."""

import fake_gpus
import pytest
import torch
import yaml

from optmerge_core import load_plan, merge, merge_part, plan_merge
from optmerge_core.__main__ import main
from optmerge_core.runtime import all_gpus, parse_device
from optmerge_core.study import gpus
from optmerge_core.study.gpus import merge_on_gpus
from optmerge_core.study.shares import largest_first, work_of

SMALL = {"method": "ties", "max_shard_size": "20KB"}


@pytest.fixture
def seen(monkeypatch):
    """Two GPUs, by what torch and the environment say of them."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,kill")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(gpus, "_work", fake_gpus.work)


def weights(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*safetensors*"))}


def planned(tiny, tmp_path):
    """A plan for GPUs, its file, and where the notes of who did what go."""
    (tmp_path / "notes").mkdir()
    settings = SMALL | {"max_part_size": "6KB", "device": "cuda"}
    plan = plan_merge(tiny.base, tiny.experts, tmp_path / "parts", **settings)
    return plan, str(plan.save(tmp_path / "plan.json"))


def test_two_gpus_make_what_one_device_makes(seen, tiny, tmp_path):
    """Parts by cost, to whichever is free, each process with a GPU of its own; the same bytes.

    What the CPU cannot show: that torch obeys CUDA_VISIBLE_DEVICES, that two GPUs compute the same
    bits, that a part fits into a GPU's memory, and that two are faster than one.
    """
    merge(tiny.base, tiny.experts, tmp_path / "whole", device="cpu", **SMALL)
    plan, path = planned(tiny, tmp_path)
    (tmp_path / "notes" / "killed").touch()
    order = largest_first(work_of(plan))
    report = merge_on_gpus(path, all_gpus())
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    done = sorted((p.stat().st_mtime_ns, p.name) for p in (tmp_path / "notes").glob("*-*"))
    names = [name.split("-") for _, name in done]
    own = {gpu: [int(part) for name, part in names if name == gpu] for gpu in ("2", "kill")}
    assert own["2"][0] == order[0] and own["kill"][0] == order[1]
    assert all(parts == sorted(parts, key=order.index) for parts in own.values())
    assert sorted(map(sorted, report.workers.values())) == sorted(map(sorted, own.values()))
    assert sorted(sum(own.values(), [])) == list(range(len(plan.parts)))
    assert merge_on_gpus(path, all_gpus()) == report  # nothing is left to do


@pytest.mark.slow
def test_a_gpus_process_is_killed_and_a_part_was_there_before(seen, tiny, tmp_path, monkeypatch):
    merge(tiny.base, tiny.experts, tmp_path / "whole", device="cpu", **SMALL)
    plan, path = planned(tiny, tmp_path)
    fake_gpus.merge.parse_device, own = lambda device: torch.device("cpu"), parse_device
    before = merge_part(load_plan(path), 3).stat().st_mtime_ns
    fake_gpus.merge.parse_device = own
    again = plan.parts_folder / "part-00003.safetensors"
    seen_then = []
    monkeypatch.setattr(gpus, "join", lambda p: seen_then.append(again.stat().st_mtime_ns) or p)
    merge_on_gpus(path, all_gpus())
    monkeypatch.undo()
    assert seen_then == [before]
    report = gpus.join(load_plan(path))
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    parts = [p.name.split("-")[1] for p in (tmp_path / "notes").glob("*-*")]
    assert (tmp_path / "notes" / "killed").exists() and "3" not in parts
    assert sorted(sum(report.workers.values(), [])) == list(range(len(plan.parts)))


@pytest.mark.slow
def test_a_part_that_kills_every_process_ends_it_and_keeps_the_rest(seen, tiny, tmp_path):
    plan, path = planned(tiny, tmp_path)
    with pytest.raises(ChildProcessError, match=r"GPU always: .* part \d+ died 4 times, .*\(-9"):
        merge_on_gpus(path, ["always"])
    first = largest_first(work_of(plan))[0]
    assert [p.name for p in (tmp_path / "notes").iterdir()] == [f"always-{first}"]


def test_what_computes_on_one_device_refuses_all_gpus(tiny, tmp_path, capsys, monkeypatch):
    models = [{"name": name, "model": str(place)} for name, place in tiny.experts.items()]
    content = {"base_model": str(tiny.base), "models": models, "merge_method": "ties"}
    path, out = tmp_path / "tiny.yaml", str(tmp_path / "out")
    path.write_text(yaml.safe_dump(content))
    given = [str(path), "--output", out, "--device", "cuda:all"]
    refused = {
        ("plan", *given): "all GPUs are for the command `merge` alone; give one here",
        ("run", *given): "--device cuda:all is for `merge` alone; give cuda",
        ("merge", *given, "--cluster", "local"): "every task has a GPU of its own; give cuda",
        ("merge", *given): "this torch sees no CUDA device",
    }
    for command, text in refused.items():
        assert main(list(command)) == 1
        said = capsys.readouterr().err.splitlines()
        assert text in said[-1] and said[-1].startswith("error: ")
    with pytest.raises(ValueError, match="device 'cuda:all': all GPUs are for the command `merge`"):
        merge(tiny.base, tiny.experts, out, device="cuda:all")
    assert [x.name for x in tmp_path.iterdir()] == ["tiny.yaml"]


@pytest.mark.parametrize(
    ("named", "count", "found"),
    [("", 3, ["0", "1", "2"]), ("4, 1", 2, ["4", "1"]), ("GPU-ab,-1,2", 1, ["GPU-ab"])],
)
def test_gpus_keep_the_names_they_have_here(seen, monkeypatch, named, count, found):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert all_gpus() == found
