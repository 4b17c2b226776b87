"""Seconds from calling a command to its end, over those of importing torch, each a new process.

`python tests/benchmarks/start.py [--runs 9] [--record]` runs every start in turn, so that a busy
moment falls on all of them, and prints medians. --record keeps them in results.csv, where the floor
is torch's import.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from floors import device_name, record

ROOT = Path(__file__).resolve().parents[2]
MODELS = "base_model: owner/base\nmodels: [owner/one, owner/two]\n"
REFUSED = {
    "YAML": "models: [",
    "a key": f"{MODELS}layers: []\n",
    "a method's name": f"{MODELS}merge_method: tiess\n",
    "an option's name": f"{MODELS}parameters: {{densty: 1}}\n",
}
FLOOR = "import torch"


def starts(folder):
    """What is started -> the arguments of Python."""
    found = {FLOOR: ["-c", FLOOR]}
    found["import optmerge_core"] = ["-c", "import optmerge_core"]
    for names in ("merge", "*"):
        code = f"from optmerge_core import {names}"
        found[code] = ["-c", code]
    for package in ("optmerge_core", "optmerge_core.benchmark"):
        found[f"{package} --help"] = ["-m", package, "--help"]
    for name, text in REFUSED.items():
        path = folder / f"{name.replace(' ', '_')}.yaml"
        path.write_text(text)
        found[f"merge, refused for {name}"] = ["-m", "optmerge_core", "merge", str(path)]
        found[f"merge, refused for {name}"] += ["--output", "out"]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        commands = starts(Path(folder))
        seconds = {name: [] for name in commands}
        for _ in range(options.runs + 1):
            for name, arguments in commands.items():
                started = time.perf_counter()
                subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True)
                seconds[name].append(time.perf_counter() - started)
    medians = {name: median(times[1:]) for name, times in seconds.items()}  # the first fills caches
    print(f"{device_name()}, medians of {options.runs} runs")
    for name, value in medians.items():
        print(f"{name:42} {value:6.2f} s  {value / medians[FLOOR]:5.2f} x torch")
    if options.record:
        floor = medians.pop(FLOOR)
        rows = {f"start: {name}": value for name, value in medians.items()}
        record([{"case": x, "floor (s)": floor, "ours (s)": value} for x, value in rows.items()])


if __name__ == "__main__":
    main()
