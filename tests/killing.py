"""Processes killed while they write, and what the next one finds; run as a script by the tests.

Every trial is forked from this process, which has imported everything and never merges itself: it
costs the merge alone, and no thread is running when it forks.
"""

import json
import os
import random
import re
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from optmerge_core.__main__ import main
from optmerge_core.checkpoints.formats import CheckpointError
from optmerge_core.checkpoints.writer import CheckpointWriter
from optmerge_core.merging.merge import merge

TIMES = re.compile(rb'"(seconds|peak_memory_bytes)": [\d.e+-]+')


def content(folder: Path) -> dict[str, bytes]:
    """File -> bytes; what a report says of time and memory is left out, as no run repeats it."""
    return {
        str(path.relative_to(folder)): TIMES.sub(b"", path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def forked(work: Callable[[], int], kill_after: float | None = None) -> int | None:
    """The exit status of `work()` in a child; None if it was killed, after so many seconds."""
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            status = work()
        except BaseException:
            status = 70
        os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, ended = os.waitpid(child, 0)
    return None if os.WIFSIGNALED(ended) else os.WEXITSTATUS(ended)


def merges(root: Path, kills: int) -> dict[str, int]:
    """Kill `merge root/recipe.yaml` at random moments; run it again, for the same bytes.

    Every second merge replaces another one's result, with --overwrite.
    """
    merge.__kwdefaults__["max_shard_size"] = "1MB"  # a small model, but several shards
    out, recipe = root / "place" / "out", str(root / "recipe.yaml")
    options = ("--overwrite", "--no-check")

    def command(*arguments: str) -> Callable[[], int]:
        return lambda: main(["merge", recipe, "--output", str(out), *options, *arguments])

    assert forked(command("--method", "weight_average")) == 0
    old = content(out)
    shutil.copytree(out, root / "old")
    started = time.perf_counter()
    assert forked(command()) == 0
    seconds = time.perf_counter() - started
    new = content(out)
    assert len([name for name in new if name.endswith(".safetensors")]) > 3 and old != new

    draw, counts = random.Random(0), {"killed": 0, "nothing": 0, "old": 0, "new": 0, "rest": 0}
    for trial in range(5 * kills):
        if counts["killed"] == kills:
            break
        shutil.rmtree(out.parent)
        out.parent.mkdir()
        replacing = trial % 2
        if replacing:
            shutil.copytree(root / "old", out)
        moment = seconds * draw.random()
        killed = forked(command(), moment) is None
        assert killed or content(out) == new
        counts["killed"] += killed
        if out.exists():
            found = content(out)
            assert found == new or (replacing and found == old), f"half a model at {moment:.3f} s"
            counts["new" if found == new else "old"] += killed
        else:
            counts["nothing"] += 1
        counts["rest"] += len(list(out.parent.iterdir())) > out.exists()
        assert forked(command()) == 0
        assert content(out) == new, f"other bytes after a kill at {moment:.3f} s"
        assert list(out.parent.iterdir()) == [out]
    return counts


def steps(root: Path) -> dict[str, int]:
    """Kill a writer at each of its steps on files in turn, when it is new and when it replaces."""
    out, base = root / "place" / "out", root / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    counted = ("mkdir", "open", "rename", "fsync", "unlink", "rmdir")

    def write(value: float, overwrite: bool = True) -> int:
        try:
            with CheckpointWriter(out, 8, overwrite=overwrite) as writer:
                for name in "abc":
                    writer.add(name, torch.full((2,), value))
                writer.copy_side_files(base)
        except CheckpointError as error:
            return 3 if "exists" in str(error) else 4
        return 0

    def write_and_die(last_step: int) -> int:
        taken = 0

        def patched(name: str) -> Callable:
            own = getattr(os, name)

            def step(*arguments, **options):
                nonlocal taken
                taken += 1
                if taken == last_step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return own(*arguments, **options)

            return step

        for name in counted:
            setattr(os, name, patched(name))
        return write(2.0)

    whole = {}
    for value in (1.0, 2.0):
        assert write(value) == 0
        whole[value] = content(out)
    counts = {"new": 0, "replacing": 0, "put back": 0}
    for replacing in (False, True):
        for step in range(1, 1000):
            shutil.rmtree(out.parent)
            out.parent.mkdir()
            if replacing:
                assert write(1.0) == 0
            if forked(lambda step=step: write_and_die(step)) is not None:
                break
            counts["replacing" if replacing else "new"] += 1
            absent = not out.exists()
            assert absent or content(out) in whole.values(), f"half a model, killed at step {step}"
            if replacing:
                assert write(2.0, overwrite=False) == 3  # refused, nothing is lost
                assert content(out) in whole.values(), f"lost, killed at step {step}"
                counts["put back"] += absent
            assert write(2.0) == 0 and content(out) == whole[2.0]
            assert list(out.parent.iterdir()) == [out], f"a rest, killed at step {step}"
    return counts


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)  # workers that merge side by side
    folder = Path(sys.argv[2])
    print(json.dumps(merges(folder, 20) if sys.argv[1] == "merges" else steps(folder)))
