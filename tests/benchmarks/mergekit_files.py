"""Merges of mergekit's own files, by the command, beside mergekit and the package's own recipes.

`MERGEKIT_PYTHON=VENV/bin/python python tests/benchmarks/mergekit_files.py [--methods ties …]
[--scale 1.0] [--folder DIR]` writes a base and five full fine-tunes (0.75 GB each; once, where a
folder is given), merges them by every method that both have, each in a process of its own, and
prints a table. Seconds are those of the merge; "start" is what the whole process takes beside them.
The floor is the shortest of three times that reading every input once and writing a file of the
output's size to the disk takes. mergekit lives in an environment of its own, whose interpreter
MERGEKIT_PYTHON or --mergekit names; without it, its cells stay empty.
"""

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from floors import record, show
from models import HALF_B, measured, reading_and_writing, write_models

METHODS = {
    "linear": ("weight_average", "Weight Average", {}),
    "task_arithmetic": ("task_arithmetic", "Task Arithmetic", {}),
    "ties": ("ties", "TIES", {"density": 0.2}),
    "dare_linear": ("dare_task_arithmetic", "DARE with Task Arithmetic", {"density": 0.8}),
    "dare_ties": ("dare_ties", "DARE with TIES", {"density": 0.8}),
}
"""mergekit's name -> the package's, its label, what a mergekit file says besides weight 1."""

OURS = """
import sys
---
from optmerge_core.__main__ import main
status = main(["merge", sys.argv[1], "--output", sys.argv[2], "--device", "cpu", "--no-check"])
assert status == 0
"""
MERGEKIT = """
import sys
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
---
run_merge(MergeConfiguration.model_validate(yaml.safe_load(open(sys.argv[1]))), sys.argv[2],
          options=MergeOptions(lazy_unpickle=True))
"""


def write_files(folder, names, method):
    """A mergekit file, and the package's own recipe of the method; both merge all parameters."""
    base, *experts = (str(folder / name) for name in names)
    own, _, parameters = METHODS[method]
    shared = {"base_model": base, "models": [{"model": path} for path in experts], "scope": "all"}
    parameters = {"weight": 1.0, "normalize": method == "linear"} | parameters
    theirs = {"merge_method": method, "parameters": parameters, "dtype": "bfloat16"}
    files = {"from a mergekit file": shared | theirs, "own recipe": shared | {"merge_method": own}}
    for name, content in files.items():
        (folder / f"{name}.yaml").write_text(json.dumps(content))
    return {name: folder / f"{name}.yaml" for name in files}


def merged_here(file, output):
    """The columns of a merge by the command."""
    shutil.rmtree(output, ignore_errors=True)
    started = time.perf_counter()
    found = measured(OURS, file, output)
    whole = time.perf_counter() - started
    seconds = json.loads((output / "merge_report.json").read_text())["seconds"]
    shares = {name: value for name, value in found.items() if "%" in name}
    times = {"ours (s)": seconds, "start (s)": whole - seconds, "ours (GB)": found["(GB)"]}
    return times | shares


def merged_by_mergekit(python, file, output):
    """The columns of mergekit on the same file, where there is one; else none."""
    if not python:
        return {}
    shutil.rmtree(output, ignore_errors=True)
    started = time.perf_counter()
    found = measured(MERGEKIT, file, output, python=python)
    whole = time.perf_counter() - started
    times = {"other (s)": found["(s)"], "other start (s)": whole - found["(s)"]}
    return {"other": "mergekit", "other (GB)": found["(GB)"]} | times


def measure(method, folder, names, scale, python):
    """A row for the mergekit file and one for the package's own recipe."""
    files = write_files(folder, names, method)
    rows = {name: merged_here(file, folder / "ours") for name, file in files.items()}
    floor = reading_and_writing(folder, names, "ours")
    theirs = merged_by_mergekit(python, files["from a mergekit file"], folder / "theirs")
    case = f"six 0.75 GB models, {METHODS[method][1]}" if scale == 1 else METHODS[method][1]
    return [
        {"case": f"{case}, {name}", "floor (s)": floor} | row | theirs for name, row in rows.items()
    ]


def main(methods, scale, folder, mergekit):
    if not mergekit:
        print("mergekit: no interpreter of its environment is given; its cells stay empty")
    with TemporaryDirectory() as temporary:
        folder = Path(folder or temporary)
        folder.mkdir(exist_ok=True)
        names = sorted(path.name for path in folder.glob("expert*"))
        names = ["base", *names] if names else write_models(folder, HALF_B, scale)
        rows = []
        for method in methods:
            rows += measure(method, folder, names, scale, mergekit)
            if scale == 1:
                record(rows[-2:])
    columns = ("case", "floor (s)", "ours (s)", "start (s)", "other (s)", "ours (GB)", "other (GB)")
    show("mergekit's files", [{key: row[key] for key in columns if key in row} for row in rows])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--scale", type=float, default=1.0, help="shrinks every side, for a try")
    parser.add_argument("--folder", help="where the models are, or are written: 6 GB")
    parser.add_argument("--mergekit", metavar="PYTHON", default=os.environ.get("MERGEKIT_PYTHON"))
    main(**vars(parser.parse_args()))
