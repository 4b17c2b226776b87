"""What a merge costs (Table 7): the shipped families' recipes from disk to disk, by the command.

`python tests/benchmarks/cost.py` merges each three times, every time in a process of its own, and
writes cost.csv: the shortest time, and the peak of memory (torch included) of that merge's report.
Beside it stands the peak of a process that takes the first steps of the mixture training. Notebook
03 draws Table 7 from it, with the time of that training, from its log.
"""

import json
import resource
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
from floors import device_name
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("internvl", "qwen2_vl")
STEPS = 20  # of the mixture training: memory has its peak in each of them


def measure(name, folder):
    """A row of the table, from the report that the merge writes beside the weights."""
    recipe, output = ROOT / "data" / "recipes" / f"{name}.yaml", Path(folder, name)
    command = ("-m", "optmerge_core", "merge", recipe, "--output", output)
    options = ("--overwrite", "--no-check")
    subprocess.run([sys.executable, *command, *options], check=True, stdout=subprocess.DEVNULL)
    report = json.loads((output / "merge_report.json").read_text())
    row = {"recipe": name, "device": device_name(), "seconds": report["seconds"]}
    return row | {"peak memory (GB)": report["peak_memory_bytes"] / 1e9}


def memory_of_mixture(name):
    """The peak in GB of a process that does `train_mixture`."""
    command = [sys.executable, __file__, name]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return int(done.stdout) / 1e9


def train_mixture(name):
    """The peak of this process's memory in bytes, after the first steps of a mixture training."""
    from optmerge_core.benchmark.training.build import plan
    from optmerge_core.benchmark.training.experts import fine_tune
    from optmerge_core.study.recipe import load_recipe

    study = load_recipe(ROOT / "data" / "recipes" / f"{name}.yaml")
    model = "/".join(Path(study.evaluation.references["mixture"]).parts[-2:])
    fine_tune(study.base_model, **plan(name)[model] | {"steps": STEPS})
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def main():
    with TemporaryDirectory() as folder:
        runs = [measure(name, folder) for name in tqdm(3 * FAMILIES)]
    table = pd.DataFrame(runs).sort_values("seconds").drop_duplicates("recipe")
    table = table.sort_values("recipe")
    memory = [memory_of_mixture(name) for name in tqdm(table["recipe"])]
    table["mixture training's peak memory (GB)"] = memory
    table.to_csv(Path(__file__).with_name("cost.csv"), index=False, float_format="%.4g")
    print(table.to_string(index=False))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(train_mixture(sys.argv[1]))
    else:
        main()
