"""Ray's clusters of simulated machines in this one: what dies or hangs is done again elsewhere."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pandas as pd
import psutil
import pytest
import ray
import ray_tasks
import yaml
from ray.cluster_utils import Cluster

from optmerge_core import join, load_plan, merge, merge_part, plan_merge
from optmerge_core.__main__ import main
from optmerge_core.study import cluster, engine
from optmerge_core.study.cluster import merge_on_cluster
from optmerge_core.study.engine import Task, run_tasks

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
SMALL = {"max_shard_size": "20KB", "max_part_size": 1}
NODE = {"num_cpus": 1, "memory": 4 * 10**9, "object_store_memory": 10**8}


@pytest.fixture
def machines(monkeypatch):
    """Two machines of one core, and this one of none, connected."""
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    own = str(Path(ray_tasks.__file__).parent)
    monkeypatch.setenv("PYTHONPATH", own, prepend=os.pathsep)  # of all workers
    simulated = Cluster(initialize_head=True, head_node_args=NODE | {"num_cpus": 0})
    nodes = [simulated.add_node(**NODE) for _ in range(2)]
    ray.init(address=simulated.address, log_to_driver=False, logging_level="ERROR")
    simulated.wait_for_nodes()
    yield simulated, nodes
    ray.shutdown()
    simulated.shutdown()


def task(function, *arguments, work=1.0):
    return Task(f"ray_tasks:{function.__name__}", arguments, work, 10**8)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*safetensors*"))}


def test_a_merge_outlives_a_machine(machines, tiny, tmp_path):
    """One of two machines is removed in the middle; the bytes are those of one process."""
    simulated, nodes = machines
    settings = {"method": "optmerge", "method_options": {"steps": 5}}
    merge(tiny.base, tiny.experts, tmp_path / "whole", max_shard_size="20KB", **settings)
    plan = plan_merge(tiny.base, tiny.experts, tmp_path / "parts", **settings, **SMALL)
    assert len(plan.parts) >= 20
    path = str(plan.save(tmp_path / "plan.json"))

    def remove_one() -> None:
        while len(list(plan.parts_folder.glob("part-*"))) < 5:
            time.sleep(0.01)
        simulated.remove_node(nodes[1], allow_graceful=False)

    thread = Thread(target=remove_one)
    thread.start()
    report = merge_on_cluster(path, "auto")
    thread.join()
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    done = report.workers
    assert sorted(sum(done.values(), [])) == list(range(len(plan.parts)))
    assert len(done) >= 2 and all(name.startswith(socket.gethostname()) for name in done)
    assert merge_on_cluster(path, "auto") == report  # nothing is left to do


def test_finished_parts_are_not_done_again(machines, tiny, tmp_path):
    """After the head has died: what it had is there, only the rest becomes tasks."""
    plan = plan_merge(tiny.base, tiny.experts, tmp_path / "out", method="ties", **SMALL)
    path = str(plan.save(tmp_path / "plan.json"))
    first = merge_part(load_plan(path), 3)
    before = first.stat().st_mtime_ns
    tasks = cluster.part_tasks(load_plan(path), path)
    assert [t.arguments[1] for t in tasks] == [n for n in range(len(plan.parts)) if n != 3]
    run_tasks(tasks, "auto", "merging")
    assert first.stat().st_mtime_ns == before
    assert cluster.part_tasks(load_plan(path), path) == []


HEAD = """
import sys
from optmerge_core.study.cluster import merge_on_cluster
merge_on_cluster(sys.argv[1], sys.argv[2])
"""


def test_a_killed_head_loses_no_part(machines, tiny, tmp_path, monkeypatch):
    """The process that hands out the parts is killed; another goes on with those that are left."""
    settings = {"method": "optmerge", "method_options": {"steps": 5}}
    merge(tiny.base, tiny.experts, tmp_path / "whole", max_shard_size="20KB", **settings)
    plan = plan_merge(tiny.base, tiny.experts, tmp_path / "parts", **settings, **SMALL)
    path = str(plan.save(tmp_path / "plan.json"))
    head = subprocess.Popen([sys.executable, "-c", HEAD, path, machines[0].address])
    while len(list(plan.parts_folder.glob("part-*"))) < 5:
        assert head.poll() is None
        time.sleep(0.01)
    head.kill()
    assert head.wait() == -signal.SIGKILL and not (tmp_path / "parts").exists()
    before = {p.name: p.stat().st_mtime_ns for p in plan.parts_folder.glob("part-*")}
    assert 5 <= len(before) < len(plan.parts)
    own, after = cluster.join, {}

    def watched(plan):
        after.update({p.name: p.stat().st_mtime_ns for p in plan.parts_folder.glob("part-*")})
        return own(plan)

    monkeypatch.setattr(cluster, "join", watched)
    merge_on_cluster(path, "auto")
    assert len(after) == len(plan.parts) and before.items() <= after.items()
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_a_machine_with_a_full_disk_is_left_out(machines, tiny, tmp_path):
    """The kernel refuses what one of them writes; its parts are merged by the other."""
    machines[0].add_node(**NODE, env_vars={"FULL": "1"})
    settings = {"method": "ties"}
    merge(tiny.base, tiny.experts, tmp_path / "whole", max_shard_size="20KB", **settings)
    plan = plan_merge(tiny.base, tiny.experts, tmp_path / "parts", **settings, **SMALL)
    path = str(plan.save(tmp_path / "plan.json"))
    function = "ray_tasks:merge_where_there_is_room"
    tasks = [replace(x, function=function) for x in cluster.part_tasks(plan, path)]
    run_tasks(tasks, "auto", "testing")
    assert list(tmp_path.glob("plan.json.full-*"))
    assert [p.name for p in plan.parts_folder.iterdir() if p.name.startswith(".")] == []
    join(plan)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_a_machine_that_hangs_is_given_up(machines, tmp_path, monkeypatch):
    """All of its processes are stopped, and nothing tells anybody."""
    monkeypatch.setattr(engine, "PATIENCE", 5.0)
    _, nodes = machines
    tasks = [task(ray_tasks.note, str(tmp_path), n) for n in range(8)]
    run_tasks(tasks, "auto", "testing")
    started = [info.process.pid for kind in nodes[1].all_processes.values() for info in kind]
    own = list(map(psutil.Process, started))
    tree = own + [child for process in own for child in process.children(recursive=True)]
    for process in tree:
        process.suspend()
    try:
        (tmp_path / "again").mkdir()
        again = [task(ray_tasks.note, str(tmp_path / "again"), n) for n in range(8)]
        done = run_tasks(again, "auto", "testing")
        assert len(done) == len(list((tmp_path / "again").iterdir())) == 8
    finally:
        for process in tree:
            process.resume()


def test_a_gpu_is_one_task_s_and_what_no_machine_has_is_refused(machines, tmp_path):
    large = Task("ray_tasks:note", (str(tmp_path), 0), 1.0, 10**15)
    with pytest.raises(ValueError, match="no machine there has a core, 1000000.0 GB of memory, wh"):
        run_tasks([large], "auto", "testing")
    tasks = [task(ray_tasks.note_gpus, str(tmp_path / f"{n}")) for n in range(6)]
    with pytest.raises(ValueError, match="no machine there has a core, 0.1 GB of memory and a GPU"):
        run_tasks(tasks, "auto", "testing", "cuda")
    assert not list(tmp_path.iterdir())
    machines[0].add_node(**NODE | {"num_cpus": 4, "num_gpus": 2})
    for device in ("cuda", "auto"):
        run_tasks(tasks, "auto", "testing", device)
        spans = [(tmp_path / f"{n}").read_text().split() for n in range(6)]
        assert {gpu for gpu, _, _ in spans} == {"0", "1"}
        for gpu in "01":
            own = sorted((float(start), float(end)) for x, start, end in spans if x == gpu)
            assert all(end <= start for (_, end), (start, _) in zip(own, own[1:], strict=False))


def test_what_dies_hangs_or_fails_is_done_again(machines, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "PATIENCE", 5.0)
    tried = (ray_tasks.die_once, ray_tasks.full_once, ray_tasks.hang_once)
    tasks = [task(function, str(tmp_path / function.__name__)) for function in tried]
    done = run_tasks(tasks, "auto", "testing")
    assert len(done) == 3 and all((tmp_path / f"{f.__name__}.done").exists() for f in tried)
    with pytest.raises(ValueError, match="^nowhere: expert A has NaN$"):
        run_tasks([task(ray_tasks.refuse, "nowhere")], "auto", "testing")


def test_the_largest_are_started_first_and_two_share_the_work(machines, tmp_path):
    tasks = [task(ray_tasks.note, str(tmp_path), n, work=float(n)) for n in range(30)]
    done = run_tasks(tasks, "auto", "testing")
    times = [(tmp_path / str(n)).stat().st_mtime_ns for n in range(30)]
    assert len({x.worker for x in done}) >= 2 and all(x.seconds >= 0.05 for x in done)
    assert max(times[25:]) < min(times[:5])


def test_no_cluster_is_said_in_one_sentence(tiny, tmp_path, capsys):
    recipe = small_recipe(tiny, tmp_path)
    given = ["--output", str(tmp_path / "out"), "--cluster", "127.0.0.1:1"]
    assert main(["merge", recipe, *given]) == 1
    assert "--cluster 127.0.0.1:1: no cluster of Ray there" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def small_recipe(tiny, tmp_path) -> str:
    models = [{"name": name, "model": str(place)} for name, place in tiny.experts.items()]
    content = {"name": "tiny", "base_model": str(tiny.base), "models": models}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(content | {"family": "internvl", "merge_method": "ties"}))
    return str(path)


def test_the_readmes_commands_on_three_machines(machines, tiny, tmp_path, capsys, monkeypatch):
    """As a new user reads them: `ray start` is the fixture's, a GPU is not at hand."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    section = readme.partition("## More than one machine\n")[2].partition("\n## ")[0]
    on_cluster, on_gpus = re.findall(r"^python -m optmerge_core (merge .*)", section, re.MULTILINE)
    machines[0].add_node(**NODE)
    small_recipe(tiny, tmp_path)
    (tmp_path / "tiny.yaml").rename(tmp_path / "recipe.yaml")
    monkeypatch.chdir(tmp_path)
    command = on_cluster.replace("/shared/", f"{tmp_path}/").split()
    assert main(["merge", "recipe.yaml", "--output", "whole", "--no-check"]) == 0
    assert main([*command, "--no-check"]) == 0
    assert files(tmp_path / "merged") == files(tmp_path / "whole")
    assert main(on_gpus.split()) == 1
    assert "this torch sees no CUDA device" in capsys.readouterr().err


def test_merge_and_sweep_by_the_command_line(machines, tiny, tmp_path):
    recipe, shared = small_recipe(tiny, tmp_path), ["--cluster", "auto"]
    for name, more in (("one", []), ("many", shared)):
        output = str(tmp_path / name)
        assert main(["merge", recipe, "--output", output, "--no-check", *more]) == 0
        axes = ["method=ties,tsv", "lambda=0.5,1"]
        sweeping = ["run", recipe, "--output", f"{output}_sweep", "--sweep", *axes]
        assert main([*sweeping, *more]) == 0
    assert files(tmp_path / "one") == files(tmp_path / "many")
    tables = [
        pd.read_csv(tmp_path / f"{name}_sweep" / "figures" / "tablexx_sweep.csv")
        .drop(columns="seconds")
        .sort_values(["method", "scaling_coefficient"], ignore_index=True)
        for name in ("one", "many")
    ]
    pd.testing.assert_frame_equal(*tables)
    assert not (tmp_path / "many_sweep" / "parts").exists()
    assert not (tmp_path / "many.plan.json").exists()
